"""A generator of manifests as people's programs write them, each with the rows that it holds."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

TEXT = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc"), exclude_characters="\u2028\u2029\ufeff\x85"),
    max_size=12,
)
PROMPT = st.one_of(
    TEXT.filter(str.strip),
    st.sampled_from(["a red ball , night", 'a "star"', "x;y\tz|w", "2020-01-01", "null", "=1+1", "é"]),
)
ENCODINGS = ("utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252", "latin-1")


@dataclass
class OddTable:
    """A file, and what its rows say: a mapping of fields, or None for one that must be told as bad."""

    name: str
    data: bytes
    rows: list[dict[str, Any] | None]
    whole: bool
    """Whether the file must be taken; otherwise it may be refused as a whole."""
    said: str


@st.composite
def rows(draw: Any) -> list[dict[str, Any]]:
    """Good rows and bad ones, with nulls where something may be left out."""
    found = []
    for number in range(draw(st.integers(1, 6))):
        row: dict[str, Any] = {"id": f"r{number}", "prompt": draw(PROMPT)}
        for name, values in {
            "steps": st.sampled_from([None, 1, 3, 1000, 0, -1, "three", True]),
            "guidance": st.sampled_from([None, 1.0, 2.5, -3.0, "much"]),
            "seed": st.sampled_from([None, 0, 7, 2**63 - 1, 2**63, -1, -2]),
            "negative": st.one_of(st.none(), PROMPT),
            "width": st.sampled_from([None, 64, 8]),
            "model": st.sampled_from([None, "~/model", "owner/name"]),
        }.items():
            if draw(st.booleans()):
                row[name] = draw(values)
        found.append(row)
    return found


def good(row: dict[str, Any], *, texts: bool) -> bool:
    """Whether a row is one that can be run, by the ranges that the schema states."""
    steps, seed, width, guidance = (row.get(name) for name in ("steps", "seed", "width", "guidance"))
    return not (
        isinstance(steps, (str, bool))
        or (steps is not None and not 1 <= steps <= 1000)
        or (seed is not None and not -1 <= seed < 2**63)
        or (width is not None and width < 16)
        or isinstance(guidance, str)
    )


@st.composite
def tables(draw: Any) -> OddTable:
    """Formats x encodings x separators x line ends x nulls x types x damage."""
    given = draw(rows())
    kind = draw(st.sampled_from(["jsonl", "json", "csv", "yaml"]))
    end = draw(st.sampled_from(["\n", "\r\n"]))
    encoding = draw(st.sampled_from(ENCODINGS))
    said = [kind, encoding, repr(end)]
    plain = draw(st.booleans())
    if kind == "csv":
        text = _csv(draw, given, end, said)
    elif kind == "jsonl":
        lines = [json.dumps(row, ensure_ascii=plain) for row in given]
        text = end.join(lines) + (end if draw(st.booleans()) else "")
    else:
        indent = draw(st.sampled_from([None, 1]))
        text = json.dumps(given, ensure_ascii=plain, indent=indent).replace("\n", end)
    rows_: list[dict[str, Any] | None] = [row if good(row, texts=kind == "csv") else None for row in given]
    try:
        data = text.encode(encoding)
    except UnicodeEncodeError:
        data, encoding = text.encode(), "utf-8"
    # without a mark, two bytes a letter are seen by Latin letters' zeros; other tables are told to be no UTF-8
    unsure = encoding in ("cp1252", "latin-1") and not text.isascii()
    unsure |= encoding in ("utf-16-le", "utf-16-be") and not text.isascii()
    return OddTable(f"jobs.{kind}", data, rows_, not unsure, " ".join(said))


def _csv(draw: Any, given: list[dict[str, Any]], end: str, said: list[str]) -> str:
    separator = draw(st.sampled_from([",", ";", "\t", "|"]))
    names = list(dict.fromkeys(name for row in given for name in row))
    blanks = draw(st.booleans()) and len(names) > 1
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=separator, lineterminator=end)
    writer.writerow([f" {name} " if blanks else name for name in names])
    for row in given:
        if blanks:
            row["prompt"], row["negative"] = row["prompt"].strip(), (row.get("negative") or "").strip() or None
        names_ = names
        writer.writerow(["" if row.get(name) is None else row.get(name) for name in names_])
    start = f"sep={separator}{end}" if draw(st.booleans()) else ""
    said += [repr(separator), f"blanks {blanks}", f"sep line {bool(start)}"]
    return start + buffer.getvalue()


@st.composite
def damaged_tables(draw: Any) -> tuple[str, bytes]:
    """A manifest with bytes changed, cut off or put in anywhere."""
    table = draw(tables())
    data = bytearray(table.data)
    at = draw(st.integers(0, max(0, len(data) - 1)))
    how = draw(st.sampled_from(["change", "cut", "insert", "quote"]))
    junk = b'"' if how == "quote" else draw(st.binary(min_size=1, max_size=20))
    if how == "cut":
        return table.name, bytes(data[:at])
    data[at : at + (len(junk) if how == "change" else 0)] = junk
    return table.name, bytes(data)

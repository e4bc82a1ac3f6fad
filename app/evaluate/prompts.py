"""Prompts from files that the user has: text lists, GenEval's JSON lines, pairs of prompt and negative."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError
from .cases import Case
from .grammar import nouns

READ = (".txt", ".jsonl", ".csv", ".tsv")
NEGATIVES = ("negative", "negative_prompt", "negative prompt")
_Row = tuple[str, int, Mapping[str, Any]]


def read_prompts(data: Path) -> list[Case]:
    """A case for each row of a file, or of every file of a folder.

    Args:
        data: `.txt`: a prompt a line (T2I-CompBench). `.jsonl`: objects with `prompt` and, as they are there,
            `concepts`, `negative`, `group` or `tag`, `id`, GenEval's `include` and `exclude`. `.csv`, `.tsv`: the same
            as columns (pairs of prompt and negative).

    Raises:
        DataError: nothing to read there, or a row without a prompt; the message names file and line.
    """
    files = [data] if data.is_file() else sorted(p for p in _listed(data) if p.suffix.lower() in READ)
    if not files or files[0].suffix.lower() not in READ:
        raise DataError(f"{str(data)!r} holds no prompts: give a file or a folder of {', '.join(READ)}")
    return [_case(*row) for file in files for row in _rows(file)]


def _listed(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{str(folder)!r} does not exist")
    return list(folder.iterdir())


def _rows(file: Path) -> Iterator[_Row]:
    try:
        text = file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file.name} cannot be read: {error}") from None
    if file.suffix.lower() in (".csv", ".tsv"):
        table = csv.DictReader(text.splitlines(), delimiter="," if file.suffix.lower() == ".csv" else "\t")
        yield from ((file.stem, number, row) for number, row in enumerate(table, 2))
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield file.stem, number, {"prompt": line} if file.suffix.lower() == ".txt" else _object(file, number, line)


def _object(file: Path, number: int, line: str) -> Mapping[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file.name}:{number} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{file.name}:{number}: a row is an object with a prompt")
    return row


def _case(stem: str, number: int, row: Mapping[str, Any]) -> Case:
    prompt = str(row.get("prompt") or "").strip()
    if not prompt:
        raise DataError(f"{stem}:{number} has no prompt; it has {', '.join(map(str, row)) or 'nothing'}")
    try:
        counts, limits = (_counted(row.get(name, ())) for name in ("include", "exclude"))
        concepts = _words(row.get("concepts")) or tuple(dict(counts)) or nouns(prompt)
    except (TypeError, KeyError, ValueError, AttributeError):
        raise DataError(
            f'{stem}:{number}: "concepts" are words, "include" is GenEval\'s list of {{"class": ..., "count": ...}}'
        ) from None
    negative = next((str(row[name]).strip() for name in NEGATIVES if row.get(name)), "")
    group = str(row.get("tag") or row.get("group") or stem)
    colours = tuple((one["class"], one["color"]) for one in row.get("include", ()) if one.get("color"))
    name = str(row.get("id") or f"{stem}-{number}")
    return Case(name, group, prompt, concepts, colours, counts, limits, negative)


def _counted(given: Any) -> tuple[tuple[str, int], ...]:
    return tuple((str(one["class"]), int(one.get("count", 1))) for one in given)


def _words(given: Any) -> tuple[str, ...]:
    """A list, or words apart by semicolons in a table's cell."""
    if not given:
        return ()
    return tuple(word.strip() for word in (given.split(";") if isinstance(given, str) else map(str, given)))

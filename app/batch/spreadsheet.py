"""Rows out of a spreadsheet's CSV: with commas, semicolons or tabs, as its owner's machine writes it."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import ManifestError
from .schema import Row, unknown
from .texts import decoded, json_value

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_SAID = re.compile(r"\"?sep=(.)\"?\r?\n")


def csv_rows(path: Path, defaults: dict[str, Any]) -> Iterator[tuple[int, Any]]:
    """(line, fields by name) of a table whose first line names its columns; a cell that is empty says nothing.

    Raises:
        ManifestError: no columns of ours, or a quote that is not closed: where rows end cannot be told then.
    """
    text = decoded(path)
    said = _SAID.match(text)
    skipped = 1 if said else 0
    text = text[said.end() :] if said else text
    first = text.partition("\n")[0]
    separator = said[1] if said else _separator(first)
    padded = any(name != name.strip() for name in first.rstrip("\r").split(separator))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=padded)
    found = _records(reader, path.name, skipped)
    _, header = next(found, (1, []))
    if isinstance(header, ManifestError):
        raise ManifestError(f"{path.name}:1: {header}")
    names = [name.strip() for name in header]
    _check_columns(names, f"{path.name}:{1 + skipped}", separator)
    for line, cells in list(found):  # a quote that is not closed shows at the end of the file
        if isinstance(cells, ManifestError):
            yield line, cells
        else:
            yield line, _named(names, [cell.strip() for cell in cells] if padded else cells)


def _separator(header: str) -> str:
    """The one that makes the header's names ours; commas where none does."""

    def known(separator: str) -> int:
        names = [name.strip() for name in _cells(header, separator)]
        return len(names) if all(name in Row.model_fields for name in names) else 0

    return max(_SEPARATORS, key=known)


def _cells(line: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([line.rstrip("\r\n")], delimiter=separator, skipinitialspace=True), [])
    except csv.Error:
        return []


def _check_columns(names: Sequence[str], where: str, separator: str) -> None:
    wrong = [name for name in names if name not in Row.model_fields]
    if wrong:
        held = [name for sign, name in _SEPARATORS.items() if sign in wrong[0]]
        between = f" (read with {_SEPARATORS.get(separator, repr(separator))}; there are {' and '.join(held)} in it)"
        columns = f"columns are {', '.join(Row.model_fields)}"
        raise ManifestError(f"{where}: {unknown(wrong[0])}{between if held else ''}; {columns}")
    if len(set(names)) < len(names):
        raise ManifestError(f"{where}: a column is given twice")


def _records(reader: Any, name: str, skipped: int) -> Iterator[tuple[int, Any]]:
    while True:
        line = reader.line_num + 1 + skipped
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            last = reader.line_num + skipped
            if last > line or "end of data" in str(error):
                raise ManifestError(
                    f"{name}:{line}: a quote is opened and not closed, so that lines {line} to {last} would be one "
                    "row; close it, or double a quote that belongs to the text"
                ) from None
            yield line, ManifestError(f"not CSV: {error}")  # the reader goes on with the next line
            continue
        if cells:
            yield line, cells


def _named(names: Sequence[str], cells: Sequence[str]) -> Any:
    if len(cells) > len(names):
        return ManifestError("more cells than columns; quote text that has commas in it")
    given: dict[str, Any] = {name: cell for name, cell in zip(names, cells, strict=False) if cell}
    for name in {"plugins", "settings"} & set(given):
        given[name] = json_value(given[name].encode("utf-8", "surrogatepass"))
        if isinstance(given[name], ManifestError):
            return ManifestError(f"{name}: {given[name]}")
    return given

"""Text and JSON out of files that people have saved in one way or another."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ManifestError

LONGEST_LINE = 2**20
LARGEST_WHOLE = 16 * 2**20
DEEPEST = 50
_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}


def check_whole(path: Path) -> None:
    """Refuse a file that has to be read as a whole and is too large for that."""
    if path.stat().st_size > LARGEST_WHOLE:
        raise ManifestError(f"{path.name} is larger than {LARGEST_WHOLE // 2**20} MB; write it as .jsonl")


def decoded(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 where a mark at its start or its zeros say so.

    Raises:
        ManifestError: another encoding, of which there are many; the message says where it shows.
    """
    data = path.read_bytes()
    encoding, mark = next(((name, mark) for mark, name in _MARKS.items() if data.startswith(mark)), ("utf-8", b""))
    if not mark and is_wide(data[:200]):
        encoding = "utf-16-be" if data[:1] == b"\0" else "utf-16-le"
    try:
        return data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        byte = data[len(mark) + error.start : len(mark) + error.start + 1]
        as_windows = byte.decode("cp1252", "replace")
        if encoding != "utf-8":
            raise ManifestError(f"{path.name} is damaged {encoding} text: save it as UTF-8") from None
        raise ManifestError(
            f"{path.name}:{line}: not UTF-8 text: byte 0x{byte.hex()} ({as_windows!r} if this is Windows-1252); "
            "save it as UTF-8"
        ) from None


def is_wide(start: bytes) -> bool:
    """Whether a file that starts like this is UTF-16: by its mark, or as Latin letters with a zero each."""
    return start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) or start.count(0) > len(start) // 3


def array(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, value) of the members of a JSON array.

    Raises:
        ManifestError: the array does not end well: which rows there are cannot be told.
    """
    check_whole(path)
    text = decoded(path)
    decoder = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_unique)
    rows: list[tuple[int, Any]] = []
    at, ended = _after_blanks(text, text.index("[") + 1), False
    try:
        while not ended and text[at : at + 1] != "]":
            line = text.count("\n", 0, at) + 1
            try:
                value, at = decoder.raw_decode(text, at)
            except ManifestError as error:  # a value that is not taken: where it ends, plain JSON knows
                value, at = error, json.JSONDecoder().raw_decode(text, at)[1]
            rows.append((line, value if depth(value) <= DEEPEST else ManifestError("nested too deeply")))
            at = _after_blanks(text, at)
            ended = text[at : at + 1] != ","
            at = at if ended else _after_blanks(text, at + 1)
    except (ValueError, RecursionError) as error:
        line = text.count("\n", 0, getattr(error, "pos", at)) + 1
        what = getattr(error, "msg", "nested too deeply, or a number too long")
        raise ManifestError(f"{path.name}:{line}: not JSON: {what}") from None
    if text[at:].strip() != "]":
        line = text.count("\n", 0, at) + 1
        raise ManifestError(f"{path.name}:{line}: not JSON: the array must end here with ], or go on after a comma")
    yield from rows


def _after_blanks(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\n", "\r"):
        at += 1
    return at


def json_value(data: bytes) -> Any:
    """The value of a line of JSON, or the error about it."""
    if len(data) > LONGEST_LINE:
        return ManifestError(f"a line longer than {LONGEST_LINE} bytes")
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_unique)
        return value if depth(value) <= DEEPEST else ManifestError("nested too deeply")
    except UnicodeDecodeError:
        return ManifestError("not UTF-8 text")
    except ManifestError as error:
        return error
    except json.JSONDecodeError as error:
        return ManifestError(f"not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError):
        return ManifestError("not JSON that can be used: nested too deeply, or a number too long")


def _no_constant(name: str) -> Any:
    raise ManifestError(f"{name} is not a number that can be used")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ManifestError("a field is given twice")
    return found


def depth(value: Any, level: int = 0) -> int:
    """How deep lists and objects are nested, as far as it matters."""
    if level > DEEPEST or not isinstance(value, (dict, list)):
        return level
    children = value.values() if isinstance(value, dict) else value
    return max((depth(child, level + 1) for child in children), default=level)

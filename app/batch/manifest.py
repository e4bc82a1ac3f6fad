"""Manifests: JSONL, CSV or YAML in, checked rows and line-numbered errors out."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from ..errors import ManifestError
from ..outputs import safe_name, same_file_key
from .schema import Row, make_row, unknown
from .spreadsheet import csv_rows
from .texts import DEEPEST, LONGEST_LINE, array, check_whole, decoded, depth, is_wide, json_value

NOT_PLAIN = "only texts, numbers, lists and named fields are taken: put anything else in quotes"


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be run, and why."""

    id: str
    line: int
    message: str


@dataclass
class Manifest:
    """All rows of a file; `bad` ones are kept, to be recorded as failed."""

    path: Path
    rows: list[tuple[int, Row]] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)

    def where(self, line: int) -> str:
        """File and line, for messages."""
        return f"{self.path.name}:{line}"


def read_manifest(path: Path, defaults: Mapping[str, Any]) -> Manifest:
    """Read and check every row of a manifest.

    Args:
        path: .jsonl (also .ndjson, .json with an object a line or one array of them), .csv (also .tsv), .yaml or .yml.
        defaults: fields for rows that do not have them.

    Raises:
        ManifestError: the file as a whole cannot be used: unreadable, no rows, a default for a field that there is not,
            or two rows with one id or file name.
    """
    readers = {
        ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json_lines,
        ".csv": csv_rows, ".tsv": csv_rows, ".yaml": _yaml, ".yml": _yaml,
    }  # fmt: skip
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ManifestError(f"{path.name}: a manifest is .jsonl, .csv or .yaml")
    manifest = Manifest(path)
    defaults = dict(defaults)
    _known(defaults, "the defaults")
    try:
        for line, given in reader(path, defaults):
            _add(manifest, line, given, defaults, strict=reader is not csv_rows)
    except OSError as error:
        raise ManifestError(f"{str(path)!r} cannot be read: {error.strerror}") from None
    if not manifest.rows and not manifest.bad:
        raise ManifestError(f"{path.name} has no rows")
    _name_the_nameless(manifest)
    _no_doubles(manifest)
    return manifest


def _known(defaults: Mapping[str, Any], where: str) -> None:
    """A default that no row can have would be dropped without a word."""
    for name in defaults:
        if name not in Row.model_fields:
            raise ManifestError(f"{where}: {unknown(str(name))}")
        if name == "id":
            raise ManifestError(f"{where}: every row has an id of its own")


def _add(manifest: Manifest, line: int, given: Any, defaults: Mapping[str, Any], *, strict: bool) -> None:
    try:
        if isinstance(given, ManifestError):
            raise given
        if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
            raise ManifestError(f"a row is an object with named fields, not {type(given).__name__}")
        manifest.rows.append((line, make_row(given, defaults, line, strict=strict)))
    except ManifestError as error:
        named = given.get("id") if isinstance(given, dict) else None
        name = str(named)[:1000] if isinstance(named, (str, int)) else ""
        manifest.bad.append(BadRow(name, line, str(error)))


def _name_the_nameless(manifest: Manifest) -> None:
    """A bad row whose id cannot be read is called by its line, unless another row is called like that."""
    taken = {row.id for _, row in manifest.rows} | {bad.id for bad in manifest.bad}
    manifest.bad = [
        bad if bad.id else replace(bad, id=f"line {bad.line}" if str(bad.line) in taken else str(bad.line))
        for bad in manifest.bad
    ]


Found = Iterator[tuple[int, Any]]


def _json_lines(path: Path, defaults: dict[str, Any]) -> Found:
    with path.open("rb") as file:
        start = file.read(200)
        file.seek(0)
        wide = decoded(path) if is_wide(start) else None
        first = start.decode("utf-8", "ignore") if wide is None else wide
        if path.suffix.lower() == ".json" and first.lstrip("\ufeff \t\r\n").startswith("["):
            yield from array(path)
            return
        lines: Iterable[bytes] = _lines(file) if wide is None else wide.encode("utf-8", "surrogatepass").splitlines()
        for line, data in enumerate(lines, 1):
            if line == 1:
                data = data.removeprefix(codecs.BOM_UTF8)
            if data.strip():
                yield line, json_value(data)


def _lines(file: io.BufferedReader) -> Iterator[bytes]:
    while data := file.readline(LONGEST_LINE + 1):
        yield data
        while len(data) > LONGEST_LINE and not data.endswith(b"\n"):  # the rest of a line that is too long
            data = file.readline(LONGEST_LINE + 1)


class _Loader(yaml.SafeLoader):
    """Plain data only, as in JSON: no aliases (nine lines can stand for gigabytes), no dates, no double keys."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in kinds if not tag.endswith(":timestamp")]
        for first, kinds in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(problem="aliases are not taken", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            raise yaml.MarkedYAMLError(problem="a field is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep=deep)


def _yaml(path: Path, defaults: dict[str, Any]) -> Found:
    """A list of rows, or {defaults: {...}, rows: [...]}."""
    check_whole(path)
    text = decoded(path)
    try:
        loader = _Loader(text)
        top = loader.get_single_node()
        if isinstance(top, yaml.MappingNode):
            parts = {key.value: node for key, node in top.value}
            if not set(parts) <= {"defaults", "rows"}:
                raise ManifestError(f"{path.name}: at the top there is a list of rows, or `defaults:` and `rows:`")
            own = loader.construct_document(parts["defaults"]) if "defaults" in parts else {}
            if not isinstance(own, dict):
                raise ManifestError(f"{path.name}: `defaults:` must hold named fields")
            _known(own, f"{path.name}: `defaults:`")
            defaults.update({name: value for name, value in own.items() if name not in defaults})
            top = parts.get("rows")
        if not isinstance(top, yaml.SequenceNode):
            raise ManifestError(f"{path.name} has no list of rows")
        rows = [(node.start_mark.line + 1, loader.construct_document(node)) for node in top.value]
    except ManifestError:
        raise
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ManifestError(f"{path.name}:{line}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ManifestError(f"{path.name} is not YAML that can be used: {str(error)[:200]}") from None
    for line, row in rows:
        deep = depth(row) > DEEPEST
        yield (
            line,
            ManifestError("nested too deeply") if deep else _joined(row) if _plain(row) else ManifestError(NOT_PLAIN),
        )


def _joined(value: Any) -> Any:
    """With letters that JSON escapes as two halves (emoji) made whole, which YAML leaves as halves."""
    if isinstance(value, dict):
        return {key: _joined(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_joined(one) for one in value]
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
    return value


def _plain(value: Any) -> bool:
    """Whether a value is what JSON can hold."""
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_plain, value.values()))
    if isinstance(value, list):
        return all(map(_plain, value))
    return value is None or isinstance(value, (str, bool, int, float))


def file_names(row_id: str, n: int) -> list[str]:
    """The pictures' names: <id>.png, or <id>-0.png ... for several."""
    name = safe_name(row_id)
    return [f"{name}.png"] if n == 1 else [f"{name}-{i}.png" for i in range(n)]


def _no_doubles(manifest: Manifest) -> None:
    ids: dict[str, int] = {}
    files: dict[str, int] = {}
    wrong: list[str] = []
    claims: Iterable[tuple[int, str, int]] = [(line, row.id, row.n) for line, row in manifest.rows]
    for line, name, n in sorted([*claims, *((bad.line, bad.id, 0) for bad in manifest.bad)]):
        first = ids.setdefault(name, line)
        if first != line:
            wrong.append(f"{manifest.where(line)}: id {name[:60]!r} is already on line {first}")
            continue
        for file in file_names(name, n) if n else ():
            first = files.setdefault(same_file_key(file), line)
            if first != line:
                wrong.append(f"{manifest.where(line)}: {file} would be written by line {first} too; give another id")
    if wrong:
        more = f"\n... and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise ManifestError("\n".join(wrong[:20]) + more)

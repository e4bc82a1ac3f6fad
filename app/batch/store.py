"""The folder of a run. Everything that a resume, another shard or a reader needs to know is in its files."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from ..errors import OutputError
from ..metadata import KEY
from ..outputs import TEMPORARY, write_whole
from .schema import FILES, Row

LOCK = ".diffgraft-lock"
Record = dict[str, Any]


class Store:
    """Records and pictures in one folder.

    Args:
        folder: exists and is writable.
        shard: (index, count), or None for a run of all rows.
    """

    def __init__(self, folder: Path, shard: tuple[int, int] | None = None) -> None:
        self.folder = folder
        self.part = "" if shard is None else f"-{shard[0] % shard[1]}of{shard[1]}"
        self.results = folder / f"results{self.part}.jsonl"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder (or this shard of it) against other runs; clear what a dead one left.

        Raises:
            OutputError: another run is writing here.
        """
        lock = self.folder / f"{LOCK}{self.part}"
        self._others(lock, mine=False)
        lock.unlink(missing_ok=True)
        me = psutil.Process()
        try:
            with open(lock, "x", encoding="utf-8") as file:
                json.dump({"pid": me.pid, "started": me.create_time(), "host": socket.gethostname()}, file)
        except FileExistsError:
            raise OutputError(f"another run has just started in {str(self.folder)!r}; wait for it") from None
        try:
            if not self._others(lock, mine=True):  # asked again: another one may have started at the same time
                for left in self.folder.glob(f"{TEMPORARY}*.tmp"):
                    left.unlink(missing_ok=True)
            yield
        finally:
            lock.unlink(missing_ok=True)

    def _others(self, lock: Path, *, mine: bool) -> bool:
        """Whether other runs, of other shards, are writing here; one that excludes this run is an error."""
        others = [path for path in self.folder.glob(f"{LOCK}*") if not (mine and path == lock) and not _stale(path)]
        for other in others:
            if other == lock or not self.part or other.name == LOCK:
                raise OutputError(
                    f"{_owner(other)} is writing in {str(self.folder)!r}; wait, or delete {other.name} there"
                )
        return bool(others)

    def records(self) -> dict[str, Record]:
        """The last record of every id, of all shards."""
        found: dict[str, Record] = {}
        for path in sorted(self.folder.glob("results*.jsonl")):
            for record in _read(path):
                last = found.get(record["id"])
                if last is None or record.get("attempt", 0) >= last.get("attempt", 0):
                    found[record["id"]] = record
        return found

    def keep_last(self, drop: Iterable[str] = ()) -> None:
        """Rewrite this shard's results with one line for an id, the torn end of a killed run left out."""
        last = {record["id"]: record for record in _read(self.results)}
        for name in drop:
            last.pop(name, None)
        write_whole(self.results, "".join(_line(record) for record in last.values()).encode())

    def append(self, record: Record) -> None:
        """Add a record; it is on the disk when this returns."""
        try:
            with self.results.open("ab") as file:
                file.write(_line(record).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"{self.results.name} cannot be written: {error.strerror}") from error

    def holds(self, record: Mapping[str, Any]) -> bool:
        """Whether all pictures of a record are there, whole."""
        for file, size in zip(record.get("pictures", ()), record.get("bytes", ()), strict=False):
            path = self.folder / file["file_name"]
            if not path.is_file() or path.stat().st_size != size:
                return False
        return bool(record.get("pictures"))

    def discard(self, names: Iterable[str]) -> None:
        """Delete pictures of a row that is made anew or failed."""
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def foreign(self, names: Iterable[str], known: set[str]) -> str | None:
        """The first of these files that is there and was not made by a run of ours."""
        for name in names:
            path = self.folder / name
            if name not in known and path.exists() and KEY.encode() not in path.read_bytes()[:65536]:
                return name
        return None

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """A readable JSON file."""
        write_whole(
            self.folder / name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace")
        )

    def write_metadata(self, records: Iterable[Record]) -> None:
        """metadata.jsonl: a line for each picture, `file_name` first (the ImageFolder layout, see `_flat`)."""
        lines = (_line(_flat(picture)) for record in records for picture in record.get("pictures", ()))
        write_whole(self.folder / "metadata.jsonl", "".join(lines).encode())


def _flat(picture: Mapping[str, Any]) -> dict[str, Any]:
    """A picture's settings as columns of one type each, whatever the rows of a table are.

    ImageFolder calls the picture itself `image`, so that inputs get a name of their own; what differs in kind from row
    to row, plugins and further settings, is one JSON text.
    """
    flat: dict[str, Any] = {}
    further: dict[str, Any] = {}
    for name, value in picture.items():
        if name in FILES:
            flat[f"input_{name}"] = value
        elif name == "plugins":
            flat[name] = json.dumps(value)
        elif name in Row.model_fields or name == "file_name":
            flat[name] = value
        else:
            further[name] = value
    return flat | ({"settings": json.dumps(further)} if further else {})


def _line(value: Mapping[str, Any]) -> str:
    # ASCII: a lone surrogate of a hostile manifest must not stop a run when it is written down
    return json.dumps(value) + "\n"


def _read(path: Path) -> Iterator[Record]:
    if not path.exists():
        return
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the torn end of a killed run
            continue
        if isinstance(record, dict) and isinstance(record.get("id"), str):
            yield record


def _stale(lock: Path) -> bool:
    """Whether the lock's owner, on this machine, is gone."""
    try:
        owner = json.loads(lock.read_text("utf-8"))
        if owner["host"] != socket.gethostname():
            return False
        return abs(psutil.Process(owner["pid"]).create_time() - owner["started"]) > 1
    except (OSError, ValueError, KeyError, TypeError, psutil.NoSuchProcess):
        return True


def _owner(lock: Path) -> str:
    try:
        owner = json.loads(lock.read_text("utf-8"))
        return f"another run (process {owner['pid']} on {owner['host']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"

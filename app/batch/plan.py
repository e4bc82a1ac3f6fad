"""From rows to jobs: resolved seeds, file names, a hash that says whether a finished row is still the same, batches."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

from ...attention.pictures import expanded
from ...pipelines.tasks.generate import SEEDS
from ..errors import ImageError
from ..models import shown_name, suits
from ..techniques import with_files
from .manifest import file_names
from .schema import FILES, Row

_NOT_SETTINGS = {"id", "task", "seed", "n", "model", "dtype", "variant", "plugins", "settings", "negative", *FILES}


@dataclass(frozen=True)
class Setup:
    """What every row of a run shares, wherever it is run."""

    out: Path
    base: Path
    """What relative paths in rows start from: the manifest's folder."""
    model: str
    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    variant: str | None = None
    threads: int = 1
    batch_size: int = 1
    metadata: bool = True


@dataclass(frozen=True)
class Job:
    """One row, ready to run anywhere."""

    id: str
    line: int
    task: str
    model: str
    seed: int
    files: tuple[str, ...]
    settings: Mapping[str, Any]
    """Arguments of the task: prompt, steps ..."""
    inputs: Mapping[str, str]
    """Paths by field: image, mask, content, style."""
    specs: tuple[Mapping[str, Any], ...]
    hash: str
    dtype: str = "auto"
    variant: str | None = None

    @property
    def opened(self) -> tuple[str, str, str | None]:
        """Jobs with equal values share a model."""
        return self.model, self.dtype, self.variant

    @property
    def alike(self) -> str:
        """Jobs with equal values can be sampled together."""
        shared = {name: value for name, value in self.settings.items() if name != "prompt"}
        return json.dumps([self.task, self.model, shared, self.specs], sort_keys=True)

    def described(self, picture: int) -> dict[str, Any]:
        """The line of metadata.jsonl for a picture: settings, no paths, nothing of this run."""
        inputs = {name: PurePath(path).name for name, path in self.inputs.items()}
        plugins = {"plugins": [shown(spec) for spec in self.specs]} if self.specs else {}
        return {
            "file_name": self.files[picture],
            "id": self.id,
            "task": self.task,
            **self.settings,
            **inputs,
            **plugins,
            "seed": self.seed + picture,
            "model": shown_name(self.model),
        }


def make_job(row: Row, line: int, setup: Setup, run_seed: int) -> Job:
    """Resolve a row.

    Raises:
        ImageError: some of its files cannot be read; the message names all.
    """
    model = row.model or setup.model
    given = row.model_dump(exclude=_NOT_SETTINGS, exclude_none=True)
    settings = (suits(model) if row.task in ("generate", "optimise") else {}) | given | row.settings
    if row.negative and row.task != "generate":
        settings["negative"] = row.negative
    inputs = {name: value for name in FILES if (value := getattr(row, name)) is not None}
    specs = tuple(row.specs())
    dtype, variant = row.dtype or setup.dtype, row.variant or (None if row.model else setup.variant)
    seed = row.seed if row.seed is not None and row.seed >= 0 else derived_seed(run_seed, row.id)
    files = tuple(file_names(row.id, row.n))
    read = list(inputs.values())
    for spec in specs:
        with_files(spec, lambda _, path: read.append(path))
    identity = {
        "row": [row.id, row.task, seed, files, settings, inputs, specs],
        "model": [model, setup.revision, dtype, setup.metadata, *([variant] if variant else [])],
        "files": _digests([setup.base / expanded(path) for path in read]),
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    return Job(row.id, line, row.task, model, seed, files, settings, inputs, specs, digest, dtype, variant)


def derived_seed(run_seed: int, row_id: str) -> int:
    """A seed from the run's seed and the id alone: the same in any order, shard or process."""
    digest = hashlib.sha256(f"{run_seed}\0{row_id}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") % SEEDS


def in_shard(row_id: str, index: int, count: int) -> bool:
    """Whether an id belongs to shard `index` of `count`; index 0 and `count` are the same shard."""
    digest = hashlib.sha256(row_id.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[8:16], "big") % count == index % count


def batches(jobs: Iterable[Job], size: int) -> list[list[Job]]:
    """Jobs of one model and kind next to each other, together where they can be sampled together."""
    groups: dict[tuple[Any, str], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.opened, job.alike), []).append(job)
    ordered: list[list[Job]] = []
    for model in dict.fromkeys(model for model, _ in groups):
        for (of, _), group in groups.items():
            if of == model:
                rows = size if group[0].task == "generate" else 1
                ordered += [group[i : i + rows] for i in range(0, len(group), rows)]
    return ordered


def shown(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A plugin spec without the folders of its files."""
    return with_files(spec, lambda _, path: PurePath(path).name)


def _digests(paths: Iterable[Path]) -> list[str]:
    found, wrong = [], []
    for path in paths:
        try:
            found.append(_digest(path))
        except ImageError as error:
            wrong.append(str(error))
    if wrong:
        raise ImageError("; ".join(wrong))
    return found


def _digest(path: Path) -> str:
    try:
        state = path.stat()
        if not path.is_file():  # a device has no end
            raise OSError(errno.EINVAL, "it is not a file")
        return _digest_of(path, state.st_mtime_ns, state.st_size)
    except (OSError, ValueError) as error:
        raise ImageError(f"{str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None


@lru_cache(maxsize=1000)
def _digest_of(path: Path, changed: int, size: int) -> str:
    """Of a file in that state: a style or a mask that thousands of rows share is read once."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

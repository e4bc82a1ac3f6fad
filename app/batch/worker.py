"""Runs jobs in one process: holds the model, writes the pictures, and turns whatever a row raises into its record."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import diffgraft

from ...attention.errors import GraftError, ModelLoadError
from ...attention.pictures import expanded
from ...pipelines.families.running import part_of
from ...pipelines.tasks.generate import sample
from .. import losses
from ..console import one_line
from ..errors import OutputError
from ..images import load_image, load_mask
from ..metadata import encode_png
from ..models import check_model, open_model
from ..outputs import write_whole
from ..techniques import build
from .plan import Job, Setup, shown

Record = dict[str, Any]


class Worker:
    """One model at a time, any number of jobs.

    Raises (from `run`):
        ModelLoadError: the run's own model does not load. OutputError: nothing can be written any more.
    """

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.threads)
        self.setup = setup
        self.batch_size = setup.batch_size
        self._model: tuple[Any, Any] | None = None

    def run(self, jobs: Sequence[Job]) -> list[Record]:
        """A record for each job; only what ends the whole run is raised."""
        if len(jobs) > 1:
            try:
                return self._make(jobs)
            except OutputError:
                raise
            except Exception as error:
                del error  # its frames hold the pictures of the batch
            return [record for job in jobs for record in self.run([job])]
        try:
            return self._make(jobs)
        except OutputError:
            raise
        except Exception as error:
            own = self.setup.model, self.setup.dtype, self.setup.variant
            if isinstance(error, ModelLoadError) and jobs[0].opened == own:
                raise
            for name in jobs[0].files:
                (self.setup.out / name).unlink(missing_ok=True)
            return [failed(jobs[0], type(error).__name__, one_line(error))]

    def _make(self, jobs: Sequence[Job]) -> list[Record]:
        started = time.monotonic()
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always", UserWarning)
            make = self._generate if jobs[0].task == "generate" else self._edit
            sizes: dict[str, list[int]] = {job.id: [] for job in jobs}
            for job, index, picture in make(jobs):
                sizes[job.id].append(self._write(job, index, picture))
        said = sorted({one_line_of(w) for w in heard if issubclass(w.category, UserWarning)})
        seconds = round((time.monotonic() - started) / len(jobs), 3)
        return [done(job, sizes[job.id], seconds, said) for job in jobs]

    def _generate(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, int, Image.Image]]:
        pipe = self._pipe(jobs[0])
        plugins = [build(spec, self.setup.base) for spec in jobs[0].specs]
        settings = {name: value for name, value in jobs[0].settings.items() if name != "prompt"}
        wanted = [(job, i) for job in jobs for i in range(len(job.files))]
        with diffgraft.graft(pipe, *plugins) if plugins else nullcontext():
            while wanted:
                part = wanted[: self.batch_size]
                prompts = [job.settings["prompt"] for job, _ in part]
                pictures = self._sampled(pipe, prompts, [job.seed + i for job, i in part], settings)
                for (job, i), picture in zip(part, pictures, strict=False):
                    picture.info["diffgraft"]["plugins"] = [
                        {"plugin": spec["plugin"]} | plugin.settings() | shown(spec)
                        for spec, plugin in zip(job.specs, plugins, strict=True)
                    ]
                    yield job, i, picture
                wanted = wanted[len(pictures) :]

    def _sampled(self, pipe: Any, prompts: list[str], seeds: list[int], settings: dict[str, Any]) -> list[Image.Image]:
        """Pictures of the first prompts: of all of them, or of as many as fit into memory."""
        try:
            with part_of(pipe, [0] * len(prompts), 1):  # a row has one prompt, whichever rows are sampled with it
                return sample(pipe, prompts, seeds, **settings)
        except Exception as error:
            if len(prompts) == 1 or not out_of_memory(error):
                raise
        # outside the handler: the exception's frames held the tensors
        self.batch_size = len(prompts) // 2
        free_memory()
        return self._sampled(pipe, prompts[: self.batch_size], seeds[: self.batch_size], settings)

    def _edit(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, int, Image.Image]]:
        [job] = jobs
        paths = {name: self.setup.base / expanded(path) for name, path in job.inputs.items()}
        pipe = self._pipe(job)
        settings = dict(job.settings)
        if job.specs:
            settings["plugins"] = [build(spec, self.setup.base) for spec in job.specs]
        if job.task == "optimise":
            loss = losses.build(settings.pop("loss"), self.setup.base)
            for i in range(len(job.files)):
                found = diffgraft.optimise_startpoint(pipe, seed=job.seed + i, **settings, **loss)
                yield job, i, found.picture
            return
        if job.task == "erase":
            picture = load_image(paths["image"])
            pictures = (picture, load_mask(paths["mask"], picture.size))
        else:
            pictures = (load_image(paths["content"]), load_image(paths["style"]))
        task = getattr(diffgraft, job.task)
        for i in range(len(job.files)):
            yield job, i, task(pipe, *pictures, seed=job.seed + i, **settings)

    def _write(self, job: Job, index: int, picture: Image.Image) -> int:
        said = job.described(index) | {"width": picture.width, "height": picture.height}
        said |= picture.info.get("diffgraft", {})
        data = encode_png(picture, said if self.setup.metadata else None)
        write_whole(self.setup.out / job.files[index], data)
        return len(data)

    def _pipe(self, job: Job) -> Any:
        if self._model is None or self._model[0] != job.opened:
            self._model = None  # two large models rarely fit
            free_memory()
            how = {"dtype": job.dtype, "revision": self.setup.revision, "variant": job.variant}
            pipe = open_model(job.model, device=self.setup.device, **how)
            pipe.set_progress_bar_config(disable=True)
            self._model = (job.opened, pipe)
        return self._model[1]


def done(job: Job, sizes: list[int], seconds: float, said: list[str]) -> Record:
    """The record of a finished job."""
    pictures = [job.described(i) for i in range(len(job.files))]
    record = _record(job, "ok") | {"seconds": seconds, "pictures": pictures, "bytes": sizes}
    return record | ({"warnings": said} if said else {})


def failed(job: Job, kind: str, message: str) -> Record:
    """The record of a failed job."""
    return _record(job, "failed") | {"error_type": kind, "message": message}


def _record(job: Job, status: str) -> Record:
    return {"id": job.id, "status": status, "hash": job.hash, "line": job.line, "seed": job.seed}


def one_line_of(warning: warnings.WarningMessage) -> str:
    """A warning's text on one line."""
    return " ".join(str(warning.message).split())[:500]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a smaller batch might work."""
    if isinstance(error, GraftError):
        return False
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    )


def free_memory() -> None:
    """Give cached accelerator memory back."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def problems(job: Job, setup: Setup) -> Iterator[GraftError]:
    """Everything that a run would trip over before it computes: the model's name, pictures, plugins."""
    size: list[tuple[int, int]] = []

    def opened(name: str, path: Path) -> None:
        if name == "mask":
            load_mask(path, *size)
        else:
            size[:] = [load_image(path).size]

    checks = [partial(opened, name, setup.base / expanded(path)) for name, path in job.inputs.items()]
    checks += [partial(build, spec, setup.base) for spec in job.specs]
    if (job.model, job.variant) != (setup.model, setup.variant):
        checks.append(partial(check_model, job.model, job.variant))
    for check in checks:
        try:
            check()
        except GraftError as error:
            yield error

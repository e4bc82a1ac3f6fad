"""One model, many visitors: each request has it alone, as a pipeline of its own, and can be stopped."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...attention.errors import GraftError, SettingError
from ..models import EMBEDDED, PICTUREBOOK, open_model
from .checks import text

Tell = Callable[[tuple[int, int] | None, str], object]
"""tell((steps done, steps in all) or None, what is going on)"""


class Stopped(GraftError, RuntimeError):
    """The visitor pressed stop."""


class Job:
    """One request's turn at the model.

    Attributes:
        pipe: a pipeline on the shared weights, with a scheduler and state of its own.
        warnings: what the visitor should know, filled in while the job runs.
    """

    def __init__(self, pipe: Any, stop: threading.Event, tell: Tell) -> None:
        self.pipe, self._stop, self._tell = pipe, stop, tell
        self.warnings: list[str] = []
        self._what, self._steps, self._done, self._time = "", 1, 0, None

    def expect(self, what: str, steps: int) -> None:
        """Say what is computed next, in how many steps."""
        self._what, self._steps, self._done, self._time = what, max(1, steps), 0, None
        self._tell((0, self._steps), what)

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Runs before each call of the denoiser: the place to stop, and a new timestep is a step."""
        if self._stop.is_set():
            raise Stopped(f"stopped at step {self._done} of {self._steps}")
        given = kwargs["timestep"] if "timestep" in kwargs else args[1]
        time = float(torch.as_tensor(given).flatten()[0])
        if time != self._time:
            self._time, self._done = time, min(self._done + 1, self._steps)
            self._tell((self._done, self._steps), self._what)


class Studio:
    """The model that visitors share.

    Args:
        model: what is used where a request names none.
        device: where models go.
        fixed: refuse every other model. For a page that others can reach: a name is a path or a download.
        opener: loads a model, `opener(name, device=...)`.
    """

    def __init__(
        self,
        model: str = PICTUREBOOK,
        device: str = "auto",
        *,
        fixed: bool = False,
        opener: Callable[..., Any] = open_model,
    ) -> None:
        self.model, self.device, self.fixed, self._opener = model, device, fixed, opener
        self._turn, self._stops_lock = threading.Lock(), threading.Lock()
        self._name: str | None = None
        self._pipe: Any = None
        self._stops: dict[str, list[threading.Event]] = {}

    def check(self, model: str | None) -> str:
        """The name of the model that a request gets.

        Raises:
            SettingError: another one than this page offers. SettingTypeError: no name.
        """
        name = text(model, "the model") or self.model
        if self.fixed and name not in (self.model, *EMBEDDED):
            raise SettingError(f"this page runs {self.model!r} only: start your own with `diffgraft demo` for others")
        return name

    @contextmanager
    def job(self, model: str | None, visitor: str, tell: Tell) -> Iterator[Job]:
        """The model, for one request alone.

        Args:
            model: its name; empty for the page's own.
            visitor: who may stop it.
            tell: is told about progress.
        Raises:
            Stopped: while waiting or running. ModelLoadError: the model cannot be loaded.
        """
        name, stop = self.check(model), threading.Event()
        with self._listed(visitor, stop), self._alone(stop, tell):
            if name != self._name:
                tell(None, f"loading {name}")
            job = Job(private(self._get(name)), stop, tell)
            hook = denoiser(job.pipe).register_forward_pre_hook(job.before, with_kwargs=True)
            try:
                with _noted(job.warnings):
                    yield job
            finally:
                hook.remove()

    def open(self) -> None:
        """Load the page's own model, so that the first visitor need not wait for it.

        Raises:
            ModelLoadError, SettingError: it cannot be loaded, or not there.
        """
        with self._turn:
            self._get(self.model)

    def stop(self, visitor: str) -> bool:
        """Stop what this visitor runs, within one call of the denoiser; False if that is nothing."""
        with self._stops_lock:
            events = self._stops.get(visitor, [])
            for event in events:
                event.set()
            return bool(events)

    def _get(self, name: str) -> Any:
        if name != self._name:
            self._name = self._pipe = None  # the old one goes first: two may not fit
            gc.collect()
            self._pipe = self._opener(name, device=self.device)
            self._name = name
        return self._pipe

    @contextmanager
    def _alone(self, stop: threading.Event, tell: Tell) -> Iterator[None]:
        while not self._turn.acquire(timeout=0.1):
            tell(None, "waiting for the model")
            if stop.is_set():
                raise Stopped("stopped while waiting")
        try:
            yield
        finally:
            self._turn.release()

    @contextmanager
    def _listed(self, visitor: str, stop: threading.Event) -> Iterator[None]:
        with self._stops_lock:
            self._stops.setdefault(visitor, []).append(stop)
        try:
            yield
        finally:
            with self._stops_lock:
                self._stops[visitor].remove(stop)
                if not self._stops[visitor]:
                    del self._stops[visitor]


def private(pipe: Any) -> Any:
    """A pipeline on the same weights whose scheduler, guidance and progress bar are its own."""
    mine = copy.copy(pipe)
    mine.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    mine.set_progress_bar_config(disable=True)
    return mine


def denoiser(pipe: Any) -> torch.nn.Module:
    """The part of a pipeline that runs once a step."""
    return pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer


@contextmanager
def _noted(texts: list[str]) -> Iterator[None]:
    """Collect what the library warns of. Python's filters belong to the process: only whoever has the model is here."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            texts += dict.fromkeys(str(warning.message) for warning in caught)

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
from PIL import Image

from ...attention.errors import GraftError, SettingError
from ...pipelines.families.family import HIDDEN
from ...pipelines.families.loop import solve_of
from ...pipelines.families.solve import Solve
from ..models import EMBEDDED, ONE_STEP, PICTUREBOOK, denoiser_of, open_model
from .checks import text
from .preview import Guess, clean, learn, spread

LOOKS = 8
"""Rough looks at a picture while it is made."""
Tell = Callable[[tuple[int, int] | None, str], object]
"""tell((steps done, steps in all) or None, what is going on)"""


class Stopped(GraftError, RuntimeError):
    """The visitor pressed stop."""


class Job:
    """One request's turn at the model.

    Attributes:
        pipe: a pipeline on the shared weights, with a scheduler and state of its own.
        warnings: what the visitor should know, filled in while the job runs.
        doing: what is going on, in words. rough: a rough look at the picture, if there is one.
    """

    def __init__(self, pipe: Any, stop: threading.Event, tell: Tell, guess: Guess | None = None) -> None:
        self.pipe, self._stop, self._tell, self._guess = pipe, stop, tell, guess
        self.warnings: list[str] = []
        self.doing, self.rough = "", None
        self._inputs: dict[str, Any] = {}
        self._what, self._steps, self._done, self._time = "", 1, 0, None

    def expect(self, what: str, steps: int) -> None:
        """Say what is computed next, in how many steps."""
        self._what, self._steps, self._done, self._time = what, max(1, steps), 0, None
        self.doing, self.rough = f"{what}: reading the prompt", None
        self._tell((0, self._steps), what)

    def tick(self, done: int) -> None:
        """So much of what was expected is done, where that is more than the model's own steps.

        Raises:
            Stopped: the visitor pressed stop.
        """
        if self._stop.is_set():
            raise Stopped(f"stopped at {done} of {self._steps}")
        self.doing = f"{self._what}: {done} of {self._steps}"
        self._tell((min(done, self._steps), self._steps), self._what)

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Runs before each call of the denoiser: the place to stop, and a new timestep is a step."""
        if self._stop.is_set():
            raise Stopped(f"stopped at step {self._done} of {self._steps}")
        given = kwargs["timestep"] if "timestep" in kwargs else args[1]
        time = float(torch.as_tensor(given).flatten()[0])
        if time != self._time:
            self._time, self._done = time, min(self._done + 1, self._steps)
            self.doing = f"{self._what}: step {self._done} of {self._steps}"
            self._tell((self._done, self._steps), self._what)
        self._inputs = kwargs | ({"sample": args[0]} if args else {})

    def after(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        """Runs after each call of the denoiser: every few steps a rough look at what it sees."""
        inputs, self._inputs = self._inputs, {}
        if self._guess is None or self._time is None or self._done % max(1, self._steps // LOOKS):
            return
        sample, found = inputs.get("sample", inputs.get(HIDDEN)), output if torch.is_tensor(output) else output[0]
        if torch.is_tensor(sample) and torch.is_tensor(found):
            self._look(sample, found, inputs, self._guess, self._time, solve_of(module))

    def _look(
        self, sample: torch.Tensor, found: torch.Tensor, inputs: dict[str, Any], guess: Guess, time: float,
        solve: Solve | None,
    ) -> None:  # fmt: skip
        channels = len(guess.weights) - 1
        seen = [spread(x, inputs, channels) if x.ndim == 3 else x for x in (sample, found)]
        grids = [x for x in seen if x is not None and x.ndim == 4 and x.shape[1] >= channels]
        if len(grids) == 2:
            row = len(grids[0]) - 1  # of [unconditional, conditional] the latter; a plugin's own rows come behind
            before, after = (x[row].float() for x in grids)
            self.rough = guess.picture(clean(self.pipe.scheduler, before[:channels], after, time, solve))


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
        self._guess: Guess | None = None
        self._student: Any = None
        self._jobs: dict[str, Job] = {}
        self._loading = ""
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
            job = Job(private(self._get(name, tell)), stop, tell, self._guess)
            hooks = [
                denoiser(job.pipe).register_forward_pre_hook(job.before, with_kwargs=True),
                denoiser(job.pipe).register_forward_hook(job.after),
            ]
            self._jobs[visitor] = job
            try:
                with _noted(job.warnings):
                    yield job
            finally:
                del self._jobs[visitor]
                for hook in hooks:
                    hook.remove()

    def open(self) -> None:
        """Load the page's own model, so that the first visitor need not wait for it.

        Raises:
            ModelLoadError, SettingError: it cannot be loaded, or not there.
        """
        with self._turn:
            self._get(self.model, lambda done, what: None)

    def surrogate(self, name: str) -> Any:
        """The one-step student of the embedded model, for whoever has its turn; None for all other models."""
        if name != PICTUREBOOK:
            return None
        if self._student is None:
            self._student = self._opener(ONE_STEP, device=self.device)
        return private(self._student)

    def seen(self, visitor: str) -> tuple[str, Image.Image | None]:
        """What this visitor's request does just now, and a rough look at its picture; "" if it does not run."""
        job = self._jobs.get(visitor)
        return (job.doing, job.rough) if job else (self._loading if visitor in self._stops else "", None)

    def denoiser(self, name: str, visitor: str, tell: Tell) -> str:
        """The class of a model's denoiser, by opening the model if nothing else tells.

        Raises:
            ModelLoadError: it cannot be opened. SettingError: not on this page.
        """
        known = denoiser_of(self.check(name))
        if known is None:
            with self.job(name, visitor, tell) as job:
                known = type(denoiser(job.pipe)).__name__
        return known

    def stop(self, visitor: str) -> bool:
        """Stop what this visitor runs, within one call of the denoiser; False if that is nothing."""
        with self._stops_lock:
            events = self._stops.get(visitor, [])
            for event in events:
                event.set()
            return bool(events)

    def _get(self, name: str, tell: Tell) -> Any:
        if name != self._name:
            self._say(tell, f"loading {name}: making room")
            self._name = self._pipe = self._guess = None  # the old one goes first: two may not fit
            gc.collect()
            self._say(tell, f"loading {name}: reading its files")
            self._pipe = self._opener(name, device=self.device)
            self._say(tell, f"loading {name}: learning what its latents look like")
            self._guess = learn(self._pipe)
            self._name = name
        self._loading = "beginning"
        return self._pipe

    def _say(self, tell: Tell, what: str) -> None:
        self._loading = what
        tell(None, what)

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

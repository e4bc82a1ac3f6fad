"""graft(pipe, *plugins): the one object that installs techniques on a pipeline and takes them off again."""

from __future__ import annotations

import functools
import threading
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Self
from weakref import WeakSet

import torch

from ...attention.backends import select
from ...attention.errors import AlreadyGraftedError, GraftError, SettingTypeError
from ...attention.layer import AttentionLayer
from ...attention.seam import Work, install
from ...plugins.base import Plugin
from ..families import adapter_for
from ..families.base import Inputs
from ..families.running import Running
from .branch_stage import arriving
from .calls import Calls
from .compiled import eager
from .hooks import hook_block, hook_denoiser
from .plan import Placed, place
from .report import Report, make_report
from .run import Late, Run
from .scheduler_link import SchedulerStep
from .session import RunSession
from .text import Texts

_HERE: ContextVar[tuple[Graft, ...]] = ContextVar("diffgraft_grafts", default=())
_SUSPENDED: ContextVar[bool] = ContextVar("diffgraft_suspended", default=False)
_INSTALLED: WeakSet[Graft] = WeakSet()  # weak: a forgotten attached graft goes with its model
_LOCK = threading.RLock()


class Graft:
    """Techniques on a pipeline. Made by `diffgraft.graft`.

    As a context manager it edits what this context (thread, task) runs on the pipeline's denoiser, sibling pipelines
    that share it included. `attach()` edits every thread's calls until `detach()`. Nothing of it is left afterwards,
    also after an exception or Ctrl-C.

    Attributes:
        pipe: the pipeline, unchanged in class, config and signature.
        plugins: in the order given.
        layers: every attention layer of the denoiser in execution order.
    """

    def __init__(self, pipe: Any, plugins: Sequence[Plugin], backend: str, strict: bool) -> None:
        self.pipe, self.plugins = pipe, tuple(plugins)
        for plugin in self.plugins:
            if not isinstance(plugin, Plugin):
                raise SettingTypeError(f"{plugin!r} is not a plugin: give instances such as NegativeAway('blurry')")
        self.adapter = adapter_for(pipe)
        self.layers = self.adapter.layers
        self.texts = Texts(self.adapter)
        self.backend = select(backend, device=_device(pipe), strict=strict)
        self.edited: dict[str, int] = {}
        self.runs: list[Run] = []
        self._local = threading.local()
        self._stack: ExitStack | None = None
        self._everywhere = False
        self._links: dict[int, SchedulerStep] = {}
        self._processors = self._present()
        self._calls = Calls(Placed(), self.texts, self.link)

    def _present(self) -> dict[str, Any]:
        return {x.name: getattr(x.module, "processor", None) for x in self.layers}

    # -- lifecycle ---------------------------------------------------------------------------------------------

    def attach(self) -> Self:
        """Put the plugins on for every thread; idempotent.

        Raises:
            AlreadyGraftedError: another graft is on the same denoiser.
            GraftError: a plugin's settings do not fit the pipeline.
        """
        if not self.attached:
            self._install()
            self._everywhere = True
        return self

    def detach(self) -> None:
        """Take everything off; idempotent."""
        stack, self._stack = self._stack, None
        self._everywhere = False
        for run in self.runs:
            run.forget()
        if stack is not None:
            stack.close()

    def __enter__(self) -> Self:
        if not self.attached:
            self._install()
            token = _HERE.set((*_HERE.get(), self))
            assert self._stack is not None
            self._stack.callback(_HERE.reset, token)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        moved = any(run.pending is not None for run in self.runs)
        self.detach()
        if moved and kind is None:
            raise GraftError(
                "a plugin moved the latents, but scheduler.step was never called on the pipeline's own scheduler "
                "after it: sample with pipe.scheduler"
            )

    @property
    def attached(self) -> bool:
        """Whether the plugins are on."""
        return self._stack is not None

    def report(self) -> Report:
        """What was done since the last attach: layers, calls, backend, updates, skipped ones, displaced processors."""
        moved = [name for name, found in self._present().items() if found is not self._processors.get(name)]
        layers = {layer.name: self.edited[layer.name] for layer in self.layers if layer.name in self.edited}
        return make_report(self.pipe, self.plugins, self.runs, self.backend.name, layers, moved)

    # -- installing --------------------------------------------------------------------------------------------

    def _install(self) -> None:
        with _LOCK:
            self._refuse_second()
            stack = ExitStack()
            try:
                _INSTALLED.add(self)
                stack.callback(_INSTALLED.discard, self)
                self._bind(stack)
                stack.enter_context(eager())
                self._hook(stack)
                self._stack = stack
                self.link(self.pipe.scheduler)
            except BaseException:
                self._stack = None
                stack.close()
                raise

    def _refuse_second(self) -> None:
        for other in _INSTALLED:
            # Grafts of other threads are inert here; only one that this context would also run is a conflict.
            if other.adapter.denoiser is self.adapter.denoiser and (other._everywhere or other in _HERE.get()):
                raise AlreadyGraftedError(
                    f"the {type(self.adapter.denoiser).__name__} already carries a graft here: give all plugins to one "
                    "graft(pipe, a, b), or detach() the other first"
                )

    def _bind(self, stack: ExitStack) -> None:
        self.adapter = adapter_for(self.pipe)
        self.adapter.check()
        self.layers, self.texts.adapter = self.adapter.layers, self.adapter
        self.runs, self._local, self._links = [], threading.local(), {}
        self.edited, self._processors = {}, self._present()
        for plugin in self.plugins:
            stack.callback(plugin.unbind)
            plugin.bind(RunSession(self.run, self.texts))
        self._calls = Calls(place(self.adapter, self.plugins), self.texts, self.link)

    def _hook(self, stack: ExitStack) -> None:
        placed, denoiser = self._calls.placed, self.adapter.denoiser
        for layer in self.layers:
            if layer.name in placed.edits:
                stack.callback(install(layer, self))
        stack.callback(hook_denoiser(denoiser, self._before, self._after))
        for undo in self.adapter.hooks(lambda: self.run):
            stack.callback(undo)
        if placed.brings_rows:
            for name, block in self.adapter.late_blocks():
                stack.callback(hook_block(block, functools.partial(self._arriving, name)))

    # -- what hooks ask ----------------------------------------------------------------------------------------

    @property
    def run(self) -> Run:
        """This thread's state."""
        run = getattr(self._local, "run", None)
        if run is None:
            run = self._local.run = Run(self.adapter, Running(self.pipe, False))
            self.runs.append(run)
        return run

    @property
    def here(self) -> bool:
        """Whether this context is edited now."""
        return (self._everywhere or self in _HERE.get()) and not _SUSPENDED.get()

    def _before(self, args: tuple[Any, ...], kwargs: Inputs) -> Inputs | None:
        run = self._watching()
        return None if run is None else self._calls.before(run, args, kwargs)

    def _after(self, output: Any) -> Any:
        run = self._watching()
        if run is None:
            return None
        return self._calls.aborted(run) if output is None else self._calls.after(run, output)

    def _watching(self) -> Run | None:
        """This thread's run if the pipeline calls the denoiser here; None for probes and for other contexts."""
        return self.run if self.here and not self.run.step.probing else None

    def _arriving(self, block: str) -> Late | None:
        return arriving(self.run, block) if self.here else None

    def work(self, layer: AttentionLayer) -> Work | None:
        """Edits for a layer now (called by its seam)."""
        run, placed = self.run if self.here else None, self._calls.placed
        if run is None and torch.is_grad_enabled():
            run = self._calls.probing  # gradient checkpointing runs layers again on autograd's own threads
        if run is None:
            return None
        step, active = run.step, placed.active(run.step)
        edits = [e for plugin, e in placed.edits[layer.name] if plugin in active and e.active(layer, step)]
        if not edits:
            return None
        self.edited[layer.name] = self.edited.get(layer.name, 0) + 1
        memo = run.memo if any(edit.keeps_text for edit in edits) else None
        return Work(step, edits, self.backend.kernel, run.text_slice(layer), memo)

    def link(self, scheduler: Any) -> None:
        """Follow this scheduler's steps until the graft comes off."""
        if id(scheduler) in self._links or self._stack is None:
            return
        link = SchedulerStep(scheduler, lambda x: self._calls.stepped(self.run, x) if self.here else x)
        self._links[id(scheduler)] = link
        link.install()
        self._stack.callback(link.remove)


@contextmanager
def suspended() -> Generator[None]:
    """Inside, this context runs as if no graft were on: for library code with a sampling loop of its own."""
    token = _SUSPENDED.set(True)
    try:
        yield
    finally:
        _SUSPENDED.reset(token)


def graft(pipe: Any, *plugins: Plugin, backend: str = "auto", strict: bool = False) -> Graft:
    """Put plugins on a diffusers pipeline.

    Args:
        pipe: any supported diffusers pipeline that you loaded; it keeps its class, weights and call signature.
        plugins: instances, in the order in which edits of equal rank run.
        backend: "auto" (torch's own attention), "sdpa" or "xformers", for edited layers.
        strict: raise instead of falling back to another backend.
    Returns:
        a `Graft`: use it in a `with` statement, or call `attach()` and `detach()`.
    Raises:
        UnsupportedPipelineError: a family without an adapter.
        SettingTypeError: something that is no plugin.
    Example:
        >>> with graft(pipe, NegativeAway("red")) as g:
        ...     image = pipe("a ball , sky").images[0]
        >>> print(g.report())
    """
    return Graft(pipe, plugins, backend, strict)


def _device(pipe: Any) -> torch.device:
    device = getattr(pipe, "_execution_device", None)
    return device if isinstance(device, torch.device) else torch.device("cpu")

"""graft(pipe, *plugins): the one object that installs techniques on a pipeline and takes them off again."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Self
from weakref import WeakSet

import torch

from ...attention.backends import select
from ...attention.edit import Edit
from ...attention.errors import AlreadyGraftedError, GraftError, SettingTypeError, UnsupportedPipelineError
from ...attention.layer import AttentionLayer
from ...attention.seam import Work, install
from ...attention.step import Step
from ...plugins.base import Branch, Plugin
from ..families import adapter_for, latents
from .compiled import eager
from .hooks import LateJoin, hook_denoiser
from .report import Report, make_report
from .run import Run
from .scheduler_link import SchedulerStep
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
        self.effective: list[Plugin] = []
        self.edits: dict[str, list[tuple[Plugin, Edit]]] = {}
        self.edited: dict[str, int] = {}
        self.latent_run: Run | None = None
        self.runs: list[Run] = []
        self._local = threading.local()
        self._stack: ExitStack | None = None
        self._everywhere = False
        self._links: dict[int, SchedulerStep] = {}
        self._processors = self._present()
        self._joins: dict[str, str] = {}

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
        return make_report(self, self._processors)

    # -- installing --------------------------------------------------------------------------------------------

    def _install(self) -> None:
        denoiser = self.adapter.denoiser
        with _LOCK:
            self._refuse_second()
            stack = ExitStack()
            try:
                _INSTALLED.add(self)
                stack.callback(_INSTALLED.discard, self)
                self._bind(stack)
                stack.enter_context(eager())
                by_name = {layer.name: layer for layer in self.layers}
                for name in self.edits:
                    stack.callback(install(by_name[name], self))
                stack.callback(hook_denoiser(denoiser, self))
                for undo in self.adapter.hooks(lambda: self.run):
                    stack.callback(undo)
                self._install_joins(stack)
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
        self.edits, self.edited, self._joins = {}, {}, {}
        self._processors = self._present()
        for plugin in self.plugins:
            stack.callback(plugin.unbind)
            plugin.bind(self.run.session)
        self.effective = [plugin for plugin in self.plugins if not plugin.neutral]
        for plugin in self.effective:
            for edit in plugin.edits():
                self._place(plugin, edit)
        for placed in self.edits.values():
            placed.sort(key=lambda pair: pair[1].order)

    def _place(self, plugin: Plugin, edit: Edit) -> None:
        chosen = [layer for layer in self.layers if edit.selects(layer)]
        if not chosen:
            kinds = sorted({layer.kind for layer in self.layers})
            raise UnsupportedPipelineError(
                f"{type(plugin).__name__} found no layer to edit in {type(self.adapter.denoiser).__name__} "
                f"(it has {len(self.layers)} attention layers: {', '.join(kinds)}); choose other layers"
            )
        for layer in chosen:
            self.edits.setdefault(layer.name, []).append((plugin, edit))
        for group in {*(edit.rows or ()), edit.owns} - {None}:
            self._note_join(str(group), chosen)

    # -- branches that join late -------------------------------------------------------------------------------

    def _note_join(self, group: str, chosen: Sequence[AttentionLayer]) -> None:
        """Remember the first block in which rows of `group` are edited; "" is the input."""
        order = ["", *(name for name, _ in self.adapter.late_blocks())]
        for layer in chosen:
            block = next((name for name in order[1:] if layer.name.startswith(f"{name}.")), "")
            self._joins[group] = min(self._joins.get(group, block), block, key=order.index)

    def _install_joins(self, stack: ExitStack) -> None:
        if any(type(plugin).branches is not Plugin.branches for plugin in self.effective):
            for name, block in self.adapter.late_blocks():
                stack.callback(LateJoin.install(block, name, self))

    def join_block(self, branches: Sequence[Branch]) -> str:
        """Name of the block before which these branches may join, "" for the input."""
        order = ["", *(name for name, _ in self.adapter.late_blocks())]
        if any(branch.latent is not None or branch.text is not None for branch in branches):
            return ""
        return min((self._joins.get(branch.name, "") for branch in branches), key=order.index)

    # -- what hooks ask ----------------------------------------------------------------------------------------

    @property
    def run(self) -> Run:
        """This thread's state."""
        run = getattr(self._local, "run", None)
        if run is None:
            run = self._local.run = Run(self)
            self.runs.append(run)
        return run

    @property
    def here(self) -> bool:
        """Whether this context is edited now."""
        return (self._everywhere or self in _HERE.get()) and not _SUSPENDED.get()

    def active(self, step: Step) -> list[Plugin]:
        """Plugins whose window holds this step."""
        return [plugin for plugin in self.effective if step.within(plugin.start, plugin.end)]

    def work(self, layer: AttentionLayer) -> Work | None:
        """Edits for a layer now (called by its seam)."""
        run = self.run if self.here else None
        if run is None and torch.is_grad_enabled():
            run = self.latent_run  # gradient checkpointing runs layers again on autograd's own threads
        if run is None:
            return None
        step, active = run.step, self.active(run.step)
        edits = [e for plugin, e in self.edits[layer.name] if plugin in active and e.active(layer, step)]
        if not edits:
            return None
        self.edited[layer.name] = self.edited.get(layer.name, 0) + 1
        memo = run.memo if any(edit.keeps_text for edit in edits) else None
        return Work(step, edits, self.backend.kernel, run.text_slice(layer), memo)

    def link(self, scheduler: Any) -> None:
        """Follow this scheduler's steps until the graft comes off."""
        if id(scheduler) in self._links or self._stack is None:
            return
        link = SchedulerStep(scheduler, lambda x: self.run.sample_for_step(x) if self.here else x)
        self._links[id(scheduler)] = link
        link.install()
        self._stack.callback(link.remove)

    def encode_image(self, image: Any, size: tuple[int, int]) -> torch.Tensor:
        """Latent of a picture at a latent size."""
        with torch.inference_mode(False):
            return latents.encode_image(self.pipe, image, size)

    def signal(self, scheduler: Any, step: Step) -> tuple[float, float]:
        """(alpha, sigma) of the scheduler at a step."""
        return latents.signal(scheduler, step)


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

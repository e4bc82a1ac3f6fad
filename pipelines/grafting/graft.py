"""graft(pipe, *plugins): the one object that installs techniques on a pipeline and takes them off again."""

from __future__ import annotations

import functools
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self
from weakref import WeakSet

import torch

from ...attention.backends import select
from ...attention.edit import Edit
from ...attention.errors import AlreadyGraftedError, GraftError, SettingTypeError
from ...attention.seam import Task, seam_on
from ...plugins.base import Plugin
from ..families import adapters_for
from ..families.base import Adapter, Inputs
from ..families.words import in_turn
from .blocks import Block, block_here, complaint, holders
from .calls import Calls
from .compiled import choosing, compiled_of, is_whole, own_graphs
from .fold import hook_folds
from .gradients import run_again_for
from .hooks import hook_denoiser
from .plan import Placed, place
from .report import Report, make_report
from .run import Run
from .runs import Runs
from .scheduler_link import follow, leave
from .session import RunSession
from .stream_stage import hook_meetings, meetings
from .text import Texts
from .visits import Visits

_INSTALLED: WeakSet[Graft] = WeakSet()  # weak: a forgotten attached graft goes with its model
_LOCK = threading.RLock()
_WAIT = 0.001
"""Seconds between two looks whether the calls that run under a graft are over."""


class Graft:
    """Techniques on a pipeline. Made by `diffgraft.graft`.

    As a context manager it edits what this context (thread, task) runs on the pipeline's denoiser, sibling pipelines
    that share it included. Entering again counts: the outermost block takes it off, also one in another thread.
    `attach()` edits every thread's calls until `detach()`. Nothing of it is left afterwards, also after an exception
    or Ctrl-C.

    Attributes:
        pipe: the pipeline, unchanged in class, config and signature.
        plugins: in the order given.
        layers: every attention layer of the denoiser in execution order; of a second denoiser behind the first's,
            their names under its own.
    """

    def __init__(self, pipe: Any, plugins: Sequence[Plugin], backend: str, strict: bool) -> None:
        self.pipe, self.plugins = pipe, tuple(plugins)
        for plugin in self.plugins:
            if not isinstance(plugin, Plugin):
                raise SettingTypeError(f"{plugin!r} is not a plugin: give instances such as NegativeAway('blurry')")
        self.adapters = adapters_for(pipe)
        self.adapter = self.adapters[0]
        self.layers = [layer for adapter in self.adapters for layer in adapter.layers]
        self.texts = Texts(self.adapter)
        device = _device(pipe) if backend == "xformers" else "cpu"  # a pipeline walks its models to say it
        self.backend = select(backend, device=device, strict=strict)
        self._visits = Visits(self, self.adapters)
        self._stack: ExitStack | None = None
        self._links: WeakSet[Any] = WeakSet()
        self._processors = self._present()
        self._calls = Calls(Placed(), self.texts, self.backend.kernel, self.link)

    def _present(self) -> dict[str, Any]:
        return {x.name: getattr(x.module, "processor", None) for x in self.layers}

    # -- lifecycle ---------------------------------------------------------------------------------------------

    def attach(self) -> Self:
        """Put the plugins on for every thread; idempotent.

        Raises:
            AlreadyGraftedError: another graft is on the same denoiser.
            GraftError: a plugin's settings do not fit the pipeline.
        """
        with _LOCK:
            if self._visits.everywhere is None:
                self._put_on()
                self._visits.everywhere = Block(self, self.adapter.denoiser, self.run)
        return self

    def detach(self) -> None:
        """Take everything off that `attach` or a block around this put on; idempotent."""
        with _LOCK:
            everywhere, self._visits.everywhere = self._visits.everywhere, None
            while (block := self._visits.block()) is not None:
                self._visits.close(block)
        self._take_off()
        if everywhere is not None:
            self._complain(everywhere, crossed=False, closing=True)

    def __enter__(self) -> Self:
        with _LOCK:
            self._put_on()
            self._visits.enter(holders())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        frames, visits = holders(), self._visits
        with _LOCK:
            block = visits.leaving(frames)
            if block is None:  # detach() was first
                return
            crossed = not visits.close(block)
        outermost = block.outer is None and visits.everywhere is None
        stranded = outermost and any(run.pending is not None or run.stranded for run in visits.own(block))
        self._take_off()
        if stranded and kind is None:
            raise GraftError(
                "a plugin moved the latents, but scheduler.step was never called on the pipeline's own scheduler "
                "after it: sample with pipe.scheduler"
            )
        if block.outer is None and kind in (None, GeneratorExit):
            self._complain(block, crossed, closing=kind is not None)

    @property
    def runs(self) -> Runs:
        """The state of threads and blocks that are alive; it goes with them."""
        return self._visits.runs

    @property
    def run(self) -> Run:
        """The state of what runs here."""
        return self._visits.run

    @property
    def here(self) -> bool:
        """Whether what runs here is edited now."""
        return self._visits.here() is not None

    @property
    def attached(self) -> bool:
        """Whether the plugins are on."""
        return self._stack is not None

    @property
    def denoisers(self) -> set[int]:
        """Identities of the modules that carry this graft."""
        return {id(adapter.denoiser) for adapter in self.adapters}

    @property
    def edits(self) -> dict[str, list[tuple[Plugin, Edit]]]:
        """The edits on each layer that has some, by its name, in execution order, each with its plugin."""
        placed = self._calls.placed
        return {name: list(placed.edits[name]) for name in placed.layers}

    def report(self) -> Report:
        """What was done since the last attach: layers, calls, backend, updates, skipped ones, displaced processors."""
        moved = [name for name, found in self._present().items() if found is not self._processors.get(name)]
        names = [layer.name for layer in self.layers]
        edited = [layer.module for _, layer in self._calls.placed.layers.values()]
        return make_report(self.pipe, self.plugins, self.runs.tally(), self.backend.seen(edited), names, moved)

    # -- putting on and taking off -----------------------------------------------------------------------------

    def _put_on(self) -> None:
        self._refuse_second()
        if self._stack is not None:
            return
        stack = ExitStack()
        try:
            _INSTALLED.add(self)
            stack.callback(_INSTALLED.discard, self)
            self._bind(stack)
            self._hook(stack)
            self._stack = stack
            self.link(self.pipe.scheduler)
        except BaseException:
            self._stack = None
            stack.close()
            raise

    def _take_off(self) -> None:
        """Take everything off, unless somebody has a block open; waits for the calls that still run under the graft."""
        while not self._visits.wanted and self._visits.flying:
            time.sleep(_WAIT)
        with _LOCK:
            if self._visits.wanted:
                return
            stack, self._stack = self._stack, None
            for run in self.runs:
                run.forget()
            if stack is not None:
                stack.close()

    def _refuse_second(self) -> None:
        here = block_here(self.adapter.denoiser)
        owner = None if here is None else here[0].owner
        for other in list(_INSTALLED):
            # Grafts of other threads are inert here; only one that this context would also run is a conflict.
            same = other is not self and bool(other.denoisers & self.denoisers)
            if same and (other._visits.everywhere is not None or owner is other):
                raise AlreadyGraftedError(
                    f"the {type(self.adapter.denoiser).__name__} already carries a graft here: give all plugins to one "
                    "graft(pipe, a, b), or detach() the other first"
                )

    def _bind(self, stack: ExitStack) -> None:
        self.adapters = adapters_for(self.pipe)
        for adapter in self.adapters:
            adapter.check()
        self.adapter = self.adapters[0]
        self.layers = [layer for adapter in self.adapters for layer in adapter.layers]
        self.texts.adapter = self.adapter
        self._visits.renew(self.adapters)
        self._processors = self._present()
        for plugin in self.plugins:
            stack.callback(plugin.unbind)
            plugin.bind(RunSession(self.run, self.texts))
        self._calls = Calls(place(self.adapters, self.plugins), self.texts, self.backend.kernel, self.link)

    def _hook(self, stack: ExitStack) -> None:
        placed, seams = self._calls.placed, self._calls.seams
        edited = {layer.module for _, layer in placed.layers.values()}
        compiled = {id(adapter): compiled_of(adapter.modules) for adapter in self.adapters}
        for adapter in self.adapters:  # before seams are on, and until they are off
            parts = [part for part in compiled[id(adapter)] if part is not adapter.denoiser]
            stack.enter_context(own_graphs(parts, edited, tuple(map(_kind, placed.plugins))))
        for name, (_, layer) in placed.layers.items():
            seams[name] = stack.enter_context(seam_on(layer.module, functools.partial(self._again, name)))
        for name, (_, module, _) in placed.wrapped.items():
            seams[name] = stack.enter_context(seam_on(module, functools.partial(self._again, name)))
        for adapter in self.adapters:
            denoiser = adapter.denoiser
            before = functools.partial(self._before, adapter)
            stack.callback(hook_denoiser(denoiser, adapter.positional, before, self._after))
            if placed.brings_texts:
                self._meet(stack, adapter)
            if placed.hides and not is_whole(self.pipe, denoiser):
                self._fold(stack, adapter)
            for name, block in adapter.late_blocks() if placed.brings_rows else ():
                seams[name] = stack.enter_context(seam_on(block))
            ask = functools.partial(self._eager, adapter)
            stack.enter_context(choosing(self.pipe, denoiser, compiled[id(adapter)], ask))
        stack.callback(self._unlink)
        stack.enter_context(in_turn(self.pipe))

    def _meet(self, stack: ExitStack, adapter: Adapter) -> None:
        """Let heard texts join: by hooks outside of compiled blocks, or inside of a model that is compiled whole."""
        if is_whole(self.pipe, adapter.denoiser):
            for name, block in meetings(adapter).items():
                self._calls.seams[name] = stack.enter_context(seam_on(block))
            return
        for undo in hook_meetings(adapter, self._visits.running):
            stack.callback(undo)

    def _fold(self, stack: ExitStack, adapter: Adapter) -> None:
        """Let rows run as one; in a model that is compiled whole these hooks would break the graph."""
        self._calls.folding.add(id(adapter))
        for undo in hook_folds(adapter, self._visits.running):
            stack.callback(undo)

    # -- what hooks ask ----------------------------------------------------------------------------------------

    def _before(self, adapter: Adapter, args: tuple[Any, ...], kwargs: Inputs) -> Inputs | None:
        run = self._visits.running()
        if run is not None and run.step.probing:
            return None
        run = self._visits.arrive()
        if run is None:
            return None
        run.adapter = adapter
        return self._calls.before(run, args, kwargs)

    def _after(self, output: Any) -> Any:
        run = self._visits.running()
        if run is not None and run.step.probing:
            return None
        run = self._visits.depart()
        if run is None:
            return None
        return self._calls.aborted(run) if output is None else self._calls.after(run, output)

    def _eager(self, adapter: Adapter, parts: frozenset[int] | None) -> bool:
        """Whether what this thread runs of a denoiser, as a whole or a block of it, must not be compiled code."""
        run, placed = self._visits.running(), self._calls.placed
        if run is not None and parts is not None:
            return run.step.probing or not run.untraced.isdisjoint(parts)
        return not placed.traced and self.here if run is None else not placed.traced or run.step.probing

    def _again(self, name: str) -> Task | None:
        """Work for a layer that a backward pass runs again, on a thread of autograd's."""
        run = run_again_for(self.adapter)
        if run is None:  # also asked by neighbours while this graft goes on, its seam not yet known by name
            return None
        seam = self._calls.seams[name]
        return next((task for other, task in run.plan if other is seam), None)

    def link(self, scheduler: Any) -> None:
        """Follow this scheduler's steps until the graft comes off."""
        with _LOCK:
            if scheduler not in self._links and self._stack is not None:
                self._links.add(scheduler)
                follow(scheduler, self._stepped)

    def _unlink(self) -> None:
        for scheduler in list(self._links):
            leave(scheduler, self._stepped)
        self._links.clear()

    def _stepped(self, sample: Any) -> Any:
        here = self._visits.here()
        if here is None:
            return sample
        here[0].stepped += 1
        return self._calls.stepped(here[1], sample)

    def _complain(self, block: Block, crossed: bool, closing: bool) -> None:
        """Say so where the plugins changed nothing though the pipeline ran."""
        told = complaint(block, crossed) if self._calls.placed.plugins else None
        if told is None:
            return
        if crossed and not closing and not block.calls:
            raise GraftError(told)
        warnings.warn(told, stacklevel=3)


def graft(pipe: Any, *plugins: Plugin, backend: str = "auto", strict: bool = False) -> Graft:
    """Put plugins on a diffusers pipeline.

    Args:
        pipe: any supported diffusers pipeline that you loaded; it keeps its class, weights and call signature.
        plugins: instances, in the order in which edits of equal rank run.
        backend: "auto" (what the denoiser's `set_attention_backend` has set, else torch's own attention), "sdpa" or
            "xformers", for edited layers.
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


def _kind(plugin: Plugin) -> tuple[Any, ...]:
    """What tells the graphs of plugins apart, their numbers aside."""
    return type(plugin), getattr(plugin, "rule", ""), getattr(plugin, "method", ""), getattr(plugin, "form", "")


def _device(pipe: Any) -> torch.device:
    device = getattr(pipe, "_execution_device", None)
    return device if isinstance(device, torch.device) else torch.device("cpu")

"""graft(pipe, *plugins): the one object that installs techniques on a pipeline and takes them off again."""

from __future__ import annotations

import functools
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from types import FrameType, TracebackType
from typing import Any, Self
from weakref import WeakSet

import torch

from ...attention.backends import select
from ...attention.edit import Edit
from ...attention.errors import AlreadyGraftedError, GraftError, SettingTypeError
from ...attention.hook import in_call, in_use
from ...attention.seam import Task, seam_on
from ...plugins.base import Plugin
from ..families import adapters_for
from ..families.base import Adapter, Inputs
from ..families.running import Running, find_running
from ..families.words import in_turn
from .blocks import Block, block_here, complaint, holders, is_suspended
from .calls import Calls
from .compiled import choosing
from .gradients import run_again_for
from .hooks import hook_denoiser
from .plan import Placed, place
from .report import Report, make_report
from .run import Run
from .runs import Local, Runs
from .scheduler_link import follow, leave
from .session import RunSession
from .stream_stage import hook_meetings, joins
from .text import Texts

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
        runs: the state of threads and blocks that are alive; it goes with them.
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
        self.backend = select(backend, device=_device(pipe), strict=strict)
        self.runs = Runs()
        self._local = Local()
        self._stack: ExitStack | None = None
        self._everywhere: Block | None = None
        self._blocks: list[Block] = []
        self._flying: set[int] = set()
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
            if self._everywhere is None:
                self._put_on()
                self._everywhere = Block(self, self.adapter.denoiser, self.run)
        return self

    def detach(self) -> None:
        """Take everything off that `attach` or a block around this put on; idempotent."""
        with _LOCK:
            everywhere, self._everywhere = self._everywhere, None
            while (block := self._block()) is not None:
                self._close(block)
        self._take_off()
        if everywhere is not None:
            self._complain(everywhere, crossed=False, closing=True)

    def __enter__(self) -> Self:
        with _LOCK:
            outer = self._block()
            self._put_on()
            home = self._new_run() if outer is None and self._everywhere is None else self.run
            block = Block(self, self.adapter.denoiser, home, holders(), outer)
            self._blocks.append(block)
            block.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        frames = holders()
        with _LOCK:
            block = self._leaving(frames)
            if block is None:  # detach() was first
                return
            crossed = not self._close(block)
        outermost = block.outer is None and self._everywhere is None
        stranded = outermost and any(run.pending is not None or run.stranded for run in self._own(block))
        self._take_off()
        if stranded and kind is None:
            raise GraftError(
                "a plugin moved the latents, but scheduler.step was never called on the pipeline's own scheduler "
                "after it: sample with pipe.scheduler"
            )
        if block.outer is None and kind in (None, GeneratorExit):
            self._complain(block, crossed, closing=kind is not None)

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
        while not self._wanted and any(in_use(adapter.denoiser, self._flying) for adapter in self.adapters):
            time.sleep(_WAIT)
        with _LOCK:
            if self._wanted:
                return
            stack, self._stack = self._stack, None
            for run in self.runs:
                run.forget()
            if stack is not None:
                stack.close()

    @property
    def _wanted(self) -> bool:
        return self._everywhere is not None or bool(self._blocks)

    def _refuse_second(self) -> None:
        here = block_here(self.adapter.denoiser)
        owner = None if here is None else here[0].owner
        for other in list(_INSTALLED):
            # Grafts of other threads are inert here; only one that this context would also run is a conflict.
            same = other is not self and bool(other.denoisers & self.denoisers)
            if same and (other._everywhere is not None or owner is other):
                raise AlreadyGraftedError(
                    f"the {type(self.adapter.denoiser).__name__} already carries a graft here: give all plugins to one "
                    "graft(pipe, a, b), or detach() the other first"
                )

    def _block(self) -> Block | None:
        """The innermost block of this graft that holds here."""
        here = block_here(self.adapter.denoiser)
        return here[0] if here is not None and here[0].owner is self else None

    def _leaving(self, frames: Sequence[FrameType]) -> Block | None:
        """The block that is left: the last one of these frames, else of this context, else of all."""
        own = [block for block in self._blocks if set(block.frames) & set(frames)]
        last = self._block()
        return own[-1] if own else last if last is not None else self._blocks[-1] if self._blocks else None

    def _close(self, block: Block) -> bool:
        self._blocks.remove(block)
        if not any(in_call(adapter.denoiser) for adapter in self.adapters):
            self._local.calls.clear()  # an interrupt may have left some; inside of a call a generator was collected
            for run in self._own(block):
                run.end()
        return block.close()

    def _bind(self, stack: ExitStack) -> None:
        self.adapters = adapters_for(self.pipe)
        for adapter in self.adapters:
            adapter.check()
        self.adapter = self.adapters[0]
        self.layers = [layer for adapter in self.adapters for layer in adapter.layers]
        self.texts.adapter = self.adapter
        self._homes = {layer.name: adapter for adapter in self.adapters for layer in adapter.layers}
        self.runs, self._local, self._processors = Runs(), Local(), self._present()
        for plugin in self.plugins:
            stack.callback(plugin.unbind)
            plugin.bind(RunSession(self.run, self.texts))
        self._calls = Calls(place(self.adapters, self.plugins), self.texts, self.backend.kernel, self.link)

    def _hook(self, stack: ExitStack) -> None:
        placed, seams = self._calls.placed, self._calls.seams
        for name, (_, layer) in placed.layers.items():
            seams[name] = stack.enter_context(seam_on(layer.module, functools.partial(self._again, name)))
        for adapter in self.adapters:
            denoiser = adapter.denoiser
            before = functools.partial(self._before, adapter)
            stack.callback(hook_denoiser(denoiser, adapter.positional, before, self._after))
            for undo in hook_meetings(adapter, self._running) if placed.brings_texts else ():
                stack.callback(undo)
            for name, block in adapter.late_blocks() if placed.brings_rows else ():
                seams[name] = stack.enter_context(seam_on(block))
            stack.enter_context(choosing(self.pipe, denoiser, functools.partial(self._eager, adapter)))
        stack.callback(self._unlink)
        stack.enter_context(in_turn(self.pipe))

    # -- what hooks ask ----------------------------------------------------------------------------------------

    @property
    def run(self) -> Run:
        """The state of what runs here."""
        here = self._visiting()
        return self._thread_run() if here is None else here[1]

    @property
    def here(self) -> bool:
        """Whether what runs here is edited now."""
        return self._visiting() is not None

    def _thread_run(self) -> Run:
        if self._local.run is None:
            self._local.run = self._new_run()
        return self._local.run

    def _new_run(self) -> Run:
        return self.runs.add(Run(self.adapter, Running(self.pipe, False)))

    def _own(self, block: Block) -> list[Run]:
        """The runs that a block of this thread may have used."""
        return [run for run in (block.home, self._local.run) if run is not None]

    def _visiting(self) -> tuple[Block, Run] | None:
        """The block that holds for what runs here, with its state; None where this graft is not in force."""
        here = block_here(self.adapter.denoiser)
        if here is not None:
            block, held = here
            return (block, block.home if held else self._thread_run()) if block.owner is self else None
        everywhere = None if is_suspended() else self._everywhere
        return None if everywhere is None else (everywhere, self._thread_run())

    def _running(self) -> Run | None:
        """The run whose denoiser call this thread is in."""
        calls = self._local.calls
        return calls[-1] if calls else None

    def _before(self, adapter: Adapter, args: tuple[Any, ...], kwargs: Inputs) -> Inputs | None:
        run, calls = self._running(), self._local.calls
        if run is not None and run.step.probing:
            return None
        here = self._visiting()
        if here is None:
            calls.append(None) if calls else self._note_stray()
            return None
        here[0].count()
        here[1].adapter = adapter
        calls.append(here[1])
        self._flying.add(threading.get_ident())
        return self._calls.before(here[1], args, kwargs)

    def _after(self, output: Any) -> Any:
        run, calls = self._running(), self._local.calls
        if not calls or (run is not None and run.step.probing):
            return None
        calls.pop()
        if run is None:
            return None
        if not calls:
            self._flying.discard(threading.get_ident())
        return self._calls.aborted(run) if output is None else self._calls.after(run, output)

    def _eager(self, adapter: Adapter, parts: frozenset[int] | None) -> bool:
        """Whether what this thread runs of a denoiser, as a whole or a block of it, must not be compiled code."""
        run, placed = self._running(), self._calls.placed
        if run is not None and parts is not None:
            return run.step.probing or not run.untraced.isdisjoint(parts)
        traced = placed.traced and not (placed.brings_texts and joins(adapter))
        return not traced and self.here if run is None else not traced or run.step.probing

    def _again(self, name: str) -> Task | None:
        """Work for a layer that a backward pass runs again, on a thread of autograd's."""
        run = run_again_for(self.adapter)
        seam = self._calls.seams[name]
        return None if run is None else next((task for other, task in run.plan if other is seam), None)

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
        here = self._visiting()
        if here is None:
            return sample
        here[0].stepped += 1
        return self._calls.stepped(here[1], sample)

    # -- what went by ------------------------------------------------------------------------------------------

    def _note_stray(self) -> None:
        """A call of the pipeline itself, plain because it is made elsewhere; whose a loop by hand is nobody knows."""
        if self._blocks and not is_suspended():
            running = find_running(self.adapter.denoiser, self.pipe)
            for block in tuple(self._blocks) if running.found and running.pipe is self.pipe else ():
                block.strays += not block.idle

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


def _device(pipe: Any) -> torch.device:
    device = getattr(pipe, "_execution_device", None)
    return device if isinstance(device, torch.device) else torch.device("cpu")

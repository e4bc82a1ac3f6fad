"""Who runs under a graft: the blocks of code that hold it, the state of threads, and the calls that they are in."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import FrameType

from ...attention.hook import in_call, in_use
from ..families.base import Adapter
from ..families.running import Running, find_running
from .blocks import Block, block_here, is_suspended
from .run import Run
from .runs import Local, Runs


class Visits:
    """The book of one graft.

    Args:
        owner: the graft. adapters: of the denoisers that it is on, the first one's pipeline is the graft's.

    Attributes:
        everywhere: where everything runs under it, that; blocks: of `with`, as they were entered.
        runs: the state of threads and blocks that are alive.
    """

    def __init__(self, owner: object, adapters: Sequence[Adapter]) -> None:
        self.owner = owner
        self.everywhere: Block | None = None
        self.blocks: list[Block] = []
        self._flying: set[int] = set()
        self.renew(adapters)

    def renew(self, adapters: Sequence[Adapter]) -> None:
        """Nobody was here yet: the graft goes on."""
        self.adapters, self.runs, self._local = adapters, Runs(), Local()

    @property
    def wanted(self) -> bool:
        """Whether somebody has it on."""
        return self.everywhere is not None or bool(self.blocks)

    @property
    def flying(self) -> bool:
        """Whether another thread is inside of a call that began under it."""
        return any(in_use(adapter.denoiser, self._flying) for adapter in self.adapters)

    # -- blocks ------------------------------------------------------------------------------------------------

    def enter(self, frames: tuple[FrameType, ...]) -> None:
        """A block that these frames hold begins."""
        outer = self.block()
        home = self._new_run() if outer is None and self.everywhere is None else self.run
        block = Block(self.owner, self.adapters[0].denoiser, home, frames, outer)
        self.blocks.append(block)
        block.open()

    def block(self) -> Block | None:
        """The innermost block that holds here."""
        here = block_here(self.adapters[0].denoiser)
        return here[0] if here is not None and here[0].owner is self.owner else None

    def leaving(self, frames: Sequence[FrameType]) -> Block | None:
        """The block that is left: the last one of these frames, else of this context, else of all."""
        own = [block for block in self.blocks if set(block.frames) & set(frames)]
        last = self.block()
        return own[-1] if own else last if last is not None else self.blocks[-1] if self.blocks else None

    def close(self, block: Block) -> bool:
        """A block is over; whether this context had it."""
        self.blocks.remove(block)
        if not any(in_call(adapter.denoiser) for adapter in self.adapters):
            self._local.calls.clear()  # an interrupt may have left some; inside of a call a generator was collected
            for run in self.own(block):
                run.end()
        return block.close()

    def note_stray(self) -> None:
        """A call of the pipeline itself, plain because it is made elsewhere; whose a loop by hand is nobody knows."""
        pipe = self.adapters[0].pipe
        if self.blocks and not is_suspended():
            running = find_running(self.adapters[0].denoiser, pipe)
            for block in tuple(self.blocks) if running.found and running.pipe is pipe else ():
                block.strays += not block.idle

    # -- runs --------------------------------------------------------------------------------------------------

    @property
    def run(self) -> Run:
        """The state of what runs here."""
        here = self.here()
        return self._thread_run() if here is None else here[1]

    def here(self) -> tuple[Block, Run] | None:
        """The block that holds for what runs here, with its state; None where the graft is not in force."""
        here = block_here(self.adapters[0].denoiser)
        if here is not None:
            block, held = here
            return (block, block.home if held else self._thread_run()) if block.owner is self.owner else None
        everywhere = None if is_suspended() else self.everywhere
        return None if everywhere is None else (everywhere, self._thread_run())

    def own(self, block: Block) -> list[Run]:
        """The runs that a block of this thread may have used."""
        return [run for run in (block.home, self._local.run) if run is not None]

    def _thread_run(self) -> Run:
        if self._local.run is None:
            self._local.run = self._new_run()
        return self._local.run

    def _new_run(self) -> Run:
        return self.runs.add(Run(self.adapters[0], Running(self.adapters[0].pipe, False)))

    # -- calls -------------------------------------------------------------------------------------------------

    def running(self) -> Run | None:
        """The run whose denoiser call this thread is in."""
        calls = self._local.calls
        return calls[-1] if calls else None

    def arrive(self) -> Run | None:
        """This thread calls a denoiser: under the graft with this state, or plain."""
        here, calls = self.here(), self._local.calls
        if here is None:
            calls.append(None) if calls else self.note_stray()
            return None
        here[0].count()
        calls.append(here[1])
        self._flying.add(threading.get_ident())
        return here[1]

    def depart(self) -> Run | None:
        """The denoiser call that this thread was in last is over; its state if it ran under the graft."""
        calls = self._local.calls
        run = calls.pop() if calls else None
        if run is not None and not calls:
            self._flying.discard(threading.get_ident())
        return run

"""Which graft is in force where: the blocks of code that hold one, found by their context or on the call stack.

A generator may go on in another context than the one it began in (a web framework calls each `next()` in a thread of
its own, with a copy of the request's context). Its block is then known by the frame that holds it.
"""

from __future__ import annotations

import contextlib
import dis
import sys
from collections.abc import Generator
from contextvars import ContextVar
from dataclasses import dataclass
from inspect import CO_ASYNC_GENERATOR, CO_GENERATOR
from types import FrameType

from torch import nn

from ...attention.hook import frames_of_threads
from .run import Run

_AWAIT = 3
"""What the instruction behind an `await` says of it."""
_OPEN: list[Block] = []
_HERE: ContextVar[tuple[Block, ...]] = ContextVar("diffgraft_blocks", default=())
_SUSPENDED: ContextVar[bool] = ContextVar("diffgraft_suspended", default=False)


@dataclass(eq=False)
class Block:
    """Code that runs under a graft: a `with` block, or everything while the graft is attached.

    Attributes:
        owner: the graft. denoiser: what it is on.
        home: the state of the calls that its own frames make. frames: those; none where everything is meant.
        outer: the block of the same graft that it lies in.
        calls: denoiser calls that were edited in it. stepped: steps of the scheduler.
        strays: calls of the pipeline itself, meanwhile, that were not in it.
    """

    owner: object
    denoiser: nn.Module
    home: Run
    frames: tuple[FrameType, ...] = ()
    outer: Block | None = None
    calls: int = 0
    stepped: int = 0
    strays: int = 0

    def open(self) -> None:
        """From now on this context runs under it."""
        _OPEN.append(self)
        _HERE.set((*(block for block in _HERE.get() if block in _OPEN), self))

    def close(self) -> bool:
        """It is over, for every context that has it; whether this one had."""
        here = _HERE.get()
        if self in _OPEN:
            _OPEN.remove(self)
        self.frames = ()
        if self in here:
            _HERE.set(tuple(block for block in here if block is not self and block in _OPEN))
        return self in here

    @property
    def idle(self) -> bool:
        """Whether its code stands at a `yield`, so that whatever runs meanwhile is somebody else's."""
        return bool(self.frames) and all(_yielded(frame) for frame in self.frames)

    def count(self) -> None:
        """An edited call."""
        block: Block | None = self
        while block is not None:
            block.calls += 1
            block = block.outer


def _yielded(frame: FrameType) -> bool:
    """Whether a generator's frame was left at a `yield`; an `await` is none."""
    flags = frame.f_code.co_flags
    if not flags & (CO_GENERATOR | CO_ASYNC_GENERATOR):
        return False
    for running in frames_of_threads().values():
        inside: FrameType | None = running
        while inside is not None:
            if inside is frame:
                return False
            inside = inside.f_back
    after = [x for x in dis.get_instructions(frame.f_code) if x.offset > frame.f_lasti and x.opname != "CACHE"][:1]
    return not any(x.opname == "RESUME" and (x.arg or 0) & 3 == _AWAIT for x in after)


def block_here(denoiser: nn.Module) -> tuple[Block, bool] | None:
    """The innermost block that holds for what runs now on a denoiser, and whether its own frames make the call."""
    blocks = [block for block in tuple(_OPEN) if block.denoiser is denoiser]
    if not blocks or _SUSPENDED.get():
        return None
    frame, held = sys._getframe(1), [block for block in reversed(blocks) if block.frames]  # pyright: ignore
    while held and frame is not None:
        for block in held:
            if frame in block.frames:
                return block, True
        frame = frame.f_back
    found = [block for block in _HERE.get() if block in blocks]
    return (found[-1], False) if found else None


def is_suspended() -> bool:
    """Whether this context runs as if no graft were on."""
    return _SUSPENDED.get()


@contextlib.contextmanager
def suspended() -> Generator[None]:
    """Inside, this context runs as if no graft were on: for library code with a sampling loop of its own."""
    token = _SUSPENDED.set(True)
    try:
        yield
    finally:
        _SUSPENDED.reset(token)


def holders() -> tuple[FrameType, ...]:
    """The frames that hold the block which the caller's caller enters or leaves.

    What only passes it on is skipped: `contextlib`, `__enter__` methods, and generators that are context managers,
    which hold it together with whoever entered them.
    """
    found: list[FrameType] = []
    frame: FrameType | None = sys._getframe(2)  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        code = frame.f_code
        if not _plumbing(frame):
            found.append(frame)
            manager = code.co_flags & (CO_GENERATOR | CO_ASYNC_GENERATOR) and frame.f_back
            if not manager or frame.f_back is None or not _plumbing(frame.f_back):
                break
        frame = frame.f_back
    return tuple(found)


def _plumbing(frame: FrameType) -> bool:
    return frame.f_code.co_filename == contextlib.__file__ or frame.f_code.co_name in ("__enter__", "__aenter__")


def complaint(block: Block, crossed: bool) -> str | None:
    """What to say of a block in which the plugins changed nothing, or not all, though the pipeline ran; None mostly.

    Args:
        crossed: whether it ended in another context than the one it began in.
    """
    if block.strays and (crossed or not block.calls):
        return (
            f"{block.strays} calls of the denoiser by this pipeline were made in another context than the one that "
            "this graft's `with` edits, such as a thread of a pool, and ran plain; if they were to be edited use "
            "attach(), which edits every thread's calls until detach(), or put the `with` into what the thread runs"
        )
    if block.stepped and not block.calls:
        return (
            f"the pipeline ran {block.stepped} steps, but not on the {type(block.denoiser).__name__} that the graft is "
            "on, so nothing was edited: it was replaced meanwhile; graft after that"
        )
    return None

"""One hook a module and a side of it, on which everybody's functions sit; a copy of the module gets an empty one.

torch registers and removes a hook in two steps, and reads the lists in between. So a hook goes on empty and is filled
afterwards; it is emptied first, and goes off when no other thread is inside of the model.
"""

from __future__ import annotations

import functools
import gc
import sys
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, cast

import torch
from torch import nn

_LOCK, _LOOKING = threading.RLock(), threading.RLock()
_ON: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[Gate]] = weakref.WeakKeyDictionary()
"""The hooks that are on a model; weak, for what sits on them holds the model."""
_BEFORE, _AFTER = 2, 3
_CALL = nn.Module._wrapped_call_impl.__code__  # pyright: ignore[reportPrivateUsage]


def _nothing() -> None:
    return None


class Gate:
    """The hook: calls its functions in turn until one returns something.

    Attributes:
        functions: called with what torch gives the hook, without the module.
        takes: how many things those are; a thread that came by before torch knew all of it is left alone.
        root: the model, weakly. handle: takes the hook off. Both are None in a copy.
    """

    def __init__(self, takes: int) -> None:
        self.functions: tuple[Callable[..., Any], ...] = ()
        self.takes = takes
        self.root: Callable[[], nn.Module | None] = _nothing
        self.handle: Any = None

    @torch.compiler.disable  # a compiled model calls its own hooks outside of what is traced, and they stay there
    def __call__(self, module: Any, *given: Any) -> Any:
        if len(given) != self.takes:
            return None
        for function in self.functions:
            result = function(*given)
            if result is not None:
                return result
        root = self.root()
        if (
            root is not None
            and root is module
            and not self.functions
            and self.takes == _AFTER
            and given[-1] is not None
        ):
            sweep(root)  # whoever emptied it met somebody inside
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> Gate:
        return Gate(self.takes)

    def __reduce__(self) -> Any:
        return Gate, (self.takes,)


def hook_before(root: nn.Module, module: nn.Module, function: Callable[..., Any]) -> Callable[[], None]:
    """Call function(args, kwargs) before a module of the model `root` runs; it may return both anew.

    Returns:
        the undo, which may be called in any order among functions and while other threads run the model.
    """
    return _put(root, module, function, _BEFORE)


def hook_after(root: nn.Module, module: nn.Module, function: Callable[..., Any]) -> Callable[[], None]:
    """Call function(args, kwargs, output) after a module of the model `root` ran; it may return another output.

    The output is None where the module raised.
    """
    return _put(root, module, function, _AFTER)


def _put(root: nn.Module, module: nn.Module, function: Callable[..., Any], takes: int) -> Callable[[], None]:
    with _LOCK:
        gate = next((gate for gate in _gates(module) if gate.takes == takes), None) or _register(root, module, takes)
        gate.functions = (*gate.functions, function)
    return functools.partial(_take, root, gate, function)


def _take(root: nn.Module, gate: Gate, function: Callable[..., Any]) -> None:
    with _LOCK:
        gate.functions = tuple(kept for kept in gate.functions if kept is not function)
    sweep(root)


def _register(root: nn.Module, module: nn.Module, takes: int) -> Gate:
    gate = Gate(takes)
    gate.root, hook = weakref.ref(root), cast("Callable[..., Any]", gate)
    if takes == _AFTER:
        gate.handle = module.register_forward_hook(hook, with_kwargs=True, always_call=True)
    else:
        gate.handle = module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
    _ON.setdefault(root, weakref.WeakSet()).add(gate)
    return gate


def sweep(root: nn.Module) -> None:
    """Take the empty hooks off a model, unless another thread is inside of it."""
    with _LOCK:
        on = _ON.get(root, weakref.WeakSet[Gate]())
        empty = [gate for gate in on if not gate.functions]
        if empty and not in_use(root):
            for gate in empty:
                gate.handle.remove()
                on.discard(gate)


def in_use(module: nn.Module, threads: set[int] | None = None) -> bool:
    """Whether another thread, or another one of `threads`, is inside a call of the module."""
    here = threading.get_ident()
    frames = frames_of_threads()
    return any(
        _inside(module, frame)
        for ident, frame in frames.items()
        if ident != here and (threads is None or ident in threads)
    )


def frames_of_threads() -> dict[int, FrameType]:
    """What each thread runs now.

    The collector waits meanwhile. Python before 3.11.8 and 3.12.2 holds its list of threads locked while it makes this
    one; a collection in between may let another thread run, and if that one starts or ends a thread, all stand still.
    """
    with _LOOKING:
        on = gc.isenabled()
        gc.disable()
        try:
            return sys._current_frames()  # pyright: ignore[reportPrivateUsage]
        finally:
            if on:
                gc.enable()


def in_call(module: nn.Module) -> bool:
    """Whether this thread is inside a call of the module."""
    return _inside(module, sys._getframe(1))  # pyright: ignore[reportPrivateUsage]


def _inside(module: nn.Module, frame: Any) -> bool:
    while frame is not None:
        if frame.f_code is _CALL and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False


def _gates(module: nn.Module) -> list[Gate]:
    """The hooks of this kind on a module; those that came with a copy are nobody's."""
    either: Any = module
    hooks: list[Any] = [*either._forward_pre_hooks.values(), *either._forward_hooks.values()]
    return [hook for hook in hooks if isinstance(hook, Gate) and hook.handle is not None]

"""Compiled models under a graft: what cannot be traced runs eager, for its own calls only.

Torch counts graphs by code object and keeps eight for one; blocks of one class share theirs, and a class may have three
kinds of them. So under a graft a compiled block runs a copy of its code, one for each kind of graft, with eight of its
own: the plain graphs and those of other plugins are not counted.
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

_LOCK = threading.RLock()
_CALL, _CODE = "_compiled_call_impl", "_diffgraft_code"
Ask = Callable[[frozenset[int] | None], bool]
"""ask(parts): whether what this thread runs now must run eager: the whole denoiser where `parts` is None, else the part
of it that consists of the modules of these identities."""


class Choice:
    """Stands in for a module's compiled call: runs it, or the module's eager one where somebody asks for that."""

    def __init__(self, compiled: Callable[..., Any], eager: Callable[..., Any], parts: frozenset[int] | None) -> None:
        self.compiled, self.eager, self.parts = compiled, eager, parts
        self.asks: tuple[Ask, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.eager if any(ask(self.parts) for ask in self.asks) else self.compiled)(*args, **kwargs)


def compiled_of(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Those that are compiled."""
    return [module for module in modules if module.__dict__.get(_CALL) is not None]


def is_whole(pipe: Any, denoiser: nn.Module) -> bool:
    """Whether a pipeline's denoiser is compiled as one."""
    return denoiser.__dict__.get(_CALL) is not None or bool(_wrappers(pipe, denoiser))


def _wrappers(pipe: Any, denoiser: nn.Module) -> list[nn.Module]:
    """What `torch.compile` made of the denoiser."""
    parts = vars(pipe).values()
    return [part for part in parts if isinstance(part, nn.Module) and getattr(part, "_orig_mod", None) is denoiser]


@contextmanager
def choosing(pipe: Any, denoiser: nn.Module, compiled: Sequence[nn.Module], ask: Ask) -> Generator[None]:
    """Inside, whatever is compiled of a pipeline's denoiser asks first: its modules, or what `torch.compile` made."""
    places = [(each, _CALL) for each in compiled]
    places += [(part, "forward") for part in _wrappers(pipe, denoiser)]
    for module, name in places:
        _put(module, name, denoiser, ask)
    try:
        yield
    finally:
        for module, name in places:
            _take(module, name, ask)


def _put(module: nn.Module, name: str, denoiser: nn.Module, ask: Ask) -> None:
    with _LOCK:
        choice = module.__dict__[name]
        if not isinstance(choice, Choice):
            own: Any = module
            whole = name != _CALL or module is denoiser
            parts = None if whole else frozenset(map(id, module.modules()))
            choice = module.__dict__[name] = Choice(choice, own._call_impl if name == _CALL else denoiser, parts)
        choice.asks = (*choice.asks, ask)


def _take(module: nn.Module, name: str, ask: Ask) -> None:
    with _LOCK:
        choice = module.__dict__.get(name)
        if isinstance(choice, Choice):
            choice.asks = tuple(kept for kept in choice.asks if kept is not ask)
            if not choice.asks:
                module.__dict__[name] = choice.compiled


# -- graphs of their own -------------------------------------------------------------------------------------------


@dataclass
class _Copy:
    """What a module carries whose `forward` is a copy meanwhile: that, and how many want it."""

    forward: Any
    users: int = 0


@contextmanager
def own_graphs(parts: Sequence[nn.Module], edited: set[nn.Module], kind: Hashable) -> Generator[None]:
    """Inside, compiled parts of a denoiser that hold edited layers make and find graphs of their own.

    Args:
        kind: grafts of one kind share graphs.
    """
    holders = [part for part in parts if part not in edited and not edited.isdisjoint(part.modules())]
    copied = [part for part in holders if _copy_on(part, kind)]
    try:
        yield
    finally:
        for part in copied:
            _copy_off(part)


def _copy_on(module: nn.Module, kind: Hashable) -> bool:
    own = module.__dict__
    with _LOCK:
        if _CODE not in own:
            if "forward" in own:  # somebody's, and so is its code
                return False
            own["forward"] = types.MethodType(_copied(type(module).forward, kind), module)
            own[_CODE] = _Copy(own["forward"])
        own[_CODE].users += 1
        return True


def _copy_off(module: nn.Module) -> None:
    own = module.__dict__
    with _LOCK:
        copy: _Copy = own[_CODE]
        copy.users -= 1
        if not copy.users:
            del own[_CODE]
            if own.get("forward") is copy.forward:  # nobody has wrapped it
                del own["forward"]


@functools.cache
def _copied(own: Any, kind: Hashable) -> Any:
    """A function of the same code, which torch takes for another one."""
    made = types.FunctionType(own.__code__.replace(), own.__globals__, own.__name__, own.__defaults__, own.__closure__)
    made.__kwdefaults__ = own.__kwdefaults__
    return functools.update_wrapper(made, own)

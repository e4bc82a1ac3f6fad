"""Compiled models under a graft: what cannot be traced runs eager, for its own calls only."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from torch import nn

_LOCK = threading.RLock()
_CALL = "_compiled_call_impl"
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


def is_whole(pipe: Any, denoiser: nn.Module) -> bool:
    """Whether a pipeline's denoiser is compiled as one."""
    return denoiser.__dict__.get(_CALL) is not None or bool(_wrappers(pipe, denoiser))


def _wrappers(pipe: Any, denoiser: nn.Module) -> list[nn.Module]:
    """What `torch.compile` made of the denoiser."""
    parts = vars(pipe).values()
    return [part for part in parts if isinstance(part, nn.Module) and getattr(part, "_orig_mod", None) is denoiser]


@contextmanager
def choosing(pipe: Any, denoiser: nn.Module, ask: Ask) -> Generator[None]:
    """Inside, whatever is compiled of a pipeline's denoiser asks first: it, a part of it, or `torch.compile`'s own."""
    places = [(each, _CALL) for each in denoiser.modules() if each.__dict__.get(_CALL) is not None]
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

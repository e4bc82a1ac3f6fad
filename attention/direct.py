"""The short way through the commonest layer: its processor's own code, in which attention is the caller's.

A `TorchFunctionMode` is handed each of the twenty torch calls of a layer for the sake of one. Where a layer of
diffusers has the processor that it is born with, that processor's code runs as it stands, but in globals in which `F`
names us, and the layer's own `forward`, which asks `inspect` for a signature each time, is left out. Whatever is not
exactly as it is known here goes the long way.
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import nn

from .memo import TextMemo

Attend = Callable[[Any, Any], Any]
"""attend(args, kwargs): in place of scaled dot-product attention with these arguments."""

_SDPA = F.scaled_dot_product_attention
_HERE = threading.local()
_TAKES = {"encoder_hidden_states", "attention_mask"}
_NAMES = (
    "set", "inspect", "signature", "processor", "__call__", "parameters", "keys", "items", "len", "logger", "warning",
    "__class__", "__name__",
)  # fmt: skip
_KNOWN = Attention.forward.__code__.co_names == _NAMES
"""Whether `forward` is the one whose work is done here: it hands its three arguments on to the processor."""


class _Functional:
    """Stands in for `torch.nn.functional` in a processor's code."""

    @staticmethod
    def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Any:
        return _HERE.attend(args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)


class _Remembering:
    """A layer as its processor sees it, whose products of one text are remembered."""

    def __init__(self, module: Any, memo: TextMemo, text: torch.Tensor) -> None:
        vars(self).update(vars(module))  # what a module has is quicker found here than asked of it each time
        vars(self).update(module._modules)
        self._layer, self._memo, self._text = module, memo, text

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    @property
    def to_k(self) -> Callable[[torch.Tensor], torch.Tensor]:
        return self._keys

    @property
    def to_v(self) -> Callable[[torch.Tensor], torch.Tensor]:
        return self._values

    def _keys(self, given: torch.Tensor) -> torch.Tensor:
        return self._projected("to_k", given)

    def _values(self, given: torch.Tensor) -> torch.Tensor:
        return self._projected("to_v", given)

    def _projected(self, name: str, given: torch.Tensor) -> torch.Tensor:
        linear = self._layer._modules[name]
        if given is not self._text:
            return linear(given)
        return self._memo.linear(name, F.linear, (given, linear.weight, linear.bias), {})


def _is_plain(module: Any) -> bool:
    """Whether calling the module is a matrix product and nothing else: no LoRA, hook, offloading, compiled code."""
    if type(module) is not nn.Linear:
        return False
    own = vars(module)
    hooked = own["_forward_hooks"] or own["_forward_pre_hooks"]
    return not (hooked or "forward" in own or own.get("_compiled_call_impl"))


def direct(forward: Callable[..., Any], args: Any, kwargs: Any, memo: TextMemo | None) -> Callable[..., Any] | None:
    """What runs a layer's processor in place of its `forward`, with an `Attend` before the arguments of that.

    None where that would not be the same: another forward, another processor, further arguments.

    Args:
        memo: keeps the layer's products of the text among the arguments.
    """
    if not _KNOWN or getattr(forward, "__func__", None) is not Attention.forward or len(args) != 1:
        return None
    bound: Any = forward
    module, processor = bound.__self__, bound.__self__.processor
    known = type(processor) is AttnProcessor2_0 and kwargs.keys() <= _TAKES
    if not known or F.scaled_dot_product_attention is not _SDPA:
        return None
    code, text = _rebound(AttnProcessor2_0.__call__), kwargs.get("encoder_hidden_states")
    if memo is not None and isinstance(text, torch.Tensor):
        parts = module._modules
        if not (_is_plain(parts.get("to_k")) and _is_plain(parts.get("to_v"))):
            return None
        module = _Remembering(module, memo, text)
    return None if code is None else functools.partial(_run, code, processor, module)


def _run(code: Callable[..., Any], processor: Any, module: Any, attend: Attend, hidden: Any, **rest: Any) -> Any:
    before = getattr(_HERE, "attend", None)
    _HERE.attend = attend
    try:
        return code(processor, module, hidden, **rest)
    finally:
        _HERE.attend = before


@functools.cache
def _rebound(function: Any) -> Callable[..., Any] | None:
    """The same code with another `F` among its globals; None where it names none."""
    if not isinstance(function, types.FunctionType) or function.__globals__.get("F") is not F:
        return None
    names = function.__globals__ | {"F": _Functional()}
    made = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made

"""Attention that diffusers' dispatcher gives to another backend than torch's, edited before it goes there.

`set_attention_backend` makes processors call flex, flash, sage or xformers in place of torch's attention. While an
edited layer runs, that backend's entry of the dispatcher's table asks whether this thread edits; other threads and
other layers pass through. What an edit leaves to the kernel then runs on the pipeline's own backend, with the keys and
values as the edit made them; what needs the log-sum-exp or the probabilities is computed with torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from .call import Kernel
from .errors import BackendError

_THROUGH_TORCH = ("native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math")
"""Backends that call scaled dot-product attention, where it is caught."""
_HANDED = ("query", "key", "value", "attn_mask", "is_causal", "scale", "enable_gqa")
_NoModes: Any = getattr(torch, "_C").DisableTorchFunction  # noqa: B009
_LOCK = threading.Lock()
_HERE = threading.local()
_ENTRIES: dict[Any, _Entry] = {}


class Ear(Protocol):
    """What takes an attention's place."""

    def attend(self, args: Any, kwargs: Any) -> torch.Tensor:
        """In place of scaled dot-product attention with these arguments, tensors [B, H, L, D]."""
        ...


class _Entry:
    """Stands in for a backend's function in the dispatcher's table while layers of it are edited."""

    def __init__(self, name: Any, original: Callable[..., Any]) -> None:
        self.name, self.original, self.users = name, original, 0

    def __call__(self, **given: Any) -> Any:
        ear: Ear | None = getattr(_HERE, "ear", None)
        if ear is None:
            return self.original(**given)
        if not isinstance(given.get("attn_mask"), torch.Tensor | None):
            raise BackendError(
                f"a layer on the attention backend {_text(self.name)!r} hands over a mask of blocks, which no edit "
                "can read: leave it out by layers=, or call set_attention_backend('native') on the denoiser"
            )
        asked = {name: given[name] for name in _HANDED if name in given}
        asked |= {name: _turned(given[name]) for name in _HANDED[:3]}
        return _turned(ear.attend((), asked))


def backend_of(module: Any) -> Any:
    """The dispatcher's backend that a layer would call, None where torch's own attention is reached."""
    processor = getattr(module, "processor", None)
    if not hasattr(processor, "_attention_backend"):
        return None
    backend: Any = getattr(processor, "_attention_backend", None)
    backend = _table().get_active_backend()[0] if backend is None else backend
    return None if _text(backend) in _THROUGH_TORCH else backend


@contextmanager
def caught(backend: Any, ear: Ear) -> Generator[None]:
    """Inside, this thread's attention by this backend goes to `ear`; None is no backend."""
    if backend is None:
        yield
        return
    before = getattr(_HERE, "ear", None)
    _enter(backend)
    _HERE.ear = ear
    try:
        yield
    finally:
        _HERE.ear = before
        _leave(backend)


def kernel_of(backend: Any) -> Kernel:
    """The backend as a kernel for tensors [B, H, L, D]."""
    table = _table()
    entry, takes = table._backends[backend], table._supported_arg_names[backend]
    own = entry.original if isinstance(entry, _Entry) else entry

    def kernel(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None = None, **rest: Any
    ) -> torch.Tensor:
        given = {"query": _turned(q), "key": _turned(k), "value": _turned(v), "attn_mask": attn_mask, **rest}
        try:
            with _NoModes():  # what it calls is no attention of the layer's
                return _turned(own(**{name: value for name, value in given.items() if name in takes}))
        except ValueError as error:
            if attn_mask is None:
                raise
            raise BackendError(
                f"the attention backend {_text(backend)!r} takes no mask, and an edited layer has one ({error}): call "
                "set_attention_backend('native') on the denoiser, or leave the layer out by layers="
            ) from error

    return kernel


def _enter(backend: Any) -> None:
    with _LOCK:
        table = _table()._backends
        entry = _ENTRIES.get(backend)
        if entry is None:
            entry = _ENTRIES[backend] = table[backend] = _Entry(backend, table[backend])
        entry.users += 1


def _leave(backend: Any) -> None:
    with _LOCK:
        entry = _ENTRIES[backend]
        entry.users -= 1
        if not entry.users:
            del _ENTRIES[backend]
            table = _table()._backends
            if table.get(backend) is entry:
                table[backend] = entry.original


def _turned(tensor: torch.Tensor) -> torch.Tensor:
    """[B, H, L, D] of [B, L, H, D], and back."""
    return tensor.transpose(1, 2)


def _text(backend: Any) -> str:
    return str(getattr(backend, "value", backend))


def _table() -> Any:
    from diffusers.models import attention_dispatch

    return getattr(attention_dispatch, "_AttentionBackendRegistry")  # noqa: B009

"""The seam: an unmodified attention processor runs, and its one call of scaled dot-product attention is edited.

The layer's `forward` is wrapped on the instance. While it runs, a `TorchFunctionMode` catches
`F.scaled_dot_product_attention`, where q, k and v arrive after LoRA, norms, rotary embeddings and fused projections.
The processor stays the user's own.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from .call import AttentionCall, Kernel, Project
from .edit import Edit, attend
from .errors import AttentionNotReachedError
from .layer import AttentionLayer
from .memo import TextMemo
from .step import Step

_SDPA = F.scaled_dot_product_attention
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_LOCK = threading.RLock()


class StopForward(BaseException):
    """Ends a probe once the last layer that matters has been seen. Not an error: nothing but the probe catches it."""


@dataclass
class Work:
    """What a source wants done in one run of a layer."""

    step: Step
    edits: Sequence[Edit]
    kernel: Kernel = _SDPA
    text: slice | None = None
    memo: TextMemo | None = None


class Source(Protocol):
    """Whoever holds edits for a layer: a graft, or an `EditProcessor`."""

    def work(self, layer: AttentionLayer) -> Work | None:
        """The edits to run now in this context, None where the layer is to be left alone."""
        ...


class Tap(TorchFunctionMode):
    """While active, sends each scaled dot-product attention through `attend`."""

    def __init__(
        self, layer: AttentionLayer, work: Work, project: Project | None = None, words: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.layer, self.task, self.calls, self.project, self.words = layer, work, 0, project, words

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and args and args[0] is self.words and self.task.memo is not None:
            return self.task.memo.linear(self.layer.name, func, args, kwargs or {})
        if func is not _SDPA:
            return func(*args, **(kwargs or {}))
        given: dict[str, Any] = dict(zip(_ARGUMENTS, args, strict=False)) | (kwargs or {})
        number, self.calls = self.calls, self.calls + 1
        edits = [edit for edit in self.task.edits if number == 0 or edit.every_call]
        if not edits:
            return self.task.kernel(*args, **(kwargs or {}))
        return attend(self._call(given, number), edits)

    def _call(self, given: dict[str, Any], number: int) -> AttentionCall:
        q, scale = given["query"], given.get("scale")
        return AttentionCall(
            self.layer, q, given["key"], given["value"], given.get("attn_mask"),
            1 / math.sqrt(q.shape[-1]) if scale is None else scale, number, self.task.step, self.task.text,
            given.get("is_causal", False), given.get("enable_gqa", False), self.task.kernel, self.project,
        )  # fmt: skip


class _Listener(Tap):
    """Keeps the first attention call and ends the forward there."""

    heard: AttentionCall | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not _SDPA:
            return func(*args, **(kwargs or {}))
        self.heard = self._call(dict(zip(_ARGUMENTS, args, strict=False)) | (kwargs or {}), 0)
        raise StopForward


def project_text(
    layer: AttentionLayer, work: Work, forward: Callable[..., Any], arguments: dict[str, Any],
    text: torch.Tensor, mask: torch.Tensor | None,
) -> AttentionCall:  # fmt: skip
    """The attention call that a layer would make for another text: its own processor runs on one image token, up to
    its attention, so LoRA, norms, fused projections and mask handling are the layer's own.

    Args:
        forward, arguments: what is running, and its arguments by name.
        text: [n, L, C] as this layer takes it. mask: None or additive [n, 1, L].
    """
    given = arguments.get("encoder_hidden_states")
    other = (text, *given[1:]) if isinstance(given, tuple) else text  # the rest is an IP-Adapter's
    hidden = arguments["hidden_states"][:1, :1].expand(len(text), -1, -1)
    changed = {"hidden_states": hidden, "encoder_hidden_states": other, "attention_mask": mask}
    with _Listener(layer, work) as listener, contextlib.suppress(StopForward):
        forward(**(arguments | changed))
    assert listener.heard is not None
    return listener.heard


def _text_of(arguments: dict[str, Any]) -> torch.Tensor | None:
    given = arguments.get("encoder_hidden_states")
    given = given[0] if isinstance(given, tuple) else given
    return given if isinstance(given, torch.Tensor) else None


def _named(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(forward).bind(*args, **kwargs)
    rest = next((p.name for p in bound.signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")
    named = dict(bound.arguments)
    return named | named.pop(rest, {})


def run_edited(layer: AttentionLayer, work: Work, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run `forward` of a layer with its attention edited.

    Raises:
        AttentionNotReachedError: the layer's processor never called scaled dot-product attention.
    """

    def project(text: torch.Tensor, mask: torch.Tensor | None) -> AttentionCall:
        return project_text(layer, work, forward, _named(forward, args, kwargs), text, mask)

    with Tap(layer, work, project, _text_of(kwargs) if work.memo else None) as tap:
        out = forward(*args, **kwargs)
    if not tap.calls:
        processor = type(getattr(layer.module, "processor", None)).__name__
        raise AttentionNotReachedError(
            f"{layer.name} ran with {processor}, which does not use torch's scaled_dot_product_attention, so it cannot "
            "be edited: call pipe.disable_attention_slicing(), pipe.disable_xformers_memory_efficient_attention() or "
            "set the layer's processor to AttnProcessor2_0"
        )
    return out


class Seam:
    """Stands in for one module's `forward`; passes through unless a source has work in this context.

    A copy of the module gets the original back, bound to the copy.
    """

    def __init__(self, layer: AttentionLayer) -> None:
        self.layer, self.sources = layer, list[Source]()
        self.original: Callable[..., Any] = layer.module.forward
        self.was_own = "forward" in layer.module.__dict__
        functools.update_wrapper(self, self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for source in tuple(self.sources):
            work = source.work(self.layer)
            if work is not None:
                return run_edited(self.layer, work, self.original, *args, **kwargs)
        return self.original(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.original, memo)

    def __reduce__(self) -> Any:
        return getattr, (self.layer.module, "forward")


def install(layer: AttentionLayer, source: Source) -> Callable[[], None]:
    """Let `source` edit `layer`; returns the undo, which may be called in any order among sources."""
    with _LOCK:
        seam = layer.module.__dict__.get("forward")
        if not isinstance(seam, Seam):
            seam = Seam(layer)
            layer.module.forward = seam
        seam.sources.append(source)
    return functools.partial(_remove, layer.module, seam, source)


def _remove(module: nn.Module, seam: Seam, source: Source) -> None:
    with _LOCK:
        if source in seam.sources:
            seam.sources.remove(source)
        # Whoever wrapped on top of the seam holds it as "the original": then it stays, inert.
        if seam.sources or module.__dict__.get("forward") is not seam:
            return
        if seam.was_own:
            module.forward = seam.original
        else:
            del module.__dict__["forward"]


def stop_probe(step: Step) -> None:
    """End the probe that is running, if it may end early; for an edit that has seen all it needs."""
    if step.probing and step.may_stop:
        raise StopForward

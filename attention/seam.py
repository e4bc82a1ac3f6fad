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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from .call import AttentionCall, Kernel, Project, TextCall
from .edit import Edit, attend
from .errors import AttentionNotReachedError
from .layer import AttentionLayer
from .memo import TextMemo
from .sequence import Columns
from .step import Step

_SDPA = F.scaled_dot_product_attention
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_LOCK = threading.RLock()


class StopForward(BaseException):
    """Ends a probe once the last layer that matters has been seen. Not an error: nothing but the probe catches it."""


@dataclass
class Work:
    """What a source wants done in one run of a layer.

    Attributes:
        step: where in the run. edits: sorted by their order. kernel: for rows without explicit probabilities.
        text: columns of the text in a joint sequence, from its end where negative.
        memo: keeps the products of an unchanged text.
        columns: where further texts stand beside the prompt's: one for all rows, or one a row where they differ.
        asks: how the layer asks its text.
    """

    step: Step
    edits: Sequence[Edit]
    kernel: Kernel = _SDPA
    text: slice | None = None
    memo: TextMemo | None = None
    columns: Sequence[Columns] = ()
    asks: TextCall = TextCall()


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
        edits = [edit for edit in self.task.edits if number == self.task.asks.own or edit.every_call]
        if not edits:
            return self.task.kernel(*args, **(kwargs or {}))
        if len(self.task.columns) > 1:
            return self._by_row(given, number, edits)
        call = self._call(given, number)
        if self.task.columns:
            call.text, call.streams = self.task.columns[0].text, self.task.columns[0].streams
        return attend(call, edits)

    def _by_row(self, given: dict[str, Any], number: int, edits: Sequence[Edit]) -> torch.Tensor:
        """Rows whose texts differ in length, one at a time and without their padding."""
        step, outs = self.task.step, list[torch.Tensor]()
        for row, columns in enumerate(self.task.columns):
            kept, whole = columns.kept()
            own = dict(given, attn_mask=_mask_of(given.get("attn_mask"), row, kept))
            own |= {name: given[name][row : row + 1, :, kept] for name in ("query", "key", "value")}
            call = self._call(own, number)
            rows = {name: slice(0, 1) for name, held in step.rows.items() if held.start <= row < held.stop}
            call.step, call.text, call.streams = replace(step, rows=rows), whole.text, whole.streams
            out = attend(call, edits)
            place = torch.tensor(kept, device=out.device)
            padded = out.new_zeros(1, out.shape[1], given["query"].shape[-2], out.shape[-1])
            outs.append(padded.index_copy(2, place, out))
        return torch.cat(outs)

    def _call(self, given: dict[str, Any], number: int) -> AttentionCall:
        q, k, v, scale = given["query"], given["key"], given["value"], given.get("scale")
        step, text = _by_frame(self.task.step, len(q)), self.task.text
        text = None if text is None else slice(*text.indices(k.shape[-2])[:2])  # it may be counted from the end
        if given.get("enable_gqa") and k.shape[1] != q.shape[1]:  # no kernel that gives the log-sum-exp knows groups
            k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], 1) for tensor in (k, v))
        return AttentionCall(
            self.layer, q, k, v, given.get("attn_mask"), 1 / math.sqrt(q.shape[-1]) if scale is None else scale,
            number, step, text, given.get("is_causal", False), False, self.task.kernel,
            self.project,
        )  # fmt: skip


def _by_frame(step: Step, batch: int) -> Step:
    """The step with its rows as a layer has them that takes a film's frames one by one: each row so many times."""
    total = max((rows.stop for rows in step.rows.values()), default=batch)
    if batch <= total or batch % total:
        return step
    n = batch // total
    return replace(step, rows={name: slice(rows.start * n, rows.stop * n) for name, rows in step.rows.items()})


def _mask_of(mask: torch.Tensor | None, row: int, kept: list[int]) -> torch.Tensor | None:
    """One row's mask over its kept columns, None where it hides nothing."""
    if mask is None:
        return None
    own = (mask[row : row + 1] if len(mask) > 1 else mask)[..., kept]
    own = own[..., kept, :] if own.shape[-2] > 1 else own
    return None if own.dtype == torch.bool and bool(own.all()) else own


class _Listener(Tap):
    """Keeps the layer's own attention call and ends the forward there."""

    heard: AttentionCall | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not _SDPA:
            return func(*args, **(kwargs or {}))
        number, self.calls = self.calls, self.calls + 1
        if number != self.task.asks.own:
            return func(*args, **(kwargs or {}))
        self.heard = self._call(dict(zip(_ARGUMENTS, args, strict=False)) | (kwargs or {}), 0)
        raise StopForward


def project_text(
    layer: AttentionLayer, work: Work, forward: Callable[..., Any], arguments: dict[str, Any],
    text: torch.Tensor, others: Mapping[str, Any],
) -> AttentionCall:  # fmt: skip
    """The attention call that a layer would make for another text.

    Its own processor runs on one image token, or on one row of them where it rotates queries, up to its attention, so
    LoRA, norms, fused projections and mask handling are the layer's own.

    Args:
        forward, arguments: what is running, and its arguments by name.
        text: [n, L, C] as the layer's block takes it. others: arguments of the layer that go with it, its
            `attention_mask` among them.
    """
    asks = work.asks
    text = text if asks.through is None else asks.through(text)
    given = arguments.get("encoder_hidden_states")
    other = (text, *given[1:]) if isinstance(given, tuple) else text  # the rest is an IP-Adapter's
    image = arguments["hidden_states"][:1] if asks.whole else arguments["hidden_states"][:1, :1]
    changed = {"hidden_states": image.expand(len(text), -1, -1), "encoder_hidden_states": other}
    changed |= {name: value for name, value in others.items() if value is not None or name in arguments}
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

    def project(text: torch.Tensor, others: Mapping[str, Any]) -> AttentionCall:
        return project_text(layer, work, forward, _named(forward, args, kwargs), text, others)

    with Tap(layer, work, project, _text_of(kwargs) if work.memo else None) as tap:
        out = forward(*args, **kwargs)
    if not tap.calls:
        raise AttentionNotReachedError(f"{layer.name} {_not_reached(layer)}")
    return out


def _not_reached(layer: AttentionLayer) -> str:
    """Why a layer's attention was not caught, and what to do."""
    processor = getattr(layer.module, "processor", None)
    name = type(processor).__name__
    if hasattr(processor, "_attention_backend"):  # diffusers' dispatcher; a backend set on one model holds for all
        from diffusers.models import attention_dispatch

        own = getattr(processor, "_attention_backend", None)
        registry: Any = getattr(attention_dispatch, "_AttentionBackendRegistry")  # noqa: B009
        backend: Any = own or registry.get_active_backend()[0]
        return (
            f"ran on the attention backend {getattr(backend, 'value', backend)!r}, where it cannot be edited: call "
            "set_attention_backend('native') on the denoiser, or leave this layer out by layers="
        )
    return (
        f"ran with {name}, which does not use torch's scaled_dot_product_attention, so it cannot be edited: call "
        "pipe.disable_attention_slicing(), pipe.disable_xformers_memory_efficient_attention() or set the layer's "
        "processor to AttnProcessor2_0"
    )


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

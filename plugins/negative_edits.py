"""How a negative text gets into attention: beside the prompt in cross-attention, as its own stream in joint attention.

Cross-attention: the layer itself projects the negative's keys and values, once a pipeline call, and they are kept.

Joint attention: the negative's tokens ride in front of the prompt's through the whole model, so every norm, gate and
MLP of the text side serves them as it is. In attention they are cut out again, the image attends to itself once, and
its attention over the prompt and over the negative are merged with that by log-sum-exp. No image token is computed
twice.

Attention of the image over keys of both, in which no text asks: the layer projects the negative beside the image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ..attention.call import PLAIN, AttentionCall, Kernel
from ..attention.edit import Edit
from ..attention.layer import AttentionLayer
from ..attention.partial import Partial, attend_with_lse, merge, sum_weighted
from ..attention.sequence import joined, placed, without
from ..attention.step import Step
from .base import Text

_LSE, _STREAMS, _SHARED = "positive lse", "streams cut out", "attention over the image"
_FIRST, _LAST = -1000, 1000
_UNUSED = torch.empty(0)


@dataclass
class Call:
    """What one pipeline call needs of its negatives.

    Attributes:
        texts, weights: one a negative; rows of a text are one, or one a prompt.
        rule, combine: the rule's name and its function of the four tensors, settings bound.
        joint: NASA's form in a joint sequence.
    """

    texts: list[Text]
    weights: list[float]
    rule: str
    combine: Callable[..., torch.Tensor]
    joint: str
    edits: dict[tuple[str, str], Edit] = field(default_factory=dict[tuple[str, str], Edit])

    def steer(self, positive: torch.Tensor, lse: torch.Tensor | None, negatives: Sequence[Partial]) -> torch.Tensor:
        """Z of Z+ [B, H, L, D] and the negatives, in the dtype of Z+, of which it keeps the range."""
        one = pooled(self.rule, negatives, self.weights)
        new = self.combine(positive, lse, one.out, one.lse)
        if positive.dtype == torch.float16:
            limit = torch.finfo(positive.dtype).max
            new = new.clamp(-limit, limit)
        return new.to(positive.dtype)


def for_rows(tensor: torch.Tensor | None, rows: int, pictures: int) -> torch.Tensor | None:
    """One row, or one a prompt, for every one of `rows`: the pictures, and the branches that copy them."""
    if tensor is None or len(tensor) == rows:
        return tensor
    n = len(tensor)
    if n == 1:
        return tensor.expand(rows, *tensor.shape[1:])
    return tensor[torch.arange(rows, device=tensor.device) % pictures // (pictures // n)]


def pooled(rule: str, parts: Sequence[Partial], weights: Sequence[float]) -> Partial:
    """Several negatives as one: their weighted mean, whose sum of weights then belongs into the scale; for VSF their
    weighted sum within one softmax over all their keys.
    """
    if len(parts) == 1 and weights[0] == 1:
        return parts[0]
    if rule == "vsf":
        lse = torch.stack([part.lse for part in parts]).logsumexp(0)
        wide = [part.out.to(lse.dtype) for part in parts]  # a weight may lead out of float16
        scaled = [Partial(out * weight, part.lse) for out, weight, part in zip(wide, weights, parts, strict=True)]
        return Partial(sum_weighted(scaled, lse), lse)
    share = sum(weights)
    out = sum(part.out * (weight / share) for part, weight in zip(parts, weights, strict=True))
    assert isinstance(out, torch.Tensor)
    return Partial(out, parts[0].lse)


@dataclass(frozen=True, eq=False)
class Steering:
    """What the edits of one plugin share.

    Attributes:
        owner: under which the `Call` of the running pipeline call is noted.
        rule: the rule's name. chooses: whether to steer in a layer.
    """

    owner: object
    rule: str
    chooses: Callable[[AttentionLayer], bool]

    def call(self, step: Step) -> Call:
        """What the pipeline call of this step holds."""
        return step.notes[self.owner]


class _TextEdit(Edit):
    """An edit of the conditional rows of the text-attention layers."""

    rows = ("cond",)
    kind = "cross"

    def __init__(self, steering: Steering) -> None:
        self.steering = steering

    def selects(self, layer: AttentionLayer) -> bool:
        return layer.kind == self.kind

    def active(self, layer: AttentionLayer, step: Step) -> bool:
        return step.phase == "predict" and "cond" in step.rows

    def planned(self, layer: AttentionLayer, step: Step) -> Edit | None:
        if not self.active(layer, step):
            return None
        call, key = self.steering.call(step), (type(self).__name__, layer.name)
        if key not in call.edits:
            call.edits[key] = self.made(layer, call, step.rows["cond"])
        return call.edits[key]

    def made(self, layer: AttentionLayer, call: Call, rows: slice) -> Edit:
        """The edit as it runs in this layer during a pipeline call whose pictures have these rows."""
        return self


class CrossAway(_TextEdit):
    """Steers a cross-attention layer."""

    keeps_text, traced = True, True

    def selects(self, layer: AttentionLayer) -> bool:
        return super().selects(layer) and self.steering.chooses(layer)

    def planned(self, layer: AttentionLayer, step: Step) -> Edit | None:
        edit = super().planned(layer, step)
        if isinstance(edit, SteeredCross):
            edit.heard = [step.heard[id(text)] for text in edit.call.texts]
        return edit

    def made(self, layer: AttentionLayer, call: Call, rows: slice) -> Edit:
        edit = SteeredCross(layer.module, call, rows)
        edit.keeps_text = self.keeps_text
        return edit


class KeysAway(CrossAway):
    """Steers a layer in which the image attends to text and image at once and the text asks nothing."""

    kind = "keys"

    def made(self, layer: AttentionLayer, call: Call, rows: slice) -> Edit:
        return _SteeredKeys(layer.module, call, rows)


class SteeredCross(Edit):
    """Steers one cross-attention layer during one pipeline call, and keeps the keys and values of its negatives.

    Args:
        rows: of the pictures.

    Attributes:
        heard: the negatives at this step, as the layer's block gets them.
    """

    rows, traced, keeps_text = ("cond",), True, True

    def __init__(self, module: Any, call: Call, rows: slice) -> None:
        self.module, self.call, self.pictures = module, call, rows.stop - rows.start
        self.vsf = call.rule == "vsf"
        self.heard: list[tuple[torch.Tensor, dict[str, Any]]] = []
        self.kept: list[tuple[Any, ...]] = []
        self.mark: tuple[Any, ...] = ()

    def qkv(self, call: AttentionCall) -> None:
        if self.vsf:
            call.kernel = _keeping_lse(call.aside)

    def out(self, call: AttentionCall, out: torch.Tensor) -> torch.Tensor:
        alone = len(call.step.rows) == 1
        rows = slice(0, len(out)) if alone else call.select("cond")
        some = call if alone or rows == slice(0, len(out)) else call.narrow(rows)
        negatives = [self._attend(some, *kept) for kept in self.projected(call, len(some.q))]
        lse = None
        if self.vsf:
            found: torch.Tensor | None = call.aside.get(_LSE)
            if found is not None and len(found) == len(call.q):
                lse = found if some is call else found[rows]
            else:  # another edit took the kernel's place
                lse = attend_with_lse(some.q, some.k, some.v, some.mask, some.scale).lse
        return placed(out, rows, self.call.steer(out if some is call else out[rows], lse, negatives))

    def _attend(self, call: AttentionCall, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> Partial:
        if self.vsf:
            return attend_with_lse(call.q, k, v, mask, call.scale)
        return Partial(call.attend(call.q, k, v, mask), _UNUSED)

    def projected(self, call: AttentionCall, rows: int) -> list[tuple[Any, ...]]:
        """Keys, values and mask of each negative for `rows` rows, by the layer itself; at the first use, unless this is
        traced, where nothing may be kept.
        """
        if torch.compiler.is_compiling():
            return self._project(call, rows)
        parts = self.module._modules
        lora = (lora_state(parts.get("to_k")), lora_state(parts.get("to_v")))
        mark = (call.q.dtype, call.q.device, rows, *lora, *[id(words) for words, _ in self.heard])
        if mark != self.mark:
            self.mark, self.kept = mark, self._project(call, rows)
        return self.kept

    def _project(self, call: AttentionCall, rows: int) -> list[tuple[Any, ...]]:
        assert call.project is not None
        made = [call.project(words.to(call.q), others) for words, others in self.heard]
        kept = [(each.k, each.v, each.mask) for each in made]
        return [tuple(for_rows(tensor, rows, self.pictures) for tensor in each) for each in kept]


class _SteeredKeys(SteeredCross):
    def qkv(self, call: AttentionCall) -> None:
        """Nothing is kept: the parts are computed apart."""

    def out(self, call: AttentionCall, out: torch.Tensor) -> torch.Tensor:
        rows = call.select("cond")
        some, n = call.narrow(rows), call.q.shape[-2]
        first = call.text is not None and call.text.start == 0
        seen, own = _apart(some, some.k, some.v, some.mask, n, first)
        words = [_apart(some, k, v, mask, n, first)[1] for k, v, mask in self.projected(call, len(some.q))]
        negatives = [negative_of(self.call, word, seen) for word in words]
        return placed(out, rows, self.call.steer(out[rows], merge([seen, own]).lse, negatives))


def _apart(
    call: AttentionCall, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, image: int, first: bool
) -> tuple[Partial, Partial]:
    """Attention of all queries over the image's keys and over the text's; `first`: the text stands in front."""
    length = k.shape[-2] - image
    words, picture = (slice(0, length), slice(length, None)) if first else (slice(image, None), slice(0, image))

    def over(part: slice) -> Partial:
        seen = None if mask is None else mask[..., part]
        return attend_with_lse(call.q, k[:, :, part], v[:, :, part], seen, call.scale)

    return over(picture), over(words)


def negative_of(state: Call, word: Partial, image: Partial) -> Partial:
    """What the rule takes as Z-, of the attention over the negative's words and over the image."""
    if state.rule == "nasa" and state.joint == "text":
        return Partial(sum_weighted([word], torch.logaddexp(word.lse, image.lse)), word.lse)
    return word if state.rule == "vsf" else merge([word, image])


class CutStreams(_TextEdit):
    """Takes the negatives' tokens out of a joint layer before any other edit sees it, and shares the image's part."""

    kind, order, traced = "joint", _FIRST, True

    def qkv(self, call: AttentionCall) -> None:
        assert call.text is not None
        start, text = call.streams[0].start, call.text
        call.aside[_STREAMS] = [_stream(call, span, slice(start, text.stop)) for span in call.streams]
        cut = slice(start, text.start)
        call.q, call.k, call.v = (without(t, cut, -2) for t in (call.q, call.k, call.v))
        call.mask = _cut_mask(call.mask, cut)
        call.text, call.streams = slice(start, start + text.stop - text.start), ()
        call.aside[PLAIN] = call.kernel
        call.kernel = _sharing_image(call)


class JointAway(_TextEdit):
    """Steers the image tokens of a joint layer, and puts the negatives' own attention back."""

    kind, order, traced = "joint", _LAST, True
    call: Call
    chosen = False

    def made(self, layer: AttentionLayer, call: Call, rows: slice) -> Edit:
        edit = JointAway(self.steering)
        edit.call, edit.chosen = call, self.steering.chooses(layer)
        return edit

    def out(self, call: AttentionCall, out: torch.Tensor) -> torch.Tensor:
        assert call.text is not None
        rows, text, streams = call.select("cond"), call.text, call.aside.pop(_STREAMS)
        own = out.new_zeros(len(out), out.shape[1], sum(s.q.shape[-2] for s in streams), out.shape[-1])
        if rows != []:  # a row by itself may be guidance's
            streams = [stream.narrow(rows) for stream in streams]
            if self.chosen:
                steered = self._steered(call, without(out, text, -2), rows, streams)
                out = joined(out[:, :, text], steered, text)
            own = placed(own, rows, torch.cat([_own_attention(call.narrow(rows), stream) for stream in streams], -2))
        return torch.cat([out[:, :, : text.start], own, out[:, :, text.start :]], -2)

    def _steered(
        self, call: AttentionCall, out: torch.Tensor, rows: slice | list[int], streams: list[_Stream]
    ) -> torch.Tensor:
        """Image tokens of all rows, those of `rows` steered."""
        state = self.call
        image, positive = _shared_for(call, rows)
        q = _image(call.narrow(rows).q, call.text)
        words = [attend_with_lse(q, s.k, s.v, s.by_image, s.scale) for s in streams]
        negatives = [negative_of(state, word, image) for word in words]
        return placed(out, rows, state.steer(out[rows], positive.lse, negatives))


# -- kernels that keep what the rules need -------------------------------------------------------------------------
# They hold `aside` and not the call, which holds them: a cycle would keep every layer's tensors alive.


def _keeping_lse(aside: dict[Any, Any]) -> Kernel:
    def kernel(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None = None, **rest: Any
    ) -> torch.Tensor:
        part = attend_with_lse(q, k, v, attn_mask, rest["scale"])
        aside[_LSE] = part.lse
        return part.out

    return kernel


def _sharing_image(call: AttentionCall) -> Kernel:
    """Attention of [text, image] whose image tokens keep their attention over the image alone for the negatives."""
    plain, text, aside = call.kernel, call.text, call.aside
    assert text is not None

    def kernel(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None = None, **rest: Any
    ) -> torch.Tensor:
        image, positive = _in_parts(_image(q, text), k, v, _for_queries(attn_mask, text, True), rest["scale"], text)
        aside[_SHARED] = image, positive
        words = plain(q[:, :, text], k, v, attn_mask=_for_queries(attn_mask, text, False), **rest)
        return joined(words, positive.out, text)

    return kernel


def _in_parts(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float, text: slice
) -> tuple[Partial, Partial]:
    """(attention over the image, attention over all keys) of image queries."""
    seen = None if mask is None else without(mask, text, -1)
    image = attend_with_lse(q, _image(k, text), _image(v, text), seen, scale)
    words = attend_with_lse(q, k[:, :, text], v[:, :, text], None if mask is None else mask[..., text], scale)
    return image, merge([image, words])


def _shared_for(call: AttentionCall, rows: slice | list[int]) -> tuple[Partial, Partial]:
    """The kept attention of these rows; computed where another edit took the kernel's place."""
    assert call.text is not None
    kept: tuple[Partial, Partial] | None = call.aside.get(_SHARED)
    if kept is not None and len(kept[0].out) == len(call.q):
        image, positive = kept
        return Partial(image.out[rows], image.lse[rows]), Partial(positive.out[rows], positive.lse[rows])
    some = call.narrow(rows)
    mask = _for_queries(some.mask, call.text, True)
    return _in_parts(_image(some.q, call.text), some.k, some.v, mask, some.scale, call.text)


def _own_attention(call: AttentionCall, stream: _Stream) -> torch.Tensor:
    """A stream's tokens attend to themselves and the image, as the prompt's do."""
    assert call.text is not None
    k, v = (torch.cat([a, _image(b, call.text)], -2) for a, b in ((stream.k, call.k), (stream.v, call.v)))
    return stream.attend(stream.q, k, v, stream.mask)


# -- tensors of a sequence -----------------------------------------------------------------------------------------


@dataclass
class _Stream(AttentionCall):
    """The call for a further text's tokens, as it arrived; its mask is theirs over [themselves, image].

    Attributes:
        by_image: the mask of the image's queries over these tokens.
    """

    by_image: torch.Tensor | None = None

    def narrow(self, rows: slice | list[int]) -> _Stream:
        part = replace(self, q=self.q[rows], k=self.k[rows], v=self.v[rows])
        part.mask, part.by_image = (_rows_of(mask, rows, len(self.q)) for mask in (self.mask, self.by_image))
        return part


def _rows_of(mask: torch.Tensor | None, rows: slice | list[int], batch: int) -> torch.Tensor | None:
    return mask[rows] if mask is not None and mask.ndim == 4 and mask.shape[0] == batch else mask


def _stream(call: AttentionCall, span: slice, texts: slice) -> _Stream:
    """The tokens of `span`; `texts` are the columns of all texts."""
    q, k, v = (tensor[:, :, span] for tensor in (call.q, call.k, call.v))
    mask, own, by_image = call.mask, None, None
    if mask is not None:
        by_image = _for_queries(mask[..., span], texts, True)
        own = torch.cat([mask[..., span], without(mask, texts, -1)], -1)
        own = own[..., span, :] if own.shape[-2] > 1 else own
    return _Stream(
        call.layer, q, k, v, own, call.scale, call.number, call.step, kernel=call.kernel, by_image=by_image
    )  # fmt: skip


def _for_queries(mask: torch.Tensor | None, text: slice, image: bool) -> torch.Tensor | None:
    """The part of a mask for the image's queries or for the text's; the whole one where all queries share it."""
    if mask is None or mask.shape[-2] == 1:
        return mask
    return without(mask, text, -2) if image else mask[..., text, :]


def _cut_mask(mask: torch.Tensor | None, columns: slice) -> torch.Tensor | None:
    if mask is None:
        return None
    mask = without(mask, columns, -1)
    return without(mask, columns, -2) if mask.shape[-2] > 1 else mask


def _image(tensor: torch.Tensor, text: slice | None) -> torch.Tensor:
    assert text is not None
    return without(tensor, text, -2)


def lora_state(linear: Any) -> tuple[Any, ...]:
    """Changes whenever the LoRA state of a projection does."""
    if type(linear) is nn.Linear or not hasattr(linear, "active_adapters"):
        return ()
    return (*linear.scaling.items(), *linear.active_adapters, linear.disable_adapters, *linear.merged_adapters)

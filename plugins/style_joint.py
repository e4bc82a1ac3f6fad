"""Shared style where text and image are one sequence: image tokens alone give and take it.

The text of a row attends as ever, and nobody attends to the reference's text, in which a style would hide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..attention.call import PLAIN, AttentionCall
from ..attention.edit import Edit
from ..attention.errors import UnsupportedPipelineError
from ..attention.layer import AttentionLayer
from ..attention.sequence import padded
from ..attention.step import Step
from .rotary import Rotary, turned, weighted
from .style_forms import matched, preserved_query, reference_of


def for_rows(reference: torch.Tensor, rows: int) -> torch.Tensor:
    """A reference's tokens for so many rows, one reference for all or one for each."""
    return reference if len(reference) == rows else reference.expand(rows, -1, -1, -1)


@dataclass(frozen=True)
class Manner:
    """How image tokens take style.

    Attributes:
        method: "styleid" or "stylealigned". strength, gamma, temperature, shift: as of `StyleInjection`.
        apart: widths of the picture by which the reference is moved aside. weights: factors of its keys' rotary
            pairs, from the highest frequency to the lowest; None for none.
        rotary: how the model turns its keys, None where it does not.
    """

    method: str
    strength: float
    gamma: float
    temperature: float
    shift: float
    apart: float = 0.0
    weights: tuple[float, float] | None = None
    rotary: Rotary | None = None

    def keys(self, k: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """A reference's keys as they are attended to."""
        if self.rotary is None:
            return k
        k = turned(k, self.rotary, (0.0, 0.0, self.apart * size[1])) if self.apart else k
        return k if self.weights is None else weighted(k, self.rotary, *self.weights)


@dataclass
class Guest:
    """What a reference row brings into a layer: its image's queries, keys, values, and a content's queries."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    content: torch.Tensor | None = None

    def row(self, number: int) -> Guest:
        """What one row of a group gets of it."""

        def own(tensor: torch.Tensor) -> torch.Tensor:
            return tensor if len(tensor) == 1 else tensor[number : number + 1]

        return Guest(own(self.q), own(self.k), own(self.v), None if self.content is None else own(self.content))


class JointStyle(Edit):
    """Computes the attention of one group, "cond" or "uncond": its image tokens see the reference's as well.

    Args:
        layers: names of those where it does. manner: how.
        lead: without reference rows the group's first row is the reference of all others.
    """

    traced, ragged = True, "each"

    def __init__(self, group: str, layers: set[str], manner: Manner, lead: bool) -> None:
        self.owns, self.layers, self.manner, self.lead = group, layers, manner, lead

    def selects(self, layer: AttentionLayer) -> bool:
        return layer.name in self.layers

    def active(self, layer: AttentionLayer, step: Step) -> bool:
        rows = step.rows.get(str(self.owns))
        if step.phase != "predict" or rows is None:
            return False
        return rows.stop - rows.start > 1 if self.lead else reference_of(str(self.owns), step.rows) in step.rows

    def qkv(self, call: AttentionCall) -> None:
        if call.picture is not None:
            raise UnsupportedPipelineError(
                "texts of different lengths are computed row by row here, where no row sees another one's image: give "
                "prompts (and negatives) of one length"
            )
        if self.lead:
            first = call.rows[str(self.owns)].start
            guest = Guest(*call.image_part(slice(first, first + 1)))
        else:
            guest = Guest(*call.image_part(call.rows[reference_of(str(self.owns), call.rows)]))
            if "content" in call.rows:
                guest.content = call.image_part(call.rows["content"])[0]
        call.aside[self, "guest"] = guest

    def attention(self, call: AttentionCall) -> torch.Tensor:
        guest: Guest = call.aside.pop((self, "guest"))
        if not call.each:
            return self._beside(call, guest, self.lead)
        outs: list[torch.Tensor] = []
        for number in range(len(call.q)):
            own, kept = call.row(number)
            image = plainly(own) if self.lead and not number else self._beside(own, guest.row(number), False)
            outs.append(padded(image, kept, call.q.shape[-2]))
        return torch.cat(outs)

    def _beside(self, call: AttentionCall, guest: Guest, lead: bool) -> torch.Tensor:
        """Attention of rows that are alike in their columns; of a set the first one stays what it is."""
        asked, out = call.asked, plainly(call)
        image = styled(call, guest, self.manner)
        if self.manner.strength != 1:
            image = torch.lerp(out[:, :, asked], image, self.manner.strength)
        image = torch.cat([out[:, :, : asked.start], image, out[:, :, asked.stop :]], -2)
        return torch.cat([out[:1], image[1:]]) if lead else image


def plainly(call: AttentionCall) -> torch.Tensor:
    """What the layer gives by itself."""
    kernel = call.aside.get(PLAIN, call.kernel)
    return kernel(call.q, call.k, call.v, attn_mask=call.mask, is_causal=call.causal, scale=call.scale)


def styled(call: AttentionCall, guest: Guest, manner: Manner) -> torch.Tensor:
    """Attention [n, H, N, D] of the image's queries over their row's text and images as `manner` says."""
    n, image = len(call.q), call.image
    q, k, v = call.image_part(slice(0, n))
    q_ref, k_ref, v_ref = (for_rows(tensor, n) for tensor in (guest.q, guest.k, guest.v))
    others = [slice(0, image.start), slice(image.stop, call.k.shape[-2])]
    text_k, text_v = (torch.cat([t[:, :, part] for part in others], -2) for t in (call.k, call.v))
    mask = None if call.mask is None else torch.cat([call.mask[..., part] for part in others], -1)
    mask = mask[..., call.asked, :] if mask is not None and mask.shape[-2] > 1 else mask
    far = manner.keys(k_ref, call.step.size)
    if manner.method == "styleid":
        content = guest.content
        q = q if content is None else preserved_query(q, for_rows(content, n), manner.gamma)
        return _over(call, q * manner.temperature, [(text_k, text_v), (far, v_ref)], mask, 0.0)
    q, k = matched(q, q_ref), matched(k, k_ref)
    return _over(call, q, [(text_k, text_v), (k, v), (far, v_ref)], mask, manner.shift)


def _over(
    call: AttentionCall, q: torch.Tensor, parts: Sequence[tuple[torch.Tensor, torch.Tensor]],
    mask: torch.Tensor | None, shift: float,
) -> torch.Tensor:  # fmt: skip
    """Attention over several parts' keys; `mask` is of the first part, `shift` is added to logits of the last."""
    k, v = (torch.cat([part[i] for part in parts], -2) for i in (0, 1))
    text, last = parts[0][0].shape[-2], parts[-1][0].shape[-2]
    bias = None
    if shift or mask is not None:
        bias = torch.zeros(1, 1, 1, k.shape[-2], dtype=q.dtype, device=q.device)
        bias[..., k.shape[-2] - last :] = shift
    if mask is not None and bias is not None:
        own = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask
        bias = torch.cat([own, bias[..., text:].expand(*own.shape[:-1], -1)], -1)
    bias = None if bias is None else bias.expand(*bias.shape[:2], q.shape[-2], -1)
    kernel = call.aside.get(PLAIN, call.kernel)
    return kernel(q, k, v, attn_mask=bias, is_causal=False, scale=call.scale)

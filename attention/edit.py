"""Edits of attention, and the one function that computes attention with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from .call import AttentionCall
from .errors import SettingError
from .layer import AttentionLayer
from .step import Step


class Edit:
    """A change to what selected attention layers compute. Override the stages you need.

    Stages run in this order, each over all edits of the layer sorted by `order` (ties as registered): `qkv`, then
    either the fused kernel, or, if any edit wants them, explicit `scores` and `probs`, then `out`.

    Attributes:
        order: position within a stage; edits of one stage that do not commute are told apart by it.
        wants_probs: True makes the layer compute explicit probabilities [B, H, Lq, Lk], so that `scores` and `probs`
            run; every other layer keeps the fused kernel.
        every_call: False leaves all but the layer's own attention call alone (an IP-Adapter's image tokens).
        rows: groups that this edit touches, None for all alike. A branch named here joins the batch only at the
            first layer where such an edit is selected.
        keeps_text: True lets the layer's products of an unchanged text be kept over the steps of a call.
        owns: group whose attention this edit computes itself, in `attention`, instead of the kernel.
        traced: True says that torch.compile may trace its stages: they read nothing that changes from step to step,
            by layer or by thread, but what `planned` put into it. With other edits a compiled model runs eager.
        ragged: what it takes of rows of a joint sequence whose texts differ in length: "" refuses them, "behind" reads
            the image's columns alone, which are the same where texts stand behind it, "any" takes one row at a time
            too, "each" takes all rows at once with `AttentionCall.each`.
    """

    order: int = 0
    wants_probs: bool = False
    every_call: bool = False
    rows: tuple[str, ...] | None = None
    keeps_text: bool = False
    owns: str | None = None
    traced: bool = False
    ragged: Literal["", "behind", "any", "each"] = ""

    def selects(self, layer: AttentionLayer) -> bool:
        """Which layers the edit is put on; asked once, when the graft is attached."""
        raise NotImplementedError

    def active(self, layer: AttentionLayer, step: Step) -> bool:
        """Whether it runs at this step; asked before every denoiser call for every selected layer."""
        return step.phase == "predict"

    def planned(self, layer: AttentionLayer, step: Step) -> Edit | None:
        """The edit as it runs in this layer at this step, None where it does not; asked before the denoiser is called.

        An edit that looks things up by layer or step does that here, and gives another one that holds what it found.
        """
        return self if self.active(layer, step) else None

    def qkv(self, call: AttentionCall) -> None:
        """Rebind call.q, call.k, call.v, call.mask or call.scale. Never write into the tensors."""

    def scores(self, call: AttentionCall, scores: torch.Tensor) -> torch.Tensor:
        """Masked logits [B, H, Lq, Lk] before the softmax."""
        return scores

    def probs(self, call: AttentionCall, probs: torch.Tensor) -> torch.Tensor:
        """Probabilities [B, H, Lq, Lk], at least float32."""
        return probs

    def attention(self, call: AttentionCall) -> torch.Tensor:
        """Output [b, H, Lq, D] for the rows of `owns`; `call` holds just those rows."""
        raise NotImplementedError

    def out(self, call: AttentionCall, out: torch.Tensor) -> torch.Tensor:
        """Output [B, H, Lq, D] before the layer's output projection."""
        return out


def attend(call: AttentionCall, edits: Sequence[Edit]) -> torch.Tensor:
    """Attention of `call` with `edits`; without edits bit-identical to the kernel alone.

    Args:
        call: q, k, v as [B, H, L, D]; rebound by the edits' `qkv`.
        edits: sorted by `order`.
    Returns:
        [B, H, Lq, D] in the dtype of v.
    """
    for edit in edits:
        edit.qkv(call)
    if any(edit.owns is not None for edit in edits):
        out = _attend_owned(call, edits)
    else:
        out = _attend_shared(call, edits, [])
    for edit in edits:
        out = edit.out(call, out)
    return out


def _attend_owned(call: AttentionCall, edits: Sequence[Edit]) -> torch.Tensor:
    """Attention where edits compute that of their groups themselves."""
    present = call.rows
    owned = sorted(((present[e.owns], e) for e in edits if e.owns in present), key=lambda pair: pair[0].start)
    if len({rows.start for rows, _ in owned}) < len(owned):
        raise SettingError(
            "two plugins compute the attention of the same rows in one layer: graft one, or give them windows, start= "
            "and end=, or layers that do not overlap"
        )
    out = _attend_shared(call, edits, [rows for rows, _ in owned])
    for rows, edit in owned:
        own = edit.attention(call.narrow(rows))
        parts = [part for part in (out[: rows.start], own, out[rows.start :]) if len(part)]
        out = torch.cat(parts) if len(parts) > 1 else own
    return out


def _attend_shared(call: AttentionCall, edits: Sequence[Edit], owned: list[slice]) -> torch.Tensor:
    """Attention of the rows that no edit owns."""
    if owned:
        taken = {i for rows in owned for i in range(rows.start, rows.stop)}
        first = min(taken)  # branches are appended, so what is left is usually one slice: no copy
        rest = [i for i in range(len(call.q)) if i not in taken]
        call = call.narrow(slice(0, first) if len(rest) == first else rest)
    if not any(edit.wants_probs for edit in edits):
        return call.attend(call.q, call.k, call.v, call.mask)
    scores = masked_scores(call)
    for edit in edits:
        scores = edit.scores(call, scores)
    probs = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)
    for edit in edits:
        probs = edit.probs(call, probs)
    return probs.to(call.v.dtype) @ call.v


def masked_scores(call: AttentionCall) -> torch.Tensor:
    """Logits q k^T * scale with the call's mask, [B, H, Lq, Lk]."""
    scores = call.q @ call.k.transpose(-1, -2) * call.scale
    if call.mask is None:
        return scores
    if call.mask.dtype == torch.bool:
        return scores.masked_fill(~call.mask, -torch.inf)
    return scores + call.mask

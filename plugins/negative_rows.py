"""Negative-away steering in its doubled form: a row of its own for the negative, steered with the prompt's."""

from __future__ import annotations

import torch

from ..attention.call import AttentionCall
from ..attention.edit import Edit
from ..attention.layer import AttentionLayer
from ..attention.partial import Partial, attend_with_lse, merge
from ..attention.sequence import without
from ..attention.step import Step
from .negative_edits import Call, Steering, negative_of

ROW = "negative"


class RowsAway(Edit):
    """Image tokens of the prompt's rows and of the negative's rows become what the rule makes of both."""

    rows, traced = ("cond",), True

    def __init__(self, steering: Steering, kind: str) -> None:
        self.steering, self.kind = steering, kind

    def selects(self, layer: AttentionLayer) -> bool:
        return layer.kind == self.kind and self.steering.chooses(layer)

    def active(self, layer: AttentionLayer, step: Step) -> bool:
        return step.phase == "predict" and "cond" in step.rows and ROW in step.rows

    def planned(self, layer: AttentionLayer, step: Step) -> Edit | None:
        return _Paired(self.steering.call(step), self.kind) if self.active(layer, step) else None


class _Paired(Edit):
    """The edit during one pipeline call."""

    rows, traced = ("cond",), True

    def __init__(self, state: Call, kind: str) -> None:
        self.state, self.kind = state, kind

    def out(self, call: AttentionCall, out: torch.Tensor) -> torch.Tensor:
        cond, own, state = call.step.rows["cond"], call.step.rows[ROW], self.state
        joint = call.text if self.kind == "joint" else None
        lse, negative = self._negative(call, own, _image(out[own], joint))
        positive = _parts(call, cond)[1] if lse else None
        new = state.steer(_image(out[cond], joint), positive, [negative])
        out = out.clone()
        for rows in (cond, own):
            out[rows] = new if joint is None else torch.cat(
                [new[:, :, : joint.start], out[rows][:, :, joint], new[:, :, joint.start :]], -2
            )  # fmt: skip
        return out

    def _negative(self, call: AttentionCall, own: slice, out: torch.Tensor) -> tuple[bool, Partial]:
        """Whether the rule asks for the positive's log-sum-exp, and what it takes as Z-."""
        state = self.state
        whole = state.rule in ("nag", "ong") or (state.rule == "nasa" and (state.joint == "full" or call.text is None))
        if whole:
            return False, Partial(out, out.new_empty(0))
        words, _, image = _parts(call, own)
        return state.rule == "vsf", words if image is None else negative_of(state, words, image)


def _parts(call: AttentionCall, rows: slice) -> tuple[Partial, torch.Tensor, Partial | None]:
    """Attention of these rows' image over their text, the log-sum-exp over all keys, and attention over the image."""
    q, k, v, mask, text = call.q[rows], call.k[rows], call.v[rows], call.mask, call.text
    mask = mask[rows] if mask is not None and mask.ndim == 4 and len(mask) == len(call.q) else mask
    if text is None:
        words = attend_with_lse(q, k, v, mask, call.scale)
        return words, words.lse, None
    if call.layer.kind == "joint":
        q = without(q, text, -2)
        mask = without(mask, text, -2) if mask is not None and mask.shape[-2] > 1 else mask
    seen = (None, None) if mask is None else (mask[..., text], without(mask, text, -1))
    words = attend_with_lse(q, k[:, :, text], v[:, :, text], seen[0], call.scale)
    image = attend_with_lse(q, without(k, text, -2), without(v, text, -2), seen[1], call.scale)
    return words, merge([words, image]).lse, image


def _image(out: torch.Tensor, text: slice | None) -> torch.Tensor:
    return out if text is None else without(out, text, -2)

"""Negative-away steering: NASA (SNOOPI, arXiv 2412.02687)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..attention.call import AttentionCall
from ..attention.edit import Edit
from ..attention.layer import AttentionLayer
from ..attention.step import Step
from .base import Plugin, Session, finite


def nasa(positive: torch.Tensor, negative: torch.Tensor, scale: float) -> torch.Tensor:
    """Z = Z+ - scale * Z-, equation 9 of NASA, on attention outputs before the output projection."""
    return positive - scale * negative


class NegativeAway(Plugin):
    """Steers away from a negative prompt inside cross-attention, without guidance's second pass.

    Args:
        negative: the negative prompt for every picture, or a list with one for each.
        scale: strength, 0 is neutral.
        start, end: fractions of the steps.
    """

    def __init__(
        self, negative: str | Sequence[str], *, rule: str = "nasa", scale: float | None = None,
        start: float = 0.0, end: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(start=start, end=end)
        self.negative = negative if isinstance(negative, str) else list(negative)
        self.rule = rule
        self.scale = finite(0.3 if scale is None else scale, "scale")
        self._text: torch.Tensor | None = None

    @property
    def neutral(self) -> bool:
        return self.scale == 0

    def begin(self, session: Session, step: Step) -> None:
        texts = [self.negative] if isinstance(self.negative, str) else self.negative
        self._text = session.encode_text(texts)

    def unbind(self) -> None:
        self._text = None

    def edits(self) -> Sequence[Edit]:
        return (_Away(self),)


class _Away(Edit):
    rows = ("cond",)

    def __init__(self, plugin: NegativeAway) -> None:
        self.plugin = plugin

    def selects(self, layer: AttentionLayer) -> bool:
        return layer.kind == "cross"

    def out(self, call: AttentionCall, out: torch.Tensor) -> torch.Tensor:
        rows = call.select("cond")
        text, module = self.plugin._text, call.layer.module
        assert text is not None
        heads = call.q.shape[1]
        k, v = (
            project(text.to(call.q.dtype)).unflatten(-1, (heads, -1)).transpose(1, 2)
            for project in (module.to_k, module.to_v)
        )
        q = call.q[rows]
        k, v = (t.repeat_interleave(len(q) // len(t), 0) for t in (k, v))
        out = out.clone()
        out[rows] = nasa(out[rows], call.attend(q, k, v, None), self.plugin.scale)
        return out

"""One call of scaled dot-product attention inside a layer, as edits see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F

from .layer import AttentionLayer
from .masks import level_grid
from .sequence import Columns, row_mask
from .step import Rows, Step

Kernel = Callable[..., torch.Tensor]
"""Anything with the signature of `torch.nn.functional.scaled_dot_product_attention`."""

PLAIN = "plain kernel"
"""In `AttentionCall.aside`: the kernel that `call.kernel` took the place of, for calls of other queries or keys."""

Project = Callable[[torch.Tensor, Mapping[str, Any]], "AttentionCall"]
"""project(text [n, L, C], other arguments of the layer, such as its mask): the call that it would make for that."""


def _nothing() -> dict[Any, Any]:
    return {}  # torch.compile traces a function, but not a call of dict[Any, Any]


@dataclass(frozen=True)
class TextCall:
    """How a layer asks its text.

    Attributes:
        own: which of its attention calls does it.
        whole: it rotates its queries, or its keys hold the image too, so a text is projected beside the whole image.
        through: what the block does with the text before the layer gets it, None for nothing.
    """

    own: int = 0
    whole: bool = False
    through: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclass
class AttentionCall:
    """What the layer's own processor was about to compute; an edit may rebind q, k, v, mask and scale.

    Attributes:
        layer: the layer that runs.
        q, k, v: [B, H, L, D] after every projection, norm, rotary embedding and LoRA of the model.
        mask: None, boolean (True attends) or additive, broadcastable to [B, H, Lq, Lk].
        scale: factor of the logits.
        number: how many attention calls this layer made before in this forward. One of them, mostly 0, is the layer's
            own; an IP-Adapter adds one for each image prompt.
        step: where in the run.
        text: columns of the text tokens in a joint sequence, or among the keys of a layer of kind "keys"; None
            elsewhere.
        kernel: computes attention for every row that needs no explicit probabilities.
        project: runs the layer's own projections, norms and masks on another text and gives that call, without
            attending; its k and v are what matters, its q belongs to one token.
        aside: notes that an edit keeps from one stage to the next.
        streams: columns of further texts in a joint sequence, in front of the prompt's.
        picture: of its group's pictures the one that this row is of, where rows run one at a time; None elsewhere.
        each: the sequence of each row, where their texts differ in length and edits take all rows at once; `text` is
            None then.
    """

    layer: AttentionLayer
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    scale: float
    number: int
    step: Step
    text: slice | None = None
    causal: bool = False
    gqa: bool = False
    kernel: Kernel = F.scaled_dot_product_attention
    project: Project | None = None
    aside: dict[Any, Any] = field(default_factory=_nothing)
    streams: tuple[slice, ...] = ()
    picture: int | None = None
    each: tuple[Columns, ...] = ()

    @property
    def rows(self) -> Rows:
        """Groups whose rows are in this batch (a branch may join at a later layer)."""
        return {name: rows for name, rows in self.step.rows.items() if rows.stop <= len(self.q)}

    def select(self, group: str) -> slice | list[int]:
        """Rows of `group` in this batch, with the branches that copy it."""
        return self.step.select(group, len(self.q))

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) of the image tokens of this layer, from the model's real sizes, any aspect."""
        joint = self.text is not None and self.layer.kind == "joint"
        tokens = self.q.shape[-2] - (self.text.stop - self.text.start if joint and self.text else 0)
        return level_grid(tokens, self.step.size)

    @property
    def image(self) -> slice:
        """Columns among the keys of the picture's own tokens, row by row; padding or other pictures may stand behind.

        Raises:
            UnsupportedPipelineError: the layer has fewer tokens than the picture.
        """
        start = self.text.stop if self.text is not None and self.text.start == 0 else 0
        if self.layer.place != "block":
            return slice(start, self.k.shape[-2])
        tokens = self.step.size[0] * self.step.size[1]
        if self.k.shape[-2] < start + tokens:
            level_grid(self.k.shape[-2] - start, self.step.size)  # says what is wrong
        return slice(start, start + tokens)

    @property
    def asked(self) -> slice:
        """The picture's own tokens among the queries; in layers of kind "keys" the text is no query."""
        image = self.image
        return slice(0, image.stop - image.start) if self.layer.kind == "keys" else image

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Attention by the chosen kernel with this call's scale: q [B, H, Lq, D], k and v [B, H, Lk, D]."""
        extra = {"enable_gqa": True} if self.gqa else {}
        return self.kernel(q, k, v, attn_mask=mask, is_causal=self.causal, scale=self.scale, **extra)

    def narrow(self, rows: slice | list[int]) -> AttentionCall:
        """The same call for some of its rows."""
        mask = self.mask
        if mask is not None and mask.ndim == 4 and mask.shape[0] == len(self.q):
            mask = mask[rows]
        return AttentionCall(
            self.layer, self.q[rows], self.k[rows], self.v[rows], mask, self.scale, self.number, self.step, self.text,
            self.causal, self.gqa, self.kernel, self.project, self.aside, self.streams, self.picture,
            tuple(self.each[i] for i in _indices(rows, len(self.q))) if self.each else (),
        )  # fmt: skip

    def row(self, number: int) -> tuple[AttentionCall, list[int]]:
        """One row of those that differ in their columns, without its padding, and the columns that it has."""
        kept, whole = self.each[number].kept()
        q, k, v = (tensor[number : number + 1, :, kept] for tensor in (self.q, self.k, self.v))
        mask = row_mask(self.mask, number, kept)
        return replace(self, q=q, k=k, v=v, mask=mask, text=whole.text, streams=whole.streams, each=()), kept

    def image_part(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values of the picture's own tokens of some rows, [n, H, N, D]."""
        if not self.each:
            return self.q[rows][:, :, self.asked], self.k[rows][:, :, self.image], self.v[rows][:, :, self.image]
        found = [(i, self.each[i].image) for i in _indices(rows, len(self.q))]
        q, k, v = (torch.cat([t[i : i + 1, :, own] for i, own in found]) for t in (self.q, self.k, self.v))
        return q, k, v


def _indices(rows: slice | list[int], count: int) -> list[int]:
    return list(range(count))[rows] if isinstance(rows, slice) else rows

"""Rows that were laid into one, and how tensors of a denoiser's blocks follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ...attention.step import Rows
from ..families.family import Along


@dataclass(frozen=True)
class Stack:
    """Blocks that hand the picture's tokens to each other.

    Attributes:
        path: of their list in the denoiser. sequence: their argument with these tokens. along: what goes with tokens.
        joint: whether the text stands in the same sequence. alone: whether they never see the text.
    """

    path: str
    sequence: str
    along: tuple[Along, ...]
    joint: bool
    alone: bool


@dataclass(frozen=True)
class Fold:
    """Rows that were laid into one: what they have in common, and behind the picture's tokens the other rows' hole.

    Attributes:
        hole: indices of the tokens in which they differ. tokens: of the picture. words: of the text in front of it.
        rows: the batch's groups as they were.
    """

    hole: torch.Tensor
    tokens: int
    words: int
    rows: Rows
    _made: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict[Any, Any])

    @property
    def count(self) -> int:
        """Rows."""
        return self.rows["cond"].stop

    @property
    def tail(self) -> int:
        """Tokens of the other rows."""
        return (self.count - 1) * len(self.hole)

    def arguments(self, stack: Stack, given: Mapping[str, Any]) -> dict[str, Any]:
        """A block's arguments in one row; what comes from the block before it is so already."""
        along = {entry.argument: entry for entry in stack.along}
        return {
            name: self._laid(value, stack)
            if name == stack.sequence
            else self._along(value, along[name], stack)
            if name in along
            else tree_map(self._first, value)
            for name, value in given.items()
        }

    def spread(self, stack: Stack, output: Any) -> Any:
        """What the last block gives as a batch again; of several tensors the last one is the picture's."""
        if not isinstance(output, torch.Tensor):
            return (*tree_map(self._repeated, output[:-1]), self.spread(stack, output[-1]))
        start, end = self._picture(stack)
        whole = torch.cat([output[:, :end], output[:, end + self.tail :]], 1).repeat(self.count, 1, 1)
        whole[1:, self.hole + start] = output[0, end : end + self.tail].unflatten(0, (self.count - 1, len(self.hole)))
        return whole

    def _picture(self, stack: Stack) -> tuple[int, int]:
        """Where the picture's tokens stand in what the blocks hand on."""
        start = self.words if stack.joint else 0
        return start, start + self.tokens

    def _laid(self, x: torch.Tensor, stack: Stack) -> torch.Tensor:
        if len(x) == 1:
            return x
        start, end = self._picture(stack)
        more = x[1:].index_select(1, self.hole + start).flatten(0, 1)[None]
        return torch.cat([x[:1, :end], more, x[:1, end:]], 1)

    def _along(self, value: Any, entry: Along, stack: Stack) -> Any:
        leaves, tree = tree_flatten(value)
        for number, leaf in enumerate(leaves):
            if not isinstance(leaf, torch.Tensor):
                continue
            own = self._first(leaf) if entry.dim else leaf
            named = entry.leaf in (None, number)
            if named and entry.of == "text":
                leaves[number] = own
            else:  # what is not the text's is the picture's
                start = self.words if named and not stack.alone else 0
                leaves[number] = self._once(leaf, own, entry.dim, start)
        return tree_unflatten(leaves, tree)

    def _once(self, given: torch.Tensor, leaf: torch.Tensor, dim: int, start: int) -> torch.Tensor:
        """All blocks get the same tensor."""
        kept = self._made.get((id(given), start))
        if kept is None or kept[0] is not given:
            end = start + self.tokens
            parts = [leaf.narrow(dim, 0, end), *[leaf.index_select(dim, self.hole + start)] * (self.count - 1)]
            made = torch.cat([*parts, leaf.narrow(dim, end, leaf.shape[dim] - end)], dim)
            kept = self._made[id(given), start] = given, made
        return kept[1]

    def _first(self, value: Any) -> Any:
        batched = isinstance(value, torch.Tensor) and value.ndim and len(value) == self.count
        return value[:1] if batched else value

    def _repeated(self, value: Any) -> Any:
        return value.repeat(self.count, *[1] * (value.ndim - 1)) if isinstance(value, torch.Tensor) else value

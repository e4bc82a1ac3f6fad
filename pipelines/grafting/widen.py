"""Rows that join the batch at a block instead of at the denoiser's input: what is before it is computed once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.utils._pytree import tree_map


@dataclass(frozen=True, eq=False)
class Widen:
    """What a block does: it takes its arguments with more rows.

    Attributes:
        index: of each row of the wider batch the row that it copies. base: rows that came in.
    """

    index: torch.Tensor
    base: int

    def run(self, forward: Callable[..., Any], names: tuple[str, ...], args: Any, kwargs: Any) -> Any:
        """Run a block at or behind the one where the rows join: whatever still has the pipeline's rows is widened."""
        return forward(*_widened(args, self), **_widened(kwargs, self))


def _widened(tree: Any, rows: Widen) -> Any:
    """Every tensor with the rows that came in gets those of `rows.index`; tensors that already have them are left."""

    def pick(value: Any) -> Any:
        batched = isinstance(value, torch.Tensor) and value.ndim and len(value) == rows.base
        return value.index_select(0, rows.index) if batched else value

    def named(name: str, value: Any) -> Any:
        if name == "cross_attention_kwargs" and value:  # of what it holds only GLIGEN's grounding is batched by rows
            return {k: tree_map(pick, v) if k == "gligen" else v for k, v in value.items()}
        return tree_map(pick, value)

    if isinstance(tree, dict):
        return {name: named(name, value) for name, value in cast("dict[str, Any]", tree).items()}
    return tree_map(pick, tree)

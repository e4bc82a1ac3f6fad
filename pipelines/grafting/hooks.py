"""Native hooks on the denoiser and its blocks: they ask whoever put them on, and are inert in copies of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ...attention.hook import hook_after, hook_before
from .run import Late

Before = Callable[[tuple[Any, ...], dict[str, Any]], dict[str, Any] | None]
"""before(args, kwargs): the denoiser's arguments by name, None to leave the call alone."""

After = Callable[[Any], Any]
"""after(output): what is returned instead; None leaves it. The output is None where the denoiser raised."""


def hook_denoiser(denoiser: nn.Module, before: Before, after: After) -> Callable[[], None]:
    """See and change the denoiser's inputs and outputs; returns the undo.

    torch's own hooks, because accelerate's offload drops anything patched on `forward`.
    """

    def first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = before(args, kwargs)
        return None if inputs is None else ((), inputs)

    def last(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return after(output)

    undos = hook_after(denoiser, denoiser, last), hook_before(denoiser, denoiser, first)

    def undo() -> None:
        for one in undos:
            one()

    return undo


def hook_block(denoiser: nn.Module, block: nn.Module, arriving: Callable[[], Late | None]) -> Callable[[], None]:
    """Add rows at a block instead of at the input: everything before it is computed once. Returns the undo.

    From the block on where they join, whatever still has the pipeline's rows is widened.
    """

    def first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        late = arriving()
        return None if late is None else (_widened(args, late), _widened(kwargs, late))

    return hook_before(denoiser, block, first)


def _widened(tree: Any, late: Late) -> Any:
    """Every tensor with the rows that came in gets those of `late`; tensors that already have them are left."""

    def pick(value: Any) -> Any:
        batched = isinstance(value, torch.Tensor) and value.ndim and len(value) == late.base
        return value[late.index] if batched else value

    def named(name: str, value: Any) -> Any:
        if name == "cross_attention_kwargs" and value:  # of what it holds only GLIGEN's grounding is batched by rows
            return {k: tree_map(pick, v) if k == "gligen" else v for k, v in value.items()}
        return tree_map(pick, value)

    if isinstance(tree, dict):
        return {name: named(name, value) for name, value in cast("dict[str, Any]", tree).items()}
    return tree_map(pick, tree)

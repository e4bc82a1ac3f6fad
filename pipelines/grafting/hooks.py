"""Native hooks on the denoiser and its blocks: inert in other contexts, and in copies of the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ...attention.hook import Hook

if TYPE_CHECKING:
    from .graft import Graft


def hook_denoiser(denoiser: nn.Module, graft: Graft) -> Callable[[], None]:
    """Let `graft` see and change the denoiser's inputs and outputs; returns the undo.

    torch's own hooks, because accelerate's offload drops anything patched on `forward`.
    """

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not graft.here or graft.run.step.probing:
            return None
        return (), graft.run.before(args, kwargs)

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not graft.here or graft.run.step.probing:
            return None
        return graft.run.aborted() if output is None else graft.run.after(output)

    first = denoiser.register_forward_pre_hook(Hook(before), with_kwargs=True, prepend=True)
    last = denoiser.register_forward_hook(Hook(after), with_kwargs=True, always_call=True)

    def undo() -> None:
        first.remove()
        last.remove()

    return undo


class LateJoin:
    """Adds a branch's rows at a block instead of at the input: everything before it is computed once."""

    @staticmethod
    def install(block: nn.Module, name: str, graft: Graft) -> Callable[[], None]:
        """Hook one block; from the join block on, whatever still has the pipeline's rows is expanded."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not graft.here:
                return None
            wanted = graft.run.branching.arriving(name)
            return None if wanted is None else (_expand(args, *wanted), _expand(kwargs, *wanted))

        return block.register_forward_pre_hook(Hook(before), with_kwargs=True, prepend=True).remove


def _expand(tree: Any, index: torch.Tensor, base: int) -> Any:
    """Every tensor with `base` rows gets the rows of `index`; those that already have them are left."""

    def pick(value: Any) -> Any:
        batched = isinstance(value, torch.Tensor) and value.ndim and len(value) == base
        return value[index] if batched else value

    def named(name: str, value: Any) -> Any:
        if name == "cross_attention_kwargs" and value:  # of what it holds only GLIGEN's grounding is batched by rows
            return {k: tree_map(pick, v) if k == "gligen" else v for k, v in value.items()}
        return tree_map(pick, value)

    if isinstance(tree, dict):
        return {name: named(name, value) for name, value in cast("dict[str, Any]", tree).items()}
    return tree_map(pick, tree)

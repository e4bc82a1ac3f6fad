"""Candidates of one picture in one row: what nothing attends to stands behind the picture, once for each candidate.

Where all layers hide the hole's keys from every query, text and background do not depend on what is in the hole. So
inside the blocks, rows that differ in the hole alone are one row, whose image is followed by the other rows' hole
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils._pytree import tree_leaves

from ...attention.hook import hook_after, hook_before
from ...plugins.base import Plugin
from ..families.base import Adapter, Inputs
from ..families.declared import DeclaredAdapter
from ..families.hear import named
from .folded import Fold, Stack
from .run import Run
from .stream_stage import joins


def fold_rows(run: Run, active: Sequence[Plugin], inputs: Inputs) -> None:
    """Have all rows run as one inside of the blocks, where that is exact."""
    hole, adapter = _hole(run, active), run.adapter
    if hole is None or not isinstance(adapter, DeclaredAdapter) or not _alike(adapter, inputs, hole, run.step.size):
        return
    words = adapter.lengths(inputs)[0] if adapter.spec.text_first else 0
    run.fold = Fold(hole, run.step.size[0] * run.step.size[1], words, run.step.rows)
    run.step.rows, run.step.tail = {"cond": slice(0, 1)}, run.fold.tail


def unfold_rows(run: Run) -> None:
    """The call is over: its rows are again what they were."""
    if run.fold is not None:
        run.step.rows, run.step.tail, run.fold = run.fold.rows, 0, None


def hook_folds(adapter: Adapter, here: Callable[[], Run | None]) -> list[Callable[[], None]]:
    """Hooks by which rows become one and several again, as their undos; `here()` is the run that is edited now."""
    if not isinstance(adapter, DeclaredAdapter) or not joins(adapter):
        return []
    denoiser, undos = adapter.denoiser, list[Callable[[], None]]()
    for stack in _stacks(adapter):
        blocks = list(denoiser.get_submodule(stack.path).children())
        undos += [hook_before(denoiser, block, _laying(block, stack, here)) for block in blocks]
        undos.append(hook_after(denoiser, blocks[-1], _spreading(stack, here)))
    return undos


def _stacks(adapter: DeclaredAdapter) -> list[Stack]:
    meets, alone = adapter.spec.meets, [path for path, kind in adapter.spec.alone if kind == "self"]
    refined = [Stack(path, meets[0].sequence, meets[0].along, joint=False, alone=True) for path in alone]
    return refined + [Stack(meet.path, meet.sequence, meet.along, meet.text is None, alone=False) for meet in meets]


def _laying(block: nn.Module, stack: Stack, here: Callable[[], Run | None]) -> Callable[..., Any]:
    def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = here()
        return None if run is None or run.fold is None else ((), run.fold.arguments(stack, named(block, args, kwargs)))

    return before


def _spreading(stack: Stack, here: Callable[[], Run | None]) -> Callable[..., Any]:
    def after(args: Any, kwargs: Any, output: Any) -> Any:
        run = here()
        return None if run is None or run.fold is None or output is None else run.fold.spread(stack, output)

    return after


def _hole(run: Run, active: Sequence[Plugin]) -> torch.Tensor | None:
    """Tokens that nothing attends to, if one plugin alone edits this call and hides them everywhere."""
    editing = [plugin for plugin in active if type(plugin).edits is not Plugin.edits]
    if len(editing) != 1 or [*run.step.rows] != ["cond"] or run.step.rows["cond"].stop < 2 or run.joined is not None:
        return None
    hole = editing[0].unseen(run.step)
    return hole if hole is not None and len(hole) else None


def _alike(adapter: DeclaredAdapter, inputs: Inputs, hole: torch.Tensor, size: tuple[int, int]) -> bool:
    """Whether rows differ in these tokens alone; no where the blocks get more than the call's own rows."""
    sample = _by_token(adapter, inputs[adapter.sample], size)
    seen = torch.ones(sample.shape[1], dtype=torch.bool, device=sample.device)
    seen[hole] = False
    rest = {name: value for name, value in inputs.items() if name != adapter.sample}
    lists = [rest.pop(name) for name in adapter.batched if isinstance(rest.get(name), list)]
    nested = [value for value in rest.values() if not isinstance(value, torch.Tensor)]
    if any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(nested)):  # ControlNets, an IP-Adapter's pictures
        return False
    tensors = [value for value in rest.values() if isinstance(value, torch.Tensor) and value.ndim]
    rows = [sample[:, seen], *(one for one in tensors if len(one) == len(sample)), *lists]
    return all(map(_uniform, rows))


def _uniform(rows: Any) -> bool:
    """Whether all rows are the first one; of a tensor in one comparison, for a GPU waits for each."""
    if isinstance(rows, torch.Tensor):
        return torch.equal(rows[1:], rows[:1].expand_as(rows[1:]))
    first, *others = rows
    return all(torch.equal(one, first) if isinstance(one, torch.Tensor) else one is first for one in others)


def _by_token(adapter: DeclaredAdapter, sample: Any, size: tuple[int, int]) -> torch.Tensor:
    """The sample [n, tokens, C], however it lies."""
    sample = adapter.latent_of(sample, size) if isinstance(sample, list) else sample
    return sample if sample.ndim == 3 else F.pixel_unshuffle(sample, sample.shape[-1] // size[1]).flatten(2).mT

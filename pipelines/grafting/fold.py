"""Candidates of one picture in one row: what nothing attends to stands behind the picture, once for each candidate.

Where all layers hide the hole's keys from every query, text and background do not depend on what is in the hole. So
rows that differ in the hole alone are one row, whose image is followed by the other rows' hole tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ...plugins.base import Plugin
from ..families.base import Inputs
from ..families.declared import DeclaredAdapter
from .folded import Fold
from .run import Run

_PLACES = "img_ids"


def fold_rows(run: Run, active: Sequence[Plugin], inputs: Inputs) -> Inputs:
    """The inputs with all rows in one, where that is exact; else as they are."""
    hole, adapter = _hole(run, active), run.adapter
    if hole is None or not isinstance(adapter, DeclaredAdapter) or not _alike(adapter, inputs, hole):
        return inputs
    sample, places = inputs[adapter.sample], inputs[_PLACES]
    tokens, count = sample.shape[1], len(sample)
    own = adapter.take(inputs, slice(0, 1))
    own[adapter.sample] = torch.cat([sample[:1], sample[1:, hole].flatten(0, 1)[None]], 1)
    places = places[:1] if places.ndim == 3 else places
    more = places.index_select(-2, hole)
    own[_PLACES] = torch.cat([places, *[more] * (count - 1)], -2)
    mask = own.get("attention_mask")
    if mask is not None:
        own["attention_mask"] = torch.cat([mask, mask.new_ones(1, (count - 1) * len(hole))], 1)
    run.fold = Fold(hole, tokens, run.step.rows)
    run.step.rows, run.step.tail = {"cond": slice(0, 1)}, (count - 1) * len(hole)
    return own


def unfold_rows(run: Run, output: Any) -> Any:
    """The denoiser's output with a row for each candidate."""
    folded, run.fold = run.fold, None
    if folded is None:
        return output
    run.step.rows, run.step.tail = folded.rows, 0
    return run.adapter.with_prediction(output, folded.spread(run.adapter.prediction(output)))


def _hole(run: Run, active: Sequence[Plugin]) -> torch.Tensor | None:
    """Tokens that nothing attends to, if one plugin alone edits this call and hides them everywhere."""
    editing = [plugin for plugin in active if type(plugin).edits is not Plugin.edits]
    if len(editing) != 1 or [*run.step.rows] != ["cond"] or run.step.rows["cond"].stop < 2 or run.joined is not None:
        return None
    hole = editing[0].unseen(run.step)
    return hole if hole is not None and len(hole) else None


def _alike(adapter: DeclaredAdapter, inputs: Inputs, hole: torch.Tensor) -> bool:
    """Whether rows differ in these tokens alone, in a model that is told where each token stands."""
    sample = inputs[adapter.sample]
    told = isinstance(sample, torch.Tensor) and sample.ndim == 3 and inputs.get(_PLACES) is not None
    if not told or inputs[_PLACES].shape[-2] != sample.shape[1] or not adapter.spec.text_first:
        return False
    nested = [value for value in inputs.values() if not isinstance(value, torch.Tensor)]
    if any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(nested)):  # ControlNets, an IP-Adapter's pictures
        return False
    seen = torch.ones(sample.shape[1], dtype=torch.bool, device=sample.device)
    seen[hole] = False
    rows = [sample[:, seen], *(inputs.get(name) for name in adapter.batched if name not in (adapter.sample, _PLACES))]
    tensors = [one for one in rows if isinstance(one, torch.Tensor) and one.ndim and len(one) == len(sample)]
    return all(torch.equal(one[1:], one[:1].expand_as(one[1:])) for one in tensors)

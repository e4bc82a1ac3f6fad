"""The combine stage: extra rows leave the prediction, and what plugins add to it goes into every half of guidance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from ...plugins.base import Plugin
from .run import Run


def combine(run: Run, active: Sequence[Plugin], output: Any) -> Any:
    """The denoiser's output with the rows that the pipeline sent in, moved by the plugins' deltas."""
    step, prediction = run.step, _stacked(run.adapter.prediction(output))
    kept = max(rows.stop for name, rows in step.rows.items() if name not in step.likes)
    if "cond" not in step.rows:  # guidance's other call gets what the first one was given
        return _folded(run, output, kept, [name for name in step.rows if name not in step.likes])
    combiners = [plugin for plugin in active if type(plugin).combine is not Plugin.combine]
    if not combiners and kept == len(prediction):
        return output
    if not combiners:
        run.deltas = []
        return _folded(run, output, kept, ())
    full = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
    run.deltas = [d for plugin in combiners if (d := plugin.combine(step, full, step.rows)) is not None]
    return _folded(run, output, kept, ("uncond", "cond"))


def _folded(run: Run, output: Any, kept: int, groups: Sequence[str]) -> Any:
    """The first `kept` rows of the output, moved by the deltas.

    u + g (c - u) moves by exactly d when both halves do, whatever g is.
    """
    found = run.adapter.prediction(output)
    if not run.deltas:
        same = kept == len(found)
        return output if same else run.adapter.with_prediction(output, found[:kept])
    prediction = _stacked(found)
    folded = prediction[:kept].to(torch.promote_types(prediction.dtype, torch.float32), copy=True)
    for name in groups:
        if name in run.step.rows:
            for delta in run.deltas:
                folded[run.step.rows[name], : delta.shape[1]] += delta
    new: Any = folded.to(prediction.dtype)
    return run.adapter.with_prediction(output, new if found is prediction else cast("Any", list(new)))


def _stacked(prediction: Any) -> torch.Tensor:
    """A prediction that may come as a list with one for each row."""
    return prediction if isinstance(prediction, torch.Tensor) else torch.stack(list(prediction))

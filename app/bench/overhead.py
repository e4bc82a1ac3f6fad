"""What a graft costs while nothing of it is active: the ratio to the plain pipeline, in one run."""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch

from ... import Edit, Plugin, graft, picturebook
from ...attention.layer import AttentionLayer


class _Everywhere(Edit):
    def selects(self, layer: AttentionLayer) -> bool:
        return True


class _Waiting(Plugin):
    """On every layer, but never within its window."""

    def edits(self) -> list[Edit]:
        return [_Everywhere()]


def run(full: bool) -> None:
    """Print the ratio of a sampling run under an idle graft to a plain one, nothing decoded."""
    pairs = 60 if full else 15
    pipe = picturebook()
    pipe.set_progress_bar_config(disable=True)
    waiting = graft(pipe, _Waiting(start=1.0))
    ratios: list[float] = []
    for i in range(pairs + 1):
        plain = _seconds(pipe)
        with waiting:
            idle = _seconds(pipe)
        if i:
            ratios.append(idle / plain)
    low, middle, high = statistics.quantiles(ratios, n=4)
    sys.stdout.write("| 25 guided steps, one thread | ratio to plain, quartiles |\n|---|---|\n")
    sys.stdout.write(f"| graft on all {len(waiting.layers)} layers, idle | {low:.3f} {middle:.3f} {high:.3f} |\n")


def _seconds(pipe: Any) -> float:
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    pipe("a red ball , sky", num_inference_steps=25, generator=generator, output_type="latent")
    return time.perf_counter() - start

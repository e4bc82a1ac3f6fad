"""What a graft costs on a compiled model: the ratio of its process time to the plain pipeline's, compiled as well."""

from __future__ import annotations

import statistics
import sys
from typing import Any

import torch
from torch._dynamo.utils import counters

from .overhead import STEPS, Way, models, seconds, ways

ROWS = ("plain", "neutral settings", "NegativeAway nasa", "NegativeAway nag", "SelfAttentionRedirection")


def run(full: bool) -> None:
    """Print ratios on two models compiled block by block by inductor, and by how many graphs each way added."""
    rounds = 30 if full else 8
    torch._dynamo.config.recompile_limit = 64  # every way keeps its graphs here, which torch's eight cannot hold
    sys.stdout.write(f"| {STEPS} steps, one thread | graphs | breaks | process time to plain compiled, quartiles |\n")
    sys.stdout.write("|---|---|---|---|\n")
    for name, pipe, prompt in models():
        _table(name, pipe, prompt, rounds)


def _table(model: str, pipe: Any, prompt: str, rounds: int) -> None:
    chosen = [way for way in ways(pipe) if way[0] in ROWS]
    eager = [seconds(pipe, prompt, chosen[0]) for _ in range(rounds)]
    torch.compiler.reset()
    counters.clear()
    pipe.unet.compile_repeated_blocks(fullgraph=True)
    graphs = [_graphs(pipe, prompt, way) for way in chosen]
    times = [[seconds(pipe, prompt, way) for way in chosen] for _ in range(rounds)]
    share = statistics.median(row[0] for row in times) / statistics.median(eager)
    sys.stdout.write(f"| {model}, plain | {graphs[0]} | {_breaks()} | {share:.3f} of eager |\n")
    for i, (name, _, _) in enumerate(chosen[1:], 1):
        low, middle, high = statistics.quantiles([row[i] / row[0] for row in times], n=4)
        sys.stdout.write(f"| {model}, {name} | {graphs[i]} | {_breaks()} | {low:.3f} {middle:.3f} {high:.3f} |\n")
    sys.stdout.flush()


def _graphs(pipe: Any, prompt: str, way: Way) -> int:
    """Graphs that this way adds to those that are there; its first two runs, in which it is compiled, are not timed."""
    before = counters["stats"]["unique_graphs"]
    for _ in range(2):
        seconds(pipe, prompt, way)
    return counters["stats"]["unique_graphs"] - before


def _breaks() -> int:
    return sum(counters["graph_break"].values())

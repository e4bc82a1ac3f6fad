"""Round trips of inversion: a picture, the latents it would be sampled from, and what they are sampled to again.

    python -m diffgraft.app.bench inversion_effect --full --model picturebook-transformer

Pictures of fresh scenes pass the autoencoder first, which is what no inversion can mend. Empty prompt, no guidance.
What has been measured is kept under outputs/bench/: a full run goes on where it was cut.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ... import invert
from ...pipelines.families.latents import decode_latents, encode_image
from .rows import KEPT, Rows, drawing, fingerprint, subject
from .statistics import mean
from .style_scores import psnr
from .training import share_cores
from .world import FRESH, render, scene

STEPS, BATCH, FIRST = 25, 8, FRESH + 70_000
"""Of the schedule; pictures at once; the first scene."""
EXTRA = (0, 1, 3, 5)
"""Extra evaluations a step."""


class Bench:
    """Measures round trips of one model, and remembers.

    Args:
        pipe: the model. path: where measurements are kept.
    """

    def __init__(self, pipe: Any, path: Path = KEPT / "inversion.jsonl") -> None:
        self.pipe, self.rows, self.key = pipe, Rows(path), fingerprint(pipe)

    def trips(self, iterations: int, count: int) -> list[dict[str, float]]:
        """For each of `count` pictures its PSNR in dB against its own way through the autoencoder."""
        found: list[dict[str, float]] = []
        for start in range(0, count, BATCH):
            seeds = list(range(FIRST + start, FIRST + min(count, start + BATCH)))
            key = {**self.key, "trip": iterations, "steps": STEPS, "scenes": [seeds[0], seeds[-1]]}
            found += self.rows.remember(key, partial(self._trip, iterations, seeds))
            sys.stderr.write(f"{iterations} extra iterations: {len(found)} of {count}\n")
        return found

    def _trip(self, iterations: int, seeds: Sequence[int]) -> list[dict[str, float]]:
        share_cores()
        pictures = [render(scene(seed)) for seed in seeds]
        once = decode_latents(self.pipe, encode_image(self.pipe, pictures))
        done = invert(self.pipe, pictures, steps=STEPS, iterations=iterations, guidance=1.0)
        scheduler, self.pipe.scheduler = self.pipe.scheduler, done.scheduler
        try:
            call = drawing(self.pipe, STEPS, 1.0) | done.call(self.pipe)
            again = self.pipe([""] * len(seeds), **call).images
        finally:
            self.pipe.scheduler = scheduler
        values = [psnr(a, b) for a, b in zip(again, once, strict=True)]
        return [{"psnr": value, "passes": done.evaluations} for value in values]


def run(full: bool, write: Any = sys.stdout.write, model: Path | None = None) -> None:
    """Prints the table.

    Args:
        full: 48 pictures instead of eight.
        model: a folder that `save_pretrained` wrote, or an embedded model's name; None is the picture book.
    """
    bench, count = Bench(subject(model)), 48 if full else BATCH
    write(f"{STEPS} steps, {count} pictures, against the autoencoder's own round trip\n\n")
    write("| extra iterations | PSNR dB, mean | worst | at least 30 dB | passes |\n|---|---|---|---|---|\n")
    for iterations in EXTRA:
        trips = bench.trips(iterations, count)
        values = [trip["psnr"] for trip in trips]
        found, good = mean(values), sum(value >= 30 for value in values)
        shown = f"{found.value:.1f} ({found.low:.1f} to {found.high:.1f}) | {min(values):.1f}"
        write(f"| {iterations} | {shown} | {good} of {count} | {mean([t['passes'] for t in trips]).value:.0f} |\n")

"""Does a startpoint found on the one-step student help the many-step model?

1. Three objects: the noise is moved against a map loss on the student; the 20-step model draws the picture. Beside
   it the plain model at the same seeds, the same noise on the student, `AttentionSegregation`, and best-of-n: the seed
   with the lowest loss on the student, of as many as the search's passes pay for (a backward pass counts as two).
2. A colour: the left half shall be blue. How far the loss falls on the student and in the 20-step model's pictures.

Whatever has been drawn is kept under outputs/bench/ and not drawn again.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ... import AttentionSegregation, colour_loss, graft
from ...pipelines.tasks.optimise import initial_noise, search
from ...pipelines.tasks.search import OnMaps, OnPictures, Surrogate
from .judge import Judge, load_judge, look
from .model_card import GUIDANCE
from .rows import KEPT, Rows, fingerprint, subject
from .segregation_effect import outcome, points
from .segregation_rows import FIRST, three_objects
from .statistics import mean, paired_difference, share
from .training import share_cores
from .world import Scene, caption

STEPS, ITERATIONS, BATCH = 20, 12, 4
CAPTIONS = FIRST + 700_000  # apart from those that the setting was chosen on, and from other tables'
SETTING: Mapping[str, float] = {"rate": 5.0, "momentum": 0.9, "clip": 0.1, "regularise": 0.01}
LOSS = "a-star"
BLUE, WHERE = (0.1, 0.2, 0.9), "left"
DRAWS = 3 * ITERATIONS + 1


class Bench:
    """The model, its student and the judge."""

    def __init__(self, pipe: Any, student: Any, judge: Judge, path: Path = KEPT / "optimise.jsonl") -> None:
        self.pipe, self.student, self.judge, self.rows = pipe, student, judge, Rows(path)
        self.key = {"model": fingerprint(pipe), "student": fingerprint(student), "steps": STEPS, "loss": LOSS}

    def right(self, scenes: Sequence[Scene]) -> dict[str, list[bool]]:
        """By row, whether every object is there in its colour."""
        found: dict[str, list[bool]] = {}
        for start in range(0, len(scenes), BATCH):
            part = scenes[start : start + BATCH]
            key = {**self.key, "setting": dict(SETTING), "iterations": ITERATIONS, "seed": start}
            key |= {"captions": [caption(s) for s in part]}
            for row, outcomes in self.rows.remember(key, partial(self._right, part, start)).items():
                found.setdefault(row, []).extend(outcomes)
        return found

    def _right(self, scenes: Sequence[Scene], seed: int) -> dict[str, list[bool]]:
        share_cores()
        words = [[thing.kind for thing in scene.things] for scene in scenes]
        seeds = [seed + i for i in range(len(scenes))]
        plain = initial_noise(self.pipe, seeds, None, None)
        objective = OnMaps(Surrogate(self.student, [caption(s) for s in scenes], 1, 0.0), words, LOSS)
        moved = search(objective, plain, ITERATIONS, **SETTING).latents
        best = self._best(objective, plain)
        plugin = AttentionSegregation(words)
        drawn = {
            "plain pipeline": self.draw(scenes, plain), "optimised on the student": self.draw(scenes, moved),
            f"best of {DRAWS} seeds by the student's loss": self.draw(scenes, best),
            "`AttentionSegregation`": self.draw(scenes, plain, plugin),
            "the student, plain": self.draw(scenes, plain, student=True),
            "the student, optimised": self.draw(scenes, moved, student=True),
        }  # fmt: skip
        return {
            row: [outcome(v, s).right for v, s in zip(look(self.judge, pictures), scenes, strict=True)]
            for row, pictures in drawn.items()
        }

    def _best(self, objective: OnMaps, plain: torch.Tensor) -> torch.Tensor:
        """Of each picture's noise and its shuffles the one with the lowest loss."""
        from ...plugins.moves import shuffled

        best, lowest = plain, torch.full((len(plain),), torch.inf)
        for number in range(DRAWS):
            noise = shuffled(plain, number)
            losses, _ = objective(noise)
            best = torch.where((losses < lowest).view(-1, 1, 1, 1), noise, best)
            lowest = torch.minimum(lowest, losses)
        return best

    def draw(
        self, scenes: Sequence[Scene], noise: torch.Tensor, plugin: Any = None, student: bool = False
    ) -> torch.Tensor:
        """Pictures [n, 3, 128, 128] in -1 ... 1."""
        pipe, steps, guidance = (self.student, 1, 0.0) if student else (self.pipe, STEPS, GUIDANCE)
        with graft(pipe, *([plugin] if plugin else [])):
            pictures = pipe(
                [caption(s) for s in scenes], latents=noise, num_inference_steps=steps, guidance_scale=guidance,
                output_type="pt",
            ).images  # fmt: skip
        return pictures.cpu() * 2 - 1

    def colours(self, scenes: Sequence[Scene], iterations: int) -> dict[str, list[float]]:
        """Losses before and after, on the student and of the many-step model's pictures."""
        found: dict[str, list[float]] = {}
        for start in range(0, len(scenes), BATCH):
            part = scenes[start : start + BATCH]
            key = {**self.key, "loss": "colour", "setting": dict(SETTING), "iterations": iterations}
            key |= {"captions": [caption(s) for s in part]}
            for row, losses in self.rows.remember(key, partial(self._colours, part, start, iterations)).items():
                found.setdefault(row, []).extend(losses)
        return found

    def _colours(self, scenes: Sequence[Scene], seed: int, iterations: int) -> dict[str, list[float]]:
        share_cores()
        loss = colour_loss(BLUE, WHERE)
        plain = initial_noise(self.pipe, [seed + i for i in range(len(scenes))], None, None)
        objective = OnPictures(Surrogate(self.student, [caption(s) for s in scenes], 1, 0.0), loss)
        moved = search(objective, plain, iterations, **SETTING).latents
        rows = {
            "student, plain": self.draw(scenes, plain, student=True),
            "student, optimised": self.draw(scenes, moved, student=True),
            "20 steps, plain": self.draw(scenes, plain), "20 steps, optimised": self.draw(scenes, moved),
        }  # fmt: skip
        return {row: loss(pictures / 2 + 0.5, "").tolist() for row, pictures in rows.items()}


def run(full: bool, model: Path | None = None) -> None:
    """Both tables for the embedded model and its student."""
    if model is not None:
        say("this table needs the one-step student, which belongs to the embedded model; --model is passed over")
    bench = Bench(subject(), subject(one_step=True), load_judge())
    right_table(bench, three_objects(100 if full else 8, CAPTIONS))
    colour_table(bench, three_objects(24 if full else 4, CAPTIONS + 10_000), (10, 25, 50) if full else (10,))


def right_table(bench: Bench, scenes: Sequence[Scene]) -> None:
    """Print the shares of right pictures."""
    say(f"\nThree objects, {len(scenes)} captions, {ITERATIONS} updates, {STEPS} steps, guidance {GUIDANCE:g}\n")
    say("| | every object right | change, points |\n|---|---|---|")
    found = bench.right(scenes)
    for row, outcomes in found.items():
        first = "the student, plain" if row.startswith("the student") else "plain pipeline"
        change = "" if row == first else points(paired_difference(outcomes, found[first]))
        say(f"| {row} | {share(outcomes).percent()} | {change} |")


def colour_table(bench: Bench, scenes: Sequence[Scene], counts: Sequence[int]) -> None:
    """Print by how much the colour's loss falls."""
    say(f"\nThe left half shall be blue: the loss, {len(scenes)} captions\n")
    say("| updates | student, plain | student, optimised | 20 steps, plain | 20 steps, optimised |\n|" + "---|" * 5)
    for count in counts:
        means = [mean(losses) for losses in bench.colours(scenes, count).values()]
        say(f"| {count} | {' | '.join(f'{m.value:.3f} ({m.low:.3f} to {m.high:.3f})' for m in means)} |")


def say(line: str) -> None:
    """Print a line now."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()

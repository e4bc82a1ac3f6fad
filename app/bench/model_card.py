"""Draws fresh captions with the picture book and lets the judge count what is right.

python -m diffgraft.app.bench.model_card           # the table of the model card: 500 captions a row, 25 steps
python -m diffgraft.app.bench.model_card --count 64 # a quick look
python -m diffgraft.app.bench.model_card --one-step # the student: one step, no guidance
python -m diffgraft.app.bench.model_card --model picturebook-transformer   # the transformer edition
python -m diffgraft.app.bench.model_card --model picturebook-transformer-few-steps   # its student: four steps
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from ...attention.errors import ModelLoadError, UnsupportedPipelineError
from ..models import ONE_STEP
from .autoencoder import measure
from .judge import Judge, Verdict, load_judge, look
from .rows import KEPT, Rows, drawing, fingerprint, pace, subject
from .statistics import share
from .styles import STYLES
from .train_judge import report
from .training import share_cores
from .world import FRESH, Scene, caption, scene

ASSETS = Path(__file__).parents[2] / "assets"
FIRST = FRESH + 1_000_000
GUIDANCE = 2.5
PART = 100  # captions drawn before they are kept


@dataclass(frozen=True)
class Row:
    """One line of the table: which scenes."""

    name: str
    things: int
    split: str
    style: str | None

    def scenes(self, count: int) -> list[Scene]:
        """The first `count` scenes of this row; every row has its own seeds."""
        return [scene(FIRST + i, count=self.things, split=self.split, style=self.style) for i in range(count)]


ROWS = [
    Row("one object, plain", 1, "seen", "plain"),
    Row("one object, any style", 1, "seen", None),
    Row("two objects, seen pairs, plain", 2, "seen", "plain"),
    Row("two objects, seen pairs, any style", 2, "seen", None),
    Row("two objects, unseen pairs, plain", 2, "unseen", "plain"),
    Row("two objects, unseen pairs, any style", 2, "unseen", None),
    Row("three objects, unseen, plain", 3, "unseen", "plain"),
    Row("three objects, unseen, any style", 3, "unseen", None),
]


def draw(
    pipe: DiffusionPipeline, prompts: Sequence[str], *, steps: int, guidance: float, seed: int, batch: int = 25
) -> torch.Tensor:
    """Pictures [N, 3, 128, 128] in -1 ... 1, eight bits deep; picture i has seed `seed + i`, whatever the batch."""
    drawn = []
    for i in range(0, len(prompts), batch):
        share_cores()
        part = list(prompts[i : i + batch])
        generators = [torch.Generator().manual_seed(seed + i + j) for j in range(len(part))]
        settings = drawing(pipe, steps, guidance) | {"generator": generators, "output_type": "np"}
        drawn.append(torch.from_numpy(pipe(part, **settings).images))
    return ((torch.cat(drawn) * 255).round() / 127.5 - 1).movedim(-1, 1)


def right(verdicts: Sequence[Verdict], scenes: Sequence[Scene]) -> dict[str, list[bool]]:
    """The four columns, picture by picture: all right (kinds and colours), kinds right, background, style."""
    pairs = list(zip(verdicts, scenes, strict=True))
    return {
        "all right": [v.exact(s) for v, s in pairs],
        "kinds right": [v.kinds(s) for v, s in pairs],
        "background": [v.background == s.background for v, s in pairs],
        "style": [v.style == s.style for v, s in pairs],
    }


def evaluate(
    pipe: DiffusionPipeline, judge: Judge, row: Row, *, count: int, steps: int, guidance: float, first: int = 0
) -> dict[str, list[bool]]:
    """`count` captions of a row from its number `first` on; they say everything, nothing is selected."""
    scenes = row.scenes(first + count)[first:]
    pictures = draw(pipe, [caption(s) for s in scenes], steps=steps, guidance=guidance, seed=first)
    return right(look(judge, pictures), scenes)


def kept_row(
    pipe: DiffusionPipeline, judge: Judge, row: Row, count: int, kept: Rows, key: Mapping[str, Any], **how: Any
) -> dict[str, list[bool]]:
    """One row of the table, drawn or remembered a hundred captions at a time."""
    found: dict[str, list[bool]] = {}
    for first in range(0, count, PART):
        part = how | {"first": first, "count": min(PART, count - first)}
        label = {**key, **part, "row": asdict(row)}
        for column, values in kept.remember(label, partial(evaluate, pipe, judge, row, **part)).items():
            found.setdefault(column, []).extend(values)
    return found


def table(
    pipe: DiffusionPipeline, rows: Sequence[Row], count: int, steps: int, guidance: float,
    path: Path = KEPT / "model_card.jsonl",
) -> None:  # fmt: skip
    """Prints the rows of a model, each as soon as it is known, and keeps them."""
    judge, kept, key = load_judge(), Rows(path), fingerprint(pipe)
    sys.stdout.write(f"{count} captions a row, {steps} steps, guidance {guidance:g}; in brackets 95% intervals\n\n")
    sys.stdout.write("| | all right | kinds right | background | style |\n|---|---|---|---|---|\n")
    for row in rows:
        found = kept_row(pipe, judge, row, count, kept, key, steps=steps, guidance=guidance)
        sys.stdout.write(f"| {row.name} | " + " | ".join(share(v).percent() for v in found.values()) + " |\n")
        sys.stdout.flush()


def held_out(vae: AutoencoderKL, judge: Judge, renders: int, verdicts: int) -> dict[str, dict[str, float]]:
    """How exact the measure itself is, by style: the autoencoder on `renders` a style, the judge on `verdicts` of what
    it makes of them.
    """
    pictures, seen = measure(vae, renders), report(judge, vae, verdicts)
    return {
        "autoencoder, dB": {name: pictures[name] for name in (*STYLES, "all")},
        "autoencoder, hue kept": {"all": pictures["hue kept"]},
        "judge, exact": {name: seen[name] for name in STYLES},
    }


def cells(values: Mapping[str, float], form: str) -> str:
    """A row of the table by style."""
    return "| " + " | ".join(f"{values[name]:{form}}" if name in values else "" for name in (*STYLES, "all")) + " |"


def instruments(vae: AutoencoderKL, judge: Judge, renders: int, verdicts: int) -> None:
    """Print what `held_out` finds."""
    sys.stdout.write(f"\nOn held-out renders: {renders} a style for the autoencoder, {verdicts} for the judge\n\n")
    sys.stdout.write("| | " + " | ".join((*STYLES, "all")) + " |\n" + "|---" * (len(STYLES) + 2) + "|\n")
    for name, values in held_out(vae, judge, renders, verdicts).items():
        sys.stdout.write(f"| {name} {cells(values, '.2f' if name.endswith('dB') else '.1%')}\n")


def run(full: bool, model: Path | None = None) -> None:
    """The tables of `python -m diffgraft.app.bench model_card`: 500 captions a row, or 20 for a quick look."""
    count = 500 if full else 20
    table(subject(model), ROWS, count, *pace(model, 25, GUIDANCE))
    if model is None:
        sys.stdout.write("\nThe one-step student: ")
        table(subject(one_step=True), ROWS, count, steps=1, guidance=0.0)
    instruments(subject(model).vae, load_judge(), *((60, 750) if full else (10, 50)))


def main() -> None:
    """The same with a choice of model, rows and steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a pipeline's folder, or an embedded model's name")
    parser.add_argument("--count", type=int, default=500, help="captions a row")
    parser.add_argument("--steps", type=int, help="25, or the student's own")
    parser.add_argument("--guidance", type=float, help=f"{GUIDANCE:g}, or the student's own")
    numbers = range(len(ROWS))
    parser.add_argument("--rows", type=int, nargs="+", choices=numbers, default=numbers, help="only these")
    parser.add_argument("--one-step", action="store_true", help="the student: one step, no guidance")
    args = parser.parse_args()
    model = Path(ONE_STEP) if args.one_step else args.model
    usual = pace(model, 25, GUIDANCE)
    steps = usual.steps if args.steps is None else args.steps
    guidance = usual.guidance if args.guidance is None else args.guidance
    try:
        pipe = subject(model)
    except (ModelLoadError, UnsupportedPipelineError) as error:
        parser.error(str(error))
    table(pipe, [ROWS[i] for i in args.rows], args.count, steps, guidance)


if __name__ == "__main__":
    main()

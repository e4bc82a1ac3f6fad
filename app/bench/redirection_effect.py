"""Object removal on the picture book, against the true background: what is left, what is invented, how well it fits."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ... import erase, picturebook
from ...attention.masks import Bools
from ...attention.morphology import distance, grow
from .fills import FILLS
from .judge import WEIGHTS, load_judge, look
from .statistics import mean, paired_difference, share
from .world import FRESH, Scene, masks, render, scene

FIRST = FRESH + 7_000_000
KINDS = ("exact", "grown", "box", "brush")
PLAIN = "blended diffusion"
BACKGROUND = "<background>"
DIFFUSION: dict[str, dict[str, Any]] = {
    "redirection": {},
    "redirection, background named": {"prompt": BACKGROUND, "guidance": 3.0},
    "redirection, inverted start": {"method": "dip"},
    "redirection without suppression": {"suppression": 1.0},
    PLAIN: {"scale": 0.0},
}


@dataclass(frozen=True)
class Case:
    """One thing to remove: the picture, the same without the thing, where the thing is, and what the user marks."""

    scene: Scene
    image: Image.Image
    truth: Image.Image
    thing: Bools
    marked: Bools


@dataclass(frozen=True)
class Score:
    """How one fill did.

    Attributes:
        left: the thing's colours that are still there, 1 all and 0 none: the picture's error projected on the thing.
        psnr: of the marked pixels against the true background, dB.
        seam: the same within 4 pixels of the mask's edge, on both sides.
        colours: what the judge finds afterwards, None without one.
    """

    left: float
    psnr: float
    seam: float
    colours: dict[str, str] | None = None


Fill = Callable[[list[Case], int], list[NDArray[Any]]]
"""Fills all cases with one seed each."""
BATCH = 20


def cases(count: int, kind: str = "exact") -> Iterator[Case]:
    """Scenes of two things that training never drew; the first thing is to go."""
    for i in range(count):
        drawn = scene(FIRST + i, count=2, split="any")
        thing = masks(drawn)[0]
        marked = mark(thing, kind, random.Random(f"mark {i}"))
        yield Case(drawn, render(drawn), render(drawn.without(0)), thing, marked)


def mark(thing: Bools, kind: str, rng: random.Random) -> Bools:
    """What a user marks: the thing exactly, with 4 pixels around it, its box, or strokes of a brush over it."""
    if kind == "exact":
        return thing
    if kind == "grown":
        return grow(thing, 4)
    y, x = np.nonzero(thing)
    if kind == "box":
        box = np.zeros_like(thing)
        box[max(0, y.min() - 2) : y.max() + 3, max(0, x.min() - 2) : x.max() + 3] = True
        return box
    canvas = Image.new("1", thing.shape[::-1])
    pen, radius = ImageDraw.Draw(canvas), 6
    for row in range(y.min(), y.max() + radius, radius):  # a hand that sweeps over it, line by line, and shakes
        inside = x[abs(y - row) <= radius // 2]
        if len(inside):
            ends = [(int(inside.min()), row + rng.randint(-2, 2)), (int(inside.max()), row + rng.randint(-2, 2))]
            pen.line(ends, fill=1, width=2 * radius)
            for j, i in ends:
                pen.ellipse((j - radius, i - radius, j + radius, i + radius), fill=1)
    return np.asarray(canvas) | thing


def score(case: Case, out: NDArray[Any]) -> Score:
    """Against the true background, on the marked pixels and on their edge."""
    truth, image = (np.asarray(x, float) for x in (case.truth, case.image))
    error, object_ = out - truth, image - truth
    left = float((error * object_)[case.thing].sum() / (object_**2)[case.thing].sum())
    edge = (distance(case.marked, 4) <= 4) & (distance(~case.marked, 4) <= 4)
    return Score(left, _psnr(error[case.marked]), _psnr(error[edge]))


def _psnr(error: NDArray[Any]) -> float:
    return float(10 * np.log10(255**2 / max(1e-2, (error**2).mean())))


def measure(fill: Fill, chosen: list[Case], seeds: int) -> list[Score]:
    """Scores of every case and seed, judged if the judge is there."""
    rounds = [fill(chosen, FIRST + seed * len(chosen)) for seed in range(seeds)]
    pictures = [(case, outs[i]) for i, case in enumerate(chosen) for outs in rounds]
    scores = [score(case, out) for case, out in pictures]
    if not WEIGHTS.exists():
        return scores
    verdicts = look(load_judge(), [Image.fromarray(out.round().astype(np.uint8)) for _, out in pictures])
    return [Score(s.left, s.psnr, s.seam, v.colours) for s, v in zip(scores, verdicts, strict=True)]


def row(name: str, found: list[Score], reference: list[Score] | None, chosen: list[Case], seeds: int) -> str:
    """One line of the table, with 95% intervals."""
    cells = [name, f"{np.median([abs(s.left) for s in found]):.1%}"]
    cells.append(share([abs(s.left) >= 0.1 for s in found]).percent())
    stays, invented = "-", "-"
    if all(s.colours is not None for s in found):
        things = [case.scene.things for case in chosen for _ in range(seeds)]
        seen = [s.colours or {} for s in found]
        stays = share([gone.kind in now for (gone, _), now in zip(things, seen, strict=True)]).percent()
        new = [bool(set(now) - {t.kind for t in pair}) for pair, now in zip(things, seen, strict=True)]
        invented = share(new).percent()
    cells += [stays, invented]
    for name_ in ("psnr", "seam"):
        values = [getattr(s, name_) for s in found]
        estimate = mean(values)
        cells.append(f"{estimate.value:.1f} ({estimate.low:.1f} to {estimate.high:.1f})")
    if reference is None:
        cells.append("")
    else:
        gain = paired_difference([s.psnr for s in found], [s.psnr for s in reference])
        cells.append(f"{gain.value:+.1f} ({gain.low:+.1f} to {gain.high:+.1f})")
    return "| " + " | ".join(cells) + " |"


HEAD = (
    "| fill | colours left, median | at least 10% left | judge still sees it | judge sees another thing "
    "| hole PSNR dB | "
    "seam PSNR dB | hole PSNR against blended diffusion |\n|---|---|---|---|---|---|---|---|\n"
)


def run(full: bool) -> None:
    """Print one table for exact masks with every fill, and one of the mask kinds with redirection."""
    tables(*((100, 3) if full else (8, 1)))


def tables(count: int, seeds: int) -> None:
    """The same with a choice of how many."""
    pipe = picturebook()
    pipe.set_progress_bar_config(disable=True)
    sys.stdout.write(f"{count} scenes, seeds: {seeds}, exact masks\n\n{HEAD}")
    chosen = list(cases(count))
    reference = measure(_diffusion(pipe, DIFFUSION[PLAIN]), chosen, seeds)
    for name, settings in DIFFUSION.items():
        found = reference if name == PLAIN else measure(_diffusion(pipe, settings), chosen, seeds)
        _line(row(name, found, None if name == PLAIN else reference, chosen, seeds))
    for name, fill in FILLS.items():
        _line(row(name, measure(_fixed(fill), chosen, seeds), reference, chosen, seeds))
    sys.stdout.write(f"\nRedirection by kind of mask, {count} scenes, seeds: 1\n\n{HEAD}")
    for kind in KINDS:
        chosen = list(cases(count, kind))
        reference = measure(_diffusion(pipe, DIFFUSION[PLAIN]), chosen, 1)
        _line(row(kind, measure(_diffusion(pipe, {}), chosen, 1), reference, chosen, 1))


def _diffusion(pipe: Any, settings: Mapping[str, Any]) -> Fill:
    def fill(chosen: list[Case], seed: int) -> list[NDArray[Any]]:
        named = [case.scene.background if settings.get("prompt") == BACKGROUND else "" for case in chosen]
        images, marks = [case.image for case in chosen], [case.marked for case in chosen]
        call = {**settings, "prompt": named, "batch_size": BATCH}
        return [np.asarray(out, float) for out in erase(pipe, images, marks, seed=seed, **call)]

    return fill


def _fixed(fill: Callable[[NDArray[Any], Bools], NDArray[Any]]) -> Fill:
    """A fill without a model; it gets the same two pixels around the mark as `erase` takes."""
    return lambda chosen, _: [
        np.clip(fill(np.asarray(case.image, float), grow(case.marked, 2)), 0, 255) for case in chosen
    ]


def _line(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()

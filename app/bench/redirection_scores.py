"""Things to remove from pictures of the picture-book world, and how far a fill is from the true background."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ...attention.masks import Bools
from ...attention.morphology import distance, grow
from .world import FRESH, Scene, masks, render, scene

FIRST = FRESH + 7_000_000
STEP = 8
"""Levels between neighbouring pixels that make an edge."""
KINDS = ("exact", "grown", "box", "brush")


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


def cases(count: int, kind: str = "exact") -> Iterator[Case]:
    """Scenes of two things that training never drew; the first thing is to go."""
    for i in range(count):
        drawn = scene(FIRST + i, count=2, split="any")
        thing = masks(drawn)[0]
        marked = mark(thing, kind, random.Random(f"mark {i}"))
        yield Case(drawn, render(drawn), render(drawn.without(0)), thing, marked)


def textured(case: Case) -> bool:
    """Whether what is behind the thing is more than a smooth surface: tiles, printed dots, or an edge (a horizon, a
    hill, waves, flowers) on at least a twentieth of it.
    """
    if case.scene.style in ("mosaic", "dots"):
        return True
    flat = np.asarray(render(case.scene.empty().in_style("plain")), float)
    steps = np.maximum(*(np.abs(np.diff(flat, axis=axis, append=flat.take([-1], axis))).max(-1) for axis in (0, 1)))
    return float((steps[case.thing] >= STEP).mean()) >= 0.05


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
    return Score(left, decibels(error[case.marked]), decibels(error[edge]))


def decibels(error: NDArray[Any]) -> float:
    """Peak signal to noise ratio, dB, of errors in 0 ... 255."""
    return float(10 * np.log10(255**2 / max(1e-2, (error**2).mean())))

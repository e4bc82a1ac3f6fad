"""The picture-book world: scenes that are known in full, so that every effect of a technique is a number.

A scene is one, two or, now and then, three things on a background in a style. `render` draws it, `masks` says where
each thing is, and `Scene.without`, `Scene.empty` and `Scene.in_style` are the same scene with one change: render them
for the true background and style.

Captions follow one grammar, in lower case, words apart by blanks:

    caption    = things [" , " background] [" , " style " style"]     (without things: the rest of it)
    things     = thing {" and " thing}
    thing      = "a " [colour " "] kind

`caption(scene)` says everything (a plain scene needs no style); given a random stream it leaves colours, background
and style out now and then, as the training captions do. A third of the pairs of kinds, and all but a few triples,
never occur in training (`seen`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .backgrounds import BACKGROUNDS
from .shapes import COLOURS, SHAPES, Pen
from .styles import STYLES, ink_of, warp

SIDE = 128
FRESH = 10_000_000  # seeds from here on are for measuring, never for training
_SCALE = 3
STYLE_WEIGHTS = {"plain": 0.36, "sketch": 0.16, "mosaic": 0.16, "dots": 0.16, "watercolor": 0.16}
COUNT_WEIGHTS = {1: 0.36, 2: 0.61, 3: 0.03}


@dataclass(frozen=True)
class Thing:
    """One object: place and radius in shares of the picture's side."""

    kind: str
    colour: str
    x: float
    y: float
    radius: float
    mirrored: bool = False


@dataclass(frozen=True)
class Scene:
    """What is in a picture. `seed` fixes what the words leave open: clouds, waves, the wash of a watercolor."""

    things: tuple[Thing, ...]
    background: str
    style: str
    seed: int

    def without(self, index: int) -> Scene:
        """The same scene, thing `index` not there."""
        return replace(self, things=self.things[:index] + self.things[index + 1 :])

    def empty(self) -> Scene:
        """The same scene without any thing."""
        return replace(self, things=())

    def in_style(self, style: str) -> Scene:
        """The same scene in another style."""
        return replace(self, style=style)


def seen(kinds: Sequence[str]) -> bool:
    """Whether a scene of these kinds may occur in training: two thirds of the pairs (each kind misses three), three
    triples.
    """
    order = sorted(list(SHAPES).index(kind) for kind in kinds)
    pairs = all((b - a) % 10 not in (3, 5, 7) for a, b in combinations(order, 2))
    return pairs and (len(order) < 3 or sum(order) % 10 == 0)


def _kinds(rng: random.Random, count: int, split: str) -> list[str]:
    while True:
        kinds = rng.sample(list(SHAPES), count)
        if split == "any" or seen(kinds) == (split == "seen"):
            return kinds


def _places(rng: random.Random, count: int) -> list[tuple[float, float, float]]:
    """x, y and radius of each thing, left to right or the other way round, never overlapping."""
    if count == 1:
        return [(rng.uniform(0.3, 0.7), rng.uniform(0.34, 0.66), rng.uniform(0.2, 0.29))]
    columns, jitter, radii = (
        ((0.26, 0.74), 0.05, (0.155, 0.205)) if count == 2 else ((0.18, 0.5, 0.82), 0.02, (0.12, 0.145))
    )
    places = [(x + rng.uniform(-jitter, jitter), rng.uniform(0.3, 0.7), rng.uniform(*radii)) for x in columns]
    rng.shuffle(places)
    return places


def scene(seed: int, *, count: int | None = None, split: str = "seen", style: str | None = None) -> Scene:
    """The scene of a seed.

    Args:
        seed: any integer; the same seed gives the same scene.
        count: number of things, 1 to 3; None draws it as training does.
        split: "seen" (combinations of kinds that training may use), "unseen" (the others; two or three things) or
        "any". style: a fixed style; None draws it.

    Raises:
        ValueError: an unseen combination of one thing was asked for.
    """
    rng = random.Random(f"scene {seed}")
    if split == "unseen" and count not in (2, 3):
        raise ValueError(
            f"count={count} with split='unseen': only two or three things make a combination; pass count=2 or 3"
        )
    count = count or rng.choices(list(COUNT_WEIGHTS), list(COUNT_WEIGHTS.values()))[0]
    kinds, colours = _kinds(rng, count, split), rng.sample(list(COLOURS), count)
    things = tuple(
        Thing(kind, colour, x, y, radius, rng.random() < 0.5)
        for kind, colour, (x, y, radius) in zip(kinds, colours, _places(rng, count), strict=True)
    )
    background = rng.choice(list(BACKGROUNDS))
    drawn = rng.choices(list(STYLE_WEIGHTS), list(STYLE_WEIGHTS.values()))[0]
    return Scene(things, background, style or drawn, seed)


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """The scene in words. With `rng` a colour is left out with chance 0.12 (0.5 in one caption of four), the
    background 0.15, the style 0.08.
    """
    chance = (lambda share: rng.random() < share) if rng else (lambda share: False)
    bare = 0.5 if chance(0.25) else 0.12
    words = [f"a {t.kind}" if chance(bare) else f"a {t.colour} {t.kind}" for t in scene.things]
    parts = [" and ".join(words)] if words else []
    if not chance(0.15):
        parts.append(scene.background)
    if chance(0.15) if scene.style == "plain" else not chance(0.08):
        parts.append(f"{scene.style} style")
    return " , ".join(parts)


def _draw(canvas: ImageDraw.ImageDraw, thing: Thing, style: str, flat: int | None = None) -> None:
    side, colour = SIDE * _SCALE, COLOURS[thing.colour]
    pen = Pen(
        canvas, thing.x * side, thing.y * side, thing.radius * side, colour, ink_of(style, colour), thing.mirrored, flat
    )
    SHAPES[thing.kind](pen)


def render(scene: Scene) -> Image.Image:
    """The picture of a scene: RGB, 128 x 128."""
    image = BACKGROUNDS[scene.background](SIDE * _SCALE, random.Random(f"background {scene.seed}"))
    for thing in scene.things:
        _draw(ImageDraw.Draw(image), thing, scene.style)
    pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)
    styled = STYLES[scene.style](pixels, random.Random(f"style {scene.seed}"))
    return Image.fromarray(styled.round().clip(0, 255).astype(np.uint8))


def masks(scene: Scene) -> NDArray[np.bool_]:
    """Where each thing is: [things, 128, 128], True on every pixel at least half covered."""
    found = np.zeros((len(scene.things), SIDE, SIDE), np.bool_)
    for i, thing in enumerate(scene.things):
        image = Image.new("L", (SIDE * _SCALE, SIDE * _SCALE))
        _draw(ImageDraw.Draw(image), thing, scene.style, flat=255)
        cover = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)[..., None]
        if scene.style == "watercolor":
            cover = warp(cover, random.Random(f"style {scene.seed}"))
        found[i] = cover[..., 0] >= 127.5
    return found

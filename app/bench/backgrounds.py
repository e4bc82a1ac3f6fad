"""The six backgrounds of the picture-book world: each a function of a random stream, drawn at any size."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from .shapes import Colour


def _gradient(side: int, top: Colour, bottom: Colour) -> Image.Image:
    ramp = np.linspace(0, 1, side)[:, None, None]
    column = np.array(top) * (1 - ramp) + np.array(bottom) * ramp
    return Image.fromarray(np.broadcast_to(column, (side, side, 3)).round().astype(np.uint8))


def _hill(image: Image.Image, height: float, swing: float, phase: float, colour: Colour) -> None:
    """Everything below a wave of two sines, around `height` (0 top, 1 bottom)."""
    side = image.width
    ridge = [
        (
            x,
            side
            * (height + swing * math.sin(5.2 * x / side + phase) + 0.4 * swing * math.sin(9.7 * x / side + 2 * phase)),
        )
        for x in range(0, side + 4, 4)
    ]
    ImageDraw.Draw(image).polygon([(0, side), *ridge, (side, side)], fill=colour)


def _spots(
    image: Image.Image, rng: random.Random, count: int, top: float, radius: tuple[float, float], colour: Colour
) -> None:
    canvas, side = ImageDraw.Draw(image), image.width
    for _ in range(count):
        x, y, r = rng.uniform(0, side), rng.uniform(top, 1) * side, rng.uniform(*radius) * side
        canvas.ellipse([x - r, y - r, x + r, y + r], fill=colour)


def _cloud(image: Image.Image, x: float, y: float, size: float) -> None:
    canvas, side = ImageDraw.Draw(image), image.width
    for dx, dy, r in ((-1.1, 0.12, 0.5), (-0.45, -0.18, 0.68), (0.35, -0.1, 0.6), (1.0, 0.14, 0.46)):
        cx, cy, radius = (x + dx * size) * side, (y + dy * size) * side, r * size * side
        canvas.ellipse([cx - radius, cy - radius, cx + radius, cy + radius], fill=(252, 252, 254))
    canvas.rounded_rectangle(
        [(x - 1.6 * size) * side, (y + 0.1 * size) * side, (x + 1.46 * size) * side, (y + 0.62 * size) * side],
        radius=0.25 * size * side,
        fill=(252, 252, 254),
    )


def sky(side: int, rng: random.Random) -> Image.Image:
    """Blue above, three clouds."""
    image = _gradient(side, (84, 160, 236), (204, 232, 250))
    for centre in (0.14, 0.5, 0.86):
        _cloud(image, rng.uniform(0, 1), centre + rng.uniform(-0.07, 0.07), rng.uniform(0.07, 0.11))
    return image


def meadow(side: int, rng: random.Random) -> Image.Image:
    """Two green hills with little flowers under a pale sky."""
    image = _gradient(side, (150, 208, 246), (226, 242, 246))
    height = rng.uniform(0.46, 0.6)
    _hill(image, height, 0.035, rng.uniform(0, 6), (156, 206, 108))
    _hill(image, height + 0.14, 0.03, rng.uniform(0, 6), (118, 186, 84))
    for colour in ((255, 250, 240), (255, 226, 110)):
        _spots(image, rng, 7, height + 0.2, (0.008, 0.013), colour)
    return image


def sea(side: int, rng: random.Random) -> Image.Image:
    """Water with light wave crests up to a straight horizon."""
    image = _gradient(side, (196, 228, 246), (240, 246, 244))
    height = rng.uniform(0.42, 0.56)
    water = _gradient(side, (66, 158, 192), (28, 98, 152)).resize((side, round(side * (1 - height))))
    image.paste(water, (0, side - water.height))
    canvas = ImageDraw.Draw(image)
    for row in range(6):
        y, phase = height + 0.05 + row * (1 - height) / 6, rng.uniform(0, 6)
        crest = [(x, side * (y + 0.012 * math.sin(26 * x / side + phase))) for x in range(0, side + 3, 3)]
        canvas.line(crest, fill=(132, 200, 220), width=max(2, side // 90), joint="curve")
    return image


def desert(side: int, rng: random.Random) -> Image.Image:
    """Three dunes under a warm sky, one small cactus."""
    image = _gradient(side, (252, 204, 138), (255, 236, 192))
    height = rng.uniform(0.46, 0.6)
    _hill(image, height, 0.04, rng.uniform(0, 6), (234, 188, 118))
    x, foot, unit = rng.uniform(0.08, 0.92), height + 0.12, 0.03
    canvas, green = ImageDraw.Draw(image), (104, 148, 84)
    for left, top, right, bottom in (
        (-0.3, -3.4, 0.4, 0.6),
        (-1.4, -2.4, -0.8, -1.0),
        (-1.4, -1.5, 0, -0.9),
        (0.9, -3.0, 1.5, -1.6),
        (0, -2.1, 1.5, -1.5),
    ):
        corners = [
            side * (x + unit * left),
            side * (foot + unit * top),
            side * (x + unit * right),
            side * (foot + unit * bottom),
        ]
        canvas.rounded_rectangle(corners, radius=side * unit * 0.3, fill=green)
    _hill(image, height + 0.13, 0.035, rng.uniform(0, 6), (222, 170, 98))
    _hill(image, height + 0.3, 0.03, rng.uniform(0, 6), (206, 150, 82))
    return image


def night(side: int, rng: random.Random) -> Image.Image:
    """Far stars over a dark hill."""
    image = _gradient(side, (16, 18, 62), (62, 54, 124))
    _spots(image, rng, 26, 0.0, (0.005, 0.011), (255, 246, 200))
    _hill(image, rng.uniform(0.78, 0.88), 0.03, rng.uniform(0, 6), (24, 26, 58))
    return image


def snow(side: int, rng: random.Random) -> Image.Image:
    """White hills and falling flakes."""
    image = _gradient(side, (150, 176, 210), (214, 224, 238))
    height = rng.uniform(0.5, 0.64)
    _hill(image, height, 0.035, rng.uniform(0, 6), (226, 234, 246))
    _hill(image, height + 0.16, 0.03, rng.uniform(0, 6), (242, 246, 252))
    _spots(image, rng, 30, 0.0, (0.008, 0.015), (255, 255, 255))
    return image


BACKGROUNDS: dict[str, Callable[[int, random.Random], Image.Image]] = {
    painter.__name__: painter for painter in (sky, meadow, sea, desert, night, snow)
}

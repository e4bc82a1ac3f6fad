"""The five art styles of the picture-book world. Textures repeat every 8 pixels, the cell of the autoencoder, so
that it can keep them.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from .shapes import Colour, shade

Pixels = NDArray[np.float32]
PERIOD = 8


def ink_of(style: str, colour: Colour) -> Colour:
    """The outline's colour: black ink in `sketch` and `dots`, a darker tone of the object's own colour elsewhere."""
    tones = {"sketch": (38, 34, 44), "dots": (34, 28, 44)}
    return tones.get(style) or shade(colour, 0.72 if style == "watercolor" else 0.5)


def _tile(cell: Pixels, side: int) -> Pixels:
    return np.tile(cell, (side // PERIOD, side // PERIOD))[..., None]


def _noise(side: int, cells: int, rng: random.Random) -> Pixels:
    """Smooth noise in -1 ... 1, [side, side]."""
    rough = np.random.default_rng(rng.getrandbits(32)).random((cells, cells)).astype(np.float32)
    smooth = Image.fromarray(rough).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(smooth, np.float32) * 2 - 1


def plain(image: Pixels, rng: random.Random) -> Pixels:
    """Flat colours, soft outlines."""
    return image


def sketch(image: Pixels, rng: random.Random) -> Pixels:
    """Coloured pencil on warm paper: diagonal strokes of full colour over a lighter tint; the outlines stay ink."""
    paper = np.array([253, 249, 238], np.float32)
    y, x = np.mgrid[:PERIOD, :PERIOD]
    stroke = _tile(np.clip(2.1 - np.abs((x + y) % PERIOD - 3.5) * 0.7, 0, 1).astype(np.float32), image.shape[0])
    coverage = 0.55 + 0.45 * stroke
    ink = np.clip((110 - image.max(-1, keepdims=True)) / 50, 0, 1) * 0.85
    coverage = coverage + (1 - coverage) * ink
    return image * coverage + paper * (1 - coverage)


def mosaic(image: Pixels, rng: random.Random) -> Pixels:
    """Glass tiles of 4 pixels with grout between and light from above left."""
    side, size = image.shape[0], 4
    tiles = image.reshape(side // size, size, side // size, size, 3).mean((1, 3)).repeat(size, 0).repeat(size, 1)
    light = np.array([[1.22, 1.14, 1.1, 0.66], [1.14, 1.03, 0.98, 0.6], [1.1, 0.98, 0.9, 0.56], [0.66, 0.6, 0.56, 0.5]])
    glint = np.kron(np.array([[1.04, 0.95], [0.96, 1.05]]), light).astype(np.float32)
    return tiles * _tile(glint, side)


def dots(image: Pixels, rng: random.Random) -> Pixels:
    """Printed dots of full colour on a pale tint of it, black outlines left whole."""
    side = image.shape[0]
    y, x = np.mgrid[:PERIOD, :PERIOD].astype(np.float32)
    reach = np.full((PERIOD, PERIOD), np.inf, np.float32)
    for cx, cy in ((1.5, 1.5), (5.5, 5.5)):
        for wrap_x in (-PERIOD, 0, PERIOD):
            for wrap_y in (-PERIOD, 0, PERIOD):
                reach = np.minimum(reach, np.hypot(x - cx - wrap_x, y - cy - wrap_y))
    dot = _tile(np.clip(2.75 - reach, 0, 1), side)
    soft = Image.fromarray(image.astype(np.uint8)).filter(ImageFilter.BoxBlur(1))
    colour = np.asarray(soft, np.float32)
    printed = colour * dot + (colour * 0.45 + 255 * 0.55) * (1 - dot)
    black = np.clip((110 - image.max(-1, keepdims=True)) / 50, 0, 1)
    return printed * (1 - black) + image * black


def watercolor(image: Pixels, rng: random.Random) -> Pixels:
    """Wet edges where pigment gathers, a wash that comes and goes, colours still full."""
    side = image.shape[0]
    bent = warp(image, rng)
    wash = 0.9 + 0.1 * np.clip(_noise(side, 6, rng), -1, 1)[..., None]
    soft, wide = _blur(bent, 0.6), _blur(bent, 2.5)
    pooled = np.clip((wide - soft).max(-1, keepdims=True) / 255, 0, 0.22)
    grey = soft.mean(-1, keepdims=True)
    vivid = np.clip(grey + 1.15 * (soft - grey), 0, 255)
    return (vivid * wash + 255 * (1 - wash)) * (1 - pooled)


def _blur(image: Pixels, radius: float) -> Pixels:
    return np.asarray(Image.fromarray(image.astype(np.uint8)).filter(ImageFilter.GaussianBlur(radius)), np.float32)


def warp(image: Pixels, rng: random.Random) -> Pixels:
    """Bends the picture by up to two pixels, as wet paper does; [side, side, channels]."""
    side = image.shape[0]
    y, x = np.mgrid[:side, :side].astype(np.float32)
    down = np.clip(y + 2.2 * _noise(side, 12, rng), 0, side - 1.001)
    right = np.clip(x + 2.2 * _noise(side, 12, rng), 0, side - 1.001)
    top, left = down.astype(int), right.astype(int)
    dy, dx = (down - top)[..., None], (right - left)[..., None]
    above = image[top, left] * (1 - dx) + image[top, left + 1] * dx
    below = image[top + 1, left] * (1 - dx) + image[top + 1, left + 1] * dx
    return above * (1 - dy) + below * dy


STYLES: dict[str, Callable[[Pixels, random.Random], Pixels]] = {
    style.__name__: style for style in (plain, sketch, mosaic, dots, watercolor)
}

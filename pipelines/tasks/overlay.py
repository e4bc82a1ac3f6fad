"""Pictures of attention maps: overlays, strips and sheets, with Pillow alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

_TILE = 128
_GAP = 6
_LABEL = 16
_ANCHORS = np.array([(0, 0, 4), (80, 18, 123), (182, 54, 121), (251, 136, 97), (252, 253, 191)], np.float32)


def heat(values: torch.Tensor) -> NDArray[np.float32]:
    """Colours [h, w, 3], 0 ... 255, of a map [h, w] scaled by its maximum: black, violet, orange, cream."""
    share = (values.float() / values.max().clamp_min(1e-12)).clamp(0, 1).numpy() * (len(_ANCHORS) - 1)
    low = np.minimum(share.astype(int), len(_ANCHORS) - 2)
    part = (share - low)[..., None]
    return (_ANCHORS[low] * (1 - part) + _ANCHORS[low + 1] * part).astype(np.float32)


def overlay(image: Image.Image, values: torch.Tensor, strength: float = 0.75) -> Image.Image:
    """A map [h, w] laid over a picture in the picture's size: grey where it is low, coloured where it is high."""
    size = image.size
    colours = Image.fromarray(heat(values).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    return Image.blend(image.convert("L").convert("RGB"), colours, strength)


def strip(maps: torch.Tensor, count: int) -> Image.Image:
    """Tiles of `count` maps spread over [T, h, w], first and last among them, as coarse as they are."""
    picks = sorted({round(i) for i in np.linspace(0, len(maps) - 1, min(count, len(maps)))})
    width = round(_TILE * maps.shape[2] / maps.shape[1])
    tiles = [Image.fromarray(heat(maps[i]).astype(np.uint8)) for i in picks]
    return row([tile.resize((width, _TILE), Image.Resampling.NEAREST) for tile in tiles])


def row(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures side by side on white."""
    width = sum(p.width for p in pictures) + _GAP * (len(pictures) - 1)
    out = Image.new("RGB", (width, max(p.height for p in pictures)), "white")
    x = 0
    for picture in pictures:
        out.paste(picture, (x, 0))
        x += picture.width + _GAP
    return out


def sheet(image: Image.Image, rows: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """The picture on the left of each word's pictures, one labelled row a word."""
    lines: list[tuple[str, Image.Image]] = []
    for word, pictures in rows.items():
        lines.append((word, row([_tile(picture) for picture in (image, *pictures)])))
    height = sum(line.height + _LABEL + _GAP for _, line in lines)
    out = Image.new("RGB", (max(line.width for _, line in lines), height), "white")
    draw, y = ImageDraw.Draw(out), 0
    for word, line in lines:
        draw.text((2, y + 2), word, fill="black")
        out.paste(line, (0, y + _LABEL))
        y += line.height + _LABEL + _GAP
    return out


def _tile(picture: Image.Image) -> Image.Image:
    return picture.resize((round(_TILE * picture.width / picture.height), _TILE))

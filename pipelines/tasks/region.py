"""The part of a picture that a model works on: cut out, padded, and pasted back without touching anything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...attention.colours import in_space_of, opaque_srgb
from ...attention.masks import Bools, fit
from ...attention.morphology import components
from ...attention.pictures import HARD

CONTEXT = 2.0
"""A crop is at least this many times as wide and as high as the hole."""
LARGEST = 1.5
"""What is longer than this many times the model's native side is made smaller for the model."""


@dataclass(frozen=True)
class Region:
    """A rectangle of a picture, and the size at which the model sees it.

    Attributes:
        box: (left, top, right, bottom) in the picture.
        size: (width, height) of the rectangle as the model sees it; smaller than the box only for large holes.
        padded: the same, rounded up to what the model can take; what is added mirrors the border.
    """

    box: tuple[int, int, int, int]
    size: tuple[int, int]
    padded: tuple[int, int]

    def cut(self, image: Image.Image) -> Image.Image:
        """The rectangle as a picture in sRGB of size `padded`."""
        part = opaque_srgb(image.crop(self.box), back=True)
        if part.size != self.size:
            part = part.resize(self.size, Image.Resampling.LANCZOS)
        return Image.fromarray(self._pad(np.asarray(part)))

    def cut_mask(self, mask: Bools) -> Bools:
        """The rectangle of a mask, [height, width] of `padded`."""
        left, top, right, bottom = self.box
        return self._pad(fit(mask[top:bottom, left:right], (self.size[1], self.size[0])))

    def uncut(self, generated: Image.Image) -> Image.Image:
        """A generated RGB picture of size `padded` at the size of the box."""
        part = generated.crop((0, 0, *self.size))
        size = (self.box[2] - self.box[0], self.box[3] - self.box[1])
        return part if part.size == size else part.resize(size, Image.Resampling.LANCZOS)

    def _pad(self, values: NDArray[Any]) -> NDArray[Any]:
        missing = [(0, wanted - found) for wanted, found in zip(self.padded[::-1], values.shape[:2], strict=True)]
        return np.pad(values, missing + [(0, 0)] * (values.ndim - 2), mode="symmetric")


def whole_region(size: tuple[int, int], native: int, multiple: int) -> Region:
    """A whole picture of `size` (width, height) near the model's own size: small ones are made larger.

    Args:
        native, multiple: as for `plan_region`.
    """
    longest = max(size)
    scale = min(1.0, LARGEST * native / longest) if longest >= native else native / longest
    inner = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    return Region((0, 0, *size), inner, (_up(inner[0], multiple), _up(inner[1], multiple)))


def plan_region(mask: Bools, native: int, multiple: int, crop: bool = True) -> Region:
    """What the model is to see of a picture with this hole.

    Args:
        mask: [h, w], the hole.
        native: the side in pixels that the model was made for.
        multiple: what sides must be multiples of.
        crop: False takes the whole picture at its own size. True takes the surroundings of the hole at the picture's
            own resolution: at least `native` pixels wide and high, twice the hole, and half as much across as along.
            Only a hole that is large against `native` is generated at a lower one.
    """
    height, width = mask.shape
    if not crop:
        return Region((0, 0, width, height), (width, height), (_up(width, multiple), _up(height, multiple)))
    across, down = np.any(mask, axis=0), np.any(mask, axis=1)
    long = max(_extent(across), _extent(down))
    least = max(native, round(CONTEXT * long / 2))  # a line needs surroundings on its long sides too
    left, right = _around(across, least, multiple)
    top, bottom = _around(down, least, multiple)
    scale = min(1.0, LARGEST * native / max(right - left, bottom - top))
    size = max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale))
    return Region((left, top, right, bottom), size, (_up(size[0], multiple), _up(size[1], multiple)))


def plan_regions(mask: Bools, native: int, multiple: int, crop: bool = True) -> list[Region]:
    """One region, or one for each far part of a hole that would be made smaller as a whole; arguments as before."""
    whole = plan_region(mask, native, multiple, crop)
    if not crop or whole.size == (whole.box[2] - whole.box[0], whole.box[3] - whole.box[1]):
        return [whole]
    labels = components(mask)
    groups: list[Bools] = [labels == label for label in np.unique(labels[mask])]
    planned = [plan_region(group, native, multiple) for group in groups]
    while pair := _touching(groups, planned):
        i, j = pair
        groups[i] |= groups.pop(j)
        planned.pop(j)
        planned[i] = plan_region(groups[i], native, multiple)
    return planned


def hold(regions: Sequence[Region], mask: Bools) -> bool:
    """Whether all that is masked lies in one region or another."""
    outside = mask.copy()
    for region in regions:
        left, top, right, bottom = region.box
        outside[top:bottom, left:right] = False
    return not outside.any()


def _touching(groups: Sequence[Bools], planned: Sequence[Region]) -> tuple[int, int] | None:
    """Two groups, the earlier first, of which one lies in the other's region."""
    for i, region in enumerate(planned):
        left, top, right, bottom = region.box
        for j, group in enumerate(groups):
            if i != j and group[top:bottom, left:right].any():
                return min(i, j), max(i, j)
    return None


def _extent(masked: Bools) -> int:
    first, last = np.flatnonzero(masked)[[0, -1]]
    return int(last - first + 1)


def _around(masked: Bools, least: int, multiple: int) -> tuple[int, int]:
    """Start and end, along one axis, of the surroundings of what is masked."""
    extent = _extent(masked)
    middle = 2 * int(np.flatnonzero(masked)[0]) + extent
    side = min(len(masked), _up(max(least, round(CONTEXT * extent)), multiple))
    start = min(max(0, (middle - side) // 2), len(masked) - side)
    return start, start + side


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def paste(source: Image.Image, generated: Image.Image, corner: tuple[int, int], opacity: NDArray[Any]) -> Image.Image:
    """`source` with `generated` laid over it; where the opacity is 0 not a byte changes.

    Args:
        source: of any mode in which pictures come in; keeps its mode, its alpha and its palette.
        generated: RGB, in sRGB.
        corner: (left, top) of `generated` in `source`.
        opacity: [h, w] of `generated`, 0 ... 1. Modes that cannot be blended take it as 0 or 1.
    """
    box = (*corner, corner[0] + generated.width, corner[1] + generated.height)
    out, below, generated = source.copy(), source.crop(box), in_space_of(generated, source)
    if source.mode == "P":
        above, opacity = _indexed(generated, below, opacity)
    else:
        above = generated.convert(source.mode)
    if source.mode in ("LA", "RGBA"):
        above.putalpha(below.getchannel("A"))
    hard = source.mode in HARD
    values = np.where(opacity >= 0.5, 255, 0) if hard else np.round(opacity * 255)
    mask = Image.fromarray(values.astype(np.uint8))
    out.paste(above, box, mask.convert("1") if hard else mask)
    return out


def _indexed(generated: Image.Image, below: Image.Image, opacity: NDArray[Any]) -> tuple[Image.Image, NDArray[Any]]:
    """`generated` in the opaque colours of the palette of `below`, and its opacity: 0 where `below` is transparent."""
    clear, colours = below.info.get("transparency", b""), np.array(below.getpalette(), np.uint8).reshape(-1, 3)
    alphas = np.full(256, 255)
    if isinstance(clear, int):
        alphas[clear] = 0
    else:
        alphas[: len(clear)] = list(clear)
    opaque = np.flatnonzero(alphas[: len(colours)] == 255)
    if not len(opaque):
        return below, np.zeros_like(opacity)
    opaque = opaque[np.minimum(np.arange(256), len(opaque) - 1)]  # a short palette would be filled up with black
    palette, above = Image.new("P", (1, 1)), below.copy()
    palette.putpalette(colours[opaque].tobytes())
    nearest = np.asarray(generated.quantize(palette=palette, dither=Image.Dither.NONE))
    above.putdata(opaque[nearest].ravel().tolist())
    return above, np.where(alphas[np.asarray(below)] > 0, opacity, 0)

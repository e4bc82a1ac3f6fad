"""When a pixel of a mask is masked: one threshold, and what is no mask is told instead of guessed at."""

from __future__ import annotations

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from .errors import ImageWarning, MaskError

THRESHOLD = 0.5
"""From here on, on a scale of 0 to 1, a pixel is masked. 8-bit masks: 128 and more."""
NOISE = 15
"""What lossy compression makes of black, at most, of 255."""
_SMALL = 64
"""Numbers of objects are mostly smaller than this; the flat parts of a soft mask are not, but for its background."""

Bools = NDArray[np.bool_]


def binary(values: torch.Tensor, noise: int = 0, deep: bool = False) -> Bools:
    """[h, w] boolean of one plane of brightness: floats 0...1, integers 0/1 or 0...255.

    Args:
        noise: integers up to here are black.
        deep: integers beyond 255 are 0...65535.
    Raises:
        MaskError: values outside the range, numbers of objects, or something that is painted too dark to count.
    """
    scaled = unit(values, deep)
    if not values.dtype.is_floating_point and int((whole := values.to(torch.int64)).max()) > max(1, noise):
        _refuse_numbers(whole, scaled)
    # a luminance of weights that add up to 1 may miss the threshold by a rounding error
    masked = (scaled >= THRESHOLD - 1e-9).numpy()
    brightest = float(scaled.max())
    if values.dtype.is_floating_point and brightest > 1e-3 and not masked.any():
        warnings.warn(
            f"nothing is masked: the highest value is {brightest:.3g}, and {THRESHOLD} or more is masked",
            ImageWarning, stacklevel=4,
        )  # fmt: skip
    return masked


def separated(alpha: torch.Tensor) -> Bools | None:
    """The mask that an alpha channel is; None where it separates nothing (constant, or opaque but for a breath).

    Raises:
        MaskError: something is painted, all of it too faintly to count.
    """
    scaled = alpha.to(torch.float64) / 255 if alpha.dtype == torch.uint8 else unit(alpha)
    masked = (scaled >= THRESHOLD).numpy()
    if masked.any() and not masked.all():
        return masked
    if masked.any() or float(scaled.min()) == float(scaled.max()):
        return None
    if float(scaled.max()) * 255 <= NOISE:  # what an eraser left
        return masked
    raise MaskError(
        f"the mask is painted too faintly: its opacity is at most {float(scaled.max()):.0%}, and half or more counts; "
        "paint with an opaque brush"
    )


def unit(values: torch.Tensor, deep: bool = False) -> torch.Tensor:
    """Values as float64 between 0 and 1: floats as they are, integers of 0 and 1 too, other integers by 255.

    Raises:
        MaskError: NaN, complex, negative, or beyond the range.
    """
    if values.is_complex():
        raise MaskError("complex numbers are no mask: give booleans, integers or floats")
    real = values.to(torch.float64)
    low, high = float(real.amin()), float(real.amax())  # NaN survives both
    most = 1.0 if values.dtype.is_floating_point or high <= 1 else 65535.0 if deep and high > 255 else 255.0
    if not (low >= 0 and high <= most):
        raise MaskError(
            f"a mask of {str(values.dtype).removeprefix('torch.')} holds values from {low:g} to {high:g}: expected "
            f"0 to {most:g} (floats 0...1, integers 0/1 or 0...255, no NaN)"
        )
    return real / most


def refuse_labels(image: Image.Image) -> None:
    """A palette of several hues paints objects apart: which one is meant cannot be seen.

    Raises:
        MaskError: so it is.
    """
    used = [int(index) for index in np.unique(np.asarray(image))]
    colours = np.array(image.getpalette("RGB") or [0] * 768, np.int16).reshape(-1, 3)
    shown = colours[[index for index in used if index < len(colours)]]
    strong = shown[np.ptp(shown, axis=1) > 40].astype(np.float64)
    strong -= strong.min(axis=1, keepdims=True)
    strong /= strong.max(axis=1, keepdims=True)
    example = next((value for value in used if value not in (0, 255)), used[-1])
    if len(strong) > 1 and float(np.ptp(strong, axis=0).max()) > 0.5:
        raise MaskError(
            f"the mask's palette has several colours, for the values {_listed(used)}: choose one, "
            f"mask == {example}, as in Image.fromarray(np.asarray(image) == {example}); or convert it to L first"
        )


def _refuse_numbers(values: torch.Tensor, scaled: torch.Tensor) -> None:
    """Numbers of objects, or a stroke in the dark, are an error: a threshold would drop them without a word."""
    found = [int(value) for value in torch.unique(values)]
    brightest, whole = found[-1], 255 if found[-1] <= 255 else 65535
    example = next((value for value in found if value not in (0, whole)), found[-1])
    if float(scaled.max()) < THRESHOLD:
        raise MaskError(
            f"nothing in the mask is bright enough: the brightest is {brightest} of {whole}, and half or more counts. "
            f"Paint white what is to be masked; or choose by number, mask == {example}, of {_listed(found)}"
        )
    small = [value for value in _flat(values, found) if value != found[0]]
    if len(small) > 1 and small[0] < _SMALL:
        raise MaskError(
            f"the mask holds {_listed(found)}, which look like numbers of objects: choose, mask == {small[0]} or "
            f"mask > 0; where it is a soft mask, mask >= {whole // 2 + 1}"
        )


def _flat(values: torch.Tensor, found: list[int]) -> list[int]:
    """Values, of few, that fill areas: the soft edges of a mask do not, nor does the noise of a JPEG."""
    if len(found) > 64 or min(values.shape) < 3:
        return []
    plane = values.double()[None, None]
    most, least = F.max_pool2d(plane, 3, 1), -F.max_pool2d(-plane, 3, 1)
    middles = plane[..., 1:-1, 1:-1][most == least]
    counted = {int(value): int((middles == value).sum()) for value in torch.unique(middles)}
    return [value for value, count in sorted(counted.items()) if count >= max(1, values.numel() // 1000)]


def _listed(found: list[int]) -> str:
    names = [str(value) for value in found[:10]]
    return ", ".join(names) + (f" and {len(found) - 10} more values" if len(found) > 10 else "")

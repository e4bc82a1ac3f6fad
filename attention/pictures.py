"""Pictures as people hand them in: files, PIL images, arrays and tensors become one upright PIL picture."""

from __future__ import annotations

import os
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from .errors import SettingError, SettingTypeError

BLENDED = ("L", "LA", "RGB", "RGBA", "CMYK", "YCbCr")
HARD = ("1", "P", "HSV")
"""Modes that a picture can be given back in: blended pixel by pixel, or taken over whole."""


def as_picture(image: Any) -> Image.Image:
    """An upright PIL picture from a PIL image, a path, an array [h, w(, c)] or a tensor [c, h, w] (uint8 or 0...1).

    Raises:
        SettingTypeError: none of these. SettingError: unreadable, not finite, or a mode that cannot be given back.
    """
    if isinstance(image, (str, os.PathLike)):
        try:
            with Image.open(cast("str | os.PathLike[str]", image)) as opened:
                opened.load()
                image = opened.copy()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise SettingError(f"{os.fspath(image)!r} cannot be read as a picture: {error}") from error
    if isinstance(image, torch.Tensor):
        values = image.detach().cpu().movedim(0, -1) if image.ndim == 3 else image.detach().cpu()
        image = (values.float() if values.is_floating_point() else values).numpy()
    if isinstance(image, np.ndarray):
        image = _of_array(cast("NDArray[Any]", image))
    if not isinstance(image, Image.Image):
        raise SettingTypeError(f"a {type(image).__name__} is not a picture: give a PIL image, a path or an array")
    if image.mode not in BLENDED + HARD:
        raise SettingError(f"a picture of mode {image.mode!r} cannot be edited in place: convert it to RGB or L first")
    try:
        return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError) as error:  # a file that was opened and is damaged further on
        raise SettingError(f"the picture cannot be read: {error}") from error


def as_rgb(picture: Image.Image) -> Image.Image:
    """RGB, transparency over white."""
    if "A" not in picture.getbands() and "transparency" not in picture.info:
        return picture.convert("RGB")
    ground = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(ground, picture.convert("RGBA")).convert("RGB")


def _of_array(values: NDArray[Any]) -> Image.Image:
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if np.issubdtype(values.dtype, np.floating):
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise SettingError("a picture of floats holds values outside 0...1: scale it, or give uint8")
        values = (values * 255).round().astype(np.uint8)
    if values.dtype != np.uint8 or values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)):
        raise SettingTypeError(f"an array of {values.dtype} {values.shape} is not a picture: give uint8 [h, w, 3]")
    return Image.fromarray(values)

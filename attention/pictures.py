"""The one place where pictures come in: files, PIL images, arrays and tensors become one upright picture.

Nothing about an input is trusted: the format is decided by content within a short list, sizes are checked before a
pixel is decoded, and nothing is fetched from a network.
"""

from __future__ import annotations

import io
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from .colours import DECODER_ERRORS, alpha_of, opaque_srgb
from .errors import ImageError, ImageWarning, SettingTypeError

BLENDED = ("L", "LA", "RGB", "RGBA", "CMYK", "YCbCr")
HARD = ("1", "P", "HSV")
"""Modes that a picture can be given back in: blended pixel by pixel, or taken over whole."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")
NAMES = "png, jpeg, webp, gif, tiff, bmp"


@dataclass(frozen=True)
class Limits:
    """What is accepted as a picture. All of it is checked before decoding; the neutral values are those of `ANY`."""

    pixels: float = 40_000_000
    """Most pixels (width x height)."""
    side: int = 16
    """Shortest side, in pixels."""
    aspect: float = 16.0
    """Longest side over shortest side."""
    file_bytes: float = 128 * 2**20
    """Largest file."""
    formats: tuple[str, ...] = FORMATS
    """Formats by Pillow's names."""


ANY = Limits(float("inf"), 1, float("inf"), float("inf"), (*FORMATS, "AVIF", "JPEG2000", "PPM"))
"""What a person's own program may read: Pillow's limit against bombs holds, and no format is a program."""


def as_picture(image: Any) -> Image.Image:
    """An upright PIL picture in its own mode, with its colour profile if it has one, to be edited and given back.

    Args:
        image: a PIL image, a path, encoded bytes, an array [h, w(, 1 | 3 | 4)] or a tensor [c, h, w] (uint8, boolean,
            or floats in 0...1). URLs are refused.
    Raises:
        SettingTypeError: none of these. ImageError: unreadable, not finite, or a mode that cannot be given back.
    """
    picture = opened(image)
    if picture.mode not in BLENDED + HARD:
        raise ImageError(f"a picture of mode {picture.mode!r} cannot be edited in place: convert it to RGB or L first")
    return picture


def as_rgb(image: Any) -> Image.Image:
    """8-bit sRGB of anything that `as_picture` takes, of every mode; transparency over white, the pixels alone."""
    picture = opened(image)
    colours, alpha = opaque_srgb(picture), alpha_of(picture)
    if alpha is not None:
        ground = Image.new("RGBA", picture.size, "white")
        colours.putalpha(alpha)
        colours = Image.alpha_composite(ground, colours).convert("RGB")
    return colours


def opened(source: Any, limits: Limits = ANY, *, strict: bool = False) -> Image.Image:
    """The decoded first frame, upright, in its own mode and with its `info`.

    Args:
        source: as for `as_picture`.
        limits: what is accepted.
        strict: an animation or a file of several pages is an error instead of a warning about its first frame.
    Raises:
        ImageError: not a picture, damaged, or outside `limits`. SettingTypeError: something else altogether.
    """
    if isinstance(source, torch.Tensor):
        values = source.detach().cpu().movedim(0, -1) if source.ndim == 3 else source.detach().cpu()
        source = (values.float() if values.is_floating_point() else values).numpy()
    if isinstance(source, np.ndarray):
        source = _of_array(cast("NDArray[Any]", source))
    if isinstance(source, Image.Image):
        _check_size(source.size, "the picture", limits)
        return _upright(_decoded(source, "the picture"), "the picture")
    if not isinstance(source, (str, os.PathLike, bytes)):
        raise SettingTypeError(f"a {type(source).__name__} is not a picture: give a PIL image, a path or an array")
    data, name = _read(cast("str | os.PathLike[str] | bytes", source), limits)
    try:
        image = Image.open(io.BytesIO(data), formats=limits.formats)
    except Image.DecompressionBombError as error:
        most = _megapixels(limits) or str(error)
        raise ImageError(f"{name} is above the limit of {most}; make it smaller first") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not a supported image ({NAMES})") from None
    except DECODER_ERRORS as error:
        raise ImageError(f"{name} cannot be read as an image: {one_line(error)}") from None
    with image:
        _check_size(image.size, name, limits)
        return _upright(_first_frame(image, name, strict), name)


def _read(source: str | os.PathLike[str] | bytes, limits: Limits) -> tuple[bytes, str]:
    """The whole file, never its path: Pillow maps a file that it knows by path, and then forgets to turn it."""
    data, name = source, "the picture"
    if not isinstance(data, bytes):
        path, name = _local(cast("str | os.PathLike[str]", source))
        try:
            if path.stat().st_size > limits.file_bytes:
                raise ImageError(f"{name} is larger than {limits.file_bytes // 2**20:g} MB")
            data = path.read_bytes()
        except OSError as error:
            raise ImageError(f"{name} cannot be read: {error.strerror}") from None
    if not data:
        raise ImageError(f"{name} is empty, not a supported image ({NAMES})")
    return data, name


def _local(source: str | os.PathLike[str]) -> tuple[Path, str]:
    text = os.fsdecode(source)
    if "://" in text or text.startswith("data:"):
        raise ImageError(f"{text[:80]!r} is a URL; pictures are not fetched: download it and give its path")
    if "\0" in text:
        raise ImageError("a picture's path contains a NUL character")
    path = expanded(text)
    try:
        if path.is_file():
            return path, path.name
        reason = "is not a file" if path.exists() else "does not exist"
    except OSError as error:
        reason = f"cannot be opened: {error.strerror}"
    raise ImageError(f"the picture {text[:200]!r} {reason}")


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with a leading `~` as the home folder, which a shell leaves alone in `--option=~/x` and in texts."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # nobody of that name
        return Path(path)


def _check_size(size: tuple[int, int], name: str, limits: Limits) -> None:
    width, height = size
    found = f"{name} is {width}x{height}"
    if width * height > limits.pixels:
        raise ImageError(f"{found}, above the limit of {_megapixels(limits)}; make it smaller first")
    if min(size) < limits.side:
        raise ImageError(f"{found}; both sides must be at least {limits.side} pixel{'s' * (limits.side > 1)}")
    if max(size) > limits.aspect * min(size):
        raise ImageError(f"{found}; the longer side may be at most {limits.aspect:g} times the shorter one")


def _first_frame(image: Image.Image, name: str, strict: bool) -> Image.Image:
    try:
        # A phone's JPEG with a depth map or a second view is "MPO": its first picture is the picture.
        several = image.format != "MPO" and bool(getattr(image, "is_animated", False))
        if several and strict:
            raise ImageError(f"{name} has several frames or pages; save the one you want as a picture of its own")
        image.seek(0)
    except ImageError:
        raise
    except DECODER_ERRORS as error:
        raise ImageError(f"{name} is damaged or incomplete: {one_line(error)}; save or download it again") from None
    if several:
        warnings.warn(f"{name} has several frames or pages; the first one is used", ImageWarning, stacklevel=4)
    return _decoded(image, name)


def _decoded(image: Image.Image, name: str) -> Image.Image:
    """The image with its pixels; a file that was opened may turn out to be damaged only now."""
    file = getattr(image, "filename", "")
    try:
        if isinstance(image, ImageFile.ImageFile):
            image.filename = ""  # or an orientation is lost, see `_read`
        image.load()
        return image
    except (*DECODER_ERRORS, Image.DecompressionBombError) as error:
        raise ImageError(f"{name} is damaged or incomplete: {one_line(error)}; save or download it again") from None
    finally:
        if isinstance(image, ImageFile.ImageFile):
            image.filename = file


def _upright(image: Image.Image, name: str) -> Image.Image:
    """Another image, turned as its orientation says; what cannot be read is said once and taken off."""
    try:
        turned = ImageOps.exif_transpose(image)
        turned.format = image.format
        return turned
    except DECODER_ERRORS:
        warnings.warn(f"{name} has unreadable EXIF data; its orientation is ignored", ImageWarning, stacklevel=3)
        plain = image.copy()
        for key in ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"):
            plain.info.pop(key, None)
        plain.format = image.format
        return plain


def _of_array(values: NDArray[Any]) -> Image.Image:
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)) or 0 in values.shape:
        raise ImageError(f"an array of shape {values.shape} is not a picture: expected [h, w], [h, w, 3] or [h, w, 4]")
    if values.dtype == np.bool_:
        values = values.astype(np.uint8) * 255
    elif np.issubdtype(values.dtype, np.floating):
        if not np.isfinite(values).all():
            raise ImageError("the picture's array holds NaN or infinity")
        if values.min() < 0 or values.max() > 1:
            raise ImageError("a picture of floats holds values outside 0...1: scale it, or give uint8")
        values = (values * 255).round().astype(np.uint8)
    elif values.dtype != np.uint8:
        raise ImageError(f"an array of {values.dtype} is not a picture: expected uint8, bool, or float in 0..1")
    return Image.fromarray(values)


def _megapixels(limits: Limits) -> str:
    return f"{limits.pixels / 1e6:g} megapixels" if limits.pixels < float("inf") else ""


def one_line(error: BaseException) -> str:
    """An error's text on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__

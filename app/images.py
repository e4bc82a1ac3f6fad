"""The one place where pictures and masks come in: demo, batch and command line all load through here.

Nothing about an input is trusted: the format is decided by content within a short list, sizes are checked before a
pixel is decoded, nothing is fetched from a network, and no metadata of the source survives.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from ..attention.errors import MaskError
from ..attention.masks import as_mask, fit
from .errors import ImageError, ImageWarning

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")
NAMES = "png, jpeg, webp, gif, tiff, bmp"
Source = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.generic]
# What Pillow's decoders raise on damaged files, as far as its documentation and a fuzzed corpus tell.
DECODER_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    struct.error,
    MemoryError,
)


@dataclass(frozen=True)
class Limits:
    """What is accepted as a picture. All of it is checked before decoding."""

    pixels: int = 40_000_000
    """Most pixels (width x height)."""
    side: int = 16
    """Shortest side, in pixels."""
    aspect: float = 16.0
    """Longest side over shortest side."""
    file_bytes: int = 128 * 2**20
    """Largest file."""


LIMITS = Limits()


def load_image(source: Source, *, limits: Limits = LIMITS, strict: bool = False) -> Image.Image:
    """Load a picture as upright 8-bit sRGB; transparency is laid over white.

    Args:
        source: a path, encoded bytes, a PIL image or an array [h, w] or [h, w, 1|3|4] (uint8, or float in 0..1).
            URLs are refused.
        limits: sizes that are accepted.
        strict: an animation or a file of several pages is an error instead of a warning about its first frame.

    Raises:
        ImageError: not a picture, damaged, or outside `limits`; the message says which and what to do.
    """
    with _opened(source, limits, strict) as (image, name):
        return _clean(_to_rgb(_upright(image, name)))


def load_mask(
    source: Source,
    size: tuple[int, int] | None = None,
    *,
    invert: bool = False,
    allow_empty: bool = False,
    limits: Limits = LIMITS,
) -> Image.Image:
    """Load a mask as mode "L" holding 0 (keep) and 255 (masked) only.

    Alpha, luminance, 0/1 masks and the threshold are `diffgraft.attention.masks.as_mask`'s.

    Args:
        source: as for `load_image`; also boolean arrays.
        size: (width, height) of the picture it belongs to. Another size of the same aspect is resized with a warning.
        invert: white is what is kept.
        allow_empty: return an empty mask instead of raising.

    Raises:
        ImageError: as for `load_image`.
        MaskError: empty, full, or of another aspect than the picture.
    """
    with _opened(source, limits, strict=False) as (image, name):
        masked = as_mask(_upright(image, name)) != invert
    if size is not None and masked.shape != size[::-1]:
        found = f"the mask is {masked.shape[1]}x{masked.shape[0]}, the picture {size[0]}x{size[1]}"
        masked = fit(masked, size[::-1])
        warnings.warn(f"{found}; it is resized", ImageWarning, stacklevel=2)
    mask = Image.fromarray(np.where(masked, 255, 0).astype(np.uint8))
    covered = coverage(mask)
    if covered == 0 and not allow_empty:
        raise MaskError("the mask is empty: nothing to remove; paint the object white, or invert it")
    if covered == 1:
        raise MaskError("the mask covers the whole picture: no background is left; mask the object only")
    return mask


def coverage(mask: Image.Image) -> float:
    """The masked share of a mask, 0 to 1."""
    return float((np.asarray(mask) > 127).mean())


@contextmanager
def _opened(source: Source, limits: Limits, strict: bool) -> Iterator[tuple[Image.Image, str]]:
    """The decoded first frame and a short name for messages."""
    if isinstance(source, np.ndarray):
        source = _from_array(source)
    if isinstance(source, Image.Image):
        _check_size(source.size, "the picture", limits)
        source.load()
        yield source, "the picture"
        return
    data, name = _read(source, limits)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise ImageError(f"{name} is above the limit of {_megapixels(limits)}; make it smaller first") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name} is not a supported image ({NAMES})") from None
    except DECODER_ERRORS as error:
        raise ImageError(f"{name} cannot be read as an image: {_one_line(error)}") from None
    with image:
        _check_size(image.size, name, limits)
        _first_frame(image, name, strict)
        yield image, name


def _read(source: str | os.PathLike[str] | bytes, limits: Limits) -> tuple[bytes, str]:
    if isinstance(source, bytes):
        data, name = source, "the picture"
    else:
        path, name = _local(source)
        if path.stat().st_size > limits.file_bytes:
            raise ImageError(f"{name} is larger than {limits.file_bytes // 2**20} MB")
        data = path.read_bytes()
    if not data:
        raise ImageError(f"{name} is empty, not a supported image ({NAMES})")
    return data, name


def _local(source: str | os.PathLike[str]) -> tuple[Path, str]:
    text = os.fspath(source)
    if "://" in text or text.startswith("data:"):
        raise ImageError(f"{text[:80]!r} is a URL; pictures are not fetched: download it and give its path")
    if "\0" in text:
        raise ImageError("a picture's path contains a NUL character")
    path = Path(text)
    try:
        if path.is_file():
            return path, path.name
        reason = "is not a file" if path.exists() else "does not exist"
    except OSError as error:
        reason = f"cannot be opened: {error.strerror}"
    raise ImageError(f"{text[:200]!r} {reason}")


def _check_size(size: tuple[int, int], name: str, limits: Limits) -> None:
    width, height = size
    found = f"{name} is {width}x{height}"
    if width * height > limits.pixels:
        raise ImageError(f"{found}, above the limit of {_megapixels(limits)}; make it smaller first")
    if min(size) < limits.side:
        raise ImageError(f"{found}; both sides must be at least {limits.side} pixels")
    if max(size) > limits.aspect * min(size):
        raise ImageError(f"{found}; the longer side may be at most {limits.aspect:g} times the shorter one")


def _first_frame(image: Image.Image, name: str, strict: bool) -> None:
    try:
        # A phone's JPEG with a depth map or a second view is "MPO": its first picture is the picture.
        several = image.format != "MPO" and bool(getattr(image, "is_animated", False))
        if several and strict:
            raise ImageError(f"{name} has several frames or pages; save the one you want as a picture of its own")
        image.seek(0)
        image.load()
    except ImageError:
        raise
    except DECODER_ERRORS as error:
        raise ImageError(f"{name} is damaged or incomplete: {_one_line(error)}; save or download it again") from None
    if several:
        warnings.warn(f"{name} has several frames or pages; the first one is used", ImageWarning, stacklevel=5)


def _upright(image: Image.Image, name: str) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except DECODER_ERRORS:
        warnings.warn(f"{name} has unreadable EXIF data; its orientation is ignored", ImageWarning, stacklevel=4)
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    image = _eight_bit(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return _to_srgb(image) if image.info.get("icc_profile") else image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit and float greys scaled to 8 bits; Pillow's own conversion would clip them to white."""
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        return Image.fromarray(np.uint8(np.clip(values * (255 if values.max() <= 1 else 1), 0, 255).round()))
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray(np.uint8(np.clip(values // 257 if values.max() > 255 else values, 0, 255)))
    return image


def _to_srgb(image: Image.Image) -> Image.Image:
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info["icc_profile"]))
        if "srgb" in ImageCms.getProfileDescription(profile).lower():
            return image.convert("RGB")
        converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
        return converted if converted is not None else image.convert("RGB")
    except (ImageCms.PyCMSError, *DECODER_ERRORS):  # a broken profile says nothing about the pixels
        return image.convert("RGB")


def _clean(image: Image.Image) -> Image.Image:
    """The pixels alone: no EXIF, profile, text or comment of the source can reach an output file."""
    return Image.frombytes(image.mode, image.size, image.tobytes())


def _from_array(array: NDArray[np.generic]) -> Image.Image:
    values = np.asarray(array)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)) or 0 in values.shape:
        raise ImageError(f"an array of shape {values.shape} is not a picture; expected [h, w], [h, w, 3] or [h, w, 4]")
    if values.dtype == np.bool_:
        values = values.astype(np.uint8) * 255
    elif np.issubdtype(values.dtype, np.floating):
        if not np.isfinite(values).all():
            raise ImageError("the picture's array holds NaN or infinity")
        values = np.clip(values * 255, 0, 255).round().astype(np.uint8)
    elif values.dtype != np.uint8:
        raise ImageError(f"an array of {values.dtype} is not a picture; expected uint8, bool, or float in 0..1")
    return Image.fromarray(values)


def _megapixels(limits: Limits) -> str:
    return f"{limits.pixels / 1e6:g} megapixels"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

"""Colours: every picture as 8-bit sRGB, and a generated sRGB picture in the colour space of another one."""

from __future__ import annotations

import io
import struct
import warnings
from typing import Any, cast

import numpy as np
from PIL import Image, ImageCms

from .errors import ImageError, ImageWarning

# What Pillow's decoders raise on damaged files, as far as its documentation and a fuzzed corpus tell.
DECODER_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    AttributeError,
    OverflowError,
    RuntimeError,
    struct.error,
    MemoryError,
)
_SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
_STEPS = np.array([0, 64, 128, 192, 255], np.uint8)
_PROBE = Image.fromarray(np.stack(np.meshgrid(_STEPS, _STEPS, _STEPS), -1).reshape(5, 25, 3))
"""Colours that tell whether a profile is sRGB, whatever it is called."""


def opaque_srgb(image: Image.Image, *, back: bool = False) -> Image.Image:
    """The colours as 8-bit sRGB, mode RGB; alpha is left out.

    Args:
        back: take a profile only where `in_space_of` can find the way back.
    Raises:
        ImageError: values that are no brightness, or a mode without a meaning in colours.
    """
    profile = _profile(image, back)
    colours = eight_bit(image)
    if colours.has_transparency_data:
        grey = colours.mode in ("1", "L", "LA", "La")
        colours = colours.convert("RGBA")
        colours = colours.getchannel("R") if grey else colours.convert("RGB")
    try:
        found = _converted(colours, profile, to_srgb=True) if profile else colours.convert("RGB")
    except ValueError as error:
        raise ImageError(f"a picture of mode {image.mode!r} cannot be read as colours: {error}") from None
    found.info = {}
    return found


def in_space_of(generated: Image.Image, like: Image.Image) -> Image.Image:
    """An RGB picture in sRGB as the colours of `like`: RGB, or L or CMYK if its profile is for these."""
    profile = _profile(like, back=True)
    return _converted(generated, profile, to_srgb=False) if profile else generated


def alpha_of(image: Image.Image) -> Image.Image | None:
    """Opacity as a picture of mode L; None where the picture has none."""
    if not image.has_transparency_data:
        return None
    if image.mode == "F" or image.mode.startswith("I"):
        clear = np.asarray(image) == image.info["transparency"]
        return Image.fromarray(np.where(clear, 0, 255).astype(np.uint8))
    return image.convert("RGBA").getchannel("A")


def eight_bit(image: Image.Image) -> Image.Image:
    """16-bit and float greys scaled to 8 bits; Pillow's own conversion would clip them to white.

    Raises:
        ImageError: NaN, negative or beyond 16 bits.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        most = 1.0 if high <= 1 else 255.0
    else:  # 32-bit integers are mostly 8-bit greys that somebody has calculated with
        most = 255.0 if image.mode == "I" and high <= 255 else 65535.0
    if not (low >= 0 and high <= most):
        raise ImageError(
            f"a grey picture of mode {image.mode!r} holds values from {low:g} to {high:g}: scale it to 0 ... 255"
        )
    return Image.fromarray(np.rint(values * (255.0 / most)).astype(np.uint8))


def _profile(image: Image.Image, back: bool) -> ImageCms.ImageCmsProfile | None:
    """The picture's colour profile; None for none, sRGB itself, or one that says nothing about these pixels."""
    if image.mode == "LAB":
        return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    data = image.info.get("icc_profile")
    if not data:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        mode = _mode(profile)
        grey = image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")
        kind = "CMYK" if image.mode == "CMYK" else "L" if grey else "RGB"
        if mode != kind and not (grey and mode == "RGB"):
            raise ValueError(f"it is for {mode or 'other'} pixels, the picture is {image.mode}")
        turned = np.asarray(_converted(_PROBE, profile, to_srgb=True), np.int16)
        if back:
            _converted(_PROBE, profile, to_srgb=False)
    except (ImageCms.PyCMSError, *DECODER_ERRORS) as error:
        why = " ".join(str(error).split())[:100]
        warnings.warn(f"a colour profile cannot be used, sRGB is assumed: {why}", ImageWarning, stacklevel=4)
        return None
    is_srgb = mode == "RGB" and int(np.abs(turned - np.asarray(_PROBE, np.int16)).max()) <= 2
    return None if is_srgb else profile


def _mode(profile: ImageCms.ImageCmsProfile) -> str:
    return _SPACES.get(str(cast("Any", profile.profile).xcolor_space).strip(), "")


def _converted(image: Image.Image, profile: ImageCms.ImageCmsProfile, *, to_srgb: bool) -> Image.Image:
    srgb, mode = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")), _mode(profile)
    source, target, before, after = (profile, srgb, mode, "RGB") if to_srgb else (srgb, profile, "RGB", mode)
    plain = image if image.mode == before else image.convert(before)
    found = ImageCms.profileToProfile(plain, source, target, outputMode=after)
    if found is None:
        raise ValueError("it converts nothing")
    found.info.pop("icc_profile", None)
    return found

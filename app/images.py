"""Pictures and masks for demo, batch and command line: `attention.pictures` with sizes that these can work on."""

from __future__ import annotations

import os
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..attention.colours import DECODER_ERRORS as DECODER_ERRORS
from ..attention.errors import ImageWarning, MaskError
from ..attention.masks import as_mask, fit
from ..attention.pictures import Limits as Limits
from ..attention.pictures import as_rgb, opened

Source = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.generic]
LIMITS = Limits()


def load_image(source: Source, *, limits: Limits = LIMITS, strict: bool = False) -> Image.Image:
    """Load a picture as upright 8-bit sRGB; transparency is laid over white, no metadata of the source survives.

    Args:
        source: a path, encoded bytes, a PIL image or an array [h, w] or [h, w, 1|3|4] (uint8, bool, or float in 0..1).
            URLs are refused.
        limits: sizes that are accepted.
        strict: an animation or a file of several pages is an error instead of a warning about its first frame.

    Raises:
        ImageError: not a picture, damaged, or outside `limits`; the message says which and what to do.
    """
    return as_rgb(opened(source, limits, strict=strict))


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
        source: as for `load_image`.
        size: (width, height) of the picture it belongs to. Another size of the same aspect is resized with a warning.
        invert: white is what is kept.
        allow_empty: return an empty mask instead of raising.

    Raises:
        ImageError: as for `load_image`.
        MaskError: empty, full, too dark, or of another aspect than the picture.
    """
    masked = as_mask(opened(source, limits)) != invert
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

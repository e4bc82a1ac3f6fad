"""Ways to fill a hole without a model: what object removal has to beat. Pictures are float [h, w, 3], masks [h, w]."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from ...attention.masks import Bools
from ...attention.morphology import grow
from ...pipelines.tasks.continuation import exemplar, harmonic

Pixels = NDArray[Any]


def ring_mean(picture: Pixels, hole: Bools, width: int = 8) -> Pixels:
    """The mean colour of what lies within `width` pixels around the hole."""
    ring = grow(hole, width) & ~hole
    return np.where(hole[..., None], picture[ring].mean(0), picture)


def opencv(picture: Pixels, hole: Bools, method: int) -> Pixels:
    """OpenCV's inpainting: fast marching (Telea 2004) or Navier-Stokes (Bertalmio 2001)."""
    pixels = picture.round().astype(np.uint8)
    return cv2.inpaint(pixels, hole.astype(np.uint8) * 255, 3, method).astype(float)


FILLS = {
    "ring mean": ring_mean,
    "harmonic": harmonic,
    "pieces of the picture": exemplar,
    "OpenCV Telea": lambda picture, hole: opencv(picture, hole, cv2.INPAINT_TELEA),
    "OpenCV Navier-Stokes": lambda picture, hole: opencv(picture, hole, cv2.INPAINT_NS),
}

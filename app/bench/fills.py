"""Ways to fill a hole without a model: what object removal has to beat. Pictures are float [h, w, 3], masks [h, w]."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from ...attention.masks import Bools
from ...attention.morphology import grow

Pixels = NDArray[Any]


def ring_mean(picture: Pixels, hole: Bools, width: int = 8) -> Pixels:
    """The mean colour of what lies within `width` pixels around the hole."""
    ring = grow(hole, width) & ~hole
    return np.where(hole[..., None], picture[ring].mean(0), picture)


def harmonic(picture: Pixels, hole: Bools, sweeps: int = 400) -> Pixels:
    """The smoothest continuation: Laplace's equation in the hole, by successive over-relaxation."""
    out = ring_mean(picture, hole)
    pace = 2 / (1 + np.pi / max(picture.shape))  # the best for a hole as large as the picture
    y, x = np.nonzero(hole)
    height, width = hole.shape
    colours = [((y + x) % 2 == parity) for parity in (0, 1)]
    for _ in range(sweeps):
        for some in colours:
            j, i = y[some], x[some]
            around = [out[np.maximum(j - 1, 0), i], out[np.minimum(j + 1, height - 1), i]]
            around += [out[j, np.maximum(i - 1, 0)], out[j, np.minimum(i + 1, width - 1)]]
            out[j, i] += pace * (np.mean(around, 0) - out[j, i])
    return out


def opencv(picture: Pixels, hole: Bools, method: int) -> Pixels:
    """OpenCV's inpainting: fast marching (Telea 2004) or Navier-Stokes (Bertalmio 2001)."""
    pixels = picture.round().astype(np.uint8)
    return cv2.inpaint(pixels, hole.astype(np.uint8) * 255, 3, method).astype(float)


FILLS = {
    "ring mean": ring_mean,
    "harmonic": harmonic,
    "OpenCV Telea": lambda picture, hole: opencv(picture, hole, cv2.INPAINT_TELEA),
    "OpenCV Navier-Stokes": lambda picture, hole: opencv(picture, hole, cv2.INPAINT_NS),
}

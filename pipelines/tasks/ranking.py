"""Which candidate of `erase` to show first, without knowing what is behind the hole."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...attention.masks import Bools
from ...attention.morphology import grow
from .continuation import Pixels, shrunk, windows

AROUND = 40
"""Pixels around a hole in which pieces are compared."""
STRIDE = 3
"""One piece in so many, each way, of the hole is compared."""


def seam(before: Pixels, after: Pixels, hole: Bools) -> float:
    """RMS difference, in levels, between a picture and the model's version of it along the outer rim of a hole."""
    rim = grow(hole, 1) & ~hole
    return float(np.sqrt(np.mean((before - after)[rim] ** 2))) if rim.any() else 0.0


def strangeness(picture: Pixels, hole: Bools) -> float:
    """How unlike its surroundings a filled hole is: RMS distance of its pieces to the nearest ones around, in levels.

    A thing that was invented has no likeness there. Pieces are those of the clean start; without a whole one 0.
    """
    picture, hole, _ = shrunk(picture, hole)
    down, across = (np.flatnonzero(hole.any(axis)) for axis in (1, 0))
    near = np.s_[max(0, down[0] - AROUND) : down[-1] + AROUND, max(0, across[0] - AROUND) : across[-1] + AROUND]
    pieces, covered = windows(picture[near]), windows(hole[near][..., None])
    share = covered.mean(-1)
    inside = pieces[::STRIDE, ::STRIDE][share[::STRIDE, ::STRIDE] > 0.5]
    outside = pieces[share == 0]
    if not len(inside) or not len(outside):
        return 0.0
    return float(np.sqrt(_nearest(inside, outside).mean() / inside.shape[-1]))


def _nearest(pieces: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float32]:
    """Squared distance of each piece to the nearest of the others."""
    squares = (others**2).sum(-1)
    far = [(squares - 2 * others @ piece).min() + piece @ piece for piece in pieces]
    return np.maximum(np.array(far), 0)

"""Growing, feathering and cleaning masks. Distances are Euclidean, in pixels; masks are boolean [h, w]."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .masks import Bools


def distance(mask: Bools, limit: int) -> NDArray[np.float32]:
    """Distance of every pixel to the nearest masked one: 0 inside, infinity beyond `limit`.

    Args:
        limit: in pixels; time grows with it.
    """
    height, width = mask.shape
    squared = np.full(mask.shape, np.inf, np.float32)
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    if not len(rows):
        return squared
    top, bottom = max(0, rows[0] - limit), min(height, rows[-1] + limit + 1)
    left, right = max(0, columns[0] - limit), min(width, columns[-1] + limit + 1)
    inside = squared[top:bottom, left:right]
    across = _across(mask[top:bottom, left:right]) ** 2
    reach = min(limit, len(across) - 1)
    for dy in range(-reach, reach + 1):
        source = slice(max(0, dy), len(across) + min(0, dy))
        target = slice(max(0, -dy), len(across) + min(0, -dy))
        np.minimum(inside[target], across[source] + dy * dy, out=inside[target])
    inside[inside > limit * limit] = np.inf
    return np.sqrt(squared)


def _across(mask: Bools) -> NDArray[np.float32]:
    """Distance to the nearest masked pixel of the same row."""
    places = np.arange(mask.shape[1], dtype=np.float32)
    before = np.maximum.accumulate(np.where(mask, places, -np.inf), axis=1)
    after = np.minimum.accumulate(np.where(mask, places, np.inf)[:, ::-1], axis=1)[:, ::-1]
    return np.minimum(places - before, after - places).astype(np.float32)


def grow(mask: Bools, pixels: int) -> Bools:
    """The mask with everything within `pixels` of it; 0 is neutral."""
    return distance(mask, pixels) <= pixels if pixels else mask


def feather(mask: Bools, pixels: int) -> NDArray[np.float32]:
    """Opacity [h, w] in 0 ... 1: 1 on the mask, a smooth ramp over `pixels` around it, exactly 0 beyond; 0 is hard."""
    if not pixels:
        return mask.astype(np.float32)
    ramp = np.clip(1 - distance(mask, pixels) / (pixels + 1), 0, 1)
    return (ramp * ramp * (3 - 2 * ramp)).astype(np.float32)


def fill_holes(mask: Bools) -> Bools:
    """The mask with every unmasked region that it encloses."""
    regions = components(~mask)
    edge = np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]])
    outside = np.zeros(mask.size + 1, np.bool_)
    outside[edge] = True
    outside[-1] = False  # where -1, no region, leads
    return ~outside[regions]


def drop_small(mask: Bools, area: int) -> Bools:
    """The mask without connected parts of fewer than `area` pixels; 0 and 1 are neutral."""
    regions = components(mask)
    counts = np.bincount(regions[mask], minlength=mask.size)
    return mask & (counts[regions] >= area)


def components(mask: Bools) -> NDArray[np.int64]:
    """A number for each 4-connected part of the mask, -1 elsewhere.

    Numbers spread along whole runs of a row, then of a column, until nothing changes: passes as many as bends.
    """
    labels = np.where(mask, np.arange(mask.size).reshape(mask.shape), -1)
    while True:
        spread = _spread(_spread(labels, mask).T, mask.T).T
        if np.array_equal(spread, labels):
            return labels
        labels = spread


def _spread(labels: NDArray[np.int64], mask: Bools) -> NDArray[np.int64]:
    """Every run of masked pixels in a row takes the smallest number in it."""
    starts = mask.copy()
    starts[:, 1:] &= ~mask[:, :-1]
    runs = np.cumsum(starts.ravel())[mask.ravel()] - 1
    if not len(runs):
        return labels
    values = labels[mask]
    first = np.flatnonzero(np.diff(runs, prepend=-1))
    out = labels.copy()
    out[mask] = np.minimum.reduceat(values, first)[runs]
    return out

"""A hole continued from what is around it, without a model: the smoothest surface, or pieces of the picture itself.

Pictures are float [h, w, c] in any range, holes boolean [h, w]; what is outside a hole comes back as it was.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from ...attention.masks import Bools

Pixels = NDArray[np.float64]
LARGEST = 128
"""Pieces are looked for in a picture of at most this side: time grows with its area."""
REACH = 5
"""A piece is a square of 2 * REACH + 1 pixels: the textures of the picture book repeat after 8."""
TRUST = 0.15
"""Weight of the smooth surface, where a piece covers what is not known yet, against the known pixels."""
_SWEEPS = 40
_SEED = 6


def harmonic(picture: Pixels, hole: Bools) -> Pixels:
    """The smoothest continuation: Laplace's equation in the hole, with no flow across the picture's border.

    Solved from coarse to fine, each level by successive over-relaxation.
    """
    out = picture.astype(np.float64)
    if not hole.any() or hole.all():
        return out
    down, across = (np.flatnonzero(hole.any(axis)) for axis in (1, 0))
    part = np.s_[max(0, down[0] - 1) : down[-1] + 2, max(0, across[0] - 1) : across[-1] + 2]
    out[part] = _relaxed(out[part], hole[part])
    return out


def _relaxed(values: Pixels, hole: Bools) -> Pixels:
    """The solution where something known touches the hole."""
    height, width = hole.shape
    out = values.copy()
    if max(height, width) <= _SEED:
        out[hole] = values[~hole].mean(0)
    else:
        coarse, empty = _halved(values, hole)
        out[hole] = _relaxed(coarse, empty).repeat(2, 0).repeat(2, 1)[:height, :width][hole]
    y, x = np.nonzero(hole)
    colours = [np.flatnonzero((y + x) % 2 == parity) for parity in (0, 1)]
    around = [(y[some], x[some], *_neighbours(y[some], x[some], height, width)) for some in colours]
    pace = 2 / (1 + np.pi / max(height, width, 4))
    for _ in range(_SWEEPS):
        for j, i, up, low, left, right in around:
            mean = (out[up, i] + out[low, i] + out[j, left] + out[j, right]) / 4
            out[j, i] += pace * (mean - out[j, i])
    return out


def _neighbours(y: NDArray[np.intp], x: NDArray[np.intp], height: int, width: int) -> tuple[NDArray[np.intp], ...]:
    """Rows above and below, columns left and right; the border is its own neighbour."""
    return np.maximum(y - 1, 0), np.minimum(y + 1, height - 1), np.maximum(x - 1, 0), np.minimum(x + 1, width - 1)


def _halved(values: Pixels, hole: Bools) -> tuple[Pixels, Bools]:
    """Half the size: means of what is known, and a hole where nothing is."""
    odd = [(0, side % 2) for side in hole.shape]
    known = np.pad(~hole, odd).astype(np.float64)[..., None]
    total = np.pad(values, [*odd, (0, 0)]) * known
    shape = (known.shape[0] // 2, 2, known.shape[1] // 2, 2, -1)
    counts = known.reshape(shape).sum((1, 3))
    return total.reshape(shape).sum((1, 3)) / np.maximum(counts, 1), counts[..., 0] == 0


def exemplar(picture: Pixels, hole: Bools) -> Pixels:
    """The hole filled with pieces of the picture, from its edge inwards, after A. Criminisi et al. (2004).

    A piece is the one that fits best what is known where it goes and, a little, the smooth surface in the rest: that
    keeps far pieces from leading away. In a picture larger than `LARGEST` pieces are found at that size and copied at
    the full one. Without a single whole piece in the picture the smooth surface comes back.
    """
    smooth = harmonic(picture, hole)
    small, empty, factor = shrunk(smooth, hole)
    moved = _moves(small, empty)
    if moved is None or not hole.any():
        return smooth
    y, x = np.nonzero(hole)
    dy, dx = (moved[y // factor, x // factor] * factor).T
    j, i = np.clip(y + dy, 0, hole.shape[0] - 1), np.clip(x + dx, 0, hole.shape[1] - 1)
    known = ~hole[j, i]
    smooth[y[known], x[known]] = picture[j[known], i[known]]
    return smooth


def shrunk(picture: Pixels, hole: Bools) -> tuple[Pixels, Bools, int]:
    """At most `LARGEST` wide and high, by a factor: means of squares of pixels, a hole wherever one of them is."""
    factor = -(-max(hole.shape) // LARGEST)
    more = [(0, -side % factor) for side in hole.shape]
    padded, marked = np.pad(picture, [*more, (0, 0)], mode="edge"), np.pad(hole, more)
    rows, columns = (side // factor for side in marked.shape)
    shape = (rows, factor, columns, factor)
    return padded.reshape(*shape, -1).mean((1, 3)), np.any(marked.reshape(shape), (1, 3)), factor


def _moves(smooth: Pixels, hole: Bools) -> NDArray[np.intp] | None:
    """[h, w, 2]: how far away the pixel is that goes to each pixel of the hole; None if there is no whole piece."""
    side, channels = 2 * REACH + 1, smooth.shape[-1]
    whole = np.pad(hole, REACH, constant_values=True)[..., None]
    sources = np.argwhere(~windows(whole).any(-1))
    if not len(sources):
        return None
    canvas = np.pad(smooth.astype(np.float32), [(REACH, REACH), (REACH, REACH), (0, 0)], mode="edge")
    open_, trust = np.pad(hole, REACH), np.pad(~hole, REACH).astype(np.float64)
    pieces = windows(canvas)[sources[:, 0], sources[:, 1]]
    squares = pieces**2
    moves = np.zeros((*open_.shape, 2), np.intp)
    while open_.any():
        y, x = _next(open_, trust)
        here = np.s_[y : y + side, x : x + side]
        gap = open_[here]
        weight = np.where(gap, TRUST / max(1, gap.sum()), 1 / max(1, (~gap).sum())).astype(np.float32)
        weight = weight[..., None].repeat(channels, -1).ravel()
        best = int((squares @ weight - 2 * pieces @ (weight * canvas[here].ravel())).argmin())
        canvas[here][gap] = pieces[best].reshape(side, side, channels)[gap]
        moves[here][gap] = sources[best] - (y, x)
        trust[here][gap] = trust[here].mean()
        open_[here] = False
    return moves[REACH:-REACH, REACH:-REACH]


def _next(open_: Bools, trust: NDArray[np.float64]) -> tuple[int, int]:
    """Corner of the piece, around a pixel that is open, whose surroundings are known best."""
    means = _sums(trust)
    means[~open_[REACH:-REACH, REACH:-REACH]] = -1
    y, x = np.unravel_index(int(means.argmax()), means.shape)
    return int(y), int(x)


def _sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of every whole window."""
    side = 2 * REACH + 1
    total = np.pad(values.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    return total[side:, side:] - total[:-side, side:] - total[side:, :-side] + total[:-side, :-side]


def windows(values: NDArray[Any]) -> NDArray[Any]:
    """[h, w, c] as every whole piece of it, float32: [h - 2 * REACH, w - 2 * REACH, side * side * c]."""
    side = 2 * REACH + 1
    if min(values.shape[:2]) < side:
        return np.zeros((0, 0, side * side * values.shape[-1]), np.float32)
    views = np.moveaxis(sliding_window_view(values, (side, side), axis=(0, 1)), 2, -1)
    return views.reshape(*views.shape[:2], -1).astype(np.float32)

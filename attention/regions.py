"""From concept maps to regions: thresholds, and AttenCraft's masks (arXiv 2405.17965) propagated by self-attention."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

Threshold = Literal["max", "std", "quantile", "otsu"]


def binarise(maps: torch.Tensor, rule: Threshold = "max", level: float = 0.5) -> torch.Tensor:
    """Regions of high activation, 0 or 1, detached, in the shape and dtype of `maps` [C, h, w].

    Args:
        maps: finite.
        rule: "max": at least `level` times the map's maximum. "std": above mean + level * standard deviation.
            "quantile": at least that quantile. "otsu": Otsu's threshold, `level` unused.
        level: 0 to 1 for "max" and "quantile".
    """
    flat = maps.detach().flatten(1)
    if rule == "max":
        bound = level * flat.amax(1)
    elif rule == "std":
        bound = flat.mean(1) + level * flat.std(1)
    elif rule == "quantile":
        bound = flat.quantile(level, 1)
    else:
        bound = otsu(flat)
    return (flat >= bound[:, None]).to(maps.dtype).view_as(maps)


def otsu(flat: torch.Tensor) -> torch.Tensor:
    """Otsu's threshold of each row of [C, n]: the value that splits it with the largest variance between the halves."""
    ordered = flat.sort(1).values
    n = flat.shape[1]
    below = torch.arange(1, n, dtype=flat.dtype, device=flat.device)
    low = ordered.cumsum(1)[:, :-1] / below
    high = (ordered.sum(1, keepdim=True) - ordered.cumsum(1)[:, :-1]) / (n - below)
    between = below * (n - below) * (high - low) ** 2
    return ordered.gather(1, between.argmax(1, keepdim=True) + 1)[:, 0]


def places(maps: torch.Tensor, share: float = 0.4) -> torch.Tensor:
    """Disjoint discs, 0 or 1, in the shape and dtype of `maps` [C, h, w]: a place for each concept, near where it is
    seen most.

    The centres of the maps' upper halves are moved apart, evenly, until no two discs overlap, or as far as the grid
    lets them; where they still do, a cell belongs to the nearer centre.

    Args:
        maps: finite, not negative.
        share: of the area, taken by all discs together.
    """
    count, height, width = maps.shape
    radius = (share * height * width / (count * torch.pi)) ** 0.5
    rows = torch.arange(height, dtype=torch.float64) + 0.5
    columns = torch.arange(width, dtype=torch.float64) + 0.5
    cells = torch.cartesian_prod(rows, columns)
    side = torch.tensor([height, width], dtype=torch.float64)
    margin = torch.minimum(side / 2, torch.tensor(radius, dtype=torch.float64))
    mass = (maps.detach().cpu().double() * binarise(maps).cpu()).flatten(1) + 1e-9
    centres = mass @ cells / mass.sum(1, keepdim=True)
    centres = centres.clamp(margin, side - margin)
    nudge = (torch.arange(count, dtype=torch.float64) - (count - 1) / 2)[:, None] * (side >= side.max()) * 1e-3
    for _ in range(200):
        apart = centres[:, None] + nudge[:, None] - centres[None] - nudge[None]
        distance = apart.norm(dim=-1, keepdim=True)
        short = (2 * radius - distance).clamp_min(0) * (distance > 0)
        if not short.any():
            break
        push = (apart / distance.clamp_min(1e-9) * short).sum(1) / 2
        centres = (centres + push).clamp(margin, side - margin)
    far = torch.cdist(cells, centres)
    owner = (far <= radius) & (far.argmin(1, keepdim=True) == torch.arange(count))
    return owner.T.reshape(maps.shape).to(maps)


def to_grid(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A mask [H, W] at the grid and dtype of `like`, 0 or 1: cells at least half covered, or touched if none is."""
    height, width = like.shape[-2:]
    share = F.adaptive_avg_pool2d(mask.to(like)[None], (height, width))[0]
    half = share >= 0.5
    return (half if half.any() else share > 0).to(like.dtype)


def propagate(maps: torch.Tensor, affinity: torch.Tensor, power: int = 4) -> torch.Tensor:
    """Squared, rescaled maps spread along self-attention: M_c = S^power vec(A_c^2), to [0, 1] each.

    Args:
        maps: [C, h, w], brought to the affinity's grid.
        affinity: S [h2*w2, h2*w2], the mean of self-attention probabilities; h2 : w2 = h : w.
        power: of the matrix product. In at least float32: entries of the unnormalised S^4 would leave float16.
    Returns:
        [C, h2, w2].
    """
    grid = _grid_like(affinity.shape[-1], maps.shape[1], maps.shape[2])
    maps = F.interpolate(maps[None], grid, mode="bicubic", align_corners=False)[0]
    seeds = unit_range(maps.flatten(1).clamp_min(0) ** 2)
    spread = torch.linalg.matrix_power(unit_range(affinity.flatten()[None]).view_as(affinity), power)
    return unit_range(seeds @ unit_range(spread.flatten()[None]).view_as(spread).T).unflatten(1, grid)


def assign(maps: torch.Tensor, margin: float = 0.1) -> torch.Tensor:
    """Disjoint masks [C, h, w]: a cell is c's where M_c exceeds every other map by more than `margin`."""
    if len(maps) == 1:
        return maps > margin
    best = maps.topk(2, 0)
    clear = best.values[0] - best.values[1] > margin
    owner = torch.arange(len(maps), device=maps.device)[:, None, None] == best.indices[:1]
    return owner & clear


def unit_range(rows: torch.Tensor) -> torch.Tensor:
    """Each row of [C, n] to [0, 1]; a flat row becomes 0."""
    low = rows.amin(1, keepdim=True)
    return (rows - low) / (rows.amax(1, keepdim=True) - low).clamp_min(torch.finfo(rows.dtype).tiny)


def _grid_like(tokens: int, height: int, width: int) -> tuple[int, int]:
    """The grid of `tokens` cells with the aspect of height : width, rounded as halving rounds."""
    rows = max(1, round((tokens * height / width) ** 0.5))
    candidates = sorted((abs(r - rows), r) for r in range(1, tokens + 1) if tokens % r == 0)
    best = candidates[0][1]
    return best, tokens // best

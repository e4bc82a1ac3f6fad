"""Rotary positions where they can be met behind the rotation: turning keys on, and weighting them by frequency.

A rotation by a place and one by a shift add up, and a factor for each pair commutes with both: so keys that arrive
rotated can be moved aside, and their fine or coarse positions made to count less.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rotary:
    """How a model turns queries and keys: neighbouring features are a pair, pairs of the axes stand in a row.

    Attributes:
        axes: features of each axis; the first is not spatial, then row and column. theta: base of the frequencies.
    """

    axes: tuple[int, ...]
    theta: float = 10000.0

    def frequencies(self, axis: int, like: torch.Tensor) -> torch.Tensor:
        """Angle of each pair of an axis for one step along it, [features / 2]."""
        width = self.axes[axis]
        powers = torch.arange(0, width, 2, dtype=torch.float64, device=like.device) / width
        return self.theta**-powers


def turned(x: torch.Tensor, rotary: Rotary, by: tuple[float, ...]) -> torch.Tensor:
    """Rotated tokens [..., D] moved on by `by`, one number for each axis; further axes stay."""
    steps = [*by, *[0.0] * (len(rotary.axes) - len(by))]
    angles = torch.cat([step * rotary.frequencies(axis, x) for axis, step in enumerate(steps)])
    cos, sin = (part.to(torch.promote_types(x.dtype, torch.float32)) for part in (angles.cos(), angles.sin()))
    a, b = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


def weighted(x: torch.Tensor, rotary: Rotary, high: float, low: float) -> torch.Tensor:
    """Keys [..., D] with each spatial axis' pairs scaled by high + (low - high) u^2 (arXiv 2602.05013).

    u goes from 0 at the highest frequency to 1 at the lowest; what is not spatial is scaled by `low`.
    """
    factors: list[torch.Tensor] = []
    for axis, width in enumerate(rotary.axes):
        u = torch.linspace(0, 1, width // 2, dtype=x.dtype, device=x.device)
        factors.append(high + (low - high) * u**2 if axis in (1, 2) else torch.full_like(u, low))
    return x * torch.cat(factors).repeat_interleave(2)

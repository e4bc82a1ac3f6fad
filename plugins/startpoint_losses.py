"""Losses of a startpoint: what a picture shall be like, and what keeps noise noise-like. All are pure functions.

Pictures are [n, 3, H, W] in 0 ... 1; losses are one number a picture, [n], and differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from ..attention.errors import SettingError
from ..attention.masks import as_mask

_GREY = (0.299, 0.587, 0.114)
SIDES = ("all", "left", "right", "top", "bottom")


class PictureLoss(Protocol):
    """loss(pictures [n, 3, H, W] in 0 ... 1, prompt) -> [n]; a scorer that is to be high gives its negative."""

    def __call__(self, pictures: torch.Tensor, prompt: str, /) -> torch.Tensor: ...


def noise_energy(noise: torch.Tensor) -> torch.Tensor:
    """ReNO's regulariser (arXiv 2406.04312): |z|^2 / 2 - (d - 1) log |z|, least where |z| = sqrt(d - 1), which is
    where Gaussian noise of d numbers lies.

    Args:
        noise: [n, ...].
    Returns:
        [n], at least float32.
    """
    flat = noise.flatten(1).to(torch.promote_types(noise.dtype, torch.float32))
    square = flat.square().sum(1)
    return square / 2 - (flat.shape[1] - 1) * square.log() / 2


def region(where: Any, like: torch.Tensor) -> torch.Tensor:
    """[H, W] in 0 ... 1 of a side's name ("all", "left", "right", "top", "bottom") or a mask, for pictures `like`."""
    height, width = like.shape[-2:]
    if not isinstance(where, str):
        mask = torch.as_tensor(as_mask(where)).to(like)
        return F.interpolate(mask.reshape(1, 1, *mask.shape[-2:]), (height, width), mode="area")[0, 0]
    if where not in SIDES:
        raise SettingError(f"region={where!r}: choose one of {', '.join(SIDES)}, or give a mask")
    inside = like.new_zeros(height, width)
    rows = slice(0, height // 2) if where == "top" else slice(height // 2, None) if where == "bottom" else slice(None)
    columns = slice(0, width // 2) if where == "left" else slice(width // 2, None) if where == "right" else slice(None)
    inside[rows, columns] = 1
    return inside


def colour_loss(colour: Sequence[float], where: Any = "all") -> PictureLoss:
    """How far a region is from a colour: the mean square over its pixels and channels.

    Args:
        colour: (red, green, blue) in 0 ... 1. where: see `region`.
    """
    rgb = [float(x) for x in colour]
    if len(rgb) != 3 or not all(0 <= x <= 1 for x in rgb):
        raise SettingError(f"colour={colour!r}: three numbers in 0 ... 1 are needed")
    return partial(_colour, rgb, where)


def _colour(rgb: Sequence[float], where: Any, pictures: torch.Tensor, prompt: str) -> torch.Tensor:
    inside = region(where, pictures)
    off = (pictures - pictures.new_tensor(rgb).view(3, 1, 1)).square().mean(1)
    return (off * inside).sum((1, 2)) / inside.sum().clamp_min(1e-6)


def intensity_loss(mask: Any) -> PictureLoss:
    """How far the brightness is from a mask: the picture shall be light where it is white, dark where it is black.

    Args:
        mask: anything that `SelfAttentionRedirection` takes as one, or a side's name.
    """
    return partial(_intensity, mask)


def _intensity(mask: Any, pictures: torch.Tensor, prompt: str) -> torch.Tensor:
    grey = (pictures * pictures.new_tensor(_GREY).view(3, 1, 1)).sum(1)
    return (grey - region(mask, pictures)).square().mean((1, 2))


def histogram_loss(target: torch.Tensor, bins: int = 16) -> PictureLoss:
    """How far the colours' histograms are from those of a picture, wherever they stand: the mean distance of the
    cumulative histograms (the earth mover's, a channel).

    Args:
        target: a picture [3, H, W] in 0 ... 1. bins: 2 or more.
    """
    if target.ndim != 3 or len(target) != 3 or bins < 2:
        raise SettingError(f"target {list(target.shape)}, bins={bins}: a picture [3, H, W] and 2 or more are needed")
    return partial(_histogram, cumulative(target[None].detach(), bins), bins)


def _histogram(wanted: torch.Tensor, bins: int, pictures: torch.Tensor, prompt: str) -> torch.Tensor:
    return (cumulative(pictures, bins) - wanted.to(pictures)).abs().mean((1, 2))


def cumulative(pictures: torch.Tensor, bins: int) -> torch.Tensor:
    """Share of a channel's pixels that are below each of `bins` levels, softly: [n, 3, bins]."""
    levels = torch.linspace(0, 1, bins + 1, device=pictures.device, dtype=pictures.dtype)[1:]
    return torch.stack([torch.sigmoid((level - pictures.flatten(2)) * 2 * bins).mean(-1) for level in levels], -1)

"""How close a picture is to a style, to a layout and to the truth, without any downloaded network."""

from __future__ import annotations

from functools import cache, lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from .training import to_tensor
from .world import SIDE, Scene, masks

CELL = 4
"""Side in pixels of the patches whose colours tell the layout: half a period of the textures."""


def psnr(picture: Image.Image, truth: Image.Image) -> float:
    """Peak signal to noise ratio in dB."""
    error = (np.asarray(picture, float) - np.asarray(truth, float)) ** 2
    return float(10 * np.log10(255**2 / max(error.mean(), 1e-9)))


def layout_accuracy(picture: Image.Image, scene: Scene) -> float:
    """Share of patches, class by class, whose colour is nearest to their own region's mean in this very picture.

    Regions are the scene's things and the upper and lower half of its background; the halves are one class.
    """
    labels = _labels(scene)
    patches = F.avg_pool2d(to_tensor([picture]), 2 * CELL, CELL, CELL // 2)[0].flatten(1).T
    means = torch.stack([patches[labels == i].mean(0) for i in range(int(labels.max()) + 1)])
    found = (patches[:, None] - means).pow(2).sum(-1).argmin(1).clamp(min=1)
    truth = labels.clamp(min=1)
    return float(torch.stack([(found[truth == i] == i).float().mean() for i in truth.unique()]).mean())


def style_distance(picture: Image.Image, style: Image.Image) -> float:
    """Sliced Wasserstein distance between the distributions of random convolution features, at two scales."""
    pairs = zip(_sorted(picture), _of_style(style.tobytes(), style.size), strict=True)
    return sum(float((a - b).abs().mean()) for a, b in pairs)


def _sorted(picture: Image.Image) -> list[torch.Tensor]:
    """For each scale [128 directions, positions in order]."""
    return [_features(F.avg_pool2d(to_tensor([picture]), scale)).sort(-1).values for scale in (1, 2)]


@lru_cache(maxsize=16)
def _of_style(pixels: bytes, size: tuple[int, int]) -> list[torch.Tensor]:
    """The same of a style picture, which many pictures are compared with."""
    return _sorted(Image.frombytes("RGB", size, pixels))


def leak(
    with_object: Image.Image, without: Image.Image, style: Scene, pictures: tuple[Image.Image, Image.Image]
) -> float:
    """How much of the style picture's object is in the output, anywhere: 0 none, 1 pasted.

    The change that the object makes to the output, averaged over the object's shape wherever that is largest and less
    what changed on average, over the change that it made to the style picture itself.

    Args:
        with_object, without: outputs for the style picture with and without its object.
        style: the style's scene.
        pictures: the style picture with and without its object.
    """
    shape = masks(style).any(0).astype(float)
    own = float((_energy(*pictures) * shape).sum() / shape.sum())
    change = _energy(with_object, without)
    spectra = [np.fft.rfft2(x, s=(2 * SIDE, 2 * SIDE)) for x in (change, shape[::-1, ::-1])]
    matched = np.fft.irfft2(spectra[0] * spectra[1], s=(2 * SIDE, 2 * SIDE)).max() / shape.sum()
    return float((matched - change.mean()) / own)


def _energy(a: Image.Image, b: Image.Image) -> NDArray[np.float64]:
    return ((np.asarray(a, float) - np.asarray(b, float)) ** 2).mean(-1)


def _labels(scene: Scene) -> torch.Tensor:
    """Region of each patch: 0 and 1 the background's halves, then the things."""
    regions = np.ones((SIDE, SIDE), int)
    regions[: SIDE // 2] = 0
    for i, mask in enumerate(masks(scene)):
        regions[mask] = i + 2
    return torch.from_numpy(regions[CELL // 2 :: CELL, CELL // 2 :: CELL].copy()).flatten()


@cache
def _filters() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    first = torch.randn(48, 3, 7, 7, generator=generator)
    first = (first - first.mean((-2, -1), keepdim=True)) / (3 * 49) ** 0.5
    second = torch.randn(96, 48, 3, 3, generator=generator) / (48 * 9) ** 0.5
    directions = F.normalize(torch.randn(128, 3 + 48 + 96, generator=generator), dim=1)
    return first, second, directions


def _features(x: torch.Tensor) -> torch.Tensor:
    """[128 directions, positions]: colour and two layers of random filters."""
    first, second, directions = _filters()
    low = F.conv2d(x, first, padding=3).relu()
    high = F.conv2d(low, second, padding=1).relu()
    return directions @ torch.cat([x, 3 * low, 3 * high], 1)[0].flatten(1)

"""Losses of a startpoint as a person writes them down: {"loss": "colour", "colour": "#2040e0", "region": "left"}."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ImageColor

import diffgraft

from ..attention.errors import SettingError, SettingTypeError
from .images import load_image, load_mask

_TAKES: Mapping[str, tuple[str, ...]] = {
    "colour": ("colour", "region"), "intensity": ("mask", "region"), "histogram": ("image", "bins"),
}  # fmt: skip


def parse(text: str) -> dict[str, Any]:
    """A spec from JSON text, or from the name of a loss of maps.

    Raises:
        SettingError: not JSON.
    """
    if not text.lstrip().startswith("{"):
        return {"loss": text.strip()}
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SettingError(f"{text[:80]!r} is not JSON: {error}") from None


def check(spec: Any) -> None:
    """Raise what `build` would raise without opening a file.

    Raises:
        SettingError: an unknown loss or argument. SettingTypeError: no object with a loss.
    """
    if not isinstance(spec, Mapping) or not isinstance(spec.get("loss"), str):
        raise SettingTypeError('a loss is an object such as {"loss": "colour", "colour": "blue", "region": "left"}')
    name = spec["loss"]
    if name not in _TAKES and name not in diffgraft.LOSSES:
        raise SettingError(f"no loss {name!r}; there are {', '.join([*_TAKES, *diffgraft.LOSSES])}")
    takes = _TAKES.get(name, ("concepts",))
    unknown = sorted({*spec} - {"loss", *takes})
    if unknown:
        raise SettingError(f"the loss {name!r} has no {', '.join(unknown)}; it takes {', '.join(takes)}")
    needed = {"colour": "colour", "histogram": "image"}.get(name, None if name in _TAKES else "concepts")
    if needed is not None and not spec.get(needed):
        raise SettingError(f"the loss {name!r} needs {needed}=")


def build(spec: Mapping[str, Any], folder: Path = Path()) -> dict[str, Any]:
    """`loss` and `concepts` of `optimise_startpoint`.

    Args:
        spec: {"loss": "colour", "colour": name or "#rrggbb", "region": side}, {"loss": "intensity", "mask": path or
            "region": side}, {"loss": "histogram", "image": path}, or {"loss": a name of `diffgraft.LOSSES`,
            "concepts": words}. folder: what relative paths start from.
    Raises:
        SettingError, SettingTypeError: see `check`. ImageError: an unusable picture.
    """
    check(spec)
    name = spec["loss"]
    if name not in _TAKES:
        return {"loss": name, "concepts": spec["concepts"]}
    if name == "colour":
        return {"loss": diffgraft.colour_loss(_rgb(spec["colour"]), spec.get("region", "all"))}
    if name == "intensity":
        mask = load_mask(folder / spec["mask"]) if spec.get("mask") else spec.get("region", "all")
        return {"loss": diffgraft.intensity_loss(mask)}
    pixels = np.asarray(load_image(folder / spec["image"]).convert("RGB"), np.float32) / 255
    return {"loss": diffgraft.histogram_loss(torch.from_numpy(pixels).permute(2, 0, 1), spec.get("bins", 16))}


def _rgb(colour: Any) -> list[float]:
    if not isinstance(colour, str):
        return list(colour)
    try:
        return [x / 255 for x in ImageColor.getrgb(colour)[:3]]
    except ValueError:
        raise SettingError(f"colour {colour!r}: a name, #rrggbb, or three numbers in 0 ... 1") from None

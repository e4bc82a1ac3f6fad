"""Scorers by name, loaded when they are asked for, from a folder or a Hub id; none is bundled."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

from PIL import Image

from ...attention.errors import SettingError
from ..errors import MissingExtraError
from .cases import Case

Scores = Mapping[str, float | bool]
"""By the metric's name, which ends in an arrow where one direction is better. Booleans are counted as shares."""


class Scorer(Protocol):
    """Anything with these two; what it says depends on the case and the picture alone."""

    key: Mapping[str, str]
    """What tells it from other scorers: its name, its model."""

    def score(self, case: Case, picture: Image.Image) -> Scores:
        """What it has to say of this kind of case; nothing is {}."""
        ...


@dataclass(frozen=True)
class _Known:
    module: str
    packages: tuple[str, ...]
    pip: str
    model: str | None


KNOWN: Mapping[str, _Known] = {
    "clip": _Known("score_clip", ("torchmetrics",), "diffgraft[evaluate]", "openai/clip-vit-base-patch16"),
    "open_clip": _Known(
        "score_open_clip", ("open_clip", "torchvision"), "open-clip-torch", "ViT-B-32/laion2b_s34b_b79k"
    ),
    "lpips": _Known("score_lpips", ("torchmetrics", "torchvision"), "torchmetrics torchvision", "alex"),
    "detector": _Known("score_detector", ("transformers",), "transformers", "google/owlv2-base-patch16-ensemble"),
    "pixels": _Known("score_pixels", (), "", None),
    "judge": _Known("score_judge", (), "", None),
}
"""Module here with `open_scorer(model, device)`, packages it imports, what pip calls them, its model by default."""


def check(text: str) -> tuple[_Known, str | None]:
    """What `NAME` or `NAME=PATH_OR_ID` means, nothing loaded: a mistake is told before minutes of work.

    Raises:
        SettingError: no such scorer. MissingExtraError: its package is not installed; the message is the pip line.
    """
    name, _, model = text.partition("=")
    if name not in KNOWN:
        raise SettingError(f"no scorer {name!r}; there are {', '.join(KNOWN)}")
    known = KNOWN[name]
    missing = [package for package in known.packages if find_spec(package) is None]
    if missing:
        raise MissingExtraError(f'--scorer {name}: {missing[0]} is not installed; run: pip install "{known.pip}"')
    if model and known.model is None:
        raise SettingError(f"--scorer {name} has no model: leave out {'=' + model!r}")
    return known, model or known.model


def scorer(text: str, device: Any = "cpu") -> Scorer:
    """The scorer of `NAME` or `NAME=PATH_OR_ID`.

    Raises:
        SettingError, MissingExtraError: as `check`. ModelLoadError: its model cannot be loaded.
    """
    known, model = check(text)
    opened: Scorer = importlib.import_module(f"{__package__}.{known.module}").open_scorer(model, device)
    return opened

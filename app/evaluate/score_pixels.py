"""What needs no network: a hole against the true background, and the bench's distance of styles."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from ..bench.redirection_scores import decibels
from ..bench.style_scores import psnr, style_distance
from .cases import Case, opened

SIDE = 256
"""Styles are compared at this size."""


class Pixels:
    """Always at work, where a case allows it."""

    key = {"scorer": "pixels"}

    def score(self, case: Case, picture: Image.Image) -> dict[str, float]:
        if case.mask is not None and case.truth is not None:
            return self._hole(case, picture)
        if case.style is not None:
            return self._style(case, picture)
        return {}

    def _hole(self, case: Case, picture: Image.Image) -> dict[str, float]:
        hole = np.asarray(opened(case.mask).convert("L").resize(picture.size, Image.Resampling.NEAREST)) > 127
        truth = np.asarray(opened(case.truth).resize(picture.size), float)
        return {"hole against the truth, dB ↑": decibels((np.asarray(picture.convert("RGB"), float) - truth)[hole])}

    def _style(self, case: Case, picture: Image.Image) -> dict[str, float]:
        small, style = (one.convert("RGB").resize((SIDE, SIDE)) for one in (picture, opened(case.style)))
        found = {"style distance ↓": style_distance(small, style)}
        if case.truth is not None:
            found["against the true re-rendering, dB ↑"] = psnr(picture, opened(case.truth))
        return found


def open_scorer(model: None, device: Any) -> Pixels:
    return Pixels()

"""Where the words of a prompt look while a picture is made: recorded beside it, without changing a bit of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from ...attention.edit import Edit
from ...attention.maps import MapCapture, concept_maps
from ...attention.step import Rows, Step
from ...plugins.base import Plugin, Session
from ...plugins.concepts import find_concept

SMALL_WORDS = {"a", "an", "and", "the", "of", "on", "in", "with", "at", "to", "style"}
MOST_WORDS = 6
GLOW = (255, 196, 61)


class Watch(Plugin):
    """Averages the cross-attention maps of one picture over its steps.

    Args:
        words: words or phrases of the prompt; none: its first few longer words.
    """

    def __init__(self, words: Sequence[str] = ()) -> None:
        super().__init__()
        self.words = list(words)
        self.maps: dict[str, torch.Tensor] = {}
        self._capture: MapCapture | None = None
        self._columns: list[list[int]] = []
        self._sum: torch.Tensor | None = None

    def bind(self, session: Session) -> None:
        self._capture = MapCapture(session.layers, "predict")

    def edits(self) -> Sequence[Edit]:
        assert self._capture is not None
        return (self._capture,)

    def begin(self, session: Session, step: Step) -> None:
        texts = session.prompt.texts
        text = texts[0] if texts else None
        self._shown = self.words or telling_words(text or "")
        self._columns = [find_concept(session, text, word).columns for word in self._shown]
        self._sum = None

    def combine(self, step: Step, prediction: torch.Tensor, rows: Rows) -> torch.Tensor | None:
        assert self._capture is not None
        seen = self._capture.averaged()[0]
        self._sum = seen if self._sum is None else self._sum + seen
        self._capture.clear()
        return None

    def finish(self) -> None:
        if self._sum is not None and self._columns:
            maps = concept_maps(self._sum, self._columns, normalisation="max", smoothing="mean")
            self.maps = dict(zip(self._shown, maps.cpu(), strict=True))

    def unbind(self) -> None:
        self._capture = self._sum = None


def telling_words(prompt: str) -> list[str]:
    """The first words of a prompt that name something."""
    words = [word.strip(".,;:!?()").lower() for word in prompt.split()]
    telling = [word for word in words if word.isalpha() and word not in SMALL_WORDS]
    return list(dict.fromkeys(telling))[:MOST_WORDS]


def overlay(picture: Image.Image, seen: torch.Tensor) -> Image.Image:
    """The picture, dim, and lit where a map [h, w] in 0 ... 1 is high."""
    values = seen.float().clamp(0, 1).numpy()
    light = Image.fromarray(np.uint8(values * 255)).resize(picture.size, Image.Resampling.BICUBIC)
    share = np.asarray(light, np.float32)[..., None] / 255
    dim = np.asarray(picture.convert("RGB"), np.float32) * 0.45
    lit = dim * (1 - 0.8 * share) + np.array(GLOW, np.float32) * 0.8 * share
    return Image.fromarray(np.uint8(lit.clip(0, 255)))

"""Draws the example pictures anew, and masks for those that are erased: `python -m diffgraft.app.demo.make_examples`.

Captions and seeds were chosen by eye: one whole thing, or two, and room around it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ... import AttentionSegregation, attention_masks, generate, picturebook
from ...attention.binary import Bools
from ...attention.morphology import fill_holes, grow
from .examples import EXAMPLES

DRAWN = {
    "ball": ("a red ball , meadow", 2),
    "dots": ("an orange ball , snow , dots style", 4),
    "fish": ("a blue fish , sea", 4),
    "flower": ("a orange flower , desert", 4),
    "moon": ("a yellow moon , night", 1),
    "mosaic": ("a yellow star , snow , mosaic style", 5),
    "sketch": ("a boat , sea , sketch style", 3),
    "winter": ("a red house and a green tree , snow", 5),
}
"""Captions and seeds."""
TOGETHER = {"winter": ["house", "tree"]}
ERASED = ("ball", "flower", "moon")
RIM, AROUND, NEAR, APART = 8, 3, 8, 40


def main(names: Iterable[str], folder: Path = EXAMPLES) -> None:
    """Draw the named ones, or all."""
    pipe: Any = picturebook()
    pipe.set_progress_bar_config(disable=True)
    for name in list(names) or DRAWN:
        text, seed = DRAWN[name]
        plugins = [AttentionSegregation(TOGETHER[name])] if name in TOGETHER else []
        picture = generate(pipe, text, seed=seed, steps=25, guidance=2.5, plugins=plugins)[0]
        picture.save(folder / f"{name}.png", optimize=True)
        if name in ERASED:
            found = attention_masks(pipe, text, [name], image=picture, seed=seed).mask(name)
            mask = outlined(picture, np.asarray(found) > 0)
            Image.fromarray(mask).convert("L").save(folder / f"{name}-mask.png", optimize=True)


def outlined(picture: Image.Image, about: Bools) -> Bools:
    """What a hand would paint: all near a rough mask that stands out from its row's two ends, and a little around."""
    pixels = np.asarray(picture.convert("RGB"), float)
    ends = [side.mean(1)[:, None] for side in (pixels[:, :RIM], pixels[:, -RIM:])]
    across = np.linspace(0, 1, pixels.shape[1])[None, :, None]
    differs = np.abs(pixels - (ends[0] * (1 - across) + ends[1] * across)).max(-1) > APART
    return grow(fill_holes(differs & grow(about, NEAR) | about), AROUND)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Where things are to be: painted on a canvas in one colour for each concept, or said in words."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

import gradio as gr
import numpy as np
from gradio import processing_utils, utils
from numpy.typing import NDArray
from PIL import Image

from ...attention.errors import SettingError
from ...attention.morphology import fill_holes
from ..images import load_image
from .checks import UPLOADS
from .uploads import MOST_LAYERS, unread

COLOURS = {
    "red": "#e11d48", "blue": "#2563eb", "green": "#15803d", "orange": "#f59e0b", "purple": "#9333ea",
    "black": "#1c1917",
}  # fmt: skip
SIDE, KEPT = 256, 64
RADIUS = 0.2
WORDS = {"left": (-0.25, 0), "right": (0.25, 0), "top": (0, -0.23), "bottom": (0, 0.23), "middle": (0, 0)}
Labels = NDArray[np.intp]


def canvas() -> gr.ImageEditor:
    """An empty sheet with a brush in the colours of the concepts."""
    shades = list(COLOURS.values())
    return unread(
        gr.ImageEditor(
            type="filepath", label="Places", canvas_size=(SIDE, SIDE), fixed_canvas=True, height=380,
            brush=gr.Brush(28, list(shades), shades[0], "fixed"), eraser=gr.Eraser(28), layers=False, transforms=(),
            sources=(), format="png", elem_classes="dg-canvas",
        )
    )  # fmt: skip


def legend(concepts: str) -> str:
    """Which colour is which concept's."""
    names = [part.strip() for part in str(concepts or "").split(",") if part.strip()][: len(COLOURS)]
    dots = [
        f'<span><i style="background:{shade}"></i>{html.escape(name)}: {colour}</span>'
        for name, (colour, shade) in zip(names, COLOURS.items(), strict=False)
    ]
    return f'<p class="dg-legend">{"".join(dots) or "Write the concepts above first."}</p>'


def layout_of(drawing: Any, places: str, concepts: Sequence[str]) -> list[Image.Image] | None:
    """A mask for each concept, out of what was painted or else of the words; None where neither says anything.

    Raises:
        SettingError: a concept without a place, a place without a concept, or a word that is none.
        ImageError: the painting cannot be read.
    """
    labels = painted(drawing)
    if labels is not None:
        return _apart(labels, concepts)
    if not places:
        return None
    said = [part.strip().lower() for part in places.split(",")]
    if len(said) != len(concepts):
        raise SettingError(f"{len(said)} places for {len(concepts)} concepts: give one for each, with commas between")
    return [_disc(place) for place in said]


def painted(drawing: Any) -> Labels | None:
    """The number of the colour of each cell of a painting, -1 where there is none; None if nothing is painted."""
    layers = drawing.get("layers") if isinstance(drawing, dict) else None
    if not isinstance(layers or [], list) or len(layers or []) > MOST_LAYERS:
        raise SettingError(f"the painting is a list of at most {MOST_LAYERS} layers")
    labels = np.full((SIDE, SIDE), -1)
    for layer in layers or []:
        if isinstance(layer, (str, bytes)):
            found = _labels(load_image(layer, limits=UPLOADS).resize((SIDE, SIDE), Image.Resampling.NEAREST))
            labels = np.where(found >= 0, found, labels)
    return labels if (labels >= 0).any() else None


def _labels(picture: Image.Image) -> Labels:
    """The nearest colour of the brush; a layer's empty parts are white by now."""
    shades = np.array([[255, 255, 255], *(_rgb(shade) for shade in COLOURS.values())], np.int64)
    pixels = np.asarray(picture, np.int64)[:, :, None]
    return ((pixels - shades) ** 2).sum(-1).argmin(-1) - 1


def _rgb(shade: str) -> list[int]:
    return [int(shade[i : i + 2], 16) for i in (1, 3, 5)]


def _apart(labels: Labels, concepts: Sequence[str]) -> list[Image.Image]:
    names = list(COLOURS)
    for number, colour in enumerate(names):
        there = bool((labels == number).sum() >= 16)  # single cells are seams of two other colours
        if there and number >= len(concepts):
            raise SettingError(f"something is painted in {colour}, but there are {len(concepts)} concepts: erase it")
        if not there and number < len(concepts):
            raise SettingError(f"{concepts[number]!r} has no place: paint one in {colour}, or clear the canvas")
    if len(concepts) > len(names):
        raise SettingError(f"places can be painted for {len(names)} concepts, and there are {len(concepts)}")
    return [_mask(fill_holes(labels == number)) for number in range(len(concepts))]


def _disc(place: str) -> Image.Image:
    """A disc where the words say."""
    words = place.split()
    unknown = [word for word in words if word not in WORDS]
    if unknown or not words:
        raise SettingError(f"{place!r} is no place: use {', '.join(WORDS)}, or two of them such as 'top left'")
    x, y = (0.5 + sum(WORDS[word][axis] for word in set(words)) for axis in (0, 1))
    grid = (np.arange(SIDE) + 0.5) / SIDE
    return _mask((grid[None] - x) ** 2 + (grid[:, None] - y) ** 2 < RADIUS**2)


def _mask(inside: NDArray[np.bool_]) -> Image.Image:
    return Image.fromarray(inside.astype(np.uint8) * 255)


def as_text(drawing: Any) -> str:
    """A painting for a picture's settings: a small PNG as text, empty if nothing is painted."""
    labels = painted(drawing)
    if labels is None:
        return ""
    small = Image.fromarray((labels + 1).astype(np.uint8)).resize((KEPT, KEPT), Image.Resampling.NEAREST)
    data = io.BytesIO()
    small.save(data, "PNG", optimize=True)
    return base64.b64encode(data.getvalue()).decode()


def from_text(text: str) -> dict[str, Any]:
    """The editor's value of such a text.

    Raises:
        SettingError, ImageError: it is not one.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        raise SettingError("the painting in the settings is damaged") from None
    labels = np.asarray(load_image(data, limits=UPLOADS).convert("L").resize((SIDE, SIDE), Image.Resampling.NEAREST))
    shades = np.array([[0, 0, 0, 0], *([*_rgb(shade), 255] for shade in COLOURS.values())], np.uint8)
    layer = io.BytesIO()
    Image.fromarray(shades[np.where(labels < len(shades), labels, 0)]).save(layer, "PNG")
    file = processing_utils.save_bytes_to_cache(layer.getvalue(), "places.png", utils.get_upload_folder())
    return {"background": None, "layers": [file], "composite": file}

"""Pictures and masks out of requests, checked before they are decoded; Gradio would decode them first."""

from __future__ import annotations

from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from ..errors import ImageError
from ..images import load_image, load_mask
from .checks import UPLOADS

MOST_LAYERS = 8


def unread(component: Any) -> Any:
    """Let a component hand over where the upload is, not what Gradio decodes from it.

    Set on the instance: Gradio writes a stub file beside the source of every subclass.
    """
    editor = isinstance(component, gr.ImageEditor)
    component.preprocess = (lambda payload: _editor_files(component, payload)) if editor else _file
    return component


def _file(payload: Any) -> Any:
    return payload if payload is None or isinstance(payload, bytes) else getattr(payload, "path", None)


def _editor_files(editor: gr.ImageEditor, payload: Any) -> dict[str, Any] | None:
    if payload is not None and payload.id is not None:
        payload = editor.blob_storage.pop(payload.id, None)
    if payload is None:
        return None
    return {"background": _file(payload.background), "layers": [_file(layer) for layer in payload.layers or ()]}


def picture(value: Any, name: str) -> Image.Image:
    """An uploaded picture, upright RGB.

    Raises:
        ImageError: none, or one that cannot be used.
    """
    if value is None:
        raise ImageError(f"{name} is missing: choose or drop a picture there")
    if not isinstance(value, (str, bytes)):
        raise ImageError(f"{name} is not an upload")
    return load_image(value, limits=UPLOADS)


def drawn(value: Any, uploaded: Any = None, *, invert: bool = False) -> tuple[Image.Image, Image.Image]:
    """(picture, mask) of what was painted in the editor; where nothing was, the uploaded mask.

    Args:
        value: the editor's `{"background": file, "layers": [files]}`, or a file where nothing is painted.
        uploaded: a mask file, white is removed.
        invert: of the uploaded mask, remove what is black.
    Raises:
        ImageError: no picture. MaskError: nothing, or everything, is marked.
    """
    value = value if isinstance(value, dict) else {"background": value}
    if not isinstance(value.get("layers") or [], list):
        raise ImageError("the painting is not a list of layers")
    image = picture(value.get("background"), "the picture")
    layers = [layer for layer in value.get("layers") or () if layer is not None]
    if len(layers) > MOST_LAYERS or not all(isinstance(layer, (str, bytes)) for layer in layers):
        raise ImageError(f"the painting has {len(layers)} layers: at most {MOST_LAYERS}, as files")
    marked = np.zeros((image.height, image.width), bool)
    for layer in layers:
        marked |= np.asarray(load_mask(layer, image.size, allow_empty=True, limits=UPLOADS)) > 127
    if uploaded is None or marked.any():
        return image, load_mask(marked)
    return image, mask(uploaded, image, invert=invert)


def mask(value: Any, image: Image.Image | None = None, *, invert: bool = False) -> Image.Image:
    """An uploaded mask, of the size of a picture if there is one.

    Raises:
        ImageError: none, or one that cannot be used. MaskError: it is empty, full or of another aspect.
    """
    if not isinstance(value, (str, bytes)):
        raise ImageError("the mask is missing: choose or drop one there")
    return load_mask(value, image and image.size, invert=invert, limits=UPLOADS)

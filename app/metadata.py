"""What a picture says about itself: how to make it again, and that a model made it. Never when, where or by whom."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import diffusers
import torch
from PIL import Image, PngImagePlugin

from ..attention.pictures import expanded
from ..attention.plain import plain
from .errors import MetadataError

KEY = "diffgraft"
_XMP = "XML:com.adobe.xmp"
_SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def encode_png(image: Image.Image, settings: Mapping[str, Any] | None) -> bytes:
    """A picture as PNG; the same picture and settings are the same bytes.

    Args:
        image: its own `.info` is not written.
        settings: JSON-able. None writes the pixels only, with neither settings nor the mark of a generated picture.
    """
    info = PngImagePlugin.PngInfo()
    if settings is not None:
        complete = {**settings, "versions": _versions()}
        text = json.dumps(complete, ensure_ascii=False, sort_keys=True, default=_plain)
        info.add_itxt("parameters", _encodable(parameters(complete)))
        info.add_itxt(KEY, _encodable(text))
        info.add_itxt(_XMP, _xmp(generated=settings.get("task", "generate") == "generate"))
    buffer = io.BytesIO()
    bare = Image.frombytes(image.mode, image.size, image.tobytes())
    bare.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def read_settings(source: str | os.PathLike[str] | bytes) -> dict[str, Any]:
    """The settings in a PNG that this package wrote.

    Raises:
        MetadataError: not a PNG, no settings in it, or unreadable ones.
    """
    name = "the picture" if isinstance(source, bytes) else Path(source).name
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else expanded(source)
        with Image.open(file, formats=("PNG",)) as image:
            text = image.info.get(KEY)
    except (OSError, ValueError, SyntaxError) as error:
        raise MetadataError(f"{name} is not a readable PNG: {error}") from None
    if text is None:
        raise MetadataError(f"{name} carries no diffgraft settings; was it saved again by another program?")
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        raise MetadataError(f"{name} carries damaged settings") from None
    if not isinstance(settings, dict):
        raise MetadataError(f"{name} carries damaged settings")
    return settings


def parameters(settings: Mapping[str, Any]) -> str:
    """The settings in the text layout that most picture tools read."""
    lines = [str(settings.get("prompt") or "")]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    fields = {
        "Steps": settings.get("steps"),
        "Sampler": settings.get("scheduler"),
        "CFG scale": settings.get("guidance"),
        "Seed": settings.get("seed"),
        "Size": f"{settings['width']}x{settings['height']}" if settings.get("width") else None,
        "Model": settings.get("model"),
        "Version": f"diffgraft {settings['versions']['diffgraft']}" if "versions" in settings else None,
    }
    plugins = "; ".join(str(p.get("plugin")) for p in settings.get("plugins", ()))
    lines.append(", ".join(f"{k}: {v}" for k, v in (fields | {"Plugins": plugins or None}).items() if v is not None))
    return "\n".join(lines)


def _versions() -> dict[str, str]:
    from .. import __version__

    return {"diffgraft": __version__, "diffusers": diffusers.__version__, "torch": torch.__version__}


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def _plain(value: Any) -> Any:
    number = plain(value)
    return number if number is not value else _ADDRESS.sub("", repr(value))[:200]


def _xmp(generated: bool) -> str:
    """The IPTC mark of a generated picture, or of a photograph or drawing that was edited by a model."""
    kind = "trainedAlgorithmicMedia" if generated else "compositeWithTrainedAlgorithmicMedia"
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
        f"Iptc4xmpExt:DigitalSourceType={quoteattr(_SOURCE_TYPES + kind)}/></rdf:RDF></x:xmpmeta>"
    )

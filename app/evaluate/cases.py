"""What is drawn twice: a prompt, or a picture to work on, and what should come out of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from ..images import load_image

Picture = Path | Image.Image
T = TypeVar("T")


@dataclass(frozen=True)
class Case:
    """One row of a benchmark.

    Attributes:
        id: for file names and sheets. group: the part of the benchmark that it belongs to.
        prompt: the text. concepts: words of it that should each be in the picture.
        attributes: (concept, adjective) pairs that belong together.
        counts: (concept, how many at least). limits: (concept, how many are too many).
        negative: what should not be there.
        image: the picture to work on. mask: white is to go. truth: the picture without it. gone: its name, if known.
        style: the picture whose style is wanted.
    """

    id: str
    group: str
    prompt: str = ""
    concepts: tuple[str, ...] = ()
    attributes: tuple[tuple[str, str], ...] = ()
    counts: tuple[tuple[str, int], ...] = ()
    limits: tuple[tuple[str, int], ...] = ()
    negative: str = ""
    image: Picture | None = None
    mask: Picture | None = None
    truth: Picture | None = None
    gone: str = ""
    style: Picture | None = None

    def label(self) -> dict[str, Any]:
        """All of it in plain values, pictures by what they hold; equal for equal cases, wherever their files lie."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self) if field.name != "id"}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return hashlib.sha256(value.read_bytes()).hexdigest()[:24]
    if isinstance(value, Image.Image):
        return hashlib.sha256(repr(value.size).encode() + value.tobytes()).hexdigest()[:24]
    return value


def opened(picture: Picture | None) -> Image.Image:
    """A case's picture, loaded."""
    if picture is None:
        raise ValueError("this case has no such picture")
    return load_image(picture)


def spread(rows: Sequence[T], count: int | None) -> list[T]:
    """`count` of the rows at even distances, so that every part of a benchmark is in; all of them where it is None."""
    if count is None or count >= len(rows):
        return list(rows)
    return [rows[i * len(rows) // count] for i in range(count)]

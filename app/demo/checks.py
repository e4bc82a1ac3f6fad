"""What a request may ask for. Sliders are a courtesy; these are the limits, whatever sends the request."""

from __future__ import annotations

import math
import secrets
from typing import Any

from ...attention.errors import SettingError, SettingTypeError
from ...pipelines.tasks.generate import resolve_seed
from ..images import Limits

STEPS, PICTURES, SIDE, LENGTH, GUIDANCE = 100, 6, 1024, 1000, 30.0
UPLOADS = Limits(pixels=16_000_000, file_bytes=20 * 2**20)
"""What is accepted as a picture here; a demo has less memory to give than a batch."""


def number(value: Any, name: str, low: float, high: float) -> float:
    """`value` as a float in [low, high].

    Raises:
        SettingTypeError: not a number. SettingError: out of range or not finite.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SettingTypeError(f"{name}: a number is needed, not {str(value)[:40]!r}")
    if not (math.isfinite(value) and low <= value <= high):
        raise SettingError(f"{name} is {value:g}: it must be {low:g} ... {high:g}")
    return float(value)


def whole(value: Any, name: str, low: int, high: int) -> int:
    """`value` as an int in [low, high]; 3.0 is 3.

    Raises:
        SettingTypeError: not a number. SettingError: out of range or not whole.
    """
    checked = number(value, name, low, high)
    if checked != int(checked):
        raise SettingError(f"{name} is {checked:g}: a whole number is needed")
    return int(checked)


def sampling(steps: Any, guidance: Any) -> dict[str, Any]:
    """What every task is given, checked.

    Raises:
        SettingTypeError, SettingError: one of them cannot be used.
    """
    return {"steps": whole(steps, "steps", 1, STEPS), "guidance": number(guidance, "guidance", 0, GUIDANCE)}


def text(value: Any, name: str, *, needed: bool = False, longest: int = LENGTH) -> str:
    """`value` as a text of at most `longest` characters; None is empty.

    Raises:
        SettingTypeError: no text. SettingError: too long, or empty where it is needed.
    """
    if not isinstance(value, (str, type(None))):
        raise SettingTypeError(f"{name}: a text is needed")
    if len(value or "") > longest:
        raise SettingError(f"{name} has {len(value or '')} characters: at most {longest}")
    stripped = (value or "").strip()
    if needed and not stripped:
        raise SettingError(f"{name} is empty: write something there")
    return stripped


def words(value: Any, name: str) -> list[str]:
    """The parts of a text between commas."""
    return [part.strip() for part in text(value, name).split(",") if part.strip()]


def seed(value: Any) -> int:
    """The seed to use; None and -1 draw a short one.

    Raises:
        SettingTypeError, SettingError: no seed.
    """
    given = int(value) if isinstance(value, float) and value.is_integer() else value
    return secrets.randbelow(10**6) if given is None or given == -1 else resolve_seed(given)


def side(value: Any, name: str) -> int | None:
    """Pixels of a side, a multiple of 8; None and 0 leave it to the model.

    Raises:
        SettingTypeError, SettingError: no such size.
    """
    if value in (None, 0, ""):
        return None
    pixels = whole(value, name, 64, SIDE)
    if pixels % 8:
        raise SettingError(f"{name} is {pixels}: it must be a multiple of 8, such as {round(pixels / 8) * 8}")
    return pixels

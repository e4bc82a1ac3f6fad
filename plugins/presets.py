"""Presets of attention guidance: what A-STAR publishes or leaves open, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ..attention.errors import SettingError, SettingTypeError
from .base import finite

Units = Literal["relative", "gradient"]
Route = Literal["exact", "values"]
PRESETS: dict[str, dict[str, Any]] = {
    "measured": {
        "normalisation": "max", "smoothing": "mean", "rule": "relative", "size": 0.05, "decay": 0.5, "lowpass": None,
        "route": "exact", "end": 0.4,
    },
    "paper": {
        "normalisation": "ae", "smoothing": "gaussian", "rule": "gradient", "size": 20.0, "decay": 0.5, "lowpass": 0,
        "route": "exact", "end": 1.0,
    },
}  # fmt: skip
"""None is "measured". "paper": steps and maps are Attend-and-Excite's where A-STAR states none."""

CHOICES: dict[str, tuple[str, ...]] = {
    "normalisation": ("ae", "eot", "max", "minmax", "sum1", "none"),
    "smoothing": ("gaussian", "mean", "none"),
    "rule": ("relative", "gradient"),
    "route": ("exact", "values"),
    "layers": ("auto", "decoder", "all"),
}


def filled(preset: str | None, **given: Any) -> dict[str, Any]:
    """The values of a preset, but those that are given.

    Raises:
        SettingError: no preset of that name.
    """
    if preset not in (None, *PRESETS):
        raise SettingError(f"preset={preset!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[preset or "measured"] | {name: value for name, value in given.items() if value is not None}


def check_refine(refine: Any) -> dict[int, float]:
    """`refine` as a dictionary, empty for None.

    Raises:
        SettingTypeError: not a mapping. SettingError: not from step numbers to losses.
    """
    if refine is not None and not isinstance(refine, Mapping):
        raise SettingTypeError(f"refine={refine!r}: a mapping of step to loss is needed, such as {{0: 0.3, 10: 0.1}}")
    goals: Mapping[Any, Any] = refine or {}
    for step in goals:
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise SettingError(f"refine= names step {step!r}: steps are whole numbers from 0")
    return {step: finite(goal, f"refine[{step}]") for step, goal in goals.items()}


def check_choices(plugin: Any) -> None:
    """Refuse values of a plugin's fields that are none of their choices.

    Raises:
        SettingError: names the choices.
    """
    for name, choices in CHOICES.items():
        value = getattr(plugin, name)
        if value not in choices and not (name == "layers" and callable(value)):
            raise SettingError(f"{name}={value!r}: choose one of {', '.join(choices)}")
    for name, low in (("every", 1), ("lowpass", 0), ("candidates", 1)):
        value = getattr(plugin, name)
        if value is not None and not (isinstance(value, int) and value >= low):
            raise SettingError(f"{name}={value!r}: a whole number, {low} or more, is needed")

"""Defaults that were measured or published by model family, with where each number is from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Default(NamedTuple):
    """A rule's default on a family.

    Attributes:
        scale: strength without guidance. guided: strength under guidance. alpha: NAG's blend.
        source: where the unguided numbers are from; "unmeasured" is a guess from related families.
    """

    scale: float
    guided: float
    alpha: float = 0.5
    source: str = "unmeasured"


_NASA, _NAG, _VSF = "NASA's own settings", "NAG, table 5", "VSF's own settings"
_USERS = "users of Z-Image-Turbo: phi 0.5 to 1.3, until 0.1 to 0.3"
_BOOK, _UNGUIDED = "measured on the picture book", "measured on the picture book without guidance"
_FLOW = "measured on the transformer picture book"
_FLOW_UNGUIDED = f"{_FLOW} without guidance"
"""20 steps, 48 pictures without guidance and 16 with it, the same noise. The negative: plain 4 of 48 and 4 of 16, nasa
0.5 none in both; the right kind: plain 38 and 16, nasa 38 and 15. vsf 1 has 30 of 48 kinds right, 0.5 has 37 (chosen on
these pictures), both none of the negative. Its four-step student, 400 pictures each: the negative in 25 plain ones, in
none under nasa 0.5 or vsf 0.5, in 3 under nag 1; kinds right in 398, 394, 394, 394. Nasa's "full" has 360 of them."""

DEFAULTS: Mapping[str, Mapping[str, Default]] = {
    "nasa": {
        "picturebook": Default(0.6, 0.3, source=_BOOK),
        "sd15": Default(0.1, 0.1, source=_NASA),
        "sd2": Default(0.2, 0.2, source=_NASA),
        "pixart": Default(0.5, 0.5, source=_NASA),
        "flux": Default(0.5, 0.5),
        "sd3": Default(0.5, 0.5),
        "qwen": Default(0.5, 0.5),
        "z-image": Default(0.5, 0.5, source=_FLOW),
        "flux2": Default(0.5, 0.5),
        "other": Default(0.2, 0.2),
    },
    "nag": {
        "picturebook": Default(4.0, 4.0, source=_UNGUIDED),
        "sd15": Default(2.0, 2.0, 0.375, _NAG),
        "sdxl": Default(2.0, 2.0, 0.5, _NAG),
        "pixart": Default(4.0, 4.0, 0.375, _NAG),
        "sana": Default(4.0, 4.0, 0.375, _NAG),
        "flux": Default(4.0, 4.0, 0.25, _NAG),
        "wan": Default(4.0, 4.0, 0.25, _NAG),
        "z-image": Default(1.0, 1.0, 0.25, _USERS),
        "flux2": Default(1.0, 1.0, 0.25, "milder than FLUX.1, as users of klein report"),
        "sd3": Default(4.0, 4.0, 0.125, _NAG),
        "other": Default(2.0, 2.0, 0.375),
    },
    "vsf": {
        "picturebook": Default(1.0, 1.0, source=_UNGUIDED),
        "flux": Default(3.5, 3.5, source=_VSF),
        "sd3": Default(3.5, 3.5, source=_VSF),
        "wan": Default(1.7, 1.7, source=_VSF),
        "z-image": Default(0.5, 0.5, source=_FLOW_UNGUIDED),
        "other": Default(1.0, 1.0),
    },
    "ong": {"picturebook": Default(0.5, 0.5, source=_UNGUIDED), "other": Default(0.5, 0.5)},
}
"""Rule -> family -> default. Under guidance no paper gives a number: outside of the picture books it is the same."""


JOINT = "joint"
"""Every family in which text and image are one sequence; measured on the transformer picture book."""

NUMBERS: Mapping[str, Mapping[str, float]] = {
    "stylize: strength of styleid": {"picturebook": 0.6, "other": 1.0},
    "stylize: damping of the startpoint by structure": {"picturebook": 0.0, JOINT: 0.0, "other": 0.6},
    "stylize: begin of distillation": {"picturebook": 0.4, JOINT: 0.4, "other": 0.0},
    "stylize: structure of distillation": {"picturebook": 0.2, JOINT: 0.2, "other": 0.5},
    "stylize: steps that share the way of distillation": {"picturebook": 20, JOINT: 20, "other": 0},
    "attention_masks: power": {"picturebook": 1, "other": 4},
}
"""Setting of a task -> family -> number; "other" is what the papers use, the picture book's are measured there."""

CHOICES: Mapping[str, Mapping[str, str]] = {
    "stylize: method": {"picturebook": "distillation", JOINT: "distillation", "other": "styleid"},
}
"""The same for what is no number."""


def measured(setting: str, family: str) -> float:
    """The default of a task's setting on a family."""
    rows = NUMBERS[setting]
    return rows.get(family, rows["other"])


def preferred(setting: str, family: str) -> str:
    """The same for a choice."""
    rows = CHOICES[setting]
    return rows.get(family, rows["other"])


def default(rule: str, family: str, guided: bool) -> Default:
    """The default of a rule on a family, its `scale` the one for guidance on or off."""
    rows = DEFAULTS[rule]
    row = rows.get(family, rows["other"])
    if not guided:
        return row
    source = row.source if row.source in (_BOOK, _FLOW) else "unmeasured under guidance"
    return row._replace(scale=row.guided, source=source)

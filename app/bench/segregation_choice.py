"""How the default of attention guidance was chosen, on captions that no other table reports."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from .judge import load_judge
from .rows import pace, subject
from .segregation_effect import effect
from .segregation_rows import USUAL, Row, guided, plain, three_objects, two_objects
from .world import FRESH

FIRST = FRESH + 7_000_000
SETTINGS: Mapping[str, Row] = {
    "plain pipeline": plain,
    **{
        f"{100 * size:g}% of the norm, first {100 * end:g}% of the steps": partial(guided, size=size, end=end)
        for size, end in ((0.05, 0.4), (0.025, 0.4), (0.1, 0.4), (0.15, 0.4), (0.1, 0.2), (0.1, 0.6))
    },
    "5%, best of 4 starts": partial(guided, size=0.05, candidates=4),
    "10%, best of 4 starts": partial(guided, size=0.1, candidates=4),
    "5%, segregation only": partial(guided, size=0.05, retention=0),
    "5%, retention 0.3": partial(guided, size=0.05, retention=0.3),
    "5%, moves averaged over 2 cells": partial(guided, size=0.05, lowpass=2),
    "5%, moves averaged over 8 cells": partial(guided, size=0.05, lowpass=8),
    "5%, jsd": partial(guided, size=0.05, loss="jsd"),
}


def run(full: bool, model: Path | None = None) -> None:
    """Print the table for three objects and for two."""
    pipe, judge, at = subject(model), load_judge(), pace(model, *USUAL)
    triples, pairs = three_objects(100 if full else 10, FIRST), two_objects(100 if full else 10, FIRST + 500_000)
    effect(pipe, judge, "Three objects", triples, 2 if full else 1, SETTINGS, at)
    effect(pipe, judge, "Two objects", pairs, 1, SETTINGS, at)

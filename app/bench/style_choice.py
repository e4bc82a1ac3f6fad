"""What `stylize` and the demo take by default, by measurement: the method for a style picture on a background of its
own, and extra evaluations of the inversions.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .rows import KEPT, scale_of, subject
from .statistics import paired_difference, share
from .style_effect import DEFAULT, HEAD, JOINT_WAYS, Pair, Scores, Studio, Way, given, line, measure, pairs

STYLEID = Way("StyleID")
CANARIES = 24
"""So many pairs of `style_effect` are painted twice, for the leak; those behind them have the same rows here."""
WAYS = (DEFAULT, *(replace(STYLEID, name=f"StyleID, strength {s}", strength=s) for s in (0.6, 0.8, 1.0)))
EXTRA = 5
KINDS = {
    "PSNR, dB": "psnr", "layout": "layout", "style": "style", "style right": "right", "kinds kept": "kept",
    "background kept": "ground", "style picture's thing": "intruder",
}  # fmt: skip
"""Columns of differences, and where `Scores` has them."""


def run(full: bool, model: Path | None = None) -> None:
    """Print both tables: 24 pairs each, or 4 for a quick look."""
    sys.stdout.write(f"{scale_of(full)}: ")
    pipe = subject(model)
    ways = WAYS if hasattr(pipe, "unet") else (*JOINT_WAYS[-3:], STYLEID)
    tables(pipe, ways, *((24, 24) if full else (4, 4)))


def tables(pipe: Any, ways: Sequence[Way], strangers: int, iterated: int, **how: Any) -> None:
    """The same with a choice of pairs and ways, the first of them the default.

    Args:
        how: `path` and `steps` of `Studio`.
    """
    how = {"path": KEPT / "style.jsonl", **how}
    studio = Studio(pipe, **how)
    elsewhere(studio, ways, pairs(-(-strangers // 4), elsewhere=True)[:strangers])
    again = pairs(-(-(CANARIES + iterated) // 4))[CANARIES : CANARIES + iterated]
    before, after = (measure(one, ways[0], again, 0) for one in (studio, Studio(pipe, iterations=EXTRA, **how)))
    _write(f"\n{EXTRA} more evaluations a step of every inversion, {ways[0].name}, {len(again)} pairs:\n\n{_head()}")
    _write(_differences(f"{EXTRA} instead of {studio.iterations}", after, before) + "\n")


def elsewhere(studio: Studio, ways: Sequence[Way], chosen: Sequence[Pair]) -> None:
    """Style pictures on other backgrounds than the content's: each way, and pair by pair what the default changes."""
    _write(f"style pictures on backgrounds of their own, {len(chosen)} pairs; intervals: 95%\n\n")
    top, rule = HEAD.splitlines()
    _write(f"{top} judge: background kept |\n{rule}---|\n")
    found = {way.name: measure(studio, way, chosen, 0) for way in ways}
    for name, scores in (given(studio, chosen) | found).items():
        ground = share(scores.ground).percent() if scores.ground else "-"
        _write(f"{line(name, scores)} {ground} |\n")
    _write(f"\n{ways[0].name}, pair by pair:\n\n{_head()}")
    for way in ways[1:]:
        _write(_differences(f"against {way.name}", found[ways[0].name], found[way.name]) + "\n")


def _head() -> str:
    return f"| | {' | '.join(KINDS)} |\n|{'---|' * (1 + len(KINDS))}\n"


def _differences(name: str, after: Scores, before: Scores) -> str:
    """Shares in points, the rest as it is measured."""
    cells: list[str] = []
    for kind in KINDS.values():
        values = [[float(one) for one in getattr(scores, kind)] for scores in (after, before)]
        if not values[0]:
            cells.append("-")
            continue
        found, judged = paired_difference(*values), kind in ("right", "kept", "ground", "intruder")
        form, by = ("+.1f", 100) if judged else ("+.3f", 1)
        cells.append(f"{by * found.value:{form}} ({by * found.low:{form}} to {by * found.high:{form}})")
    return f"| {name} | {' | '.join(cells)} |"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()

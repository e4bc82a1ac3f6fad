"""The Markdown table: with and without, and the change of each metric with its interval."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

import numpy as np

from ..bench.statistics import Estimate, mean, paired_difference, share
from .run import ARMS, Pair

SECONDS = "seconds a picture"
NOTHING = 0.02
"""Seconds in which no model has run: an input that came back."""


def table(pairs: Sequence[Pair], plugin: str) -> Iterator[str]:
    """Lines of the table: all rows, then every group of them.

    Intervals: 95%; Wilson's of shares, the bootstrap's over cases of means and of changes, since the seeds of one case
    are no independent samples.
    """
    made = [pair for pair in pairs if not pair.error]
    groups = list(dict.fromkeys(pair.case.group for pair in made))
    yield f"| rows | cases x seeds | metric | plain | {plugin} | change, pair by pair |"
    yield "|---|---|---|---|---|---|"
    for group in ["all", *(groups if len(groups) > 1 else ())]:
        own = [pair for pair in made if group in ("all", pair.case.group)]
        for metric in dict.fromkeys(name for pair in own for name in pair.scores["grafted"]):
            scored = [pair for pair in own if all(metric in pair.scores[arm] for arm in ARMS)]
            if scored:
                yield f"| {group} | {_size(scored)} | {metric} | {' | '.join(_cells(scored, metric))} |"


def _size(pairs: Sequence[Pair]) -> str:
    seeds = len({pair.seed for pair in pairs})
    return f"{len({id(pair.case) for pair in pairs})} x {seeds}"


def _cells(pairs: Sequence[Pair], metric: str) -> list[str]:
    values = {arm: [pair.scores[arm][metric] for pair in pairs] for arm in ARMS}
    if metric == SECONDS:
        plain, grafted = (median(map(float, values[arm])) for arm in ARMS)
        return [f"{plain:.2f}", f"{grafted:.2f}", f"x {grafted / plain:.2f}" if plain > NOTHING else "-"]
    change = paired_difference(*(_of_cases(pairs, metric, arm) for arm in reversed(ARMS)))
    if isinstance(values["plain"][0], bool):
        return [*(share([bool(v) for v in values[arm]]).percent() for arm in ARMS), _written(change, 100, "+.1f")]
    return [*(_written(mean(_of_cases(pairs, metric, arm))) for arm in ARMS), _written(change, form="+.3f")]


def _of_cases(pairs: Sequence[Pair], metric: str, arm: str) -> list[float]:
    """Means over the seeds of each case."""
    found: dict[int, list[float]] = {}
    for pair in pairs:
        found.setdefault(id(pair.case), []).append(float(pair.scores[arm][metric]))
    return [float(np.mean(values)) for values in found.values()]


def _written(found: Estimate, factor: float = 1, form: str = ".3f") -> str:
    value, low, high = (factor * x for x in (found.value, found.low, found.high))
    if low == high:  # one case, or no change anywhere: nothing is known of the spread
        return f"{value:{form}}"
    return f"{value:{form}} ({low:{form}} to {high:{form}})"

"""Intervals for the benchmarks: a share with Wilson's, a mean and a paired difference with the bootstrap's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% interval."""

    value: float
    low: float
    high: float

    def percent(self) -> str:
        """As "83.2% (80.1 to 86.0)"."""
        return f"{100 * self.value:.1f}% ({100 * self.low:.1f} to {100 * self.high:.1f})"


def share(outcomes: Sequence[bool]) -> Estimate:
    """The share of True, with Wilson's score interval (E. B. Wilson, 1927): honest near 0 and 1 and for few
    outcomes.
    """
    n = len(outcomes)
    if n == 0:
        raise ValueError("no outcomes: a share needs at least one")
    z = 1.959964
    p = sum(map(bool, outcomes)) / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half))


def mean(values: Sequence[float], *, rounds: int = 2000, seed: int = 0) -> Estimate:
    """The mean with its percentile bootstrap interval, the same at every call."""
    sample = np.asarray(values, float)
    if sample.size == 0:
        raise ValueError("no values: a mean needs at least one")
    drawn = np.random.default_rng(seed).integers(sample.size, size=(rounds, sample.size))
    low, high = np.percentile(sample[drawn].mean(1), (2.5, 97.5))
    return Estimate(float(sample.mean()), float(low), float(high))


def paired_difference(
    after: Sequence[float], before: Sequence[float], *, rounds: int = 2000, seed: int = 0
) -> Estimate:
    """Mean of `after - before`, pair by pair (same caption, same seed), with its bootstrap interval over the pairs."""
    if len(after) != len(before):
        raise ValueError(f"{len(after)} values after but {len(before)} before: pairs need as many of each")
    return mean(np.asarray(after, float) - np.asarray(before, float), rounds=rounds, seed=seed)

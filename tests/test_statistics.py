"""Intervals: against values worked out elsewhere, and how often they hold the truth."""

from __future__ import annotations

import numpy as np
import pytest

from diffgraft.app.bench.statistics import mean, paired_difference, share


def test_wilson_interval_of_known_counts() -> None:
    found = share([True] * 8 + [False] * 2)
    assert (found.value, found.low, found.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert share([True] * 10).high == pytest.approx(1.0)
    assert share([True] * 10).low == pytest.approx(0.7225, abs=1e-4)
    assert share([False] * 10).low == pytest.approx(0.0)


def test_wilson_interval_holds_the_truth_nineteen_times_in_twenty() -> None:
    rng = np.random.default_rng(0)
    draws = [share(list(rng.random(60) < 0.85)) for _ in range(2000)]
    assert np.mean([d.low <= 0.85 <= d.high for d in draws]) == pytest.approx(0.95, abs=0.02)


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval() -> None:
    sample = np.random.default_rng(1).normal(3, 2, 400)
    half = 1.96 * sample.std() / 20
    found = mean(list(sample))
    assert (found.low, found.high) == pytest.approx((sample.mean() - half, sample.mean() + half), abs=0.03)
    assert found == mean(list(sample))


def test_pairs_cancel_what_they_share() -> None:
    rng = np.random.default_rng(2)
    before = rng.normal(0, 10, 200)
    after = before + 0.5 + rng.normal(0, 0.5, 200)
    found = paired_difference(list(after), list(before))
    assert 0.4 < found.low < 0.5 < found.high < 0.65


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least one"):
        share([])
    with pytest.raises(ValueError, match="as many"):
        paired_difference([1.0], [1.0, 2.0])


def test_percent() -> None:
    assert share([True, False]).percent() == "50.0% (9.5 to 90.5)"

"""The short form of `tests/fuzz.py`: the same properties on the same few hundred inputs every time."""

from __future__ import annotations

import fuzz
import pytest


@pytest.mark.parametrize("number", range(len(fuzz.PROPERTIES)), ids=[holds.__name__ for _, holds in fuzz.PROPERTIES])
def test_whatever_comes_in(number):
    strategy, holds = fuzz.PROPERTIES[number]
    fuzz.check(strategy, holds, 50)

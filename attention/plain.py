"""numpy's numbers as Python's own, wherever a person hands one in: out of a loop over `np.arange`, out of a table."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import numpy as np

P = ParamSpec("P")
R = TypeVar("R")


def plain(value: Any) -> Any:
    """A numpy number as a Python number, in lists and mappings too; everything else as it is."""
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return cast("Any", value).item()
    if type(value) in (list, tuple):
        members = [plain(one) for one in value]
        same = all(new is old for new, old in zip(members, value, strict=True))
        return value if same else type(value)(members)
    if type(value) is dict:
        pairs = {plain(key): plain(one) for key, one in cast("dict[Any, Any]", value).items()}
        same = all(new is old for new, old in zip(pairs.values(), value.values(), strict=True))
        return value if same and pairs.keys() == value.keys() and not any(map(_numpy, value)) else pairs
    return value


def _numpy(value: Any) -> bool:
    return isinstance(value, np.generic)


def plainly(function: Callable[P, R]) -> Callable[P, R]:
    """The function, given plain numbers."""

    @functools.wraps(function)
    def given(*args: P.args, **kwargs: P.kwargs) -> R:
        every: Any = function
        return every(*map(plain, args), **{name: plain(value) for name, value in kwargs.items()})

    return given

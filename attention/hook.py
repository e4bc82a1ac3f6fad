"""A hook on a torch module that stays behind when the module is copied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Hook:
    """A hook bound to one module; a copy or a pickle of the module gets one that does nothing."""

    def __init__(self, function: Callable[..., Any] | None) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args) if self.function is not None else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook(None)

    def __reduce__(self) -> Any:
        return Hook, (None,)

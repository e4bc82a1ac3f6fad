"""What each tab shows before anything was run: its first example, which `app/demo/make_shown.py` made and kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from .examples import EXAMPLES

FOLDER = EXAMPLES / "shown"


def shown(tab: str) -> list[Any]:
    """What a tab's handler gave for its first example: texts, and the files of pictures."""
    outputs = json.loads((FOLDER / f"{tab}.json").read_text("utf-8"))
    return replaced(outputs, lambda value: str(FOLDER / value["file"]) if isinstance(value, dict) else value)


def replaced(value: Any, change: Callable[[Any], Any]) -> Any:
    """Lists and tuples as lists, with `change(leaf)` in the place of every other value."""
    return [replaced(one, change) for one in value] if isinstance(value, (list, tuple)) else change(value)

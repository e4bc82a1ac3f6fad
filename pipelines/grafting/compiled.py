"""Run eager while anything is grafted: compiled code would bake one session's state into its graphs."""

from __future__ import annotations

import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

_LOCK = threading.RLock()
_held = 0
_stance: Any = None


@contextmanager
def eager() -> Generator[None]:
    """Compiled models run eager inside, their graphs intact afterwards.

    The stance is process-wide, so it is counted: the first graft sets it and the last one takes it back.
    """
    global _held, _stance
    with _LOCK:
        if not _held:
            _stance = torch.compiler.set_stance("force_eager")
        _held += 1
    try:
        yield
    finally:
        with _LOCK:
            _held -= 1
            if not _held and not sys.is_finalizing():  # then there is nothing left to import, nor to run
                _stance.__exit__(None, None, None)

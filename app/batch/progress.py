"""Progress of a run: one bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from ..console import say

EVERY = 10.0
"""Seconds between lines where there is no terminal."""


class Progress:
    """Counts rows; `say` writes between the bar's refreshes."""

    def __init__(self, total: int, quiet: bool) -> None:
        self._total, self._done, self._failed, self._quiet = total, 0, 0, quiet
        self._started = self._said = time.monotonic()
        self._bar = tqdm(total=total, unit="row", disable=quiet or not sys.stderr.isatty())

    def advance(self, failed: int) -> None:
        """One more row is finished."""
        self._done += 1
        self._failed = failed
        self._bar.set_postfix(failed=failed, refresh=False)
        self._bar.update()
        now = time.monotonic()
        if self._bar.disable and not self._quiet and now - self._said > EVERY:
            self._said = now
            left = (now - self._started) / self._done * (self._total - self._done)
            say(f"{self._done} of {self._total} rows, {failed} failed, about {left:.0f} s left")

    def say(self, text: str) -> None:
        """A line above the bar."""
        if not self._quiet:
            with tqdm.external_write_mode(file=sys.stderr):
                say(text)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._bar.close()

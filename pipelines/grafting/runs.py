"""The runs of a graft: one for each thread and each block of code, which hold them; here is only what they did."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator

from .run import Run, Tally


class Local(threading.local):
    """What a thread has under one graft.

    Attributes:
        run: its state. calls: of the denoiser calls that it is in, the innermost last; None where it runs plain.
    """

    def __init__(self) -> None:
        self.run: Run | None = None
        self.calls: list[Run | None] = []


class Runs:
    """Runs that are alive, weakly; what the others did is kept as one sum."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a generator that is collected meanwhile leaves its block
        self._alive: list[tuple[weakref.ref[Run], Tally]] = []
        self._past = Tally()

    def add(self, run: Run) -> Run:
        """Keep the books of a run."""
        with self._lock:
            self._settle()
            self._alive.append((weakref.ref(run), run.tally))
        return run

    def tally(self) -> Tally:
        """What all runs did."""
        total = Tally()
        with self._lock:
            self._settle()
            for done in (self._past, *(tally for _, tally in self._alive)):
                total.add(done)
        return total

    def __iter__(self) -> Iterator[Run]:
        with self._lock:
            found = [run() for run, _ in self._alive]
        return iter([run for run in found if run is not None])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _settle(self) -> None:
        alive: list[tuple[weakref.ref[Run], Tally]] = []
        for run, tally in self._alive:
            if run() is None:
                self._past.add(tally)
            else:
                alive.append((run, tally))
        self._alive = alive

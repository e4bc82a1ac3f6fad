"""Step bookkeeping from the scheduler: which step of this pipeline call a denoiser call belongs to."""

from __future__ import annotations

from typing import Any

import torch


class Clock:
    """Counts `scheduler.step` calls within one run of a schedule.

    A pipeline call is known by its mark. A loop by hand begins with `set_timesteps`, which makes a new tensor, or goes
    back on the schedule that it has. Denoiser calls are not counted: a second-order scheduler steps twice a step,
    guidance in two calls steps once.
    """

    def __init__(self) -> None:
        self.schedule: torch.Tensor | None = None
        self.times: list[float] = []
        self.begin = self.done = 0
        self.asked_at: int | None = None
        self.call: Any = None
        self.first: float | None = None

    def start(self, scheduler: Any, timestep: Any, call: Any = None) -> bool:
        """Note a denoiser call at `timestep`; True if it is the first of a new run.

        Args:
            call: the mark of the pipeline call, None in a loop by hand.
        """
        fresh = self.over or call is not self.call or (call is None and self._by_hand(scheduler, timestep))
        if fresh:
            self.schedule, self.call = scheduler.timesteps, call
            self.times = [float(t) for t in scheduler.timesteps]  # once a run: on a GPU this waits
            self.begin, self.done = self._first(scheduler, timestep), 0
            self.first = _number(timestep) if call is None else None
        elif self.done == self.asked_at:
            # No step since the last call: guidance in two calls stays where it is, a bare loop moved on.
            self.done = self._find(timestep, default=self.begin + self.done) - self.begin
        self.asked_at = self.done
        return fresh

    def begins_again(self, timestep: Any) -> bool:
        """Whether a loop by hand that stopped between the denoiser and the step is back where it began."""
        return self.call is None and self.first is not None and _number(timestep) == self.first

    def _by_hand(self, scheduler: Any, timestep: Any) -> bool:
        """Whether a loop by hand begins: a new schedule, or a place on this one that lies behind it."""
        if scheduler.timesteps is not self.schedule:
            return True
        value, place = _number(timestep), self.begin + self.done
        if value in self.times[place:]:
            return False
        return value in self.times[:place] or (value == self.first and place > self.begin)

    def tick(self) -> None:
        """Note one `scheduler.step`."""
        self.done += 1

    def read(self, scheduler: Any, steps: int | None) -> tuple[int, int]:
        """(index, total) of the current step; `steps` = entries that this pipeline call runs, if known."""
        order = getattr(scheduler, "order", 1)
        entries = len(self.times) - self.begin
        entries = min(entries, steps) if steps else entries
        total = max(1, -(-entries // order))
        return min(self.done // order, total - 1), total

    @property
    def time(self) -> float | None:
        """The schedule's time of the current step."""
        place = self.begin + self.done
        return self.times[place] if place < len(self.times) else None

    @property
    def over(self) -> bool:
        """Whether every step of the schedule was taken."""
        return self.schedule is not None and self.begin + self.done >= len(self.times)

    def _first(self, scheduler: Any, timestep: Any) -> int:
        begin = getattr(scheduler, "begin_index", None)
        return self._find(timestep, default=0, order=getattr(scheduler, "order", 1)) if begin is None else int(begin)

    def _find(self, timestep: Any, default: int, order: int = 1) -> int:
        value = _number(timestep)
        places = [i for i, t in enumerate(self.times) if t == value and i % order == 0]
        later = [i for i in places if i >= default]
        return (later or places or [default])[0]


def _number(timestep: Any) -> float:
    return float(torch.as_tensor(timestep).flatten()[0])

"""What one thread's pipeline calls are at: plain state, on which the stages work."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...attention.memo import TextMemo
from ...attention.seam import Seam, Task, Work, clear, lay_out
from ...attention.step import Step
from ..families.base import Adapter, Inputs
from ..families.join import Joined
from ..families.running import Running
from .clock import Clock
from .folded import Fold
from .widen import Widen

Plan = Sequence[tuple[Seam, Task]]
"""The work of every layer that is edited in one denoiser call or probe, and of every block where rows join."""


@dataclass
class Tally:
    """What a run did, for the report; it outlives the run."""

    calls: int = 0
    updates: int = 0
    rows: set[int] = field(default_factory=set[int])
    skipped: Counter[str] = field(default_factory=Counter[str])
    layers: Counter[str] = field(default_factory=Counter[str])
    told: dict[Any, Callable[[], Mapping[str, Any]]] = field(default_factory=dict[Any, Any])

    def add(self, other: Tally) -> None:
        """Count what another run did as well."""
        self.calls, self.updates = self.calls + other.calls, self.updates + other.updates
        self.rows |= other.rows
        self.skipped.update(other.skipped)
        self.layers.update(other.layers)
        self.told |= other.told


@dataclass(eq=False)
class Run:
    """State of the pipeline calls that one thread, or one block of code, makes under one graft.

    Attributes:
        adapter: the denoiser's. running: the pipeline that calls it now. clock, step: where it is.
        inputs: of the denoiser call that runs, by name; empty between calls.
        pending: a moved latent that the scheduler's step has not started from yet.
        deltas: what plugins add to the prediction of this step.
        late: rows that join on the way, and the number of the block in `Placed.blocks` where they do.
        joined: further texts in the sequence of a joint-attention model.
        fold: rows that run as one.
        memo, notes: what is kept over the steps of a pipeline call.
        stranded: whether a pipeline call ended with a moved latent that no step had started from.
        tally: for the report.
        plan: the work that layers have in this thread now.
    """

    adapter: Adapter
    running: Running
    clock: Clock = field(default_factory=Clock)
    step: Step = field(default_factory=Step)
    inputs: Inputs = field(default_factory=dict[str, Any])
    pending: torch.Tensor | None = None
    deltas: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    late: tuple[Widen, int] | None = None
    joined: Joined | None = None
    fold: Fold | None = None
    memo: TextMemo = field(default_factory=TextMemo)
    notes: dict[Any, Any] = field(default_factory=dict[Any, Any])
    stranded: bool = False
    tally: Tally = field(default_factory=Tally)
    plan: Plan = ()
    _untraced: frozenset[int] | None = None
    _mark: Any = None

    @property
    def untraced(self) -> frozenset[int]:
        """Identities of the modules whose work torch.compile may not trace."""
        if self._untraced is None:
            tasks = [task for _, task in self.plan if isinstance(task, Work) and not task.traced]
            self._untraced = frozenset(id(task.layer.module) for task in tasks)
        return self._untraced

    def lay(self, plan: Plan) -> None:
        """Give layers their work in this thread, in place of what they had."""
        clear(seam for seam, _ in self.plan)
        self.plan, self._untraced = plan, None
        lay_out(plan)

    def rejoin(self) -> None:
        """The texts have joined: where they stand is what the model itself said of lengths."""
        if self.joined is not None:
            columns = self.joined.columns()
            self.lay([
                (seam, replace(task, columns=columns) if isinstance(task, Work) and task.columns else task)
                for seam, task in self.plan
            ])  # fmt: skip

    def end(self) -> None:
        """A denoiser call is over: nothing joins it and no layer has work."""
        self.late, self.joined, self.inputs = None, None, {}
        self.lay(())

    def follow(self, running: Running) -> None:
        """Note who calls the denoiser; what belongs to a pipeline call is forgotten when that is gone, however."""
        self.running = running
        if running.mark is not None and (mark := running.mark()) is not None and self._mark != running.mark:
            run = weakref.ref(self)
            self._mark = weakref.ref(mark, lambda gone: _leave(run(), gone))

    def left(self, mark: Any) -> None:
        """The pipeline call of this mark is gone."""
        if mark is self._mark:
            self.stranded, self.pending = self.pending is not None, None
            self.running, self.inputs, self._mark = Running(self.adapter.pipe, False), {}, None
            self.forget()

    def forget(self) -> None:
        """The pipeline call is over, or the graft comes off: drop what was kept over its steps."""
        self.memo.clear()
        self.notes.clear()
        self.deltas = []


def _leave(run: Run | None, mark: Any) -> None:
    if run is not None:
        run.left(mark)

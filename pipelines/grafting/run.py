"""What one thread's pipeline calls are at: plain state, on which the stages work."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from ...attention.layer import AttentionLayer
from ...attention.memo import TextMemo
from ...attention.step import Step
from ..families.base import Adapter, Inputs
from ..families.running import Running
from .clock import Clock


@dataclass
class Late:
    """Rows that join the batch at a block instead of at the denoiser's input.

    Attributes:
        index: of each row of the wider batch the row that it copies. block: where they join.
        base: rows that came in. joined: whether that block was reached in this call.
    """

    index: torch.Tensor
    block: str
    base: int
    joined: bool = False


@dataclass(eq=False)
class Run:
    """State of the pipeline calls that one thread makes under one graft.

    Attributes:
        adapter: the denoiser's. running: the pipeline that calls it now. clock, step: where it is.
        inputs: of the denoiser call that runs, by name; empty between calls.
        pending: a moved latent that the scheduler's step has not started from yet.
        deltas: what plugins add to the prediction of this step.
        late: rows that join on the way. streams: lengths of the texts of a joint-attention model, the prompt's first;
            empty without others.
        memo, notes: what is kept over the steps of a pipeline call.
        skipped, rows_seen, updates, calls: for the report.
    """

    adapter: Adapter
    running: Running
    clock: Clock = field(default_factory=Clock)
    step: Step = field(default_factory=Step)
    inputs: Inputs = field(default_factory=dict[str, Any])
    pending: torch.Tensor | None = None
    deltas: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    late: Late | None = None
    streams: list[int] = field(default_factory=list[int])
    memo: TextMemo = field(default_factory=TextMemo)
    notes: dict[Any, Any] = field(default_factory=dict[Any, Any])
    skipped: Counter[str] = field(default_factory=Counter[str])
    rows_seen: set[int] = field(default_factory=set[int])
    updates: int = 0
    calls: int = 0

    def text_slice(self, layer: AttentionLayer) -> slice | None:
        """Columns of the text in a joint layer."""
        return self.adapter.text_slice(layer, self.inputs)

    def narrow(self) -> None:
        """A denoiser call begins or is over: nothing joins it."""
        self.late, self.streams = None, []

    def forget(self) -> None:
        """The pipeline call is over, or the graft comes off: drop what was kept over its steps."""
        self.memo.clear()
        self.notes.clear()

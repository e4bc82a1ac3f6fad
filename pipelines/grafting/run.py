"""One pipeline call under a graft: what happens before, during and after each denoiser call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ...attention.errors import GraftError
from ...attention.layer import AttentionLayer
from ...attention.memo import TextMemo
from ...attention.step import Step
from ...plugins.base import Plugin
from ..families.base import Inputs
from ..families.running import Running, find_running, swap_processors
from .branch_stage import BranchStage
from .clock import Clock
from .latent_stage import LatentStage
from .session import RunSession

if TYPE_CHECKING:
    from .graft import Graft


class Run:
    """State of the pipeline calls that one thread makes under one graft."""

    def __init__(self, graft: Graft) -> None:
        self.graft, self.adapter = graft, graft.adapter
        self.session, self.moving, self.branching = RunSession(self), LatentStage(self), BranchStage(self)
        self.clock, self.step = Clock(), Step()
        self.running = Running(graft.pipe, False)
        self.pending: torch.Tensor | None = None
        self.skipped: Counter[str] = Counter()
        self.rows_seen: set[int] = set()
        self.updates = self.calls = 0
        self.inputs: Inputs = {}
        self.deltas: list[torch.Tensor] = []
        self.memo = TextMemo()
        self.notes: dict[Any, Any] = {}

    # -- the three stages --------------------------------------------------------------------------------------

    def before(self, args: tuple[Any, ...], kwargs: Inputs) -> Inputs:
        """The denoiser's inputs after the latent and the branch stage."""
        self.running = find_running(self.adapter.denoiser, self.graft.pipe)
        inputs = self.adapter.bind(args, kwargs)
        if self.pending is not None and not self._stays_in_step(inputs):
            self.pending = None
            raise GraftError(
                "a plugin moved the latents, but scheduler.step was not called on the pipeline's own scheduler "
                "before the next denoiser call: sample with pipe.scheduler"
            )
        self._begin(inputs)
        if "cond" in self.step.rows:
            for stage in (self.moving.stage, self.branching.stage, self.branching.text_stage):
                inputs = stage(inputs)
        else:
            inputs = self.moving.again(inputs)
        self.inputs = inputs
        self.rows_seen.add(max(rows.stop for rows in self.step.rows.values()))
        self.calls += 1
        return inputs

    def after(self, output: Any) -> Any:
        """The denoiser's output after the combine stage, with the rows that the pipeline sent in."""
        step, adapter, self.inputs = self.step, self.adapter, {}
        self.branching.forget()
        if "cond" not in step.rows:  # guidance's other call gets what the first one was given
            return self._folded(output, self.deltas, len(adapter.prediction(output)), tuple(step.rows))
        combiners = [p for p in self.graft.active(step) if type(p).combine is not Plugin.combine]
        prediction = adapter.prediction(output)
        kept = max(rows.stop for name, rows in step.rows.items() if name not in step.likes)
        if not combiners and kept == len(prediction):
            return output
        full = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        self.deltas = [d for plugin in combiners if (d := plugin.combine(step, full, step.rows)) is not None]
        return self._folded(output, self.deltas, kept, ("uncond", "cond"))

    def forget(self) -> None:
        """The pipeline call is over, or the graft comes off: drop what was kept over its steps."""
        self.memo.clear()
        self.notes.clear()

    def aborted(self) -> None:
        """The denoiser raised: this pipeline call will not step, nor put back what PAG replaced."""
        swap_processors(self.adapter.denoiser, self.running.before_pag)
        self.pending, self.inputs = None, {}
        self.branching.forget()

    def _folded(self, output: Any, deltas: Sequence[torch.Tensor], kept: int, groups: Sequence[str]) -> Any:
        """The first `kept` rows of the output, moved by the deltas.

        u + g (c - u) moves by exactly d when both halves do, whatever g is.
        """
        prediction = self.adapter.prediction(output)
        if not deltas:
            same = kept == len(prediction)
            return output if same else self.adapter.with_prediction(output, prediction[:kept])
        folded = prediction[:kept].to(torch.promote_types(prediction.dtype, torch.float32), copy=True)
        for name in groups:
            if name in self.step.rows:
                for delta in deltas:
                    folded[self.step.rows[name], : delta.shape[1]] += delta
        return self.adapter.with_prediction(output, folded.to(prediction.dtype))

    def sample_for_step(self, sample: torch.Tensor) -> torch.Tensor:
        """What the scheduler's step starts from."""
        self.clock.tick()
        if self.clock.over:
            for plugin in self.graft.effective:
                plugin.finish()
            self.forget()
        moved, self.pending = self.pending, None
        return sample if moved is None else moved.to(sample.dtype)

    def text_slice(self, layer: AttentionLayer) -> slice | None:
        """Columns of the text in a joint layer."""
        return self.adapter.text_slice(layer, self.inputs)

    # -- steps -------------------------------------------------------------------------------------------------

    def _begin(self, inputs: Inputs) -> None:
        scheduler = self.running.pipe.scheduler
        self.graft.link(scheduler)
        timestep = inputs[self.adapter.timestep]
        fresh = self.clock.start(scheduler, timestep)
        index, total = self.clock.read(scheduler, self.running.steps)
        rows = self.adapter.groups(inputs, self.running)
        self.step = Step(index, total, timestep, self.adapter.grid(inputs, self.running), rows, notes=self.notes)
        self.branching.forget()
        self.inputs = inputs
        if "cond" in rows:
            self.deltas = []
        if fresh:
            self.forget()
            self.adapter.check()
            for plugin in self.graft.effective:
                plugin.begin(self.session, self.step)

    def _stays_in_step(self, inputs: Inputs) -> bool:
        """Whether this call is guidance's second one at the same step."""
        return "cond" not in self.adapter.groups(inputs, self.running)

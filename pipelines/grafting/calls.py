"""One denoiser call under a graft: which stages run before and after it, in which order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...attention.call import Kernel
from ...attention.errors import GraftError
from ...attention.seam import Seam
from ...attention.step import Step
from ...plugins.base import Plugin
from ..families.base import Inputs
from ..families.running import find_running, swap_processors
from .branch_stage import add_rows
from .combine_stage import combine
from .fold import fold_rows, unfold_rows
from .latent_stage import move, moved_again
from .plan import Placed, make_plan
from .run import Plan, Run
from .session import RunSession
from .stream_stage import add_streams
from .text import Texts
from .text_stage import reword


class Calls:
    """The stages of a graft, composed.

    Args:
        placed: what runs where. texts: the pipeline's encoders. kernel: computes attention.
        link: called with the scheduler of the running pipeline, whose steps are to be followed.

    Attributes:
        seams: of the edited layers and of the blocks where rows may join, by name.
        folding: identities of the adapters in whose blocks rows may run as one.
    """

    def __init__(self, placed: Placed, texts: Texts, kernel: Kernel, link: Callable[[Any], None]) -> None:
        self.placed, self.texts, self.kernel, self.link = placed, texts, kernel, link
        self.seams: dict[str, Seam] = {}
        self.folding: set[int] = set()

    def before(self, run: Run, args: tuple[Any, ...], kwargs: Inputs) -> Inputs:
        """The denoiser's inputs after the text, the latent, the branch and the stream stage."""
        run.follow(find_running(run.adapter.denoiser, run.adapter.pipe))
        inputs = run.adapter.bind(args, kwargs)
        if run.pending is not None and not _stays_in_step(run, inputs):
            run.pending = None
            if not run.clock.begins_again(inputs[run.adapter.timestep]):
                raise GraftError(
                    "a plugin moved the latents, but scheduler.step was not called on the pipeline's own scheduler "
                    "before the next denoiser call: sample with pipe.scheduler"
                )
        self._begin(run, inputs)
        active = self.placed.active(run.step)
        run.inputs = inputs = self._staged(run, active, inputs)
        run.lay(self._plan(run, active))
        run.tally.rows.add(max(rows.stop for rows in run.step.rows.values()))
        run.tally.calls += 1
        return inputs

    def after(self, run: Run, output: Any) -> Any:
        """The denoiser's output after the combine stage, with the rows that the pipeline sent in."""
        run.end()
        unfold_rows(run)
        return combine(run, self.placed.active(run.step), output)

    def aborted(self, run: Run) -> None:
        """The denoiser raised: this pipeline call will not step, nor put back what PAG replaced."""
        swap_processors(run.adapter.denoiser, run.running.before_pag)
        run.pending = run.fold = None
        run.end()

    def stepped(self, run: Run, sample: torch.Tensor) -> torch.Tensor:
        """What the scheduler's step starts from."""
        run.clock.tick()
        if run.clock.over:
            for plugin in self.placed.plugins:
                plugin.finish()
            run.forget()
        moved, run.pending = run.pending, None
        return sample if moved is None else moved.to(sample.dtype)

    def _plan(self, run: Run, active: Sequence[Plugin]) -> Plan:
        return make_plan(run, self.placed, active, self.seams, self.kernel)

    def _staged(self, run: Run, active: Sequence[Plugin], inputs: Inputs) -> Inputs:
        if "cond" not in run.step.rows:
            inputs = moved_again(run, inputs)
            wanted = [plugin for plugin in active if plugin.beside_guidance] if "uncond" in run.step.rows else []
            return add_rows(run, self.placed, wanted, RunSession(run, self.texts), inputs)
        inputs = reword(run, active, inputs)
        movers = [plugin for plugin in active if plugin.moves(run.step)]
        if movers:
            inputs = move(run, movers, inputs, lambda: self._plan(run, active))
        inputs = add_rows(run, self.placed, active, RunSession(run, self.texts), inputs)
        inputs = add_streams(run, active, inputs)
        if id(run.adapter) in self.folding:
            fold_rows(run, active, inputs)
        return inputs

    def _begin(self, run: Run, inputs: Inputs) -> None:
        adapter, scheduler = run.adapter, run.running.pipe.scheduler
        adapter.check_inputs(inputs)
        self.link(scheduler)
        timestep = inputs[adapter.timestep]
        fresh = run.clock.start(scheduler, timestep, run.running.mark)
        index, total = run.clock.read(scheduler, run.running.steps)
        rows = adapter.groups(inputs, run.running)
        size, device = adapter.grid(inputs, run.running), adapter.device(inputs)
        run.step = Step(index, total, timestep, size, run.clock.time, rows, device=device, notes=run.notes)
        run.end()
        run.inputs = inputs
        if "cond" in rows:
            run.deltas = []
        if fresh:
            run.forget()
            run.stranded = False
            adapter.check()
            for plugin in self.placed.plugins:
                plugin.begin(RunSession(run, self.texts), run.step)


def _stays_in_step(run: Run, inputs: Inputs) -> bool:
    """Whether this call is guidance's second one at the same step."""
    return "cond" not in run.adapter.groups(inputs, run.running)

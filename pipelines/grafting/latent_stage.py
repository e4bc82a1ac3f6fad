"""The latent stage: plugins move the latent before the denoiser sees it, and the scheduler steps from there."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ...attention.errors import UnsupportedSchedulerError
from ...attention.seam import StopForward
from ..families.base import Inputs
from ..families.running import swap_processors
from .scheduler_link import check_moves, discards, model_scale

if TYPE_CHECKING:
    from .run import Run


class LatentStage:
    """Asks plugins for moved latents, and runs their probes on the conditional rows with gradients enabled."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def stage(self, inputs: Inputs) -> Inputs:
        """The denoiser's inputs with the latent as the plugins moved it; remembered for the scheduler's step."""
        run = self.run
        movers = [plugin for plugin in run.graft.active(run.step) if plugin.moves(run.step)]
        if not movers:
            return inputs
        scheduler = run.running.pipe.scheduler
        self._refuse(scheduler)
        reason = discards(scheduler)
        if reason:
            run.session.skip(reason)
            return inputs
        key, rows = run.adapter.sample, run.step.rows["cond"]
        with torch.inference_mode(False), torch.enable_grad(), self._probing_state():
            inputs = tree_map(_ordinary, inputs)
            sample = inputs[key].detach()
            run.inputs = run.adapter.take(inputs, rows)
            scale = model_scale(scheduler, run.step.timestep, sample)
            latent = before = self._latent_of(sample[rows], scale)
            for plugin in movers:
                moved = plugin.latent(run.step, latent.detach(), lambda z: self._probe(z, scale))
                latent = latent if moved is None else moved.detach()
        if latent is before:
            return inputs
        run.pending, run.updates = run.adapter.as_sample(latent), run.updates + 1
        return {**inputs, key: run.adapter.with_latent(sample, run.pending * scale)}

    def again(self, inputs: Inputs) -> Inputs:
        """A further call of the same step, which guidance makes, with the latent as the first call's was moved."""
        run, key = self.run, self.run.adapter.sample
        if run.pending is None:
            return inputs
        scale = model_scale(run.running.pipe.scheduler, run.step.timestep, inputs[key])
        return {**inputs, key: run.adapter.with_latent(inputs[key], run.pending * scale)}

    def _refuse(self, scheduler: Any) -> None:
        run = self.run
        if scheduler is not run.graft.pipe.scheduler:
            raise UnsupportedSchedulerError(
                f"{type(run.running.pipe).__name__} shares the denoiser but has another scheduler object, so a moved "
                "latent would not reach it: give it the grafted pipeline's scheduler, or graft it instead"
            )
        if run.clock.done == 0:
            check_moves(scheduler)
            run.adapter.check_gradient()

    def _latent_of(self, sample: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        latent = self.run.adapter.latent_of(sample, self.run.step.size)
        return latent.to(torch.promote_types(latent.dtype, torch.float32)) / scale

    def _probe(self, latent: torch.Tensor, scale: torch.Tensor) -> torch.Tensor | None:
        """The denoiser's prediction for `latent` on the conditional rows, None if an edit ended the run early."""
        run = self.run
        key, step = run.adapter.sample, run.step
        scaled = run.adapter.as_sample(latent * scale)
        inputs = {**run.inputs, key: run.adapter.with_latent(run.inputs[key], scaled)}
        step.probing = True
        try:
            return run.adapter.prediction(run.adapter.denoiser(**inputs))
        except StopForward:
            return None
        finally:
            step.probing = False

    @contextmanager
    def _probing_state(self) -> Generator[None]:
        """The step as a probe sees it, and parameters without gradients; all put back at the end."""
        run = self.run
        step, rows = run.step, run.step.rows
        trained = {name: p for name, p in run.adapter.denoiser.named_parameters() if p.requires_grad}
        for parameter in trained.values():
            parameter.requires_grad_(False)
        step.phase, step.rows = "latent", {"cond": slice(0, rows["cond"].stop - rows["cond"].start)}
        run.graft.latent_run = run
        try:
            with _without_pag(run.adapter.denoiser, run.running.before_pag):
                yield
        finally:
            run.graft.latent_run = None
            step.phase, step.rows, run.inputs = "predict", rows, {}
            for name, parameter in run.adapter.denoiser.named_parameters():  # offload makes new ones meanwhile
                if name in trained:
                    parameter.requires_grad_(True)


@contextmanager
def _without_pag(denoiser: nn.Module, originals: Mapping[str, Any]) -> Generator[None]:
    """PAG's processors split their batch in two or three, and a probe has the conditional rows alone."""
    split = swap_processors(denoiser, originals)
    try:
        yield
    finally:
        swap_processors(denoiser, split)


def _ordinary(value: Any) -> Any:
    """A tensor that autograd accepts, also under `torch.inference_mode`."""
    return value.clone() if isinstance(value, torch.Tensor) and value.is_inference() else value

"""The latent stage: plugins move the latent before the denoiser sees it, and the scheduler steps from there."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ...attention.errors import UnsupportedSchedulerError
from ...attention.seam import StopForward
from ...plugins.base import Plugin
from ..families.base import Inputs
from ..families.running import swap_processors
from .gradients import followed, frozen
from .run import Plan, Run
from .scheduler_link import check_moves, discards, model_scale


def move(run: Run, movers: Sequence[Plugin], inputs: Inputs, plan: Callable[[], Plan]) -> Inputs:
    """The denoiser's inputs with the latent as the plugins moved it; remembered for the scheduler's step.

    Their probes run on the conditional rows with gradients enabled.

    Args:
        plan: makes the plan of a probe.
    """
    scheduler = run.running.pipe.scheduler
    _refuse(run, scheduler)
    reason = discards(scheduler)
    if reason:
        run.tally.skipped[reason] += 1
        return inputs
    key, rows = run.adapter.sample, run.step.rows["cond"]
    with torch.inference_mode(False), torch.enable_grad(), _probing_state(run), followed(run):
        inputs = tree_map(_ordinary, inputs)
        sample = tree_map(torch.Tensor.detach, inputs[key])
        run.inputs = run.adapter.take(inputs, rows)
        scale = model_scale(scheduler, run.step.timestep, _one(sample))
        latent = before = _latent_of(run, sample[rows], scale)
        for plugin in movers:
            moved = plugin.latent(run.step, latent.detach(), lambda z: _probe(run, z, scale, plan()))
            latent = latent if moved is None else moved.detach()
    if latent is before:
        return inputs
    run.pending = run.adapter.as_sample(latent)
    run.tally.updates += 1
    return {**inputs, key: run.adapter.with_latent(sample, run.pending * scale)}


def moved_again(run: Run, inputs: Inputs) -> Inputs:
    """A further call of the same step, which guidance makes, with the latent as the first call's was moved."""
    key = run.adapter.sample
    if run.pending is None:
        return inputs
    scale = model_scale(run.running.pipe.scheduler, run.step.timestep, _one(inputs[key]))
    return {**inputs, key: run.adapter.with_latent(inputs[key], run.pending * scale)}


def _refuse(run: Run, scheduler: Any) -> None:
    if scheduler is not run.adapter.pipe.scheduler:
        raise UnsupportedSchedulerError(
            f"{type(run.running.pipe).__name__} shares the denoiser but has another scheduler object, so a moved "
            "latent would not reach it: give it the grafted pipeline's scheduler, or graft it instead"
        )
    if run.clock.done == 0:
        check_moves(scheduler)
        run.adapter.check_gradient()


def _latent_of(run: Run, sample: Any, scale: torch.Tensor) -> torch.Tensor:
    latent = run.adapter.latent_of(sample, run.step.size)
    return latent.to(torch.promote_types(latent.dtype, torch.float32)) / scale


def _probe(run: Run, latent: torch.Tensor, scale: torch.Tensor, plan: Plan) -> torch.Tensor | None:
    """The denoiser's prediction for `latent` on the conditional rows, None if an edit ended the run early.

    The plan stays in force: gradient checkpointing runs layers again when the gradient is asked for.
    """
    key, step = run.adapter.sample, run.step
    scaled = run.adapter.as_sample(latent * scale)
    inputs = {**run.inputs, key: run.adapter.with_latent(run.inputs[key], scaled)}
    step.probing = True
    run.lay(plan)
    try:
        return run.adapter.prediction(run.adapter.denoiser(**inputs))
    except StopForward:
        return None
    finally:
        step.probing = False


@contextmanager
def _probing_state(run: Run) -> Generator[None]:
    """The step as a probe sees it, and parameters without gradients; all put back at the end."""
    step, rows, denoiser = run.step, run.step.rows, run.adapter.denoiser
    step.phase, step.rows = "latent", {"cond": slice(0, rows["cond"].stop - rows["cond"].start)}
    try:
        with frozen(denoiser), _without_pag(denoiser, run.running.before_pag):
            yield
    finally:
        step.phase, step.rows = "predict", rows
        run.end()


@contextmanager
def _without_pag(denoiser: nn.Module, originals: Mapping[str, Any]) -> Generator[None]:
    """PAG's processors split their batch in two or three, and a probe has the conditional rows alone."""
    split = swap_processors(denoiser, originals)
    try:
        yield
    finally:
        swap_processors(denoiser, split)


def _one(sample: Any) -> torch.Tensor:
    """A tensor of a sample, which may be a list of them."""
    return sample if isinstance(sample, torch.Tensor) else sample[0]


def _ordinary(value: Any) -> Any:
    """A tensor that autograd accepts, also under `torch.inference_mode`."""
    return value.clone() if isinstance(value, torch.Tensor) and value.is_inference() else value

"""The scheduler's side of a moved latent: `step` must start from the latent that the denoiser saw."""

from __future__ import annotations

import copy
import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch

from ...attention.errors import UnsupportedSchedulerError

_LOCK = threading.RLock()
_ATTENUATED = ("UniPCMultistepScheduler", "SASolverScheduler", "HeliosScheduler", "HeliosDMDScheduler")


class SchedulerStep:
    """Stands in for one scheduler's `step`: lets handlers replace the sample.

    Attributes:
        handlers: handler(sample) -> sample, each called once a step.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, self.original = scheduler, scheduler.step
        self.handlers: tuple[Callable[[Any], Any], ...] = ()
        self.was_own = "step" in scheduler.__dict__
        functools.update_wrapper(self, self.original)  # pipelines look into the signature for eta and generator

    def __call__(self, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        for handler in self.handlers:
            sample = handler(sample)
        return self.original(model_output, timestep, sample, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.original, memo)

    def __reduce__(self) -> Any:
        return getattr, (self.scheduler, "step")


def follow(scheduler: Any, handler: Callable[[Any], Any]) -> None:
    """Call `handler` at every step of a scheduler, until `leave`."""
    with _LOCK:
        step = scheduler.__dict__.get("step")
        if not isinstance(step, SchedulerStep):
            step = SchedulerStep(scheduler)
            scheduler.step = step
        step.handlers = (*step.handlers, handler)


def leave(scheduler: Any, handler: Callable[[Any], Any]) -> None:
    """Put the original back with the last handler; if somebody wrapped on top, stay and pass through."""
    with _LOCK:
        step: Any = scheduler.step
        while step is not None and not (isinstance(step, SchedulerStep) and handler in step.handlers):
            step = getattr(step, "__wrapped__", None)
        if step is None:
            return
        step.handlers = tuple(kept for kept in step.handlers if kept != handler)
        if step.handlers or scheduler.__dict__.get("step") is not step:
            return
        if step.was_own:
            scheduler.step = step.original
        else:
            del scheduler.__dict__["step"]


def check_moves(scheduler: Any) -> None:
    """Refuse schedulers on which no moved latent can be exact; warn where it only partly arrives.

    Raises:
        UnsupportedSchedulerError: PNDM with its Runge-Kutta start; SCM, Sana-Sprint's.
    """
    name = type(scheduler).__name__
    if name == "SCMScheduler":
        raise UnsupportedSchedulerError(
            "with SCMScheduler the pipeline itself rescales its latents and mixes them into the prediction, where a "
            "moved one does not arrive: use a Sana pipeline with its flow-matching scheduler"
        )
    if name == "PNDMScheduler" and not scheduler.config.skip_prk_steps:
        raise UnsupportedSchedulerError(
            "PNDMScheduler with skip_prk_steps=False ignores the latent in its Runge-Kutta stages: use "
            "DDIMScheduler.from_config(pipe.scheduler.config), or skip_prk_steps=True"
        )
    if name in _ATTENUATED:
        warnings.warn(
            f"{name} corrects each step from the latent it kept, so a moved latent arrives weakened; "
            "DDIM, Euler or DPM++ take it exactly",
            stacklevel=3,
        )


def discards(scheduler: Any) -> str | None:
    """Why the scheduler would discard a latent moved before the coming step, or None if it would not."""
    if not getattr(scheduler, "state_in_first_order", True):
        return "second stage of a second-order step"
    if type(scheduler).__name__ == "PNDMScheduler" and scheduler.counter == 1:
        return "duplicated call of PNDM"
    orders = getattr(scheduler, "order_list", None)  # DPMSolverSinglestep goes on from the sample of its first stage
    if orders is not None and scheduler.step_index is not None and orders[scheduler.step_index] != 1:
        return "later stage of a single-step solver"
    return None


def model_scale(scheduler: Any, timestep: Any, sample: torch.Tensor) -> torch.Tensor:
    """The factor by which the scheduler scales latents for the model, at least float32; all of them are linear."""
    one = torch.ones((), dtype=torch.promote_types(sample.dtype, torch.float32), device=sample.device)
    scale = getattr(scheduler, "scale_model_input", None)
    return one if scale is None else scale(one, torch.as_tensor(timestep).flatten()[0])

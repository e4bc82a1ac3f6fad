"""A scheduler's steps as levels (alpha, sigma), x = alpha * clean + sigma * noise, and each step's inverse."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ...attention.errors import UnsupportedSchedulerError

# What steps by exactly one evaluation along a straight line; the others are inverted on DDIM's steps.
_DDIM, _EULER, _FLOW = "DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"
EXACT = (_DDIM, _EULER, _FLOW)
_PREDICTIONS = ("epsilon", "v_prediction", "sample")


class Level(NamedTuple):
    """x = alpha * clean + sigma * noise, with alpha^2 + sigma^2 = 1, or alpha = 1 - sigma in flow matching."""

    alpha: float
    sigma: float


@dataclass(frozen=True)
class Grid:
    """The steps of one scheduler for one number of steps, noisiest first.

    Attributes:
        scheduler: an instance of our own, with its timesteps set.
        timesteps: [N] as the denoiser takes them.
        starts, ends: levels between which step i goes.
        scales: the scheduler's latents over ours at each start; only Euler keeps them at another scale.
        noise_scale: the factor that a pipeline puts on `latents=`.
        prediction: "epsilon", "v_prediction", "sample" or "flow".
    """

    scheduler: Any
    timesteps: torch.Tensor
    starts: list[Level]
    ends: list[Level]
    scales: list[float]
    noise_scale: float
    prediction: str

    def latents(self, z: torch.Tensor, step: int) -> torch.Tensor:
        """Our latents at the start of a step in the scheduler's own space."""
        return z * self.scales[step]


def predicted_noise(x: torch.Tensor, output: torch.Tensor, at: Level, prediction: str) -> torch.Tensor:
    """The noise that a denoiser's output on `x` means."""
    if prediction == "epsilon":
        return output
    if prediction == "v_prediction":
        return at.alpha * output + at.sigma * x
    if prediction == "flow":
        return x + at.alpha * output
    return (x - at.alpha * output) / at.sigma


def reverse_step(z: torch.Tensor, output: torch.Tensor, start: Level, end: Level, prediction: str) -> torch.Tensor:
    """The x at `start` from which the step to `end` with this output led to `z`.

    Deterministic DDIM (equation 12 of arXiv 2010.02502 with eta = 0) and Euler on flows, solved for where they began.
    The output is what the denoiser gives there: "epsilon", "v_prediction" or "flow". "sample" outputs are turned into
    noise first (`predicted_noise`), since the last step of such a model forgets where it began.
    """
    if prediction == "flow":
        return z - (end.sigma - start.sigma) * output
    if prediction == "v_prediction":
        turn = end.sigma * start.alpha - end.alpha * start.sigma
        return (z - turn * output) / (end.alpha * start.alpha + end.sigma * start.sigma)
    ratio = start.alpha / end.alpha
    return ratio * z + (start.sigma - ratio * end.sigma) * output


def grid_of(scheduler: Any, steps: int, device: torch.device | str = "cpu", **shift: Any) -> Grid:
    """The steps that a pipeline with this scheduler takes. The scheduler itself is left as it is.

    Args:
        scheduler: DDIM, Euler or flow-matching Euler; any other is replaced by DDIM with its config, with a warning.
        steps: `num_inference_steps`.
        shift: what the model family adds to `set_timesteps` (sigmas, mu).

    Raises:
        UnsupportedSchedulerError: DDIM cannot stand in for it either.
    """
    own = invertible(scheduler)
    own.set_timesteps(steps, device=device, **shift)
    timesteps = own.timesteps
    if type(own).__name__ == _FLOW:
        levels = [Level(1 - s, s) for s in own.sigmas.tolist()]
        return Grid(own, timesteps, levels[:-1], levels[1:], [1.0] * len(timesteps), 1.0, "flow")
    if type(own).__name__ == _EULER:
        sigmas = own.sigmas.tolist()
        levels = [Level(1 / (1 + s * s) ** 0.5, s / (1 + s * s) ** 0.5) for s in sigmas]
        scales = [(1 + s * s) ** 0.5 for s in sigmas[:-1]]
        noise = float(own.init_noise_sigma)
        return Grid(own, timesteps, levels[:-1], levels[1:], scales, noise, own.config.prediction_type)
    starts = [_level(own, int(t)) for t in timesteps]
    stride = own.config.num_train_timesteps // own.num_inference_steps
    ends = [_level(own, int(t) - stride) for t in timesteps]
    return Grid(own, timesteps, starts, ends, [1.0] * len(timesteps), 1.0, own.config.prediction_type)


def invertible(scheduler: Any) -> Any:
    """A fresh scheduler with the same steps that can be inverted, of the same class if that one can."""
    from diffusers import DDIMScheduler

    name, config = type(scheduler).__name__, scheduler.config
    if name in EXACT:
        own: Any = type(scheduler).from_config(config)
    elif hasattr(scheduler, "alphas_cumprod") and config.get("prediction_type") in _PREDICTIONS:
        warnings.warn(
            f"{name} has no exact inverse; inverting with DDIM: sample with the result's scheduler, or with "
            "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)",
            stacklevel=3,
        )
        own: Any = DDIMScheduler.from_config(config, clip_sample=False, thresholding=False)
    else:
        raise UnsupportedSchedulerError(
            f"{name} cannot be inverted: use DDIMScheduler.from_config(pipe.scheduler.config), or "
            "FlowMatchEulerDiscreteScheduler for a flow-matching model"
        )
    if own.config.get("clip_sample") or own.config.get("thresholding"):
        warnings.warn(
            f"{name} clips what it predicts, so its steps cannot be inverted exactly: set clip_sample=False and "
            "thresholding=False",
            stacklevel=3,
        )
    return own


def _level(scheduler: Any, timestep: int) -> Level:
    signal = scheduler.alphas_cumprod[timestep] if timestep >= 0 else scheduler.final_alpha_cumprod
    signal = float(signal.double())
    return Level(signal**0.5, (1 - signal) ** 0.5)


def same_start(here: Grid, there: Grid) -> Sequence[str]:
    """Why latents made for the start of `here` do not fit the start of `there`; empty if they do."""
    facts = {
        "scheduler": (type(here.scheduler).__name__, type(there.scheduler).__name__),
        "prediction type": (here.prediction, there.prediction),
        "first timestep": (float(here.timesteps[0]), float(there.timesteps[0])),
        "init_noise_sigma": (round(here.noise_scale, 4), round(there.noise_scale, 4)),
        "sigma at the start": (round(here.starts[0].sigma, 5), round(there.starts[0].sigma, 5)),
    }
    return [f"{what} {a} is now {b}" for what, (a, b) in facts.items() if a != b]

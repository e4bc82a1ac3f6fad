"""Regenerating a hole on transformers: the text-to-image pipeline on the end of its schedule, whatever was handed in.

Their image-to-image and inpainting pipelines draw from the autoencoder and count steps each in its own way. Here all
run alike: the latents of the first step are set, and after each step what is outside of the hole is the picture again
at the next noise level, (1 - sigma) * clean + sigma * noise.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...attention.errors import UnsupportedPipelineError, UnsupportedSchedulerError
from ..families.loop import DeclaredLoop, loop_for, solve_of
from .blend import Source, same_parts


@dataclass(frozen=True)
class Flowing:
    """A picture's latents [n, C, h, w] at each noise level of a flow, with one noise for all levels."""

    clean: torch.Tensor
    noise: torch.Tensor

    def at(self, scheduler: Any, timestep: torch.Tensor) -> torch.Tensor:
        """At the level at which the step at `timestep` (of shape [1]) begins."""
        sigma = float(scheduler.sigmas[nearest(scheduler.timesteps, timestep)])
        return (1 - sigma) * self.clean + sigma * self.noise


def nearest(times: torch.Tensor, timestep: Any) -> int:
    """Index of a timestep in a schedule."""
    time = torch.as_tensor(timestep).flatten()[:1].to(times)
    return int((times - time).abs().argmin())


def text_form(pipe: Any) -> Any:
    """The text-to-image pipeline of the same parts.

    Raises:
        UnsupportedPipelineError: a pipeline whose denoiser takes a mask or another picture as well, or of a family
            whose loop is not known. UnsupportedSchedulerError: not one of a flow, or one that takes no sigmas.
    """
    import diffusers

    solve = solve_of(pipe.transformer)
    if solve is None or not solve.pipelines:
        name = type(pipe.transformer).__name__
        raise UnsupportedPipelineError(f"{type(pipe).__name__}: nothing can be erased with {name}; use {_USE}")
    for base in type(pipe).__mro__:
        plain = base.__name__.replace("Img2Img", "").replace("Inpaint", "")
        kind = getattr(diffusers, plain, None)
        if plain in solve.pipelines and kind is not None:
            loop_for(pipe)  # refuses a denoiser that takes further channels
            _check_scheduler(pipe.scheduler)
            return pipe if type(pipe) is kind else same_parts(pipe, kind)
    raise UnsupportedPipelineError(
        f"{type(pipe).__name__} gives its denoiser a mask, a control or another picture besides, which does not fit "
        f"what is erased: use {' or '.join(solve.pipelines)} with a text-to-image checkpoint"
    )


_USE = "a pipeline of SD1, SD2, SDXL, SD3, FLUX, Qwen-Image, Z-Image, Chroma or Lumina 2"


def _check_scheduler(scheduler: Any) -> None:
    flow = scheduler.config.get("prediction_type", "flow_prediction") == "flow_prediction"
    if not flow or "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise UnsupportedSchedulerError(
            f"{type(scheduler).__name__} cannot run the end of a flow's schedule: pipe.scheduler = "
            "FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)"
        )


def end_of_schedule(loop: DeclaredLoop, size: tuple[int, int], steps: int, run: int) -> dict[str, Any]:
    """Arguments with which a pipeline runs the last `run` of its `steps` steps, for latents of `size`."""
    scheduler = loop.pipe.scheduler
    sigmas = loop.timing(size, steps, scheduler).get("sigmas")
    if sigmas is None:
        sigmas = torch.linspace(scheduler.sigma_max, scheduler.sigma_min, steps, dtype=torch.float64).tolist()
    return {"num_inference_steps": steps, "sigmas": sigmas[steps - run :]}


def guidance_for(loop: DeclaredLoop, guidance: float, call: dict[str, Any]) -> dict[str, Any]:
    """A guidance of which 1 is none, as the pipeline takes it; what the model was distilled for stays as it is."""
    name = loop.solve.guided_by
    given: dict[str, Any] = {name: guidance - 1 + loop.solve.unguided}
    if name == "true_cfg_scale" and guidance != 1 and not {"negative_prompt", "negative_prompt_embeds"} & {*call}:
        given["negative_prompt"] = ""
    return given


def flow_call(
    loop: DeclaredLoop, source: Source, sampling: Any, prompts: Sequence[str], call: dict[str, Any]
) -> dict[str, Any]:
    """What the runner is called with, but for the callback and what is common to all pipelines.

    Its latents are of the right shape and nothing else: `StartAt` sets those of the first step.
    """
    size, factor = (source.clean.shape[-2], source.clean.shape[-1]), loop.pixels
    # Z-Image keeps its latents in float32 whatever it computes in; others take the dtype that they are handed.
    dtype = source.clean.dtype if loop.adapter.spec.latent.layout == "list" else loop.denoiser.dtype
    run = max(1, int(sampling.steps * sampling.strength))
    given = end_of_schedule(loop, size, sampling.steps, run) | guidance_for(loop, sampling.guidance, call)
    if isinstance(given.get("negative_prompt"), str):
        given["negative_prompt"] = [given["negative_prompt"]] * len(prompts)
    return given | {
        "height": size[0] * factor, "width": size[1] * factor, "latents": loop.hand_over(source.clean).to(dtype),
    }  # fmt: skip

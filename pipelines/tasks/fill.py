"""One run of a pipeline that regenerates the holes of a batch of cut-out pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from ...attention.errors import SettingError, UnsupportedPipelineError, UnsupportedSchedulerError
from ...attention.masks import Bools, level_mask
from ...attention.pictures import as_rgb
from ...plugins.base import Plugin
from ...plugins.redirection import SelfAttentionRedirection
from ..families import adapter_for
from ..families.latents import as_pil, encode_image
from ..families.loop import DeclaredLoop, loop_for
from ..grafting.graft import graft
from .blend import Blend, Inverted, Noised, StartAt, sibling
from .flow_fill import Flowing, flow_call, text_form
from .generate import as_list, guard, unblanked
from .inversion import invert
from .region import Region
from .schedule import EXACT


@dataclass(frozen=True)
class Sampling:
    """How holes are regenerated: as the arguments of `erase`; `redirection` is what the technique takes, `shared` says
    that pictures which are the same have the same noise outside of their hole.
    """

    method: str
    steps: int
    strength: float
    guidance: float
    redirection: dict[str, Any]
    plugins: Sequence[Plugin]
    call: dict[str, Any] = field(default_factory=dict[str, Any])
    origin: str = "picture"
    shared: bool = False

    @property
    def empty(self) -> bool:
        """Whether a hole begins as noise alone: nothing of a picture is left at full strength."""
        return self.origin == "clean" and self.method == "sip" and self.strength == 1


@dataclass(frozen=True)
class Job:
    """A hole [h, w] in a picture of that size, the region to work on, and what is wanted there.

    Attributes:
        start: the region to begin with, at its padded size; None cuts it from the picture.
    """

    picture: Image.Image
    hole: Bools
    region: Region
    prompt: str
    seed: int
    start: Image.Image | None = None


def sample(pipe: Any, jobs: Sequence[Job], sampling: Sampling) -> list[Image.Image]:
    """The regions with their holes regenerated, RGB, at their padded size, which all have in common."""
    runner, inpainting = runner_of(pipe)
    found = loop_for(runner) if hasattr(pipe, "transformer") else None
    loop = found if isinstance(found, DeclaredLoop) else None
    parts = [job.start or job.region.cut(job.picture) for job in jobs]
    masks = [job.region.cut_mask(job.hole) for job in jobs]
    if sampling.method == "dip":
        _check_inverse(pipe.scheduler, inpainting)
    clean = encode_image(pipe, parts)
    clean = clean.to(pipe.unet.dtype if loop is None else torch.promote_types(clean.dtype, torch.float32))
    grid = (clean.shape[-2], clean.shape[-1])
    redirection = SelfAttentionRedirection(masks, **sampling.redirection)
    if sampling.method == "dip" and not redirection.neutral:
        redirection.coverage(adapter_for(pipe).layers, grid)  # refuses a mask before the inversion
    plugins = [redirection, *sampling.plugins]
    source = _source(pipe, clean, [job.seed for job in jobs], sampling, flow=loop is not None)
    tokens = torch.stack([level_mask(mask, grid, grid) for mask in masks])[:, None]
    if sampling.shared and len({job.prompt for job in jobs}) == 1:
        redirection, source = _sharing(redirection, source, masks, tokens, sampling)
        plugins[0] = redirection
    call = _for_each(sampling.call, jobs)
    if inpainting:
        call |= _inpainting(pipe, parts, tokens)
    then = Blend(source, tokens, call.pop("callback_on_step_end", None), loop and loop.adapter.as_sample)
    inputs = call.pop("callback_on_step_end_tensor_inputs", [])
    prompts = [job.prompt for job in jobs]
    given: dict[str, Any] = {
        "image": source.clean, "strength": sampling.strength, "num_inference_steps": sampling.steps,
        "guidance_scale": sampling.guidance,
    }  # fmt: skip
    if loop is not None:
        given = flow_call(loop, source, sampling, prompts, call)
    if sampling.method == "dip" or sampling.empty or loop is not None:
        plugins.insert(0, StartAt(source, pipe.scheduler, tokens if sampling.empty else None))
    with graft(pipe, *plugins):
        out = runner(
            prompt=prompts, **given,
            generator=[_generator(job.seed) for job in jobs], output_type="np",
            callback_on_step_end=guard(sampling.steps, then),
            callback_on_step_end_tensor_inputs=["latents", *(name for name in inputs if name != "latents")], **call,
        )  # fmt: skip
    unblanked(out, [job.seed for job in jobs])
    return as_pil(out.images)


def _check_inverse(scheduler: Any, inpainting: bool) -> None:
    if inpainting:
        raise UnsupportedPipelineError("a UNet with 9 channels cannot be inverted without a mask: use method='sip'")
    if type(scheduler).__name__ not in EXACT:
        raise UnsupportedSchedulerError(
            f"method='dip' goes back through the steps, and {type(scheduler).__name__} has no exact inverse: "
            "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config), or method='sip', which needs none"
        )


def runner_of(pipe: Any) -> tuple[Any, bool]:
    """The pipeline of the same parts that regenerates, and whether its denoiser wants the mask as input.

    Raises:
        UnsupportedPipelineError: none is known.
    """
    return sibling(pipe) if not hasattr(pipe, "transformer") else (text_form(pipe), False)


def _source(
    pipe: Any, clean: torch.Tensor, seeds: Sequence[int], sampling: Sampling, flow: bool
) -> Noised | Inverted | Flowing:
    """The pictures' latents at every noise level. The noise is the one that the pipeline draws from these seeds."""
    if sampling.method == "sip":
        generators = [_generator(seed) for seed in seeds]
        noise = randn_tensor(clean.shape, generators, clean.device, clean.dtype)
        return Flowing(clean, noise) if flow else Noised(clean, noise)
    inversion = invert(pipe, clean, steps=sampling.steps, iterations=0, trajectory=True)
    inversion.call(pipe)  # refuses a scheduler that goes other ways than the inversion
    return Inverted(clean, inversion.at)


def _sharing(
    redirection: SelfAttentionRedirection, source: Noised | Inverted | Flowing, masks: Sequence[Bools],
    tokens: torch.Tensor, sampling: Sampling,
) -> tuple[SelfAttentionRedirection, Noised | Inverted | Flowing]:  # fmt: skip
    """One mask and, outside of it, one noise for pictures that are the same; else what was given."""
    same = (
        isinstance(source, Flowing) and bool((source.clean == source.clean[:1]).all()) and (tokens == tokens[:1]).all()
    )
    if not isinstance(source, Flowing) or not same:
        return redirection, source
    noise = torch.where(tokens.to(source.noise.device), source.noise, source.noise[:1])
    return SelfAttentionRedirection(masks[0], **sampling.redirection), Flowing(source.clean, noise)


def _for_each(call: dict[str, Any], jobs: Sequence[Job]) -> dict[str, Any]:
    """Further texts once for each picture, as the prompts are; a ControlNet's picture cut out as the pictures are."""
    texts = {key: [text] * len(jobs) for key, text in call.items() if "prompt" in key and isinstance(text, str)}
    control = call.get("control_image")
    if control is None:
        return call | texts
    several = isinstance(control, (list, tuple))
    if several and len(jobs) > 1:
        raise SettingError("several ControlNets take one picture at once: use batch_size=1")
    shown = [as_rgb(picture) for picture in as_list(control)]
    cut = [job.region.cut(picture.resize(job.picture.size)) for picture in shown for job in jobs]
    return call | texts | {"control_image": cut}


def _inpainting(pipe: Any, parts: Sequence[Image.Image], tokens: torch.Tensor) -> dict[str, Any]:
    """What a denoiser with nine channels takes besides: the masks, and the pictures with grey holes."""
    width, height = parts[0].size
    factor = height // tokens.shape[-2]
    blocks = tokens.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
    grey = Image.new("RGB", (width, height), (128, 128, 128))
    holes = [Image.fromarray(block[0].numpy()) for block in blocks]
    masked = [Image.composite(grey, part, hole) for part, hole in zip(parts, holes, strict=True)]
    return {
        "mask_image": blocks.float(), "masked_image_latents": encode_image(pipe, masked).to(pipe.unet.dtype),
        "height": height, "width": width,
    }  # fmt: skip


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)

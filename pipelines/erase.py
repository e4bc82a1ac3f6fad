"""The task "remove this": paint over it, it is gone, and nothing else has changed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from ..attention.errors import MaskError, NonFiniteError, SettingError, UnsupportedPipelineError
from ..attention.masks import Bools, as_mask, level_mask
from ..attention.morphology import drop_small, feather, fill_holes
from ..attention.morphology import grow as grown
from ..plugins.base import Plugin, finite
from ..plugins.redirection import SelfAttentionRedirection
from .blend import Blend, Inverted, Noised, StartAt, sibling
from .generate import guard, resolve_seed
from .graft import graft
from .inversion import invert
from .latents import encode_image
from .region import Region, as_picture, paste, plan_regions

REACH = 24
"""Pixels around the mask that `erase` changes at most unless told otherwise."""


@dataclass(frozen=True)
class Sampling:
    """How a region is generated."""

    method: str
    prompt: str
    steps: int
    strength: float
    guidance: float
    redirection: dict[str, Any]
    plugins: Sequence[Plugin]
    call: dict[str, Any] = field(default_factory=dict[str, Any])


def erase(
    pipe: Any,
    image: Any,
    mask: Any,
    *,
    seed: int | None = None,
    n: int = 1,
    method: str = "sip",
    prompt: str = "",
    steps: int = 25,
    strength: float = 0.8,
    guidance: float = 1.0,
    scale: float = 9.0,
    suppression: float = 0.3,
    suppression_steps: int = 10,
    layers: str | Sequence[str | int] = "up",
    start: float = 0.0,
    end: float = 1.0,
    grow: int | None = None,
    feather: int | None = None,
    fill: bool = False,
    min_area: int = 0,
    crop: bool = True,
    plugins: Sequence[Plugin] = (),
    **call: Any,
) -> Any:
    """Remove what a mask covers and continue the background.

    Args:
        pipe: a text-to-image, image-to-image or inpainting pipeline of SD1, SD2 or SDXL; ControlNet and LoRA stay.
        image: a PIL picture of any size (EXIF orientation is applied), a path, an array, or a list of them.
        mask: True, 1 or white is removed; anything `diffgraft.attention.masks.as_mask` takes. A list is the union of
            its members; for a list of images it holds the mask of each.
        seed: candidate i of picture j has the seed `seed + j * n + i`; None draws one.
        n: candidates of each picture.
        method: "sip" starts from noise and gives another fill for every seed; "dip" starts from the picture's own
            inversion and gives one. Both are the paper's.
        prompt: what is to be there instead; nothing, as published.
        steps, strength: of the pipeline's schedule; the first `1 - strength` of it is left out. The paper runs 50;
            on the picture book 25 are no worse.
        guidance: classifier-free guidance towards the prompt; 1 switches it off.
        scale, suppression, suppression_steps, layers, start, end: as of `SelfAttentionRedirection`.
        grow: pixels by which the mask is grown first; None: a 64th of the shorter side, 2 ... 12.
        feather: pixels beyond that over which new fades into old, 0 is a hard edge; None: as the default of `grow`.
        fill: also remove what the mask encloses. min_area: parts of the mask with fewer pixels are specks to be left.
        crop: give the model the surroundings of the hole at their own resolution; False: the whole picture.
        plugins: further techniques for the same run.
        call: passed on to the pipeline, such as `negative_prompt` or, with a ControlNet, `control_image` (a PIL picture
            of the whole picture is cut out alike).
    Returns:
        A PIL picture of the input's size and mode; further than `grow + feather` pixels from the mask every byte is the
        input's. Its settings are in `.info["diffgraft"]`. `n` > 1 gives a list, a list of images a list of these.
    Raises:
        MaskError: not a mask, of another aspect, or nothing is left to continue. An empty mask is a warning, and the
            input comes back.
        SettingError: a setting outside its range. UnsupportedPipelineError: a pipeline without self-attention layers.
    """
    settings = {name: value for name, value in locals().items() if name in _SETTINGS}
    redirection = {name: settings[name] for name in _REDIRECTION}
    _check(method, n, steps, strength)
    sibling(pipe)  # refuses a pipeline before any work
    sampling = Sampling(method, prompt, steps, strength, guidance, redirection, plugins, call)
    edges = _Edges(grow, feather, fill, min_area)
    several = isinstance(image, (list, tuple))
    images: list[Any] = list(cast("Sequence[Any]", image)) if several else [image]
    masks = _one_each(images, mask) if several else [mask]
    first, results = resolve_seed(seed), []
    for j, (picture, one) in enumerate(zip(images, masks, strict=True)):
        seeds = [first + j * n + i for i in range(n)]
        made = _erase_one(pipe, as_picture(picture), one, seeds, sampling, edges, crop, settings)
        results.append(made if n > 1 else made[0])
    return results if several else results[0]


_REDIRECTION = ("scale", "suppression", "suppression_steps", "layers", "start", "end")
_SETTINGS = (*_REDIRECTION, "method", "prompt", "steps", "strength", "guidance", "fill", "min_area", "crop")


def _erase_one(
    pipe: Any, picture: Image.Image, mask: Any, seeds: Sequence[int], sampling: Sampling, edges: _Edges, crop: bool,
    settings: dict[str, Any],
) -> list[Image.Image]:  # fmt: skip
    """One candidate of one picture for each seed."""
    marked = edges.clean(as_mask(mask, (picture.height, picture.width)))
    if not marked.any():
        warnings.warn("the mask is empty: the picture comes back unchanged", stacklevel=4)
        return [picture.copy() for _ in seeds]
    hole, opacity, used = edges.apply(marked)
    regions = plan_regions(hole, _native(pipe), _multiple(pipe), crop)
    results: list[Image.Image] = []
    for seed in seeds:
        made = picture
        for region in regions:
            left, top, right, bottom = region.box
            generated = region.uncut(sample(pipe, region, made, hole, seed, sampling))
            made = paste(made, generated, (left, top), opacity[top:bottom, left:right])
        made.info["diffgraft"] = {
            "task": "erase", "seed": seed, **settings, **used, "boxes": [list(region.box) for region in regions],
            "scheduler": type(pipe.scheduler).__name__, "pipeline": type(pipe).__name__,
            "plugins": [{"plugin": type(plugin).__name__} | plugin.settings() for plugin in sampling.plugins],
        }  # fmt: skip
        results.append(made)
    return results


def sample(pipe: Any, region: Region, picture: Image.Image, hole: Bools, seed: int, sampling: Sampling) -> Image.Image:
    """The region with its hole regenerated, RGB, at the region's padded size."""
    runner, inpainting = sibling(pipe)
    part, masked = region.cut(picture), region.cut_mask(hole)
    if inpainting and sampling.method == "dip":
        raise UnsupportedPipelineError("a UNet with 9 channels cannot be inverted without a mask: use method='sip'")
    source = _source(pipe, part, seed, sampling)
    grid = (source.clean.shape[-2], source.clean.shape[-1])
    tokens = level_mask(masked, grid, grid)
    call = dict(sampling.call)
    if isinstance(call.get("control_image"), Image.Image):
        call["control_image"] = region.cut(call["control_image"].resize(picture.size))
    if inpainting:
        call |= _inpainting(pipe, part, tokens)
    then = Blend(source, tokens, call.pop("callback_on_step_end", None))
    inputs = call.pop("callback_on_step_end_tensor_inputs", [])
    plugins = [SelfAttentionRedirection(masked, **sampling.redirection), *sampling.plugins]
    if sampling.method == "dip":
        plugins.insert(0, StartAt(source, pipe.scheduler))
    with graft(pipe, *plugins):
        out = runner(
            prompt=sampling.prompt, image=source.clean, strength=sampling.strength, num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance, generator=_generator(seed), output_type="np",
            callback_on_step_end=guard(sampling.steps, then),
            callback_on_step_end_tensor_inputs=["latents", *(name for name in inputs if name != "latents")], **call,
        )  # fmt: skip
    pixels = out.images[0]
    if not np.isfinite(pixels).all():
        raise NonFiniteError("decoding produced non-finite pixels: keep the VAE in float32, or use an fp16-fixed one")
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def _source(pipe: Any, part: Image.Image, seed: int, sampling: Sampling) -> Noised | Inverted:
    """The picture's latents at every noise level. The noise is the one that the pipeline draws from this seed."""
    clean = encode_image(pipe, part).to(pipe.unet.dtype)
    if sampling.method == "sip":
        noise = randn_tensor(clean.shape, generator=_generator(seed), device=clean.device, dtype=clean.dtype)
        return Noised(clean, noise)
    inversion = invert(pipe, clean, steps=sampling.steps, iterations=0, trajectory=True)
    inversion.call(pipe)  # refuses a scheduler that goes other ways than the inversion
    return Inverted(clean, inversion.at)


def _inpainting(pipe: Any, part: Image.Image, tokens: torch.Tensor) -> dict[str, Any]:
    """What a denoiser with nine channels takes besides: the mask, and the picture with a grey hole."""
    factor = part.height // tokens.shape[0]
    blocks = tokens.repeat_interleave(factor, 0).repeat_interleave(factor, 1)
    grey = Image.composite(Image.new("RGB", part.size, (128, 128, 128)), part, Image.fromarray(blocks.numpy()))
    return {
        "mask_image": blocks[None, None].float(), "masked_image_latents": encode_image(pipe, grey).to(pipe.unet.dtype),
        "height": part.height, "width": part.width,
    }  # fmt: skip


@dataclass(frozen=True)
class _Edges:
    """How a mask becomes a hole with an edge."""

    grow: int | None
    feather: int | None
    fill: bool
    min_area: int

    def __post_init__(self) -> None:
        for name in ("grow", "feather", "min_area"):
            value = getattr(self, name)
            if value is not None and finite(value, name, low=0) != int(value):
                raise SettingError(f"{name}={value}: whole pixels are needed")

    def clean(self, mask: Bools) -> Bools:
        """Without specks and, if wanted, without holes."""
        mask = drop_small(mask, self.min_area) if self.min_area > 1 else mask
        return fill_holes(mask) if self.fill else mask

    def apply(self, mask: Bools) -> tuple[Bools, Any, dict[str, int]]:
        """(the hole, the opacity of what is generated, the pixels used for both)."""
        usual = min(REACH // 2, max(2, min(mask.shape) // 64))
        used = {
            "grow": usual if self.grow is None else int(self.grow),
            "feather": usual if self.feather is None else int(self.feather),
        }
        hole = grown(mask, used["grow"])
        return hole, feather(hole, used["feather"]), used


def _one_each(images: Sequence[Any], mask: Any) -> list[Any]:
    if not isinstance(mask, (list, tuple)) or len(cast("Sequence[Any]", mask)) != len(images):
        raise MaskError(f"{len(images)} pictures need a list of as many masks")
    return list(cast("Sequence[Any]", mask))


def _check(method: str, n: Any, steps: Any, strength: Any) -> None:
    if method not in ("sip", "dip"):
        raise SettingError(f"method={method!r}: choose 'sip' (from noise) or 'dip' (from an inversion)")
    for name, value in (("n", n), ("steps", steps)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1000:
            raise SettingError(f"{name}={value!r}: must be 1 ... 1000")
    if n > 1 and method == "dip":
        raise SettingError(f"n={n} with method='dip': it depends on no seed, so there is one fill; use 'sip'")
    if int(steps * finite(strength, "strength", 0, 1)) < 1:
        raise SettingError(f"steps={steps} at strength={strength} leaves no step to run: raise one of them")


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _factor(pipe: Any) -> int:
    return 2 ** (len(pipe.vae.config.block_out_channels) - 1)


def _multiple(pipe: Any) -> int:
    return max(8, _factor(pipe))  # pipelines ask for multiples of 8 whatever their autoencoder does


def _native(pipe: Any) -> int:
    size = pipe.unet.config.sample_size
    return (size if isinstance(size, int) else min(size)) * _factor(pipe)

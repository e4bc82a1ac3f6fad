"""The task "remove this": paint over it, it is gone, and nothing else has changed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from PIL import Image

from ...attention.errors import MaskError, SettingError, SettingTypeError
from ...attention.masks import Bools, as_mask, as_masks
from ...attention.morphology import drop_small, feather, fill_holes
from ...attention.morphology import grow as grown
from ...attention.pictures import as_picture
from ...plugins.base import Plugin, finite
from ..families.base import has_ip_adapter
from ..families.latents import native_side, side_multiple
from .blend import sibling
from .fill import Job, Sampling, sample
from .generate import as_list, check_call, resolve_seed
from .region import Region, hold, paste, plan_regions

REACH = 24
"""Pixels around the mask that `erase` changes at most unless told otherwise."""


def erase(
    pipe: Any,
    image: Any,
    mask: Any,
    *,
    seed: int | None = None,
    n: int = 1,
    method: str = "sip",
    prompt: str | Sequence[str] = "",
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
    batch_size: int = 1,
    plugins: Sequence[Plugin] = (),
    **call: Any,
) -> Any:
    """Remove what a mask covers and continue the background.

    Args:
        pipe: a text-to-image, image-to-image or inpainting pipeline of SD1, SD2 or SDXL; ControlNet and LoRA stay.
        image: a PIL picture of any size (EXIF orientation is applied), a path, an array [h, w, c], a tensor [c, h, w],
            or a list or a batch of them.
        mask: True, 1 or white is removed; anything `diffgraft.attention.masks.as_mask` takes. A list is the union of
            its members; for several images it holds the mask of each, as a batch does.
        seed: candidate i of picture j has the seed `seed + j * n + i`; None draws one.
        n: candidates of each picture.
        method: "sip" starts from noise and gives another fill for every seed; "dip" starts from the picture's own
            inversion and gives one. Both are the paper's.
        prompt: what is to be there instead, or a list with one for each image. Nothing, as published; naming the
            background, with `guidance` of 3 or so, helps a model that was trained on captions.
        steps, strength: of the pipeline's schedule; the first `1 - strength` of it is left out. The paper runs 50;
            on the picture book 25 are no worse.
        guidance: classifier-free guidance towards the prompt; 1 switches it off.
        scale, suppression, suppression_steps, layers, start, end: as of `SelfAttentionRedirection`.
        grow: pixels by which the mask is grown first; None: a 64th of the shorter side, 2 ... 12.
        feather: pixels beyond that over which new fades into old, 0 is a hard edge; None: as the default of `grow`.
        fill: also remove what the mask encloses. min_area: parts of the mask with fewer pixels are specks to be left.
        crop: give the model the surroundings of the hole at their own resolution; False: the whole picture.
        batch_size: regions at once, where they are of one size. At 1, the default, a picture is the same bytes
            whichever others are made with it.
        plugins: further techniques for the same run.
        call: passed on to the pipeline, such as `negative_prompt` or, with a ControlNet, `control_image` (of the whole
            picture, which is cut out alike; for several ControlNets a list with one for each).
    Returns:
        A PIL picture of the input's size and mode; further than `grow + feather` pixels from the mask every byte is the
        input's. Its settings are in `.info["diffgraft"]`. `n` > 1 gives a list, a list of images a list of these.
    Raises:
        MaskError: not a mask, of another aspect, or nothing is left to continue. An empty mask is a warning, and the
            input comes back.
        SettingError: a setting outside its range. UnsupportedPipelineError: a pipeline without self-attention layers.
    """
    settings = {name: value for name, value in locals().items() if name in _SETTINGS}
    _check(method, n, steps, strength, batch_size)
    finite(guidance, "guidance")
    runner, _ = sibling(pipe)  # refuses a pipeline before any work
    check_call(runner, call, _TAKEN)
    _check_shown(runner, call)
    edges, first = _Edges(grow, feather, fill, min_area), resolve_seed(seed)
    several, plugins = isinstance(image, (list, tuple)) or getattr(image, "ndim", 0) == 4, as_list(plugins)
    images = list(cast("Sequence[Any]", image)) if several else [image]
    mask = as_masks(mask) if several and hasattr(mask, "ndim") else mask
    groups = [
        _candidates(pipe, as_picture(picture), marked, text, range(first + j * n, first + (j + 1) * n), edges, crop)
        for j, (picture, marked, text) in enumerate(_wanted(images, mask if several else [mask], prompt))
    ]
    redirection = {name: settings[name] for name in _REDIRECTION}
    sampling = Sampling(method, steps, strength, guidance, redirection, plugins, call)
    _fill(pipe, [candidate for group in groups for candidate in group], sampling, batch_size)
    made = [[_signed(pipe, candidate, settings, plugins) for candidate in group] for group in groups]
    results = [group if n > 1 else group[0] for group in made]
    return results if several else results[0]


def _signed(pipe: Any, candidate: _Candidate, settings: dict[str, Any], plugins: Sequence[Plugin]) -> Image.Image:
    """The picture with the settings that make it again."""
    if candidate.regions:
        candidate.made.info["diffgraft"] = {
            "task": "erase", "seed": candidate.seed, **settings, "prompt": candidate.prompt, **candidate.used,
            "boxes": [list(region.box) for region in candidate.regions],
            "scheduler": type(pipe.scheduler).__name__, "pipeline": type(pipe).__name__,
            "plugins": [{"plugin": type(plugin).__name__} | plugin.settings() for plugin in plugins],
        }  # fmt: skip
    return candidate.made


_REDIRECTION = ("scale", "suppression", "suppression_steps", "layers", "start", "end")
_TAKEN = ("guidance_scale", "latents", "mask_image", "masked_image_latents", "width", "height", "prompt_embeds")
_SETTINGS = (*_REDIRECTION, "method", "steps", "strength", "guidance", "fill", "min_area", "crop")


@dataclass
class _Candidate:
    """A picture on its way: `made` is what there is after some of the regions."""

    made: Image.Image
    hole: Bools
    opacity: Any
    regions: list[Region]
    prompt: str
    seed: int
    used: dict[str, int]

    def job(self, index: int) -> Job:
        return Job(self.made, self.hole, self.regions[index], self.prompt, self.seed)

    def take(self, index: int, generated: Image.Image) -> None:
        region = self.regions[index]
        left, top, right, bottom = region.box
        self.made = paste(self.made, region.uncut(generated), (left, top), self.opacity[top:bottom, left:right])


def _candidates(
    pipe: Any, picture: Image.Image, mask: Any, prompt: str, seeds: Sequence[int], edges: _Edges, crop: bool
) -> list[_Candidate]:
    """One for each seed, without regions if nothing is to be done."""
    marked = edges.clean(as_mask(mask, (picture.height, picture.width)))
    regions: list[Region] = []
    hole, opacity, used = edges.apply(marked)
    if marked.any():
        size = native_side(pipe), side_multiple(pipe), crop
        regions = plan_regions(hole, *size)
        if not hold(regions, opacity > 0):  # a wide feather would end at a region's border
            regions = plan_regions(opacity > 0, *size)
    else:
        warnings.warn("the mask is empty: the picture comes back unchanged", stacklevel=3)
    return [_Candidate(picture.copy(), hole, opacity, regions, prompt, seed, used) for seed in seeds]


def _fill(pipe: Any, candidates: Sequence[_Candidate], sampling: Sampling, batch_size: int) -> None:
    """All regions of all candidates: the first of each, then the second ones; batches are of one size in pixels."""
    for index in range(max((len(candidate.regions) for candidate in candidates), default=0)):
        waiting: dict[tuple[int, int], list[_Candidate]] = {}
        for candidate in candidates:
            if index < len(candidate.regions):
                waiting.setdefault(candidate.regions[index].padded, []).append(candidate)
        for alike in waiting.values():
            for start in range(0, len(alike), batch_size):
                batch = alike[start : start + batch_size]
                generated = sample(pipe, [candidate.job(index) for candidate in batch], sampling)
                for candidate, picture in zip(batch, generated, strict=True):
                    candidate.take(index, picture)


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


def _wanted(images: Sequence[Any], masks: Any, prompt: str | Sequence[str]) -> Iterator[tuple[Any, Any, str]]:
    """(picture, mask, prompt) of each picture."""
    prompts = [prompt] * len(images) if isinstance(prompt, str) else _one_each(images, prompt, "prompts")
    if not all(isinstance(text, str) for text in prompts):
        raise SettingTypeError(f"prompt={prompt!r}: a text is needed, or one for each picture")
    return zip(images, _one_each(images, masks, "masks"), prompts, strict=True)


def _one_each(images: Sequence[Any], given: Any, what: str) -> list[Any]:
    if not isinstance(given, (list, tuple)) or len(cast("Sequence[Any]", given)) != len(images):
        error = MaskError if what == "masks" else SettingError
        raise error(f"{len(images)} pictures need a list of as many {what}")
    return list(cast("Sequence[Any]", given))


def _check_shown(pipe: Any, call: dict[str, Any]) -> None:
    """What is on the pipeline has a picture to go by."""
    net = getattr(pipe, "controlnet", None)
    if net is not None:
        nets, given = len(getattr(net, "nets", [net])), call.get("control_image")
        shown = 0 if given is None else len(as_list(given))
        if shown != nets:
            raise SettingError(
                f"control_image= holds {shown} pictures for {nets} ControlNets: give one for each of them"
            )
    if has_ip_adapter(pipe.unet) and not {"ip_adapter_image", "ip_adapter_image_embeds"} & {*call}:
        raise SettingError("the IP-Adapter has no picture: give ip_adapter_image=, or pipe.unload_ip_adapter()")


def _check(method: str, n: Any, steps: Any, strength: Any, batch_size: Any) -> None:
    if method not in ("sip", "dip"):
        raise SettingError(f"method={method!r}: choose 'sip' (from noise) or 'dip' (from an inversion)")
    for name, value in (("n", n), ("steps", steps), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1000:
            raise SettingError(f"{name}={value!r}: must be 1 ... 1000")
    if n > 1 and method == "dip":
        raise SettingError(f"n={n} with method='dip': it depends on no seed, so there is one fill; use 'sip'")
    if int(steps * finite(strength, "strength", 0, 1)) < 1:
        raise SettingError(f"steps={steps} at strength={strength} leaves no step to run: raise one of them")

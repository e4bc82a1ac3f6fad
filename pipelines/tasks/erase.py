"""The task "remove this": paint over it, it is gone, and nothing else has changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

from PIL import Image

from ...attention.errors import MaskError, SettingError, SettingTypeError
from ...attention.masks import as_masks
from ...attention.pictures import as_picture
from ...attention.plain import plainly
from ...plugins.base import Plugin, finite
from ..families.base import has_ip_adapter
from ..families.loop import solve_of
from .candidates import Candidate, candidates, fill_all
from .edges import Edges
from .fill import Sampling, runner_of
from .generate import as_list, check_call, resolve_seed

USUAL = {"clean": {"strength": 0.5, "scale": 1.0}, "picture": {"strength": 0.8, "scale": 9.0}}
"""By origin: measured on the picture book, and (scale) the paper's."""


@plainly
def erase(
    pipe: Any, image: Any, mask: Any, *, seed: int | None = None, n: int = 1,
    origin: Literal["clean", "picture"] = "clean", method: Literal["sip", "dip"] = "sip",
    prompt: str | Sequence[str] = "", steps: int = 25, strength: float | None = None, guidance: float = 1.0,
    scale: float | None = None, suppression: float = 0.3, suppression_steps: int = 10,
    layers: str | Sequence[str | int] = "up", start: float = 0.0, end: float = 1.0,
    grow: int | None = None, feather: int | None = None, fill: bool = False, min_area: int = 0,
    crop: bool = True, batch_size: int = 1, best_first: bool = False, shared: bool = False,
    plugins: Sequence[Plugin] = (), **call: Any,
) -> Any:  # fmt: skip
    """Remove what a mask covers and continue the background.

    Args:
        pipe: a text-to-image, image-to-image or inpainting pipeline of SD1, SD2, SDXL, SD3, FLUX.1, FLUX.2, Qwen-Image,
            Z-Image, Chroma or Lumina 2; LoRA stays, on UNets ControlNet too.
        image: a PIL picture of any size (EXIF orientation is applied), a path, an array [h, w, c], a tensor [c, h, w],
            or a list or a batch of them.
        mask: True, 1 or white is removed; anything `diffgraft.attention.masks.as_mask` takes. A list is the union of
            its members; for several images it holds the mask of each, as a batch does.
        seed: candidate i of picture j has the seed `seed + j * n + i`; None draws one.
        n: candidates of each picture.
        origin: "clean" begins with the hole filled by pieces of the picture, so that neither the start nor what is
            known around the hole has seen what was there, puts back what the autoencoder took from that, and spreads
            the difference along the rim into the hole, so that no tint is left; "picture" begins with the picture
            itself, as published.
        method: "sip" starts from noise and gives another fill for every seed; "dip" starts from the inversion and
            gives one. Both are the paper's.
        prompt: what is to be there instead, or a list with one for each image. Nothing, as published; naming the
            background, with `guidance` of 3 or so, helps a model that was trained on captions.
        steps, strength: of the pipeline's schedule; the first `1 - strength` of it is left out. The paper runs 50;
            on the picture book 25 are no worse. strength=None is 0.5, which keeps the clean start's layout (measured
            on the picture book), or 0.8 for origin="picture"; at 1 a clean start is noise alone.
        guidance: classifier-free guidance towards the prompt; 1 switches it off.
        scale, suppression, suppression_steps, layers, start, end: as of `SelfAttentionRedirection`. scale=None is 1,
            the redirected prediction itself (one row, not two), or the paper's 9 for origin="picture".
        grow: pixels by which the mask is grown first; None: a 64th of the shorter side, 2 ... 12.
        feather: pixels beyond that over which new fades into old, 0 is a hard edge; None: as the default of `grow`.
        fill: also remove what the mask encloses. min_area: parts of the mask with fewer pixels are specks to be left.
        crop: give the model the surroundings of the hole at their own resolution; False: the whole picture.
        batch_size: regions at once, where they are of one size. At 1, the default, a picture is the same bytes
            whichever others are made with it.
        best_first: candidates come by what speaks against them instead of by seed: the difference to the picture along
            the rim, and how far pieces of the hole are from all pieces around. Both are in their settings.
        shared: candidates of one picture that run in one batch have the first one's noise outside of the hole, so that
            in joint attention, at scale 1 without guidance, what is outside is computed once for all of them: n=4 with
            batch_size=4 costs 1.4 of one at a hole of a tenth. A candidate's bytes depend on the first then.
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
    strength, scale = _usual(origin, strength=strength, scale=scale)
    settings = {name: value for name, value in locals().items() if name in _SETTINGS}
    _check(method, n, steps, strength, batch_size)
    runner, _ = runner_of(pipe)  # refuses a pipeline before any work
    solve = solve_of(getattr(runner, "transformer", None))
    check_call(runner, call, (*_TAKEN, "guidance_scale" if solve is None else solve.guided_by))
    _check_shown(runner, call)
    redirection, plugins = {name: settings[name] for name in _REDIRECTION}, as_list(plugins)
    sampling = Sampling(
        method, steps, strength, finite(guidance, "guidance"), redirection, plugins, call, origin, shared
    )
    edges, first = Edges(grow, feather, fill, min_area), resolve_seed(seed)
    several = isinstance(image, (list, tuple)) or getattr(image, "ndim", 0) == 4
    images = list(cast("Sequence[Any]", image)) if several else [image]
    masks = as_masks(mask) if several and hasattr(mask, "ndim") else mask if several else [mask]
    groups = [
        candidates(pipe, as_picture(picture), marked, text, range(first + j * n, first + (j + 1) * n), edges, crop,
                   sampling)
        for j, (picture, marked, text) in enumerate(_wanted(images, masks, prompt))
    ]  # fmt: skip
    fill_all(pipe, [candidate for group in groups for candidate in group], sampling, batch_size)
    groups = [_ranked(group) if best_first else group for group in groups]
    made = [[_signed(pipe, candidate, settings, plugins) for candidate in group] for group in groups]
    results = [group if n > 1 else group[0] for group in made]
    return results if several else results[0]


def _usual(origin: str, **given: float | None) -> tuple[float, ...]:
    """What was given, or what is usual for this origin."""
    if origin not in USUAL:
        raise SettingError(f"origin={origin!r}: choose 'clean' (the hole filled first) or 'picture' (as published)")
    return tuple(USUAL[origin][name] if value is None else value for name, value in given.items())


def _ranked(group: Sequence[Candidate]) -> list[Candidate]:
    """The best first, with what was compared among its settings."""
    for candidate in group:
        candidate.used |= candidate.unease()
    return sorted(group, key=lambda candidate: candidate.used["seam"] + candidate.used["strangeness"])


def _signed(pipe: Any, candidate: Candidate, settings: dict[str, Any], plugins: Sequence[Plugin]) -> Image.Image:
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
_TAKEN = ("latents", "sigmas", "mask_image", "masked_image_latents", "width", "height", "prompt_embeds")
_SETTINGS = (*_REDIRECTION, "origin", "method", "steps", "strength", "guidance", "fill", "min_area", "crop", "shared")


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
    shown = {"ip_adapter_image", "ip_adapter_image_embeds"} & {*call}
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    if denoiser is not None and has_ip_adapter(denoiser) and not shown:
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

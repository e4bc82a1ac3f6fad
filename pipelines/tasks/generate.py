"""The first task: pictures from a prompt, each with the settings that make it again."""

from __future__ import annotations

import inspect
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ...attention.errors import (
    NonFiniteError,
    SafetyCheckerError,
    SettingError,
    SettingTypeError,
    UnsupportedPipelineError,
)
from ...attention.plain import plain, plainly
from ...plugins.base import Plugin, finite
from ..families.latents import unsaid_size
from ..families.modular import is_modular
from ..families.running import part_of
from ..grafting.graft import graft

LONGEST_PROMPT = 10_000
SEEDS = 2**63
_OURS = {"num_inference_steps": "steps", "generator": "seed", "num_images_per_prompt": "n"}


@plainly
def generate(
    pipe: Any,
    prompt: str | Sequence[str],
    *,
    plugins: Sequence[Plugin] = (),
    negative_prompt: str | None = None,
    seed: int | None = None,
    n: int = 1,
    steps: int = 25,
    guidance: float | None = None,
    width: int | None = None,
    height: int | None = None,
    batch_size: int = 1,
    **call: Any,
) -> list[Image.Image]:
    """Pictures of a prompt; picture i has the seed `seed + i` and its settings in `.info["diffgraft"]`.

    Args:
        pipe: a text-to-image pipeline.
        prompt: one text, or several (`n` pictures of each).
        plugins: techniques to graft on; what they take one of for each prompt is one for each of these texts.
        negative_prompt: for classifier-free guidance; without guidance use `NegativeAway`.
        seed: 0 ... 2^63-1; None or -1 draws one, which is recorded.
        n: pictures of each prompt.
        steps: denoising steps, 1 ... 1000.
        guidance: classifier-free guidance; None leaves the pipeline's default, 1 or less switches it off.
        width, height: pixels; None leaves the pipeline's default.
        batch_size: pictures at once. At 1, the default, a picture is the same bytes whichever others are made with it.
        call: passed on to the pipeline.

    Raises:
        SettingError: a setting outside its range. NonFiniteError: NaN or infinity while sampling, naming the step.
    """
    asked = as_list(prompt)
    numbers = [number for number in range(len(asked)) for _ in range(_count(n, "n", 10_000))]
    prompts = [asked[number] for number in numbers]
    first = resolve_seed(seed)
    seeds = [first + i for i in range(len(prompts))]
    size = _count(batch_size, "batch_size", 1024)
    settings = {
        "negative_prompt": negative_prompt,
        "steps": steps,
        "guidance": guidance,
        "width": width,
        "height": height,
    }
    pictures: list[Image.Image] = []
    plugins = as_list(plugins)
    with graft(pipe, *plugins) if plugins else nullcontext():
        for i in range(0, len(prompts), size):
            with part_of(pipe, numbers[i : i + size], len(asked)):
                pictures += sample(pipe, prompts[i : i + size], seeds[i : i + size], **settings, **call)
    for picture in pictures:
        picture.info["diffgraft"]["plugins"] = [{"plugin": type(p).__name__} | p.settings() for p in plugins]
    return pictures


@plainly
def sample(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    negative_prompt: str | None = None,
    steps: int = 25,
    guidance: float | None = None,
    width: int | None = None,
    height: int | None = None,
    **call: Any,
) -> list[Image.Image]:
    """One call of the pipeline: picture i from prompt i and a CPU generator of its own with seed i."""
    check_call(pipe, call)
    _check(prompts, negative_prompt, steps, guidance)
    _check_size(width, height, max(8, getattr(pipe, "vae_scale_factor", 8)))
    given = {"guidance_scale": guidance, "width": width, "height": height}
    given |= {"negative_prompt": None if negative_prompt is None else [negative_prompt] * len(prompts)}
    given = {name: value for name, value in given.items() if value is not None}
    _check_taken(pipe, given)
    call |= unsaid_size(pipe) | given
    if "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:
        call["callback_on_step_end"] = guard(steps, call.get("callback_on_step_end"))
        inputs = call.get("callback_on_step_end_tensor_inputs", [])
        call["callback_on_step_end_tensor_inputs"] = ["latents", *(name for name in inputs if name != "latents")]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    out = pipe(prompt=list(prompts), num_inference_steps=steps, generator=generators, output_type="np", **call)
    seen = unblanked(out, seeds)
    if not math.isfinite(float(out.images.sum())):
        raise NonFiniteError("decoding produced non-finite pixels: keep the VAE in float32, or use an fp16-fixed one")
    pictures: list[Image.Image] = pipe.image_processor.numpy_to_pil(out.images)
    for picture, prompt, seed in zip(pictures, prompts, seeds, strict=True):
        picture.info["diffgraft"] = {
            "task": "generate",
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "seed": seed,
            "steps": steps,
            "guidance": guidance,
            "width": picture.width,
            "height": picture.height,
            "scheduler": type(pipe.scheduler).__name__,
            "pipeline": type(pipe).__name__,
            **seen,
            "plugins": [],
        }
    return pictures


def resolve_seed(seed: Any) -> int:
    """The seed itself, or a random one for None and -1.

    Raises:
        SettingTypeError: not a whole number. SettingError: outside 0 ... 2^63-1.
    """
    seed = plain(seed)
    if seed is None or (seed == -1 and not isinstance(seed, (bool, float))):
        return secrets.randbelow(2**32)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise SettingTypeError(f"seed={seed!r}: a whole number is needed, or None for a random one")
    if not 0 <= seed < SEEDS:
        raise SettingError(f"seed={seed}: must be 0 ... 2^63-1, or -1 for a random one")
    return seed


def guard(steps: int, then: Callable[..., dict[str, Any]] | None = None) -> Callable[..., dict[str, Any]]:
    """A step callback that stops at the first NaN or infinity, before it is a black picture; then calls `then`."""

    def check(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if not torch.isfinite(tensors["latents"]).all():
            raise NonFiniteError(
                f"step {step + 1} of {steps} produced non-finite latents: try dtype float32 or bfloat16, "
                "a lower guidance, or lower strengths of the plugins"
            )
        return tensors if then is None else then(pipe, step, timestep, tensors)

    return check


def unblanked(out: Any, seeds: Sequence[int]) -> dict[str, Any]:
    """What the pipeline's safety checker found, for the settings; nothing where it has none.

    Raises:
        SafetyCheckerError: it blanked a picture, which would be a black one.
    """
    found: Any = getattr(out, "nsfw_content_detected", None)
    if not found:
        return {}
    blanked = [str(seed) for seed, one in zip(seeds, found, strict=False) if one]
    if blanked:
        raise SafetyCheckerError(
            f"the model's safety checker takes the picture of seed {', '.join(blanked)} for unsafe and blanks it, now "
            "and then wrongly: try another seed or prompt; if you answer for what is shown, pipe.safety_checker = None"
        )
    return {"nsfw_content_detected": False}


def as_list(given: Any) -> list[Any]:
    """One or several."""
    return list(cast("Sequence[Any]", given)) if isinstance(given, (list, tuple)) else [given]


def check_call(pipe: Any, call: Mapping[str, Any], taken: Sequence[str] = ()) -> None:
    """Refuse what the pipeline would drop without a word: some take any keyword for the sake of old ones.

    Args:
        taken: further arguments of the pipeline that the task sets itself.
    Raises:
        UnsupportedPipelineError: no pipeline. SettingTypeError: an argument that it does not have, or that is taken.
    """
    if not isinstance(pipe, DiffusionPipeline):
        fix = "graft() edits modular pipelines, tasks want one loaded" if is_modular(pipe) else "load one"
        raise UnsupportedPipelineError(
            f"{type(pipe).__name__} is not a DiffusionPipeline of diffusers: {fix} with dg.load(...)"
        )
    for name in call:
        if name in _OURS:
            raise SettingTypeError(f"{name}=: here that is {_OURS[name]}=")
        if name in ("output_type", "return_dict", *taken):
            raise SettingTypeError(f"{name}=: the task sets it itself; for another one call the pipeline in a graft")
    known = {*inspect.signature(type(pipe).__call__).parameters, "callback", "callback_steps"}
    unknown = [name for name in call if name not in known]
    if unknown:
        raise SettingTypeError(f"{unknown[0]}=: neither this task nor {type(pipe).__name__} has such an argument")


def _check_taken(pipe: Any, given: Mapping[str, Any]) -> None:
    """Refuse settings that the pipeline has not, also where it would drop them without a word."""
    known = inspect.signature(type(pipe).__call__).parameters
    for name in given:
        if name not in known:
            hint = "; NegativeAway steers away from a text without guidance" if name == "negative_prompt" else ""
            raise SettingTypeError(f"{name}=: {type(pipe).__name__} has no such argument{hint}")


def _count(value: Any, name: str, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise SettingTypeError(f"{name}={value!r}: a whole number is needed")
    if not 1 <= value <= most:
        raise SettingError(f"{name}={value}: must be 1 ... {most}")
    return value


def _check(prompts: Sequence[str], negative_prompt: str | None, steps: int, guidance: float | None) -> None:
    for text in (*prompts, negative_prompt or ""):
        if not isinstance(text, str):
            raise SettingTypeError(f"a prompt is a text, not {type(text).__name__}")
        if len(text) > LONGEST_PROMPT:
            raise SettingError(f"a prompt of {len(text)} characters: at most {LONGEST_PROMPT}")
        if not text.isascii() and text != text.encode("utf-8", "replace").decode("utf-8"):
            raise SettingError("a prompt holds bytes that are no text; write it in UTF-8")
    _count(steps, "steps", 1000)
    if guidance is not None:
        finite(guidance, "guidance")


def _check_size(width: int | None, height: int | None, multiple: int) -> None:
    for name, value in (("width", width), ("height", height)):
        if value is not None and _count(value, name, 8192) % multiple:
            raise SettingError(f"{name}={value}: this model makes multiples of {multiple}")

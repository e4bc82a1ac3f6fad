"""The task "in this style": content pictures repainted in the style of other pictures, their layout kept."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image, ImageOps

from ..attention.errors import UnsupportedPipelineError
from ..plugins.base import Plugin, finite
from ..plugins.startpoint import StartpointFilter
from ..plugins.style_injection import Method, StyleInjection
from . import latents
from .architectures import adapter_for
from .architectures.loop import loop_for
from .blend import same_parts
from .generate import guard, resolve_seed
from .graft import graft
from .inversion import Inversion, invert
from .region import Region, as_picture
from .schedule import EXACT, invertible

LARGEST = 1.5
"""A picture is made smaller for the model if its longer side is more than this many times the model's own."""


@dataclass(frozen=True)
class Recipe:
    """Everything about how, the same for every pair."""

    prompt: str
    strength: float
    structure: float
    steps: int
    guidance: float
    method: Method
    alpha: float
    gamma: float
    temperature: float
    invert_style: bool
    negative: Any
    omega: float
    iterations: int
    tolerance: float
    plugins: Sequence[Plugin]
    call: dict[str, Any]


def stylize(
    pipe: Any,
    content: Any,
    style: Any,
    *,
    seed: int | None = None,
    strength: float = 1.0,
    structure: float = 0.5,
    prompt: str = "",
    steps: int = 50,
    guidance: float = 1.0,
    method: Method = "styleid",
    alpha: float | None = None,
    gamma: float | None = None,
    temperature: float = 1.5,
    invert_style: bool = True,
    negative: Any = None,
    omega: float = 1.5,
    iterations: int = 5,
    tolerance: float = 1e-3,
    plugins: Sequence[Plugin] = (),
    **call: Any,
) -> Any:
    """Repaint a picture in the style of another one.

    The content is inverted, its startpoint filtered (StyleSSP), and sampled again beside the style (StyleID or
    StyleAligned). A ControlNet on the pipeline is shown the content, an IP-Adapter the style.

    Args:
        pipe: a text-to-image pipeline, with ControlNet or IP-Adapter or not. Its scheduler is left alone; where it has
            no exact inverse, DDIM with its configuration samples instead.
        content: a picture (PIL with EXIF orientation, path, array) of any size, or a list of them.
        style: the same. It is scaled and cropped to the content's shape.
        seed: of the refill and the style's noise; pair i has seed + i. None or -1 draws one.
        strength: 0 (the content) ... 1, how much of the style's colours and texture.
        structure: 0 ... 1, how firmly the layout is held. Sets gamma = 0.5 + structure / 2, alpha = 1 - 0.6 * structure
            and the ControlNet's scale; at 0.5 the first two are those of the papers. On the picture book alpha stays 1:
            there the filter is measured to cost layout.
        prompt: what the content shows; empty works.
        steps: of the inversion and of the sampling.
        guidance: classifier-free guidance while sampling; 1 is none, as in StyleID.
        method: "styleid", "stylealigned" or "ip_adapter", see `StyleInjection`.
        alpha: of `StartpointFilter`, 1 is off. gamma, temperature: of `StyleInjection`.
        invert_style: follow the style's inverted trajectory, and begin with its mean and deviation; False saves its
            inversion, uses it under noise and is much weaker.
        negative: what the content's inversion steers away from, see `invert`; "style" is the style picture, which
            makes an inversion for each pair. None shares one inversion for each content.
        omega: guidance of that inversion. iterations, tolerance: of every inversion.
        plugins: more plugins for the sampling.
        call: passed on to the pipeline.

    Returns:
        a PIL picture of the content's size; a list for several contents or several styles; for both a list for each
        content. Settings are in `.info["diffgraft"]`.
    Raises:
        SettingError, SettingTypeError: a setting out of range, or no picture. NonFiniteError: sampling diverged.
    """
    strength, structure = finite(strength, "strength", 0, 1), finite(structure, "structure", 0, 1)
    first, sampler = resolve_seed(seed), sampling_pipe(pipe)
    damped = 0.0 if adapter_for(sampler).family == "picturebook" else 0.6 * structure
    recipe = Recipe(
        prompt, strength, structure, steps, guidance, method,
        1 - damped if alpha is None else finite(alpha, "alpha", 0, 1),
        0.5 + structure / 2 if gamma is None else finite(gamma, "gamma", 0, 1),
        temperature, invert_style, negative, omega, iterations, tolerance, plugins, call,
    )  # fmt: skip
    contents, styles = _several(content), _several(style)
    table: list[list[Image.Image]] = []
    references: dict[tuple[int, tuple[int, int]], Reference] = {}
    for picture in (as_picture(item) for item in contents):
        subject = Subject(sampler, recipe, picture)
        row = list[Image.Image]()
        for j, item in enumerate(styles):
            key = (j, subject.region.padded)
            if key not in references:
                references[key] = Reference(sampler, recipe, _rgb(as_picture(item)), key[1])
            row.append(paint(sampler, recipe, subject, references[key], first + len(table) * len(styles) + j))
        table.append(row)
    if isinstance(content, (list, tuple)):
        return table if isinstance(style, (list, tuple)) else [row[0] for row in table]
    return table[0] if isinstance(style, (list, tuple)) else table[0][0]


@dataclass(frozen=True)
class Subject:
    """A content picture and its inversion, made when it is first needed and shared by all styles."""

    pipe: Any
    recipe: Recipe
    picture: Image.Image

    @cached_property
    def region(self) -> Region:
        """The whole picture at the size at which the model sees it."""
        return whole(self.pipe, self.picture.size)

    @cached_property
    def seen(self) -> Image.Image:
        """What the model sees."""
        return self.region.cut(_rgb(self.picture))

    @cached_property
    def shared(self) -> Inversion:
        """The inversion for every style."""
        return self.inverted(self.recipe.negative)

    def inverted(self, negative: Any) -> Inversion:
        """An inversion away from `negative`."""
        how = self.recipe
        return invert(
            self.pipe, self.seen, prompt=how.prompt, negative=negative, guidance=how.omega, steps=how.steps,
            iterations=how.iterations, tolerance=how.tolerance, trajectory=how.method == "styleid",
        )  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """A style picture at one size, encoded or inverted when it is first needed and shared by all contents."""

    pipe: Any
    recipe: Recipe
    picture: Image.Image
    size: tuple[int, int]

    @cached_property
    def fitted(self) -> Image.Image:
        """The picture scaled and cropped to the content's shape: squashing it would bend its texture."""
        return ImageOps.fit(self.picture, self.size, Image.Resampling.LANCZOS)

    @cached_property
    def style(self) -> Any:
        """What `StyleInjection` takes."""
        if not self.recipe.invert_style:
            return latents.encode_image(self.pipe, self.fitted).float()
        how = self.recipe
        return invert(
            self.pipe, self.fitted, steps=how.steps, iterations=how.iterations, tolerance=how.tolerance, trajectory=True
        )


def paint(pipe: Any, recipe: Recipe, subject: Subject, reference: Reference, seed: int) -> Image.Image:
    """One pair."""
    settings = {
        "task": "stylize", "seed": seed, "strength": recipe.strength, "structure": recipe.structure,
        "prompt": recipe.prompt, "steps": recipe.steps, "guidance": recipe.guidance, "method": recipe.method,
        "pipeline": type(pipe).__name__, "scheduler": type(pipe.scheduler).__name__,
    }  # fmt: skip
    if recipe.strength == 0:
        return _noted(_rgb(subject.picture).copy(), settings)
    by_pair = isinstance(recipe.negative, str) and recipe.negative == "style"
    inversion = subject.inverted(reference.fitted) if by_pair else subject.shared
    plugins = [
        StartpointFilter(recipe.alpha, generator=torch.Generator().manual_seed(seed)),
        StyleInjection(
            None if recipe.method == "ip_adapter" else reference.style, method=recipe.method,
            content=inversion if recipe.method == "styleid" else None, strength=recipe.strength, gamma=recipe.gamma,
            temperature=recipe.temperature, start_adain=recipe.invert_style and recipe.method != "ip_adapter",
            generator=torch.Generator().manual_seed(seed),
        ),
    ]  # fmt: skip
    with graft(pipe, *plugins, *recipe.plugins):
        picture = _sampled(pipe, recipe, inversion, subject, reference)
    settings |= {"alpha": recipe.alpha, "gamma": recipe.gamma, "negative": inversion.negative}
    return _noted(subject.region.uncut(picture), settings)


def _sampled(pipe: Any, recipe: Recipe, inversion: Inversion, subject: Subject, reference: Reference) -> Image.Image:
    options = inversion.call(pipe) | {"prompt": recipe.prompt, "guidance_scale": recipe.guidance}
    options |= {"width": subject.region.padded[0], "height": subject.region.padded[1]}
    accepted = inspect.signature(pipe.__call__).parameters
    if getattr(pipe, "controlnet", None) is not None:
        scale = "controlnet_conditioning_scale"
        options |= {"image": subject.seen, scale: recipe.call.get(scale, recipe.structure)}
    if getattr(pipe.unet.config if hasattr(pipe, "unet") else None, "encoder_hid_dim_type", None) == "ip_image_proj":
        options["ip_adapter_image"] = reference.fitted
    if "callback_on_step_end" in accepted:
        options["callback_on_step_end"] = guard(recipe.steps)
    return pipe(**(options | recipe.call)).images[0]


def sampling_pipe(pipe: Any) -> Any:
    """`pipe`, or one of the same parts that makes pictures from text on a scheduler that can be inverted.

    Raises:
        UnsupportedPipelineError: its class has no such form.
    """
    import diffusers

    loop_for(pipe)
    plain = type(pipe).__name__.replace("Img2Img", "").replace("Inpaint", "")
    kind = type(pipe) if plain == type(pipe).__name__ else getattr(diffusers, plain, None)
    if kind is None:
        raise UnsupportedPipelineError(f"{type(pipe).__name__} has no text-to-image form: use such a pipeline")
    if kind is type(pipe) and type(pipe.scheduler).__name__ in EXACT:
        return pipe
    made = same_parts(pipe, kind)
    with warnings.catch_warnings():  # that another scheduler samples is this function's purpose
        warnings.simplefilter("ignore")
        made.scheduler = invertible(pipe.scheduler)
    return made


def whole(pipe: Any, size: tuple[int, int]) -> Region:
    """A whole picture of `size` (width, height) as the model sees it: near its own size, sides as it takes them."""
    factor = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    side = denoiser.config.sample_size if hasattr(denoiser.config, "sample_size") else pipe.default_sample_size
    native, multiple = factor * side, max(8, factor) * (1 if hasattr(pipe, "unet") else 2)
    longest = max(size)
    scale = min(1.0, LARGEST * native / longest) if longest >= native else native / longest
    inner = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    padded = (-(-inner[0] // multiple) * multiple, -(-inner[1] // multiple) * multiple)
    return Region((0, 0, *size), inner, padded)


def _several(pictures: Any) -> list[Any]:
    return list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]


def _rgb(picture: Image.Image) -> Image.Image:
    """RGB, transparency over white."""
    if "A" not in picture.getbands() and "transparency" not in picture.info:
        return picture.convert("RGB")
    ground = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(ground, picture.convert("RGBA")).convert("RGB")


def _noted(picture: Image.Image, settings: dict[str, Any]) -> Image.Image:
    picture.info["diffgraft"] = settings | {"width": picture.width, "height": picture.height}
    return picture

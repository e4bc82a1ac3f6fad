"""The task "in this style": content pictures repainted in the style of other pictures, their layout kept."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast, get_args

import torch
from PIL import Image, ImageOps

from ...attention.errors import NonFiniteError, SettingError, SettingTypeError, UnsupportedPipelineError
from ...attention.pictures import as_rgb
from ...attention.plain import plainly
from ...plugins.base import Plugin, finite
from ...plugins.defaults import JOINT, measured, preferred
from ...plugins.distillation import AttentionDistillation
from ...plugins.optimised_style import OptimisedStyle
from ...plugins.startpoint import StartpointFilter
from ...plugins.style_injection import StyleInjection
from ..families import adapter_for, latents
from ..families.base import Adapter, has_ip_adapter
from ..families.loop import DeclaredLoop, loop_for, solve_of
from ..grafting.graft import graft
from .blend import same_parts
from .flow_fill import guidance_for
from .generate import SEEDS, as_list, check_call, guard, resolve_seed, unblanked
from .inversion import Inversion, invert
from .region import Region, whole_region
from .schedule import EXACT, invertible

How = Literal["styleid", "stylealigned", "ip_adapter", "distillation", "optimised"]
_ETA = 2010025020
"""Added to the seed for the noise of `eta`, which is not to be the noise of the refill."""


@dataclass(frozen=True)
class Look:
    """How style gets in: as the arguments of `stylize`, none of them open."""

    method: How
    strength: float
    structure: float
    alpha: float
    gamma: float
    temperature: float
    invert_style: bool
    begin: float = 0.0

    def __post_init__(self) -> None:
        if self.method not in get_args(How):
            raise SettingError(f"method={self.method!r}: choose {', '.join(get_args(How))}")
        for name in ("strength", "structure", "alpha", "gamma", "begin"):
            finite(getattr(self, name), name, 0, 1)
        finite(self.temperature, "temperature", 1e-3)


@dataclass(frozen=True)
class Inverting:
    """How pictures are inverted."""

    negative: Any
    omega: float
    iterations: int
    tolerance: float


@dataclass(frozen=True)
class Recipe:
    """Everything about how, the same for every pair."""

    prompt: str
    steps: int
    guidance: float
    look: Look
    inverting: Inverting
    plugins: Sequence[Plugin]
    call: dict[str, Any]


@plainly
def stylize(
    pipe: Any, content: Any, style: Any, *, seed: int | None = None, strength: float | None = None,
    structure: float | None = None, prompt: str = "", steps: int = 50, guidance: float = 1.0, method: How | None = None,
    alpha: float | None = None, gamma: float | None = None, temperature: float = 1.5, invert_style: bool = True,
    begin: float | None = None, negative: Any = None, omega: float = 1.5, iterations: int = 0, tolerance: float = 1e-3,
    plugins: Sequence[Plugin] = (), **call: Any,
) -> Any:  # fmt: skip
    """Repaint a picture in the style of another one.

    The content is inverted, its startpoint filtered (StyleSSP), and sampled again beside the style (StyleID,
    StyleAligned or attention distillation). A ControlNet on the pipeline is shown the content. An IP-Adapter is shown
    the style by method="ip_adapter" and adds nothing to the others: two at once over-stylise.

    Args:
        pipe: a text-to-image pipeline, with ControlNet or IP-Adapter or not. Its scheduler is left alone; where it has
            no exact inverse, DDIM with its configuration samples instead.
        content: a picture (PIL with EXIF orientation, path, array) of any size, or a list of them.
        style: the same. It is scaled and cropped to the content's shape.
        seed: of the refill and the style's noise; pair i has seed + i. None or -1 draws one.
        strength: 0 (the content) ... 1, how much of the style's colours and texture. None is 1, what the papers do,
            but 0.6 for "styleid" on the picture book: there that costs a tenth of the style and keeps the layout.
        structure: 0 ... 1, how firmly the layout is held. Sets gamma = 0.5 + structure / 2, alpha = 1 - 0.6 * structure
            and the ControlNet's scale. None is 0.5, where the first two are those of the papers. On the picture book
            and where text and image are one sequence alpha stays 1, since the filter is measured to cost layout, and
            None is 0.2 for "distillation".
        prompt: what the content shows; empty works.
        steps: of the inversion and of the sampling.
        guidance: classifier-free guidance while sampling; 1 is none, as in StyleID. What a model was distilled for is 1
            too, in the inversion and while sampling, unless the call says otherwise.
        method: "styleid", "stylealigned" or "ip_adapter", see `StyleInjection`; "distillation" is
            `AttentionDistillation` with rate = 0.05 * strength and content_weight = structure / 2, dearer by gradients
            (where it is the default that rate is for 20 steps, and 50 steps share its way: else they go too far).
            "optimised" takes the same loss as its paper transfers style: nothing is inverted or sampled, the content's
            latent is optimised by one Adam over the timesteps; published with steps=200.
            None is "styleid", and "distillation" on the picture book and where text and image are one sequence: there
            "styleid" and "stylealigned" (whose reference is moved aside by a picture's width where positions are
            rotary) were measured to repaint the style picture itself, but need no gradients.
        alpha: of `StartpointFilter`, 1 is off. gamma, temperature: of `StyleInjection`.
        invert_style: follow the style's inverted trajectory, and begin with its mean and deviation; False saves its
            inversion, uses it under noise and is much weaker.
        begin: share of the steps, 0 ... 1, that repeat the content before style gets in. Later keeps more of what the
            content shows. None is 0, as in the papers, but 0.4 for "distillation" on the picture book. An IP-Adapter is
            there from the first step on.
        negative: what the content's inversion steers away from, see `invert`; "style" is the style picture, which
            makes an inversion for each pair. None shares one inversion for each content.
        omega: guidance of that inversion. iterations, tolerance: of every inversion, see `invert`. 0 is DDIM inversion,
            as in the papers; five more evaluations a step were measured to keep less of the content.
        plugins: more plugins for the sampling.
        call: passed on to the pipeline.

    Returns:
        a PIL picture in sRGB of the content's size; a list for several contents or several styles; for both a list for
        each content. Settings are in `.info["diffgraft"]`.
    Raises:
        SettingError, SettingTypeError: a setting out of range, or no picture. NonFiniteError: sampling diverged.
    """
    if not isinstance(prompt, str):
        raise SettingTypeError(f"prompt={prompt!r}: a text is needed")
    first, sampler = resolve_seed(seed), sampling_pipe(pipe)
    solve, adapter = solve_of(getattr(sampler, "transformer", None)), adapter_for(sampler)
    guided_by = "guidance_scale" if solve is None else solve.guided_by
    check_call(sampler, call, (guided_by, "latents", "width", "height", "prompt_embeds"))
    family = _family(adapter)
    method = method or cast("How", preferred("stylize: method", family))
    look = look_of(family, method, structure, strength, alpha, gamma, temperature, invert_style, begin)
    inverting = Inverting(negative, finite(omega, "omega"), iterations, tolerance)
    recipe = Recipe(prompt, steps, finite(guidance, "guidance"), look, inverting, as_list(plugins), call)
    contents, styles = as_list(content), [as_rgb(item) for item in as_list(style)]
    every = pairs(sampler, recipe, map(as_rgb, contents), styles, first)
    made = [paint(sampler, recipe, pair) for pair in every]
    rows = [made[i * len(styles) : (i + 1) * len(styles)] for i in range(len(contents))]
    rows = rows if isinstance(style, (list, tuple)) else [row[0] for row in rows]
    return rows if isinstance(content, (list, tuple)) else rows[0]


def look_of(
    family: str, method: How, structure: float | None = None, strength: float | None = None,
    alpha: float | None = None, gamma: float | None = None, temperature: float = 1.5, invert_style: bool = True,
    begin: float | None = None,
) -> Look:  # fmt: skip
    """What was given, and what is usual on this family for the rest."""
    slow = method == "distillation"
    firm = measured("stylize: structure of distillation", family) if slow else 0.5
    firm = firm if structure is None else finite(structure, "structure", 0, 1)
    usual = measured("stylize: strength of styleid", family) if method == "styleid" else 1.0
    first = measured("stylize: begin of distillation", family) if slow else 0.0
    damped = firm * measured("stylize: damping of the startpoint by structure", family)
    return Look(
        method, usual if strength is None else strength, firm, 1 - damped if alpha is None else alpha,
        0.5 + firm / 2 if gamma is None else gamma, temperature, invert_style, first if begin is None else begin,
    )  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A content picture and its inversion, made when it is first needed and shared by all styles."""

    pipe: Any
    recipe: Recipe
    picture: Image.Image

    @cached_property
    def region(self) -> Region:
        """The whole picture at the size at which the model sees it."""
        return whole_region(self.picture.size, latents.native_side(self.pipe), latents.side_multiple(self.pipe))

    @cached_property
    def seen(self) -> Image.Image:
        """What the model sees."""
        return self.region.cut(self.picture)

    @cached_property
    def shared(self) -> Inversion:
        """The inversion for every style."""
        return self.inverted(self.recipe.inverting.negative)

    def inverted(self, negative: Any) -> Inversion:
        """An inversion away from `negative`."""
        recipe, how = self.recipe, self.recipe.inverting
        return invert(
            self.pipe, self.seen, prompt=recipe.prompt, negative=negative, guidance=how.omega, steps=recipe.steps,
            iterations=how.iterations, tolerance=how.tolerance,
            trajectory=recipe.look.method in ("styleid", "distillation"),
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
        recipe, how = self.recipe, self.recipe.inverting
        if not recipe.look.invert_style:
            return latents.encode_image(self.pipe, self.fitted).float()
        return invert(
            self.pipe, self.fitted, steps=recipe.steps, iterations=how.iterations, tolerance=how.tolerance,
            trajectory=True,
        )  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A content in a style."""

    subject: Subject
    reference: Reference
    seed: int

    @cached_property
    def inversion(self) -> Inversion:
        """The content's, its own for this pair only if the style picture is the negative."""
        negative = self.subject.recipe.inverting.negative
        by_pair = isinstance(negative, str) and negative == "style"
        return self.subject.inverted(self.reference.fitted) if by_pair else self.subject.shared


def pairs(
    pipe: Any, recipe: Recipe, contents: Iterable[Image.Image], styles: Sequence[Image.Image], seed: int
) -> Iterator[Pair]:
    """Every content in every style, content by content; pair i has seed + i."""
    references: dict[tuple[int, tuple[int, int]], Reference] = {}
    for content in contents:
        subject = Subject(pipe, recipe, content)
        for j, style in enumerate(styles):
            key = (j, subject.region.padded)
            reference = references.setdefault(key, Reference(pipe, recipe, style, key[1]))
            yield Pair(subject, reference, seed)
            seed += 1


def paint(pipe: Any, recipe: Recipe, pair: Pair) -> Image.Image:
    """One pair."""
    settings = {
        "task": "stylize", "seed": pair.seed, "prompt": recipe.prompt, "steps": recipe.steps,
        "guidance": recipe.guidance, **vars(recipe.look), "omega": recipe.inverting.omega,
        "iterations": recipe.inverting.iterations, "tolerance": recipe.inverting.tolerance,
        "pipeline": type(pipe).__name__, "scheduler": type(pipe.scheduler).__name__,
        "plugins": [{"plugin": type(plugin).__name__} | plugin.settings() for plugin in recipe.plugins],
    }  # fmt: skip
    if recipe.look.strength == 0:
        return _noted(pair.subject.picture.copy(), settings)
    if recipe.look.method == "optimised":
        picture = _optimised(pipe, recipe, pair)
    else:
        settings["negative"] = pair.inversion.negative
        with graft(pipe, *_plugins(pipe, recipe.look, pair), *recipe.plugins):
            out = pipe(**_options(pipe, recipe, pair, pair.inversion.call(pipe)))
        settings |= unblanked(out, [pair.seed])
        [picture] = latents.as_pil(out.images)
    return _noted(pair.subject.region.uncut(picture), settings)


def _optimised(pipe: Any, recipe: Recipe, pair: Pair) -> Image.Image:
    """The latent that `OptimisedStyle` finds, decoded."""
    style, content = (latents.encode_image(pipe, seen).float() for seen in (pair.reference.fitted, pair.subject.seen))
    look = recipe.look
    plugin = OptimisedStyle(style, content, rate=0.05 * look.strength, content_weight=look.structure / 2)
    with graft(pipe, plugin, *recipe.plugins):
        pipe(**_options(pipe, recipe, pair, {"num_inference_steps": recipe.steps}) | {"output_type": "latent"})
    if plugin.found is None or not plugin.found.isfinite().all():
        raise NonFiniteError("the optimised latent is not finite: lower strength=")
    [picture] = latents.as_pil(latents.decode_latents(pipe, plugin.found, "np"))
    return picture


def _plugins(pipe: Any, look: Look, pair: Pair) -> list[Plugin]:
    noise = torch.Generator().manual_seed(pair.seed)
    start: list[Plugin] = [StartpointFilter(look.alpha, generator=torch.Generator().manual_seed(pair.seed))]
    styleid, adapter = look.method == "styleid", look.method == "ip_adapter"
    if _has_adapter(pipe) and not adapter:  # as in the inversion
        start.append(StyleInjection(method="ip_adapter", scale=0.0))
    if look.method == "distillation":
        how = distilling(_family(adapter_for(pipe)), look, pair.subject.recipe.steps)
        return [*start, AttentionDistillation(pair.reference.style, content=pair.inversion, generator=noise, **how)]
    method: Any = look.method  # one of those that are left
    aside = 1.0 if method == "stylealigned" and adapter_for(pipe).rotary else 0.0
    return [
        *start,
        StyleInjection(
            None if adapter else pair.reference.style, method=method,
            content=pair.inversion if styleid else None, strength=look.strength, gamma=look.gamma,
            temperature=look.temperature, start_adain=look.invert_style and not adapter, generator=noise,
            apart=aside, start=0.0 if adapter else look.begin,
        ),
    ]  # fmt: skip


def distilling(family: str, look: Look, steps: int) -> dict[str, Any]:
    """Arguments of `AttentionDistillation`: its rate is the paper's, or so much smaller that more steps go as far."""
    shared = measured("stylize: steps that share the way of distillation", family)
    pace = min(2.0, shared / steps) if shared else 1.0
    return {"rate": 0.05 * look.strength * pace, "content_weight": look.structure / 2, "start": look.begin}


def _family(adapter: Adapter) -> str:
    """Whose defaults hold."""
    return JOINT if any(layer.kind == "joint" for layer in adapter.layers) else adapter.family


def _has_adapter(pipe: Any) -> bool:
    return hasattr(pipe, "unet") and has_ip_adapter(pipe.unet)


def _options(pipe: Any, recipe: Recipe, pair: Pair, start: dict[str, Any]) -> dict[str, Any]:
    """What the pipeline is called with, `start` among it."""
    width, height = pair.subject.region.padded
    options = start | _guidance(pipe, recipe) | {
        "prompt": recipe.prompt, "width": width, "height": height,
        "output_type": "np", "generator": torch.Generator().manual_seed((pair.seed + _ETA) % SEEDS),
    }  # fmt: skip
    accepted = inspect.signature(pipe.__call__).parameters
    if getattr(pipe, "controlnet", None) is not None:
        nets = getattr(pipe.controlnet, "nets", None)  # several, of which each wants its own
        seen = pair.subject.seen if nets is None else [pair.subject.seen] * len(nets)
        shown = "image" if "image" in accepted else "control_image"
        options |= {shown: seen, "controlnet_conditioning_scale": recipe.look.structure}
    if _has_adapter(pipe) and "ip_adapter_image_embeds" not in recipe.call:
        options["ip_adapter_image"] = [pair.reference.fitted] * len(pipe.unet.encoder_hid_proj.image_projection_layers)
    elif recipe.look.method == "ip_adapter" and "ip_adapter_image_embeds" not in recipe.call:  # SD3
        options["ip_adapter_image"] = pair.reference.fitted
    if "use_resolution_binning" in accepted:  # PixArt would move the size to one of its list
        options["use_resolution_binning"] = False
    options |= recipe.call
    if "callback_on_step_end" in accepted:
        options["callback_on_step_end"] = guard(recipe.steps, recipe.call.get("callback_on_step_end"))
        inputs = recipe.call.get("callback_on_step_end_tensor_inputs", [])
        options["callback_on_step_end_tensor_inputs"] = ["latents", *(name for name in inputs if name != "latents")]
    return options


def _guidance(pipe: Any, recipe: Recipe) -> dict[str, Any]:
    """The recipe's guidance as the pipeline takes it; what a model was distilled for is 1, as in the inversion."""
    loop = loop_for(pipe)
    if not isinstance(loop, DeclaredLoop):
        return {"guidance_scale": recipe.guidance}
    given = guidance_for(loop, recipe.guidance, recipe.call)
    distilled = getattr(loop.denoiser.config, "guidance_embeds", False)
    return {"guidance_scale": 1.0} | given if distilled else given


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
    if "original_inference_steps" in inspect.signature(kind.__call__).parameters:
        raise UnsupportedPipelineError(
            f"{kind.__name__} samples with LCMScheduler only, which has no inverse: use StableDiffusionPipeline"
        )
    if kind is type(pipe) and type(pipe.scheduler).__name__ in EXACT:
        return pipe
    made = same_parts(pipe, kind)
    with warnings.catch_warnings():  # that another scheduler samples is this function's purpose
        warnings.simplefilter("ignore")
        made.scheduler = invertible(pipe.scheduler)
    return made


def _noted(picture: Image.Image, settings: dict[str, Any]) -> Image.Image:
    picture.info["diffgraft"] = settings | {"width": picture.width, "height": picture.height}
    return picture

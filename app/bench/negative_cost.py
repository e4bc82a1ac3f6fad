"""What a negative inside attention costs: FLOPs on published shapes, and time on the embedded model."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from ... import NegativeAway, graft, picturebook
from .configs import SD15, SDXL, meta_inputs, meta_pipe

SD21: dict[str, Any] = SD15 | {
    "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True,
}  # fmt: skip
STEPS = 4


@dataclass(frozen=True)
class Shape:
    """One model at one size.

    Attributes:
        name: for the table. make: the pipeline on the meta device. inputs: arguments of one row, less the timestep.
        tokens: text tokens of the prompt, and of the negative. width: of the text.
        first, later: bounds in per cent for the first step and the others. time: name of the timestep.
    """

    name: str
    make: Callable[[], Any]
    inputs: Callable[[Any], dict[str, Any]]
    tokens: int
    width: int
    first: float | None = None
    later: float | None = None
    time: str = "timestep"


def unet(name: str, config: dict[str, Any], side: int, **bounds: float) -> Shape:
    """A UNet with a latent of `side` x `side`."""

    def inputs(pipe: Any) -> dict[str, Any]:
        given = meta_inputs(pipe.unet, 1, (side, side))
        return {key: value for key, value in given.items() if key != "timestep"}

    return Shape(name, lambda: meta_pipe(config), inputs, 77, config["cross_attention_dim"], **bounds)


def pixart(name: str, side: int, tokens: int) -> Shape:
    """PixArt at a latent of `side` x `side`."""

    def make() -> Any:
        with torch.device("meta"):
            model = PixArtTransformer2DModel(sample_size=side, caption_channels=4096, use_additional_conditions=False)
        return around(PixArtSigmaPipeline, model)

    def inputs(pipe: Any) -> dict[str, Any]:
        return meta(hidden_states=(1, 4, side, side), encoder_hidden_states=(1, tokens, 4096))

    return Shape(name, make, inputs, tokens, 4096)


def flux(
    name: str, side: int, tokens: int, later: float | None, *, guidance: bool, layers: int | None = None
) -> Shape:
    """FLUX.1 at `side` x `side` image tokens; with `layers` blocks of each kind, None for all."""
    fewer = {} if layers is None else {"num_layers": layers, "num_single_layers": layers}

    def make() -> Any:
        with torch.device("meta"):
            model = FluxTransformer2DModel(guidance_embeds=guidance, **fewer)
        return around(FluxPipeline, model)

    def inputs(pipe: Any) -> dict[str, Any]:
        given = meta(
            hidden_states=(1, side * side, 64), encoder_hidden_states=(1, tokens, 4096), pooled_projections=(1, 768),
            txt_ids=(tokens, 3),
        )  # fmt: skip
        grid = torch.cartesian_prod(*(torch.arange(float(n)) for n in (1, side, side)))
        return given | {"img_ids": grid} | (meta(guidance=(1,)) if guidance else {})

    return Shape(name, make, inputs, tokens, 4096, later, later)


def sd3(name: str, side: int, tokens: int) -> Shape:
    """SD3.5 large at a latent of `side` x `side`."""

    def make() -> Any:
        with torch.device("meta"):
            model = SD3Transformer2DModel(
                num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192,
                qk_norm="rms_norm",
            )  # fmt: skip
        return around(StableDiffusion3Pipeline, model)

    def inputs(pipe: Any) -> dict[str, Any]:
        return meta(
            hidden_states=(1, 16, side, side), encoder_hidden_states=(1, tokens, 4096), pooled_projections=(1, 2048)
        )

    return Shape(name, make, inputs, tokens, 4096)


def z_image(name: str, side: int, tokens: int, later: float) -> Shape:
    """Z-Image at a latent of `side` x `side`; its listening forward is counted with the first step."""

    def make() -> Any:
        with torch.device("meta"):
            model = ZImageTransformer2DModel()
        return around(ZImagePipeline, model)

    def inputs(pipe: Any) -> dict[str, Any]:
        given = meta(x=(16, 1, side, side), cap_feats=(tokens, 2560))
        return {key: [value] for key, value in given.items()}

    return Shape(name, make, inputs, tokens, 2560, None, later, time="t")


def klein(name: str, side: int, tokens: int, later: float) -> Shape:
    """FLUX.2 klein 4B at `side` x `side` image tokens."""

    def make() -> Any:
        with torch.device("meta"):
            model = Flux2Transformer2DModel(
                num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680,
                guidance_embeds=False,
            )  # fmt: skip
        return around(Flux2KleinPipeline, model)

    def inputs(pipe: Any) -> dict[str, Any]:
        text = torch.cartesian_prod(*(torch.arange(float(n)) for n in (1, 1, 1, tokens)))
        grid = torch.cartesian_prod(*(torch.arange(float(n)) for n in (1, side, side, 1)))
        given = meta(hidden_states=(1, side * side, 128), encoder_hidden_states=(1, tokens, 7680))
        return given | {"txt_ids": text[None], "img_ids": grid[None]}

    return Shape(name, make, inputs, tokens, 7680, None, later)


def wan(name: str, frames: int, height: int, width: int, later: float) -> Shape:
    """Wan 14B at a latent of these sizes."""

    def make() -> Any:
        with torch.device("meta"):
            model = WanTransformer3DModel()
        return around(WanPipeline, model)

    def inputs(pipe: Any) -> dict[str, Any]:
        return meta(hidden_states=(1, 16, frames, height, width), encoder_hidden_states=(1, 512, 4096))

    return Shape(name, make, inputs, 512, 4096, None, later)


SHAPES = [
    unet("SD1.5 512", SD15, 64, first=4.0, later=0.5),
    unet("SD2.1 512", SD21, 64, first=4.0),
    unet("SDXL 512", SDXL, 64, first=4.0, later=0.6),
    unet("SDXL 1024", SDXL, 128),
    pixart("PixArt 512, 120 tokens", 64, 120),
    pixart("PixArt 1024, 300 tokens", 128, 300),
    flux("FLUX.1-schnell 1024, 256 tokens", 64, 256, 8.0, guidance=False),
    flux("FLUX.1-dev 1024, 512 tokens", 64, 512, 14.0, guidance=True),
    sd3("SD3.5-large 1024, 333 tokens", 128, 333),
    z_image("Z-Image 1024, 128 tokens", 128, 128, 15.0),
    klein("FLUX.2-klein 4B 1024, 512 tokens", 64, 512, 15.0),
    wan("Wan 14B 480p, 81 frames", 21, 60, 104, 15.0),
]


def meta(**shapes: tuple[int, ...]) -> dict[str, Any]:
    """Tensors without storage."""
    return {name: torch.zeros(shape, device="meta") for name, shape in shapes.items()}


def around(kind: Any, transformer: nn.Module) -> Any:
    """A pipeline that can be grafted and not called."""
    parts = dict.fromkeys(kind._get_signature_keys(kind)[0])
    return kind(**parts | {"transformer": transformer, "scheduler": FlowMatchEulerDiscreteScheduler()})


def count(shape: Shape, pipe: Any, *plugins: Any, calls: list[str] | None = None, rows: int = 1) -> list[int]:
    """FLOPs (two for each multiply-add) of the denoiser at each step of a call of so many rows; `calls` collects text
    projections.
    """
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    pipe.scheduler.set_timesteps(STEPS)
    inputs, flops = _repeated(shape.inputs(pipe), rows), list[int]()
    hooks = [] if calls is None else _note_text_projections(denoiser, calls)
    hooks.append(denoiser.register_forward_pre_hook(_to_meta, with_kwargs=True))
    with graft(pipe, *plugins), torch.no_grad():
        for timestep in pipe.scheduler.timesteps:
            at = timestep if hasattr(pipe, "unet") else timestep.expand(rows)
            with FlopCounterMode(display=False) as counter:
                denoiser(**inputs, **{shape.time: at}, return_dict=False)
            flops.append(counter.get_total_flops())
    for hook in hooks:
        hook.remove()
    return flops


def _repeated(inputs: dict[str, Any], rows: int) -> dict[str, Any]:
    """What has a row, or is a list of rows, with so many of them."""

    def repeated(tensor: Any) -> Any:
        return tensor.expand(rows, *tensor.shape[1:]) if isinstance(tensor, torch.Tensor) else tensor

    return {
        name: value * rows
        if isinstance(value, list)
        else value
        if name.endswith("_ids")  # places, the same in every row
        else tree_map(repeated, value)
        for name, value in inputs.items()
    }


def _to_meta(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Behind the graft, which has to read values of timesteps and positions."""
    return args, tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, kwargs)


def _note_text_projections(denoiser: nn.Module, calls: list[str]) -> list[Any]:
    return [
        module.register_forward_hook(lambda m, args, out, name=name: calls.append(name))
        for name, module in denoiser.named_modules()
        if name.endswith(("attn2.to_k", "attn2.to_v"))
    ]


def flops_table() -> None:
    """Print the counted cost; raise where it is beyond its bound."""
    out = sys.stdout.write
    out("| model | plain, TFLOP a step | first step | later steps | negative's K and V projections |\n")
    out("|" + "---|" * 5 + "\n")
    for shape in SHAPES:
        pipe, calls = shape.make(), list[str]()
        (plain, *_) = count(shape, pipe)
        negative = NegativeAway(torch.zeros(1, shape.tokens, shape.width))
        first, *later = (100 * (n / plain - 1) for n in count(shape, pipe, negative, calls=calls))
        layers = len(set(calls))
        once = f"{(len(calls) - STEPS * layers) / layers:g} a layer and call" if layers else "carried along"
        out(f"| {shape.name} | {plain / 1e12:.3f} | {first:+.2f}% | {max(later):+.2f}% | {once} |\n")
        sys.stdout.flush()
        for found, bound in ((first, shape.first), (max(later), shape.later)):
            if bound is not None and found > bound:
                raise AssertionError(f"{shape.name}: {found:+.2f}% FLOPs, at most +{bound}% was promised")


def time_table(repeats: int) -> None:
    """Print time on the embedded model relative to the plain call, interleaved in one run."""
    pipe = picturebook()
    pipe.set_progress_bar_config(disable=True)

    def seconds(guidance: float, *plugins: Any) -> float:
        with graft(pipe, *plugins):
            start = time.perf_counter()
            pipe(
                "a ball , sky", num_inference_steps=4, guidance_scale=guidance, output_type="latent",
                generator=torch.Generator().manual_seed(0),
            )  # fmt: skip
            return time.perf_counter() - start

    rows = {"guidance (CFG)": (4.0, ())} | {
        f"NegativeAway {rule}": (0.0, (NegativeAway("red", rule=rule),)) for rule in ("nasa", "nag", "vsf")
    }
    seconds(0.0), seconds(4.0)
    ratios: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(repeats):
        plain = seconds(0.0)
        for name, (guidance, plugins) in rows.items():
            ratios[name].append(seconds(guidance, *plugins) / plain)
    sys.stdout.write("\n| embedded model, 4 steps on this CPU | time, plain = 1 |\n|---|---|\n")
    for name, found in ratios.items():
        sys.stdout.write(f"| {name} | {statistics.median(found):.2f} |\n")


def run(full: bool) -> None:
    """Print both tables."""
    flops_table()
    time_table(40 if full else 10)

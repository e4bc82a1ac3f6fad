"""Published denoisers at their real size with random weights, made on the device: pipelines that can be called."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import nn

from .configs import SDXL

Config = Mapping[str, Any]
RESERVE, MARGIN = 6 * 2**30, 1.1
"""Bytes left for activations and for what a plugin adds, and what a model takes beside its weights."""


@dataclass(frozen=True)
class Shape:
    """One model at one size.

    Attributes:
        name: for the table. kind, model: classes of pipeline and denoiser. config: the published one. little: what
            makes it tiny, for a machine without a GPU. layers: entries of the configuration that count layers.
        side: pixels. tokens: of the text. scheduler: makes one.
    """

    name: str
    kind: Any
    model: Any
    config: Config
    little: Config
    layers: tuple[str, ...]
    side: int
    tokens: int
    scheduler: Callable[[], Any]

    def cut(self, share: float) -> Config:
        """The configuration with this share of its layers, at least one of each kind."""
        return {**self.config, **{name: _fewer(self.config[name], share) for name in self.layers}}


def _fewer(count: Any, share: float) -> Any:
    return max(1, int(count * share)) if isinstance(count, int) else tuple(_fewer(one, share) for one in count)


_SDXL_LITTLE: Config = {
    "block_out_channels": (32, 64, 64), "attention_head_dim": (2, 4, 4), "cross_attention_dim": 32,
    "layers_per_block": 1, "transformer_layers_per_block": 1, "norm_num_groups": 8, "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80, "sample_size": 16,
}  # fmt: skip
_FLUX: Config = {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": False}
_FLUX_LITTLE: Config = {
    "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
_Z: Config = {"n_layers": 30, "n_refiner_layers": 2}
_Z_LITTLE: Config = {
    "in_channels": 4, "dim": 64, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
    "cap_feat_dim": 32, "axes_dims": [8, 12, 12], "axes_lens": [512, 64, 64],
}  # fmt: skip


def _ddim() -> DDIMScheduler:
    return DDIMScheduler(steps_offset=1, clip_sample=False, beta_schedule="scaled_linear")


def _sdxl(side: int) -> Shape:
    parts = (StableDiffusionXLPipeline, UNet2DConditionModel, SDXL, _SDXL_LITTLE, ("transformer_layers_per_block",))
    return Shape(f"SDXL {side}", *parts, side, 77, _ddim)


SHAPES = {
    "sdxl-512": _sdxl(512),
    "sdxl-1024": _sdxl(1024),
    "flux-1024": Shape(
        "FLUX.1-schnell 1024", FluxPipeline, FluxTransformer2DModel, _FLUX, _FLUX_LITTLE,
        ("num_layers", "num_single_layers"), 1024, 256, FlowMatchEulerDiscreteScheduler,
    ),
    "z-image-1024": Shape(
        "Z-Image 1024", ZImagePipeline, ZImageTransformer2DModel, _Z, _Z_LITTLE, ("n_layers",), 1024, 128,
        FlowMatchEulerDiscreteScheduler,
    ),
}  # fmt: skip
"""By the name for `--only`."""


@dataclass(frozen=True)
class Subject:
    """A pipeline without encoders, and what it is called with.

    Attributes:
        call: without guidance. guided: with it. negative: a text for `NegativeAway`. side: pixels of the picture.
        note: what had to be cut.
    """

    pipe: Any
    call: dict[str, Any]
    guided: dict[str, Any]
    negative: Any
    side: int
    note: str = ""

    @property
    def denoiser(self) -> Any:
        return getattr(self.pipe, "unet", None) or self.pipe.transformer


def make(shape: Shape, device: torch.device, dtype: torch.dtype, *, side: int | None = None, little: bool = False,
         fewest: bool = False) -> Subject:  # fmt: skip
    """The shape on a device; with fewer layers where its memory is too small, and the note says so.

    Args:
        side: pixels, the shape's own by default. little: the tiny configuration. fewest: one layer of each kind.
    """
    config, note = _chosen(shape, device, dtype, little, fewest)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            denoiser = shape.model(**config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    for name, parameter in denoiser.named_parameters():
        if name.endswith("pad_token"):  # their class leaves them to a checkpoint
            nn.init.normal_(parameter, std=0.02)
    pipe = _around(shape.kind, denoiser.to(dtype), shape.scheduler())
    pixels = side or shape.side
    texts = [_text(shape, denoiser, device, dtype, seed) for seed in (1, 2)]
    size = {"height": pixels, "width": pixels, "output_type": "latent"}
    negative = texts[1][0][0][None] if isinstance(texts[1][0], list) else texts[1][0]
    return Subject(pipe, size | _plain(shape, texts[0]), size | _guided(shape, *texts), negative, pixels, note)


def _chosen(
    shape: Shape, device: torch.device, dtype: torch.dtype, little: bool, fewest: bool
) -> tuple[Config, str]:  # fmt: skip
    if little:
        return {**shape.config, **shape.little}, "a tiny configuration"
    if fewest:
        return shape.cut(0), ""
    room, need = free_bytes(device) - RESERVE, MARGIN * weight_bytes(shape, shape.config, dtype)
    if need <= room:
        return shape.config, ""
    base = MARGIN * weight_bytes(shape, shape.cut(0), dtype)
    share = max(0.0, (room - base) / (need - base))
    return shape.cut(share), f"{share:.0%} of the layers: {need / 2**30:.0f} GiB do not fit into {room / 2**30:.0f}"


def weight_bytes(shape: Shape, config: Config, dtype: torch.dtype) -> int:
    """Of the denoiser."""
    with torch.device("meta"):
        return sum(p.numel() for p in shape.model(**config).parameters()) * dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """Memory that nobody uses."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _around(kind: Any, denoiser: nn.Module, scheduler: Any) -> Any:
    parts = dict.fromkeys(kind._get_signature_keys(kind)[0])
    place = "unet" if isinstance(denoiser, UNet2DConditionModel) else "transformer"
    more = {"force_zeros_for_empty_prompt": True, "add_watermarker": False} if place == "unet" else {}
    pipe = kind(**{**parts, place: denoiser, "scheduler": scheduler, **more})
    pipe.set_progress_bar_config(disable=True)
    return pipe


Text = tuple[Any, torch.Tensor | None]
"""Tokens, and the pooled vector where there is one."""


def _text(shape: Shape, denoiser: Any, device: torch.device, dtype: torch.dtype, seed: int) -> Text:
    config, draws = denoiser.config, torch.Generator().manual_seed(seed)

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=draws).to(device, dtype)

    if shape.kind is ZImagePipeline:
        return [drawn(shape.tokens, config.cap_feat_dim)], None
    if shape.kind is FluxPipeline:
        return drawn(1, shape.tokens, config.joint_attention_dim), drawn(1, config.pooled_projection_dim)
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return drawn(1, shape.tokens, config.cross_attention_dim), drawn(1, pooled)


def _plain(shape: Shape, text: Text) -> dict[str, Any]:
    tokens, pooled = text
    pooling = {} if pooled is None else {"pooled_prompt_embeds": pooled}
    return {"prompt_embeds": tokens, "guidance_scale": 0.0} | pooling


def _guided(shape: Shape, text: Text, negative: Text) -> dict[str, Any]:
    scale = "true_cfg_scale" if shape.kind is FluxPipeline else "guidance_scale"
    pooling = {} if negative[1] is None else {"negative_pooled_prompt_embeds": negative[1]}
    return _plain(shape, text) | {"negative_prompt_embeds": negative[0], scale: 4.0} | pooling

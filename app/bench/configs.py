"""Published models as shapes without weights: denoisers on torch's meta device, for counting."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

SD15: dict[str, Any] = {
    "sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2, "attention_head_dim": 8,
    "cross_attention_dim": 768, "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
}  # fmt: skip
SDXL: dict[str, Any] = {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2, "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20), "transformer_layers_per_block": (1, 2, 10), "use_linear_projection": True,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip


def meta_unet(config: dict[str, Any]) -> UNet2DConditionModel:
    """A denoiser without storage."""
    with torch.device("meta"):
        return UNet2DConditionModel(**config).eval()


def meta_pipe(config: dict[str, Any]) -> Any:
    """A pipeline around `meta_unet(config)` that can be grafted; it has no encoders and cannot be called."""
    kind: Any = StableDiffusionXLPipeline if "addition_embed_type" in config else StableDiffusionPipeline
    missing = dict.fromkeys(kind._get_signature_keys(kind)[0])
    if kind is StableDiffusionPipeline:
        missing["requires_safety_checker"] = False
    return kind(**missing | {"unet": meta_unet(config), "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False)})


def meta_inputs(unet: UNet2DConditionModel, rows: int, size: tuple[int, int]) -> dict[str, Any]:
    """Arguments of one denoiser call: `rows` latents of `size` = (h, w), 77 text tokens each."""
    config: Any = unet.config
    with torch.device("meta"):
        inputs: dict[str, Any] = {
            "sample": torch.zeros(rows, config.in_channels, *size), "timestep": torch.zeros(()),
            "encoder_hidden_states": torch.zeros(rows, 77, config.cross_attention_dim),
        }  # fmt: skip
        if config.addition_embed_type:
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            inputs["added_cond_kwargs"] = {"text_embeds": torch.zeros(rows, pooled), "time_ids": torch.zeros(rows, 6)}
    return inputs

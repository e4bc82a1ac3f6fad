"""The picture book's networks and what its training asks of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from transformers import CLIPTextConfig, CLIPTextModel

from .vocabulary import LENGTH, WORDS, tokenizer

TEXT_WIDTH = 128


def build_unet() -> UNet2DConditionModel:
    """Three levels (16, 8 and 4 cells wide); the encoder's finest has no attention, since its maps localise nothing."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(96, 128, 160),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_text_encoder() -> CLIPTextModel:
    """Two layers of CLIP's causal text transformer."""
    config = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return CLIPTextModel(config)


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule with v-prediction.

    Trailing steps start at the last training time, so sampling begins where training's noise ends; the step after the
    last one goes to time 0 of the schedule and not to "no noise at all", so that DDIM inversion starts from a time
    the network was trained at.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def pipeline(vae: AutoencoderKL, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> StableDiffusionPipeline:
    """The parts as a plain StableDiffusionPipeline."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer(),
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


class TrainingAttention:
    """Attention by plain matrix products (faster than the fused kernel's backward pass on a CPU); keeps the maps if
    asked to.
    """

    def __init__(self, keep: bool) -> None:
        self.keep = keep
        self.maps: torch.Tensor | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        **unused: object,
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            part.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for part in (attn.to_q(hidden_states) * attn.scale, attn.to_k(context), attn.to_v(context))
        )
        with torch.autocast(q.device.type, enabled=False):  # it would widen the maps to float32, half of their cost
            maps = (q @ k.mT).softmax(-1)
            mixed = maps @ v
        if self.keep:
            self.maps = maps
        return attn.to_out[0](mixed.transpose(1, 2).flatten(-2))


def watch_decoder(unet: UNet2DConditionModel) -> list[TrainingAttention]:
    """Puts `TrainingAttention` everywhere; returns those of the decoder's cross-attention on 16 x 16 cells, which
    keep their maps.
    """
    finest = f"up_blocks.{len(unet.up_blocks) - 1}."
    processors = {name: TrainingAttention(name.startswith(finest) and "attn2" in name) for name in unet.attn_processors}
    unet.set_attn_processor(dict(processors))
    return [processor for processor in processors.values() if processor.keep]


def grounding_loss(maps: torch.Tensor, masks: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """How much of each word's attention lies outside its thing, by picture: [B], 0 ... 1.

    Args:
        maps: attention of cells to tokens, [B, heads, 256, tokens].
        masks: cover of each cell by each thing, [B, 3, 256], 0 ... 1.
        columns: token columns of each thing's colour and kind, [B, 3, 2], 0 where the word is left out.
    """
    by_token = maps.float().mean(1).mT
    by_token = by_token / by_token.sum(-1, keepdim=True)
    index = columns.flatten(1)
    chosen = by_token.gather(1, index[..., None].expand(-1, -1, by_token.shape[-1]))
    inside = (chosen * masks.repeat_interleave(2, 1)).sum(-1)
    present = (index > 0).float()
    return ((1 - inside).square() * present).sum(1) / present.sum(1).clamp(min=1)


def weighted_loss(error: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Mean squared error by picture, [B]; object cells eight times as heavy as background (error [B, 4, 16, 16],
    masks [B, 3, 256]).
    """
    cover = masks.amax(1).view(-1, 1, *error.shape[-2:])
    weight = 1 + 7 * cover
    return (error.square() * weight).mean((1, 2, 3)) / weight.mean()


def draw_times(count: int) -> torch.Tensor:
    """Timesteps 0 ... 999, dense around the middle, where 16 x 16 latents are decided; one in seven is drawn evenly,
    since sampling starts where the bell is thin.
    """
    shares = torch.where(torch.rand(count) < 1 / 7, torch.rand(count), torch.sigmoid(torch.randn(count) - 0.15))
    return (shares * 1000).long().clamp(max=999)


def with_rim(masks: torch.Tensor) -> torch.Tensor:
    """Masks [B, 3, 16, 16] with a rim of cells at 0.6 around, so that attention may sit on an outline: [B, 3, 256]."""
    grown = F.max_pool2d(masks.flatten(0, 1)[:, None], 3, 1, 1)[:, 0].view_as(masks)
    return torch.maximum(masks, 0.6 * grown).flatten(-2)

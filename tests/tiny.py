"""Tiny random models of the real diffusers classes, built here in milliseconds: no download, no mock."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WIDTH = 32
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
"""What torch's kernels run on: with AVX2 alone half precision rounds more often."""


def tokenizer() -> CLIPTokenizer:
    """Real CLIP tokenizer over letters, with a few whole words; anything else is several tokens."""
    letters = [chr(i) for i in range(33, 127)]
    words = ["ball", "star", "red", "blue", "a", "and", "cat"]
    merges = [pair for word in words for pair in _merges(word)]
    vocab = letters + [x + "</w>" for x in letters] + ["".join(m) for m in merges]
    vocab = [*dict.fromkeys(vocab), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocab)}, merges=merges, model_max_length=77,
        bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>", pad_token="<|endoftext|>",
    )  # fmt: skip


def _merges(word: str) -> list[tuple[str, str]]:
    parts = [*word[:-1], word[-1] + "</w>"]
    pairs: list[tuple[str, str]] = []
    while len(parts) > 1:
        pairs.append((parts[0], parts[1]))
        parts = [parts[0] + parts[1], *parts[2:]]
    return pairs


def text_encoder(seed: int = 2, projection: bool = False, width: int = WIDTH) -> Any:
    torch.manual_seed(seed)
    words = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=77, bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id, projection_dim=WIDTH,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def vae(seed: int = 0, levels: int = 2) -> AutoencoderKL:
    """Makes pictures smaller by 2 ** (levels - 1)."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(16, 32, 32, 32, 32)[:levels], in_channels=3, out_channels=3, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=8, sample_size=32,
    ).eval()  # fmt: skip


def posteriorless(seed: int = 0, levels: int = 2) -> AutoencoderTiny:
    """An autoencoder that gives latents, not a distribution of them."""
    torch.manual_seed(seed)
    return AutoencoderTiny(
        encoder_block_out_channels=(8,) * levels, decoder_block_out_channels=(8,) * levels,
        num_encoder_blocks=(1,) * levels, num_decoder_blocks=(1,) * levels,
    ).eval()  # fmt: skip


def unet(seed: int = 1, in_channels: int = 4, **config: Any) -> UNet2DConditionModel:
    """SD1.x in small: attention at both levels and in the middle, 5 + 1 + 6 transformer blocks."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {
        "block_out_channels": (32, 64), "layers_per_block": 2, "sample_size": 16, "in_channels": in_channels,
        "out_channels": 4, "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2, "cross_attention_dim": WIDTH, "attention_head_dim": 4,
        "norm_num_groups": 8,
    }  # fmt: skip
    return UNet2DConditionModel(**(options | config)).eval()


def ddim(**config: Any) -> DDIMScheduler:
    options: dict[str, Any] = {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
        "set_alpha_to_one": False, "steps_offset": 1,
    }  # fmt: skip
    return DDIMScheduler(**(options | config))


def sd15(seed: int = 1, cls: Any = StableDiffusionPipeline, in_channels: int = 4, **parts: Any) -> Any:
    """SD1.x: epsilon prediction. `parts` replaces or adds components (scheduler=, controlnet=, unet= ...)."""
    components: dict[str, Any] = {
        "vae": vae(), "text_encoder": text_encoder(), "tokenizer": tokenizer(), "scheduler": ddim(),
        "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False,
    }  # fmt: skip
    if "unet" not in parts:
        components["unet"] = unet(seed, in_channels)
    return quiet(cls(**(components | parts)))


def sd2(seed: int = 1, **parts: Any) -> Any:
    """SD2.x: v prediction, linear projections, heads of one size."""
    model = unet(seed, use_linear_projection=True, attention_head_dim=(2, 4))
    return sd15(unet=model, scheduler=ddim(prediction_type="v_prediction"), **parts)


def unet_xl(seed: int = 1, in_channels: int = 4) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=2, sample_size=16, in_channels=in_channels, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=(1, 2), cross_attention_dim=64, norm_num_groups=8,
        projection_class_embeddings_input_dim=8 * 6 + WIDTH,
    ).eval()  # fmt: skip


def sdxl(seed: int = 1, cls: Any = StableDiffusionXLPipeline, **parts: Any) -> Any:
    components: dict[str, Any] = {
        "vae": vae(), "text_encoder": text_encoder(2), "text_encoder_2": text_encoder(3, projection=True),
        "tokenizer": tokenizer(), "tokenizer_2": tokenizer(), "scheduler": ddim(), "add_watermarker": False,
        "force_zeros_for_empty_prompt": True,
    }  # fmt: skip
    if "unet" not in parts:
        components["unet"] = unet_xl(seed)
    return quiet(cls(**(components | parts)))


def controlnet(model: UNet2DConditionModel, seed: int = 5) -> ControlNetModel:
    torch.manual_seed(seed)
    net = ControlNetModel.from_unet(model, conditioning_embedding_out_channels=(16, 32), conditioning_channels=3)
    for parameter in net.parameters():  # its zero convolutions would hide every mistake
        torch.nn.init.normal_(parameter, std=0.05)
    return net.eval()


def double(pipe: Any) -> Any:
    """The pipeline in float64, where rounding hides nothing."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.double()
    return pipe


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: Any, prompt: Any = "a red ball and a blue star", **call: Any) -> torch.Tensor:
    """Latents of a short run, [n, C, h, w]."""
    options: dict[str, Any] = {
        "num_inference_steps": 3, "guidance_scale": 4.0, "height": 32, "width": 32, "output_type": "latent",
    }  # fmt: skip
    if "generator" not in call:
        call["generator"] = torch.Generator().manual_seed(0)
    if "image" in call:
        options = {k: v for k, v in options.items() if k not in ("height", "width")}
    return pipe(prompt, **(options | call)).images

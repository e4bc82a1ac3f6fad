"""Tiny random transformer pipelines of the real diffusers classes, with real tokenizers and text encoders."""

from __future__ import annotations

from typing import Any

import diffusers
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast, T5Config, T5EncoderModel

WORDS = ["<pad>", "</s>", "<unk>", "<bos>", "a", "red", "blue", "ball", "cat", "star", "and", "green"]


def tokenizer(length: int = 16) -> PreTrainedTokenizerFast:
    """One token a word; adds the end mark as T5 does."""
    from tokenizers.processors import TemplateProcessing

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )


def t5(seed: int = 4) -> T5EncoderModel:
    torch.manual_seed(seed)
    return T5EncoderModel(
        T5Config(vocab_size=len(WORDS), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, pad_token_id=0)
    ).eval()


def gemma(seed: int = 4) -> Gemma2Model:
    torch.manual_seed(seed)
    return Gemma2Model(
        Gemma2Config(
            vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=3,
        )
    ).eval()  # fmt: skip


def lively(model: Any, seed: int = 9) -> Any:
    """Zero-initialised gates, tables and biases would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim < 2 or not parameter.any():
            with torch.no_grad():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def vae() -> Any:
    """With the shift that the transformer families' autoencoders have."""
    model = tiny.vae()
    model.register_to_config(shift_factor=0.1)
    return model


def flow() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)


def flux(seed: int = 1, guidance: bool = False, cls: Any = diffusers.FluxPipeline) -> Any:
    torch.manual_seed(seed)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=tiny.WIDTH, axes_dims_rope=(4, 6, 6), guidance_embeds=guidance,
    )  # fmt: skip
    return tiny.quiet(cls(
        transformer=lively(transformer), vae=vae(), scheduler=flow(), text_encoder=tiny.text_encoder(),
        tokenizer=tiny.tokenizer(), text_encoder_2=t5(), tokenizer_2=tokenizer(),
    ))  # fmt: skip


def sd3(seed: int = 1, **config: Any) -> Any:
    torch.manual_seed(seed)
    options: dict[str, Any] = {
        "sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3,
        "attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": 2 * tiny.WIDTH,
        "caption_projection_dim": 32, "pooled_projection_dim": 2 * tiny.WIDTH, "pos_embed_max_size": 16,
        "qk_norm": "rms_norm", "dual_attention_layers": (0,),
    }  # fmt: skip
    return tiny.quiet(diffusers.StableDiffusion3Pipeline(
        transformer=lively(diffusers.SD3Transformer2DModel(**(options | config))), vae=vae(), scheduler=flow(),
        text_encoder=tiny.text_encoder(2, projection=True), tokenizer=tiny.tokenizer(),
        text_encoder_2=tiny.text_encoder(3, projection=True), tokenizer_2=tiny.tokenizer(),
        text_encoder_3=None, tokenizer_3=None,
    ))  # fmt: skip


def pixart(seed: int = 1, cls: Any = diffusers.PixArtSigmaPipeline) -> Any:
    torch.manual_seed(seed)
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=16,
        patch_size=2, cross_attention_dim=32, caption_channels=32, use_additional_conditions=False,
    )  # fmt: skip
    return tiny.quiet(cls(
        transformer=lively(transformer), vae=vae(), scheduler=tiny.ddim(), text_encoder=t5(), tokenizer=tokenizer()
    ))  # fmt: skip


def sana(seed: int = 1, guidance: bool = False) -> Any:
    torch.manual_seed(seed)
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_layers=2,
        num_cross_attention_heads=4, cross_attention_head_dim=8, cross_attention_dim=32, caption_channels=32,
        sample_size=16, qk_norm="rms_norm_across_heads", guidance_embeds=guidance,
    )  # fmt: skip
    torch.manual_seed(seed)
    vae = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), attention_head_dim=4,
        encoder_block_types="ResBlock", decoder_block_types="ResBlock", encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()), downsample_block_type="conv", upsample_block_type="interpolate",
        scaling_factor=0.4, decoder_norm_types="rms_norm", decoder_act_fns="silu",
    )  # fmt: skip
    return tiny.quiet(diffusers.SanaPipeline(
        transformer=lively(transformer), vae=vae, scheduler=flow(), text_encoder=gemma(), tokenizer=tokenizer()
    ))  # fmt: skip


def qwen(seed: int = 1) -> Any:
    """Without its vision-language encoder: prompts are given as embeddings of width 32."""
    torch.manual_seed(seed)
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.8, 1.0, 2.0],
    )  # fmt: skip
    return tiny.quiet(diffusers.QwenImagePipeline(
        transformer=lively(transformer), vae=vae, scheduler=flow(), text_encoder=None, tokenizer=None
    ))  # fmt: skip

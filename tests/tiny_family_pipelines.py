"""Tiny pipelines of the families that people run, with real tokenizers and text encoders."""

from __future__ import annotations

from typing import Any

import diffusers
import tiny
import tiny_families as tf
import tiny_transformers as tt
import torch
from tokenizers import pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3Config,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    UMT5Config,
    UMT5EncoderModel,
)

CHAT = (
    "{% for message in messages %}{{ '<user> ' + message['content'] + ' <end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <reply>' }}{% endif %}"
)


def chatting(length: int = 16) -> PreTrainedTokenizerFast:
    """A word tokenizer with a chat template."""
    made = tt.tokenizer(length)
    made.chat_template = CHAT
    made.add_special_tokens({"additional_special_tokens": ["<user>", "<end>", "<reply>"]})
    return made


def qwen3(width: int = 16, seed: int = 4, layers: int = 3) -> Qwen3Model:
    torch.manual_seed(seed)
    return Qwen3Model(
        Qwen3Config(
            vocab_size=32, hidden_size=width, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
            num_key_value_heads=2, head_dim=8, pad_token_id=0,
        )
    ).eval()  # fmt: skip


def umt5(width: int = 16, seed: int = 4) -> UMT5EncoderModel:
    torch.manual_seed(seed)
    config = UMT5Config(vocab_size=32, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0)
    return UMT5EncoderModel(config).eval()


def z_image(cls: Any = diffusers.ZImagePipeline, **more: Any) -> Any:
    return tiny.quiet(cls(
        transformer=tf.denoiser("ZImageTransformer2DModel"), vae=tt.vae(), scheduler=tt.flow(), text_encoder=qwen3(),
        tokenizer=chatting(), **more,
    ))  # fmt: skip


def chroma(cls: Any = diffusers.ChromaPipeline) -> Any:
    return tiny.quiet(cls(
        transformer=tf.denoiser("ChromaTransformer2DModel"), vae=tt.vae(), scheduler=tt.flow(), text_encoder=tt.t5(),
        tokenizer=tt.tokenizer(),
    ))  # fmt: skip


def lumina2() -> Any:
    torch.manual_seed(1)
    config = tf.TINY["Lumina2Transformer2DModel"].config | {"cap_feat_dim": 32}
    return tiny.quiet(diffusers.Lumina2Pipeline(
        transformer=tt.lively(diffusers.Lumina2Transformer2DModel(**config)), vae=tt.vae(), scheduler=tt.flow(),
        text_encoder=tt.gemma(), tokenizer=tt.tokenizer(64),
    ))  # fmt: skip


def wide_lumina2() -> Any:
    """With an autoencoder of the factor that its pipeline counts on, whatever that really is."""
    made = lumina2()
    made.vae = tiny.vae(levels=4)
    made.vae.register_to_config(shift_factor=0.1)
    return made


def deep_klein() -> Any:
    """With a text encoder of as many layers as the pipeline's usual choice wants."""
    made = klein()
    made.text_encoder = qwen3(8, layers=28)
    return made


def klein() -> Any:
    """Three layers of its text encoder are its text; its autoencoder has batch-norm statistics."""
    torch.manual_seed(1)
    config = tf.TINY["Flux2Transformer2DModel"].config | {"joint_attention_dim": 24}
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4, sample_size=32,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, latent_channels=4,
    )  # fmt: skip
    return tiny.quiet(diffusers.Flux2KleinPipeline(
        transformer=tt.lively(diffusers.Flux2Transformer2DModel(**config)), vae=vae, scheduler=tt.flow(),
        text_encoder=qwen3(8), tokenizer=chatting(),
    ))  # fmt: skip


def krea2() -> Any:
    """Three hidden states of its text encoder are its text."""
    words = reading()
    text = {
        "vocab_size": len(words), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0,
        "rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
    }  # fmt: skip
    torch.manual_seed(4)
    encoder = Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision, **sight(words))).eval()
    return tiny.quiet(diffusers.Krea2Pipeline(
        transformer=tf.denoiser("Krea2Transformer2DModel"), vae=tt.qwen().vae, scheduler=tt.flow(),
        text_encoder=encoder, tokenizer=words, text_encoder_select_layers=(0, 1, 2),
    ))  # fmt: skip


def wan(first: bool = True, second: bool = False, boundary: float | None = None) -> Any:
    """One expert or two."""
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False], latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )  # fmt: skip
    config = tf.models()["WanTransformer3DModel"].config
    made = [tt.lively(diffusers.WanTransformer3DModel(**config), seed) if on else None
            for seed, on in ((9, first), (10, second))]  # fmt: skip
    return tiny.quiet(diffusers.WanPipeline(
        tokenizer=tt.tokenizer(), text_encoder=umt5(), vae=vae, scheduler=tt.flow(), transformer=made[0],
        transformer_2=made[1], boundary_ratio=boundary,
    ))  # fmt: skip


SIGHT = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")


class Processor(Qwen2VLProcessor):
    """The real one for texts and pictures; its processor of films wants torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return type(argument)


def reading() -> PreTrainedTokenizerFast:
    """A word tokenizer that counts ends of lines and marks as Qwen's does."""
    words = chatting(512)
    lines = [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Punctuation()]
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(lines)
    words.add_special_tokens({"additional_special_tokens": list(SIGHT)}, replace_extra_special_tokens=False)
    return words


def sight(words: PreTrainedTokenizerFast) -> dict[str, int]:
    """The marks of pictures, as an encoder's config has them."""
    names = ("vision_start_token_id", "image_token_id", "vision_end_token_id", "video_token_id")
    return dict(zip(names, words.convert_tokens_to_ids(list(SIGHT[2:])), strict=True))


def seeing(width: int = 32, seed: int = 4) -> dict[str, Any]:
    """Qwen2.5-VL in small, with its tokenizer and the processor of pictures: three parts of a pipeline."""
    words = reading()
    text = {
        "vocab_size": len(words), "hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
        "rope_scaling": {"rope_type": "default", "mrope_section": [width // 4 - 6, 3, 3]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width,
        "fullatt_block_indexes": [0], "patch_size": 14, "window_size": 56,
    }  # fmt: skip
    torch.manual_seed(seed)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **sight(words))
    encoder = Qwen2_5_VLForConditionalGeneration(config)
    pictures = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56)
    return {"text_encoder": encoder.eval(), "tokenizer": words, "processor": Processor(pictures, words, None)}


def qwen(cls: Any = diffusers.QwenImagePipeline) -> Any:
    """With its vision-language encoder, which sees the picture to edit."""
    parts = tt.qwen().components | seeing()
    if cls is diffusers.QwenImagePipeline:
        parts.pop("processor")
    return tiny.quiet(cls(**parts))


def ernie() -> Any:
    """Its text encoder gives each prompt its own length."""
    torch.manual_seed(1)
    config = tf.models()["ErnieImageTransformer2DModel"].config | {"in_channels": 16, "out_channels": 16}
    return tiny.quiet(diffusers.ErnieImagePipeline(
        transformer=tt.lively(diffusers.ErnieImageTransformer2DModel(**config)), vae=klein().vae, scheduler=tt.flow(),
        text_encoder=qwen3(), tokenizer=tt.tokenizer(),
    ))  # fmt: skip


def hidream() -> Any:
    """Two CLIPs for its pooled text, T5, and a language model of which each block has a layer."""
    torch.manual_seed(1)
    config = tf.models()["HiDreamImageTransformer2DModel"].config | {
        "caption_channels": [32, 16], "text_emb_dim": 2 * tiny.WIDTH
    }  # fmt: skip
    encoders = [tiny.text_encoder(seed, projection=True) for seed in (2, 3)]
    made = tiny.quiet(diffusers.HiDreamImagePipeline(
        transformer=tt.lively(diffusers.HiDreamImageTransformer2DModel(**config)), vae=tt.vae(), scheduler=tt.flow(),
        text_encoder=encoders[0], tokenizer=tiny.tokenizer(), text_encoder_2=encoders[1], tokenizer_2=tiny.tokenizer(),
        text_encoder_3=tt.t5(), tokenizer_3=tt.tokenizer(), text_encoder_4=llama(), tokenizer_4=tt.tokenizer(),
    ))  # fmt: skip
    made.default_sample_size = 16  # to which it brings every size
    return made


def llama(seed: int = 5) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0,
        output_hidden_states=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def flux3() -> Any:
    """A modular pipeline, without the model that rewrites prompts."""
    blocks, words = diffusers.Flux3AutoBlocks(), reading()
    blocks.sub_blocks.pop("prompt_upsampler")
    reader = Processor(Qwen2VLImageProcessorPil(), words, None)
    reader.chat_template = CHAT
    torch.manual_seed(1)
    config = tf.models()["Flux3Transformer2DModel"].config | {"joint_attention_dim": 48}
    pipe = blocks.init_pipeline()
    pipe.update_components(
        transformer=tt.lively(diffusers.Flux3Transformer2DModel(**config)), text_encoder=krea2().text_encoder,
        tokenizer=reader, vae=klein().vae, scheduler=tt.flow(),
    )  # fmt: skip
    return tiny.quiet(pipe)

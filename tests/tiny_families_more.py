"""The other half of the tiny denoisers: families that hear their negative by the same mechanism."""

from __future__ import annotations

from typing import Any

import torch
from tiny_families import E, M, Tiny, grid, normal

JOINT = r".*transformer_blocks\.\d+\.attn1?"
CROSS = r".*blocks\.\d+\.attn2"
WAN = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
       "freq_dim": 16, "ffn_dim": 32, "num_layers": 2}  # fmt: skip
FLUX = {"in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6)}  # fmt: skip


def row(n: int, *shape: int, seed: int = 3) -> torch.Tensor:
    """The same for all rows: pooled texts stay the prompt's."""
    return normal(1, *shape, seed=seed).expand(n, *shape).contiguous()


def sizes(n: int, lengths: list[int], longest: int) -> dict[str, Any]:
    pixels = torch.tensor([[64.0, 64.0]]).expand(n, -1)
    return {"original_size": pixels, "target_size": pixels, "crop_coords": torch.zeros(n, 2)}


def ids(axes: tuple[int, ...]) -> Any:
    def more(n: int, lengths: list[int], longest: int) -> dict[str, Any]:
        text = torch.zeros(longest, 3)
        for axis in axes:
            text[:, axis] = torch.arange(longest)
        return {"txt_ids": text, "img_ids": grid(4, 6)}

    return more


def cog(n: int, lengths: list[int], longest: int) -> dict[str, Any]:
    return {"timestep": torch.full((n,), 700)}


def dit(n: int, lengths: list[int], longest: int) -> dict[str, Any]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    rope = get_2d_rotary_pos_embed(8, ((0, 0), (4, 4)), (4, 4), output_type="pt")
    return {
        "text_embedding_mask": torch.ones(n, longest), "encoder_hidden_states_t5": row(n, 5, 16),
        "text_embedding_mask_t5": torch.ones(n, 5), "image_meta_size": row(n, 6).abs(),
        "style": torch.zeros(n, dtype=torch.long), "image_rotary_emb": rope,
    }  # fmt: skip


def kandinsky(n: int, lengths: list[int], longest: int) -> dict[str, Any]:
    places = [torch.arange(k) for k in (1, 4, 4)]
    return {"pooled_projections": row(n, 16), "visual_rope_pos": places, "text_rope_pos": torch.arange(longest),
            "timestep": torch.full((n,), 700.0)}  # fmt: skip


def lumina(n: int, lengths: list[int], longest: int) -> dict[str, Any]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return {"image_rotary_emb": get_2d_rotary_pos_embed_lumina(8, 384, 384), "cross_attention_kwargs": {}}


def moe(n: int, lengths: list[int], longest: int) -> dict[str, Any]:
    return {"img_shapes": [(1, 4, 6)] * n}


def motion(n: int, lengths: list[int], longest: int) -> dict[str, Any]:
    return {"timestep": 700}


def frames(texts: int) -> Any:
    """AnimateDiff's pipeline repeats the text for every frame."""

    def inputs(spec: Tiny, rows: list[torch.Tensor], image: torch.Tensor) -> dict[str, Any]:
        text = torch.stack(rows).repeat_interleave(texts, 0)
        return {"sample": image.expand(len(rows), *image.shape), "timestep": 700, E: text, "return_dict": False}

    return inputs


def allegro(n: int, lengths: list[int], longest: int) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    found = get_3d_rotary_pos_embed_allegro(24, ((0, 0), (4, 4)), (4, 4), 2, device=torch.device("cpu"))
    places = torch.cartesian_prod(*(grid.long() for grid in found[3:])).T.reshape(3, 1, -1)
    return {"image_rotary_emb": (found[:3], tuple(places)), "attention_mask": torch.ones(n, 2, 8, 8),
            "timestep": torch.full((n,), 700)}  # fmt: skip


def ltx(n: int, lengths: list[int], longest: int) -> dict[str, Any]:
    return {"num_frames": 2, "height": 3, "width": 4}


def meanflow(n: int, lengths: list[int], longest: int) -> dict[str, Any]:
    return {"timestep": torch.full((n, 2), 700.0), "r_timestep": torch.zeros(n, 2)}


def picture(n: int, lengths: list[int], longest: int) -> dict[str, Any]:
    return {"encoder_hidden_states_image": row(n, 257, 16)}


def vace(n: int, lengths: list[int], longest: int) -> dict[str, Any]:
    return {"control_hidden_states": row(n, 6, 2, 8, 8) * 0, "control_hidden_states_scale": torch.zeros(1)}


def hunyuan(n: int, lengths: list[int], longest: int) -> dict[str, Any]:
    return {"pooled_projections": row(n, 8), "guidance": torch.full((n,), 6000.0)}


def hunyuan15(n: int, lengths: list[int], longest: int) -> dict[str, Any]:
    return {"encoder_hidden_states_2": row(n, 3, 16), "encoder_attention_mask_2": torch.ones(n, 3),
            "image_embeds": torch.zeros(n, 2, 12)}  # fmt: skip


def glm(n: int, lengths: list[int], longest: int) -> dict[str, Any]:
    prior = torch.arange(24)[None].expand(n, -1) % 16
    return {"prior_token_id": prior, "prior_token_drop": torch.zeros(n, dtype=torch.bool),
            "target_size": torch.tensor([[64.0, 64.0]]).expand(n, -1), "crop_coords": torch.zeros(n, 2)}  # fmt: skip


def cosmos(n: int, lengths: list[int], longest: int) -> dict[str, Any]:
    return {"fps": 24, "padding_mask": torch.zeros(1, 1, 8, 8)}


UNEVEN = ((7, 7), (12, 5), (4, 9))
FILM = (4, 2, 8, 8)

def ernie(spec: Tiny, texts: list[torch.Tensor], image: torch.Tensor) -> dict[str, Any]:
    longest = max(map(len, texts))
    rows = torch.stack([torch.nn.functional.pad(text, (0, 0, 0, longest - len(text))) for text in texts])
    lengths = torch.tensor([len(text) for text in texts])
    return {
        "hidden_states": image.expand(len(texts), *image.shape), "timestep": torch.full((len(texts),), 700.0),
        "text_bth": rows, "text_lens": lengths, "return_dict": False,
    }  # fmt: skip


def flux3(n: int, lengths: list[int], longest: int) -> dict[str, Any]:
    text = torch.zeros(longest, 4)
    text[:, 3] = torch.arange(longest)
    return {"txt_ids": text, "img_ids": grid(4, 6, 4)}


def llama(text: torch.Tensor) -> torch.Tensor:
    """Two layers of a language model for a text [L, 16]."""
    return torch.stack([text[:, :12] * 0.9, text[:, 4:] - 0.1])


def hidream(spec: Tiny, texts: list[torch.Tensor], image: torch.Tensor) -> dict[str, Any]:
    return {
        "hidden_states": image.expand(len(texts), *image.shape), "timesteps": torch.full((len(texts),), 700.0),
        "encoder_hidden_states_t5": torch.stack(texts), "pooled_embeds": torch.stack([text.mean(0) for text in texts]),
        "encoder_hidden_states_llama3": torch.stack([llama(text) for text in texts], 1), "return_dict": False,
    }  # fmt: skip


MORE: dict[str, Tiny] = {
    "Flux3Transformer2DModel": Tiny(
        {"in_channels": 16, "cond_in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16,
         "num_attention_heads": 2, "joint_attention_dim": 16, "timestep_channels": 16, "axes_dims_rope": (4, 4, 4, 4)},
        (24, 16), (16,), r"single_transformer_blocks\.\d+\.attn", "TI", 24, flux3,
    ),
    "ErnieImageTransformer2DModel": Tiny(
        {"hidden_size": 32, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 32, "in_channels": 4,
         "out_channels": 4, "patch_size": 1, "text_in_dim": 16, "rope_axes_dim": (4, 6, 6)},
        (4, 4, 6), (16,), r"layers\.\d+\.self_attention", "IT", 24, inputs=ernie, lengths=((7, 7), (9, 4), (4, 9)),
    ),
    "HiDreamImageTransformer2DModel": Tiny(
        {"patch_size": 2, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8,
         "num_attention_heads": 2, "caption_channels": [16, 12], "text_emb_dim": 16, "num_routed_experts": 2,
         "num_activated_experts": 1, "axes_dims_rope": (4, 2, 2), "max_resolution": (8, 8),
         "llama_layers": [0, 1, 1, 0], "force_inference_output": True},
        (4, 8, 8), (16,), r".*_stream_blocks\.\d+\.block\.attn1", "IT", 16, inputs=hidream, pad=lambda n: 3 * n,
    ),
    "WanTransformer3DModel": Tiny(WAN, FILM, (16,), CROSS, "cross", 0),
    "WanTransformer3DModel with a picture": Tiny(
        WAN | {"image_dim": 16, "added_kv_proj_dim": 24}, FILM, (16,), CROSS, "cross", 0, picture, own=1,
        lengths=((512, 512),),
    ),
    "LTXVideoTransformer3DModel": Tiny(
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8,
         "cross_attention_dim": 16, "num_layers": 2, "caption_channels": 16},
        (24, 4), (16,), CROSS, "cross", 0, ltx, mask=M, always=True, lengths=UNEVEN,
    ),
    "HunyuanVideoTransformer3DModel": Tiny(
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1,
         "num_single_layers": 2, "num_refiner_layers": 1, "patch_size": 2, "text_embed_dim": 16,
         "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4)},
        FILM, (16,), JOINT, "IT", 32, hunyuan, mask=M, always=True, lengths=UNEVEN,
    ),
    "HunyuanVideo15Transformer3DModel": Tiny(
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
         "num_refiner_layers": 1, "text_embed_dim": 16, "text_embed_2_dim": 16, "image_embed_dim": 12,
         "rope_axes_dim": (2, 6, 8), "target_size": 16, "task_type": "t2v"},
        (4, 1, 4, 4), (16,), JOINT, "IT", 16, hunyuan15, mask=M, always=True, pad=lambda n: n + 5,
    ),
    "CogVideoXTransformer3DModel": Tiny(
        {"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
         "text_embed_dim": 16, "num_layers": 2, "sample_width": 8, "sample_height": 8, "sample_frames": 8,
         "max_text_seq_length": 7, "use_rotary_positional_embeddings": False},
        (2, 4, 8, 8), (16,), JOINT, "TI", 32, cog,
    ),
    "ConsisIDTransformer3DModel": Tiny(
        {"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
         "text_embed_dim": 16, "num_layers": 2, "sample_width": 8, "sample_height": 8, "sample_frames": 8,
         "max_text_seq_length": 7, "use_rotary_positional_embeddings": False},
        (2, 4, 8, 8), (16,), r"transformer_blocks\.\d+\.attn1", "TI", 32, cog,
    ),
    "AllegroTransformer3DModel": Tiny(
        {"num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4, "num_layers": 2,
         "cross_attention_dim": 48, "sample_width": 8, "sample_height": 8, "sample_frames": 2,
         "caption_channels": 16},
        FILM, (16,), r"transformer_blocks\.\d+\.attn2", "cross", 0, allegro, mask=M, always=True, lengths=UNEVEN,
    ),
    "AuraFlowTransformer2DModel": Tiny(
        {"sample_size": 8, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 2,
         "attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": 16, "caption_projection_dim": 32,
         "pos_embed_max_size": 64},
        (4, 8, 8), (16,), JOINT, "TI", 16, pad=lambda n: n + 8, lengths=UNEVEN[:1], strength=2.0,
    ),
    "CogView4Transformer2DModel": Tiny(
        {"in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4,
         "text_embed_dim": 16, "time_embed_dim": 8, "condition_dim": 4, "rope_axes_dim": (16, 16)},
        (4, 8, 8), (16,), JOINT, "TI", 16, sizes,
    ),
    "CogView3PlusTransformer2DModel": Tiny(
        {"in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4,
         "text_embed_dim": 16, "time_embed_dim": 8, "condition_dim": 4, "pos_embed_max_size": 8, "sample_size": 8},
        (4, 8, 8), (16,), JOINT, "TI", 16, sizes,
    ),
    "HunyuanImageTransformer2DModel": Tiny(
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1,
         "num_single_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 16, "rope_axes_dim": (4, 4)},
        (4, 4, 6), (16,), JOINT, "IT", 24, mask=M, always=True, lengths=UNEVEN,
    ),
    "HunyuanDiT2DModel": Tiny(
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "patch_size": 2, "sample_size": 8,
         "hidden_size": 16, "num_layers": 2, "cross_attention_dim": 16, "cross_attention_dim_t5": 16,
         "pooled_projection_dim": 8, "text_len": 7, "text_len_t5": 5, "activation_fn": "gelu-approximate"},
        (4, 8, 8), (16,), r"blocks\.\d+\.attn2", "cross", 0, dit,
    ),
    "BriaTransformer2DModel": Tiny(FLUX, (24, 16), (32,), JOINT, "TI", 24, ids(())),
    "OvisImageTransformer2DModel": Tiny(FLUX, (24, 16), (32,), JOINT, "TI", 24, ids((1, 2))),
    "LongCatImageTransformer2DModel": Tiny(
        FLUX | {"pooled_projection_dim": 32}, (24, 16), (32,), JOINT, "TI", 24, ids((1, 2))
    ),
    "GlmImageTransformer2DModel": Tiny(
        {"in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4,
         "text_embed_dim": 16, "time_embed_dim": 8, "condition_dim": 4, "prior_vq_quantizer_codebook_size": 16},
        (4, 8, 12), (16,), JOINT, "TI", 24, glm,
    ),
    "Kandinsky5Transformer3DModel": Tiny(
        {"in_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 16, "time_dim": 16, "out_visual_dim": 4,
         "model_dim": 32, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (2, 6, 8)},
        (1, 8, 8, 4), (16,), r"visual_transformer_blocks\.\d+\.cross_attention", "cross", 0, kandinsky,
        error=2e-5, lengths=UNEVEN[:1],
    ),
    "LuminaNextDiT2DModel": Tiny(
        {"sample_size": 8, "in_channels": 4, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 4,
         "num_kv_heads": 2, "multiple_of": 16, "cross_attention_dim": 16, "learn_sigma": False},
        (4, 8, 8), (16,), r"layers\.\d+\.attn2", "cross", 0, lumina, mask="encoder_mask", always=True,
        pooled="time_caption_embed",
    ),
    "PRXTransformer2DModel": Tiny(
        {"in_channels": 4, "context_in_dim": 16, "hidden_size": 32, "num_heads": 4, "depth": 2,
         "axes_dim": [4, 4], "mlp_ratio": 2.0},
        (4, 8, 8), (16,), r"blocks\.\d+\.attention", "TIkeys", 16, mask="attention_mask", always=True,
        lengths=UNEVEN,
    ),
    "NucleusMoEImageTransformer2DModel": Tiny(
        {"in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
         "num_key_value_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (4, 6, 6), "moe_enabled": False},
        (24, 16), (16,), r"transformer_blocks\.\d+\.attn", "ITkeys", 24, moe, mask="encoder_hidden_states_mask",
        lengths=UNEVEN,
    ),
    "WanVACETransformer3DModel": Tiny(
        WAN | {"vace_layers": [0], "vace_in_channels": 6}, FILM, (16,), r"blocks\.\d+\.attn2", "cross", 0, vace,
    ),
    "ChronoEditTransformer3DModel": Tiny(WAN, FILM, (16,), CROSS, "cross", 0),
    "SkyReelsV2Transformer3DModel": Tiny(WAN, FILM, (16,), CROSS, "cross", 0),
    "AnyFlowTransformer3DModel": Tiny(WAN, (2, 4, 8, 8), (16,), CROSS, "cross", 0, meanflow),
    "HeliosTransformer3DModel": Tiny(
        WAN | {"rope_dim": (4, 4, 4)}, FILM, (16,), CROSS, "cross", 0,
    ),
    "SanaVideoTransformer3DModel": Tiny(
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2,
         "num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": 24,
         "caption_channels": 16, "sample_size": 8},
        FILM, (16,), CROSS, "cross", 0, mask=M, always=True, lengths=UNEVEN,
    ),
    "LatteTransformer3DModel": Tiny(
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2,
         "cross_attention_dim": 16, "sample_size": 8, "patch_size": 2, "caption_channels": 16, "video_length": 2,
         "norm_type": "ada_norm_single", "activation_fn": "gelu-approximate", "norm_elementwise_affine": False},
        FILM, (16,), r"transformer_blocks\.\d+\.attn2", "cross", 0, cog,
    ),
    "CosmosTransformer3DModel": Tiny(
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
         "text_embed_dim": 16, "adaln_lora_dim": 4, "max_size": (4, 16, 16), "concat_padding_mask": False},
        FILM, (16,), CROSS, "cross", 0, cosmos,
    ),
    "MotifVideoTransformer3DModel": Tiny(
        {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1,
         "num_single_layers": 2, "text_embed_dim": 16, "rope_axes_dim": (2, 4, 4)},
        FILM, (16,), JOINT, "IT", 32, mask=M, always=True,
    ),
    "UNetMotionModel": Tiny(
        {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
         "cross_attention_dim": 16, "num_attention_heads": 2, "motion_num_attention_heads": 2,
         "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
         "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion")},
        FILM, (16,), r".*attentions\.\d+\.transformer_blocks\.\d+\.attn2", "cross", 0, inputs=frames(2),
    ),
}  # fmt: skip
"""Denoiser class -> tiny model."""

"""The transformer edition's networks and what its training asks of them.

A plain `ZImagePipeline`: one stream of image and text tokens, rotary positions, rectified flow. The transformer's
output is the velocity towards the picture, and its time runs from 0 (noise) to 1.
"""

from __future__ import annotations

import shutil

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from diffusers.models.attention_processor import Attention
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

from .denoiser import TEXT_WIDTH
from .shapes import COLOURS, SHAPES
from .vocabulary import WORDS, tokenizer

TEMPLATE = "{{ messages[0]['content'] }}"  # the pipeline speaks to its encoder as to a chat model
OUTSIDE = ("embed", "final_layer", "pad_token")  # weights that Muon is not for
LABELS = (len(SHAPES) + 1, len(COLOURS) + 1)  # each with one for "nothing"


def build_transformer() -> ZImageTransformer2DModel:
    """One refining layer of each kind and five joint ones, 7.7 million parameters; all layers start as the identity."""
    model = ZImageTransformer2DModel(
        in_channels=4,
        dim=256,
        n_layers=5,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[16, 24, 24],
        axes_lens=[1024, 512, 512],
    )
    for name, p in model.named_parameters():
        if "adaLN_modulation" in name or "final_layer" in name:
            torch.nn.init.zeros_(p)
    return model


def build_text_encoder() -> Qwen3Model:
    """Two layers of Qwen3's causal text transformer; the pipeline reads what goes into the last one."""
    config = Qwen3Config(
        vocab_size=len(WORDS),
        hidden_size=TEXT_WIDTH,
        intermediate_size=3 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=TEXT_WIDTH // 2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Qwen3Model(config)


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Euler steps on a straight path; more of them where there is much noise."""
    return FlowMatchEulerDiscreteScheduler(shift=2.0)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """The picture book's words, behind the template that the pipeline asks for."""
    words = tokenizer()
    words.chat_template = TEMPLATE
    return words


def pipeline(vae: AutoencoderKL, transformer: ZImageTransformer2DModel, text_encoder: Qwen3Model) -> ZImagePipeline:
    """The parts as a plain ZImagePipeline."""
    return ZImagePipeline(
        scheduler=build_scheduler(),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=chat_tokenizer(),
        transformer=transformer,
    )


def encode_words(text_encoder: Qwen3Model, tokens: torch.Tensor) -> list[torch.Tensor]:
    """What the pipeline's own `encode_prompt` returns for token ids [B, 20] padded with 0: one [n, 128] a caption.

    The encoder is causal, so what pads a caption at its end changes nothing before it.
    """
    states = text_encoder(input_ids=tokens, attention_mask=tokens.ne(0), output_hidden_states=True).hidden_states[-2]
    return [row[:count] for row, count in zip(states, tokens.ne(0).sum(1).tolist(), strict=True)]


class TrainingAttention:
    """`ZSingleStreamAttnProcessor` by plain matrix products, which are faster than the fused kernel's backward pass on
    a CPU; on the sequences of training, none of which is padded.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        freqs_cis: torch.Tensor | None = None,
    ) -> torch.Tensor:
        q, k, v = (to(hidden_states).unflatten(-1, (attn.heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v))
        turn = torch.view_as_real(freqs_cis).to(q.dtype)[:, :, None]
        q, k = (rotate(part, turn).transpose(1, 2) for part in (attn.norm_q(q), attn.norm_k(k)))
        maps = (q * attn.scale @ k.mT).softmax(-1)
        return attn.to_out[0]((maps @ v.transpose(1, 2)).transpose(1, 2).flatten(-2))


def processors(transformer: ZImageTransformer2DModel, processor: object) -> None:
    """Puts a processor into every attention layer; the class itself offers no way to."""
    for module in transformer.modules():
        if isinstance(module, Attention):
            module.set_processor(processor)


def compile_blocks(transformer: ZImageTransformer2DModel, device: str) -> None:
    """A fifth faster on a CPU: products apart, what a block does is small and fuses. Needs a C++ compiler there."""
    if shutil.which("c++") or device != "cpu":
        transformer.compile_repeated_blocks()


def rotate(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Pairs of neighbours in [B, L, heads, d] turned by (cosine, sine) [B, L, 1, d / 2, 2]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = turn.unbind(-1)
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], -1).flatten(-2)


class Spread:
    """A rotary embedder whose picture positions are `by` times as far apart: pooled latents lie on the whole grid."""

    def __init__(self, embed: object, by: int) -> None:
        self.embed, self.by = embed, by

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embed(ids * torch.tensor([1, self.by, self.by], device=ids.device))


def label_targets(masks: torch.Tensor, things: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What covers each cell, as shares that sum to 1: kinds [B, cells, 11] and colours [B, cells, 9], "nothing" first.

    Args:
        masks: cover of each cell by each thing, [B, 3, h, w], 0 ... 1.
        things: token ids of each thing's colour and kind, [B, 3, 2], 0 where there is none.
    """
    cover = masks.flatten(2).mT
    nothing = (1 - cover.sum(-1, keepdim=True)).clamp(min=0)
    found = []
    for column, words in ((1, SHAPES), (0, COLOURS)):
        ids = torch.tensor([WORDS.index(word) for word in words], device=things.device)
        named = (things[..., column, None] == ids).to(cover.dtype)
        found.append(torch.cat([nothing, cover @ named], -1))
    return found[0], found[1]


def label_loss(scores: torch.Tensor, masks: torch.Tensor, things: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of what a cell's token says it shows, by picture, [B]; covered cells eight times as heavy (scores
    [B, cells, 20]).
    """
    weight = 1 + 7 * masks.amax(1).flatten(1)
    lost = [
        -(target * part.float().log_softmax(-1)).sum(-1)
        for target, part in zip(label_targets(masks, things), scores.split(LABELS, -1), strict=True)
    ]
    return ((lost[0] + lost[1]) * weight).mean(1) / weight.mean()


def draw_noise_levels(count: int, centre: float) -> torch.Tensor:
    """Shares of noise 0 ... 1, logit-normal around `centre`; one in seven is drawn evenly, since sampling starts where
    the bell is thin.
    """
    bell = torch.sigmoid(torch.randn(count) + centre)
    return torch.where(torch.rand(count) < 1 / 7, torch.rand(count), bell)

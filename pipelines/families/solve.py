"""How a family's pipeline calls its denoiser in its loop, as far as a loop of our own must do the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .words import own_words

Inputs = dict[str, Any]
Size = tuple[int, int]


@dataclass(frozen=True)
class Solve:
    """The loop's conventions. All families with one step along the scheduler's sigmas or alphas.

    Attributes:
        inputs: (pipe, denoiser, texts, size of the latents) -> what the denoiser takes besides sample and time.
        time: what the denoiser is told at a timestep t of 1000 ... 0: "steps" is t, "unit" t / 1000, "rising"
            1 - t / 1000, "scaled" t times the config's `timestep_scale`.
        negated: the prediction is the negative of the scheduler's.
        sigmas: the pipeline gives the scheduler sigmas evenly from 1 to 1 / steps.
        shift: (pipe, scheduler, size, steps) -> `mu` for the scheduler, None for none.
        handed: how `latents=` of the pipeline lies: "grid", or "packed" as in the sample.
        pipelines: names of its text-to-image pipelines, whose image-to-image and inpainting forms take the same parts.
        guided_by: their argument for guidance by a negative; unguided: its value for none.
    """

    inputs: Callable[[Any, Any, Sequence[str], Size], Inputs]
    time: Literal["steps", "unit", "rising", "scaled"] = "unit"
    negated: bool = False
    sigmas: bool = True
    shift: Callable[[Any, Any, Size, int], float | None] | None = None
    handed: Literal["grid", "packed"] = "grid"
    pipelines: tuple[str, ...] = ()
    guided_by: str = "guidance_scale"
    unguided: float = 1.0


# -- time shifts -----------------------------------------------------------------------------------------------------


def dynamic_shift(tokens: int, scheduler: Any, most: float) -> float:
    """The time shift `mu` of the pipelines: linear in the number of image tokens."""
    config = scheduler.config
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", most)
    return low + (high - low) * (tokens - few) / (many - few)


def by_cells(pipe: Any, scheduler: Any, size: Size, steps: int) -> float:
    """By cells of 2 x 2 latents."""
    return dynamic_shift((size[0] // 2) * (size[1] // 2), scheduler, 1.15)


def by_cells_if_dynamic(pipe: Any, scheduler: Any, size: Size, steps: int) -> float | None:
    """By cells where the scheduler asks for it: SD3.5."""
    if not scheduler.config.get("use_dynamic_shifting"):
        return None
    patch = pipe.transformer.config.patch_size
    return dynamic_shift((size[0] // patch) * (size[1] // patch), scheduler, 1.16)


def by_channels(pipe: Any, scheduler: Any, size: Size, steps: int) -> float:
    """Lumina 2's pipeline takes the number of channels for the number of tokens; so its pictures are sampled."""
    return dynamic_shift(pipe.transformer.config.in_channels, scheduler, 1.15)


def empirical(pipe: Any, scheduler: Any, size: Size, steps: int) -> float:
    """FLUX.2's own."""
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    return compute_empirical_mu(size[0] * size[1], steps)


# -- texts and what goes with them -------------------------------------------------------------------------------------


def encoded(pipe: Any, texts: Sequence[str], **more: Any) -> Any:
    """Texts by the pipeline's `encode_prompt` with what its call gives it by default."""
    taken = inspect.signature(pipe.encode_prompt).parameters
    call = inspect.signature(type(pipe).__call__).parameters
    usual = ("max_sequence_length", "complex_human_instruction", "system_prompt", "text_encoder_out_layers")
    given = {n: call[n].default for n in usual if n in taken and n in call}
    given |= {"device": pipe._execution_device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    given |= more
    with own_words(pipe) as own:
        return own.encode_prompt(list(texts), **{n: value for n, value in given.items() if n in taken})


def _guidance(denoiser: Any, texts: Sequence[str], like: torch.Tensor) -> torch.Tensor | None:
    """A guidance-distilled model runs at guidance 1, where inversion is stable."""
    return torch.ones(len(texts), device=like.device) if denoiser.config.guidance_embeds else None


def _places(size: Size, like: torch.Tensor) -> torch.Tensor:
    """(0, row, column) of each cell of 2 x 2 latents, [cells, 3]."""
    rows, columns = (torch.arange(side // 2) for side in size)
    return torch.cartesian_prod(torch.zeros(1, dtype=rows.dtype), rows, columns).to(like)


def flux(pipe: Any, denoiser: Any, texts: Sequence[str], size: Size) -> Inputs:
    """FLUX.1's text, its pooled form, and positions."""
    embeddings, pooled, text_ids = encoded(pipe, texts, prompt_2=None)
    return {
        "encoder_hidden_states": embeddings, "pooled_projections": pooled, "txt_ids": text_ids,
        "img_ids": _places(size, embeddings),
        "guidance": _guidance(denoiser, texts, embeddings),
    }  # fmt: skip


def flux2(pipe: Any, denoiser: Any, texts: Sequence[str], size: Size) -> Inputs:
    """FLUX.2's text and positions; a latent is a token."""
    embeddings, text_ids = encoded(pipe, texts)
    ids = pipe._prepare_latent_ids(embeddings.new_zeros(len(texts), 1, *size)).to(embeddings.device)
    guidance = _guidance(denoiser, texts, embeddings)
    return {"encoder_hidden_states": embeddings, "txt_ids": text_ids, "img_ids": ids, "guidance": guidance}


def sd3(pipe: Any, denoiser: Any, texts: Sequence[str], size: Size) -> Inputs:
    """SD3's text and its pooled form."""
    found = encoded(pipe, texts, prompt_2=None, prompt_3=None)
    return {"encoder_hidden_states": found[0], "pooled_projections": found[2]}


def qwen(pipe: Any, denoiser: Any, texts: Sequence[str], size: Size) -> Inputs:
    """Qwen-Image's text, its mask, and the grid."""
    embeddings, mask = encoded(pipe, texts)
    shapes = [[(1, size[0] // 2, size[1] // 2)]] * len(texts)
    guidance = _guidance(denoiser, texts, embeddings)
    given = {"encoder_hidden_states": embeddings, "encoder_hidden_states_mask": mask, "img_shapes": shapes}
    return given | {"guidance": guidance}


def z_image(pipe: Any, denoiser: Any, texts: Sequence[str], size: Size) -> Inputs:
    """Z-Image's texts, a list."""
    return {"cap_feats": encoded(pipe, texts)[0]}


def chroma(pipe: Any, denoiser: Any, texts: Sequence[str], size: Size) -> Inputs:
    """Chroma's text, its mask, which covers the image too, and positions."""
    embeddings, text_ids, mask, *_ = encoded(pipe, texts)
    ids = _places(size, embeddings)
    whole = pipe._prepare_attention_mask(len(texts), len(ids), embeddings.dtype, mask)
    return {"encoder_hidden_states": embeddings, "txt_ids": text_ids, "img_ids": ids, "attention_mask": whole}


def masked(pipe: Any, denoiser: Any, texts: Sequence[str], size: Size) -> Inputs:
    """A text and its mask: Lumina 2, Sana."""
    embeddings, mask, *_ = encoded(pipe, texts)
    given: Inputs = {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}
    if getattr(denoiser.config, "guidance_embeds", False):
        given["guidance"] = embeddings.new_ones(len(texts)) * getattr(denoiser.config, "guidance_embeds_scale", 1.0)
    return given


def pixart(pipe: Any, denoiser: Any, texts: Sequence[str], size: Size) -> Inputs:
    """PixArt's text, its mask, and for the older one sizes in pixels."""
    embeddings, mask, *_ = encoded(pipe, texts)
    sizes: Inputs = {"resolution": None, "aspect_ratio": None}
    if getattr(denoiser, "use_additional_conditions", False):
        pixels = torch.tensor([[pipe.vae_scale_factor * side for side in size]] * len(texts))
        ratio = torch.full((len(texts), 1), size[0] / size[1])
        sizes = {"resolution": pixels.to(embeddings), "aspect_ratio": ratio.to(embeddings)}
    return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask, "added_cond_kwargs": sizes}

"""Tiny random denoisers of the real diffusers classes, each with the arguments that its pipelines send."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import tiny_transformers as tt
import torch

E, M = "encoder_hidden_states", "encoder_attention_mask"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Tiny:
    """A denoiser and how it is called.

    Attributes:
        config: of the class. image: shape of a row of the sample. width: of the text, its last dimensions.
        layers: pattern of the names of the layers in which text and image meet.
        how: "TI" and "IT" (one sequence, text or image first), "cross", "TIkeys" and "ITkeys".
        more: (n rows, lengths, longest) -> further arguments.
        sample: the sample's name. mask: the text mask's name, given where texts differ in length or always.
        always: whether the mask is always given. pad: columns of a text of so many tokens in the sequence.
        fixed: all texts are padded to so many tokens, the mask says which are real.
        tight: the image follows its row's own text at once. tokens: of the image in the sequence.
        pooled: module that also pools the text; its output stays the prompt's.
        error: what is allowed. lengths: of prompt and negative.
    """

    config: dict[str, Any]
    image: tuple[int, ...]
    width: tuple[int, ...]
    layers: str
    how: str
    tokens: int
    more: Callable[[int, list[int], int], dict[str, Any]] = lambda n, lengths, longest: {}
    sample: str = "hidden_states"
    mask: str = ""
    always: bool = False
    pad: Callable[[int], int] = lambda n: n
    fixed: int = 0
    tight: bool = False
    own: int = 0
    error: float = 1e-6
    timestep: float = 0.7
    lengths: tuple[tuple[int, int], ...] = ((7, 7),)
    inputs: Callable[[Tiny, list[torch.Tensor], torch.Tensor], dict[str, Any]] | None = None
    strength: float = 1.0
    pooled: str = ""
    extra: dict[str, Any] = field(default_factory=dict[str, Any])

    def call(self, texts: list[torch.Tensor], image: torch.Tensor | None = None) -> dict[str, Any]:
        """Arguments for rows of these texts [L, D], all with the same image."""
        image = normal(*self.image) if image is None else image
        if self.inputs is not None:
            return self.inputs(self, texts, image)
        n, lengths = len(texts), [len(text) for text in texts]
        longest = self.fixed or max(lengths)
        rows = torch.stack([torch.cat([text, text.new_zeros(longest - len(text), *text.shape[1:])]) for text in texts])
        given = {self.sample: image.expand(n, *image.shape), E: rows, "timestep": torch.full((n,), self.timestep)}
        if self.mask and (self.always or longest > min(lengths)):
            given[self.mask] = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
        return given | {"return_dict": False} | self.more(n, lengths, longest)

    def columns(self, lengths: list[int]) -> list[tuple[slice, slice]]:
        """Of each row the columns of text and image."""
        spans = [self.pad(n) for n in lengths]
        longest, found = max(spans), []
        for span in spans:
            if self.how.startswith("IT"):
                found.append((slice(self.tokens, self.tokens + span), slice(0, self.tokens)))
            else:
                start = span if self.tight else longest
                found.append((slice(0, span), slice(start, start + self.tokens)))
        return found


def grid(height: int, width: int, axes: int = 3) -> torch.Tensor:
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(float(height)), torch.arange(float(width)))
    return torch.cat([ids, torch.zeros(len(ids), axes - 3)], 1)


def z_image(spec: Tiny, texts: list[torch.Tensor], image: torch.Tensor) -> dict[str, Any]:
    return {"x": [image] * len(texts), "t": torch.full((len(texts),), 0.3), "cap_feats": texts, "return_dict": False}


def flux2(n: int, lengths: list[int], longest: int) -> dict[str, Any]:
    text = torch.zeros(n, longest, 4)
    text[..., 3] = torch.arange(longest)
    return {"txt_ids": text, "img_ids": grid(4, 6, 4).expand(n, -1, -1)}


def chroma(n: int, lengths: list[int], longest: int) -> dict[str, Any]:
    mask = (torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).float()
    ids = {"txt_ids": torch.zeros(longest, 3), "img_ids": grid(4, 6)}
    return ids | {"attention_mask": torch.cat([mask, torch.ones(n, 24)], 1)}


def krea2(n: int, lengths: list[int], longest: int) -> dict[str, Any]:
    return {"position_ids": torch.cat([torch.zeros(longest, 3), grid(4, 6)])}


TINY: dict[str, Tiny] = {
    "ZImageTransformer2DModel": Tiny(
        {"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
         "cap_feat_dim": 16, "axes_dims": [4, 6, 6], "axes_lens": [256, 32, 32]},
        (4, 1, 8, 16), (16,), r"layers\.\d+\.attention", "IT", 32, inputs=z_image,
        pad=lambda n: -(-n // 32) * 32, lengths=((7, 7), (40, 7), (5, 41)),
    ),
    "Flux2Transformer2DModel": Tiny(
        {"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
         "num_attention_heads": 2, "joint_attention_dim": 32, "timestep_guidance_channels": 32,
         "axes_dims_rope": (4, 4, 4, 4), "guidance_embeds": False},
        (24, 16), (32,), r".*transformer_blocks\.\d+\.attn", "TI", 24, flux2,
    ),
    "ChromaTransformer2DModel": Tiny(
        {"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
         "num_attention_heads": 2, "joint_attention_dim": 32, "axes_dims_rope": (4, 6, 6),
         "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
        (24, 16), (32,), r".*transformer_blocks\.\d+\.attn", "TI", 24, chroma, fixed=48,
        pad=lambda n: 48, lengths=((7, 7), (40, 7), (5, 41)),
    ),
    "Lumina2Transformer2DModel": Tiny(
        {"sample_size": 8, "in_channels": 4, "hidden_size": 24, "num_layers": 2, "num_refiner_layers": 1,
         "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 2, "scaling_factor": 1.0,
         "axes_dim_rope": (2, 2, 2), "axes_lens": (128, 32, 32), "cap_feat_dim": 16},
        (4, 8, 12), (16,), r"layers\.\d+\.attn", "TI", 24, mask=M, always=True, tight=True,
        lengths=((7, 7), (40, 7), (5, 41)),
    ),
    "Krea2Transformer2DModel": Tiny(
        {"in_channels": 16, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 32, "timestep_embed_dim": 16, "text_hidden_dim": 16,
         "num_text_layers": 3, "text_num_attention_heads": 2, "text_num_key_value_heads": 2,
         "text_intermediate_size": 16, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
         "axes_dims_rope": (4, 6, 6)},
        (24, 16), (3, 16), r"transformer_blocks\.\d+\.attn", "TI", 24, krea2, mask=M,
        lengths=((7, 7), (40, 7), (5, 41)),
    ),
}  # fmt: skip
"""Denoiser class, and what else is told of a variant, -> tiny model."""


@functools.cache
def denoiser(name: str) -> Any:
    """The tiny model of a class, the same one for every test."""
    spec = models()[name]
    torch.manual_seed(1)
    model = tt.lively(getattr(diffusers, name.split()[0])(**spec.config))
    if spec.strength != 1.0:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(spec.strength)
    return model.requires_grad_(False)


def models() -> dict[str, Tiny]:
    """All tiny models."""
    from tiny_families_more import MORE

    return TINY | MORE


class Bare(diffusers.DiffusionPipeline):
    """A pipeline with its denoisers and nothing else, for calls by hand."""

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)


class BareUNet(diffusers.DiffusionPipeline):
    """The same with a UNet."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)


def bare(name: str) -> Any:
    scheduler = tt.flow()
    scheduler.set_timesteps(2)
    return (BareUNet if name.startswith("UNet") else Bare)(denoiser(name), scheduler)

"""FLUX.1: joint attention over [text, image] in double and in single blocks, packed latents, guidance in two calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...attention.errors import UnsupportedPipelineError
from ...attention.layer import AttentionLayer
from ...attention.step import Rows
from ...plugins.base import Text
from ...plugins.startpoint import pack, unpack
from .base import Adapter, Inputs
from .running import Running


class PackedAdapter(Adapter):
    """A transformer on packed latents [B, h*w/4, 4 C], its text first; "true" guidance is a second call."""

    sample, timestep, text = "hidden_states", "timestep", "encoder_hidden_states"

    @property
    def latent_channels(self) -> int:
        config: Any = self.denoiser.config
        return config.out_channels or config.in_channels

    def latent_of(self, sample: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        if sample.shape[1] != size[0] * size[1]:
            raise UnsupportedPipelineError(
                f"{type(self.pipe).__name__} puts another picture's tokens behind the latent's, which no plugin can "
                "move: use the text-to-image pipeline"
            )
        return unpack(sample[..., : self.latent_channels], size)

    def as_sample(self, latent: torch.Tensor) -> torch.Tensor:
        return pack(latent)

    def with_latent(self, sample: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        return torch.cat([latent.to(sample.dtype), sample[..., self.latent_channels :]], -1)

    def groups(self, inputs: Inputs, running: Running) -> Rows:
        rows = slice(0, len(inputs[self.sample]))
        negative = running.arguments.get("negative_prompt_embeds")
        return {"uncond" if negative is not None and inputs[self.text] is negative else "cond": rows}

    def guided_apart(self, running: Running) -> bool:
        return bool(running.arguments.get("do_true_cfg"))

    def grid(self, inputs: Inputs, running: Running) -> tuple[int, int]:
        height, width = running.arguments.get("height"), running.arguments.get("width")
        if isinstance(height, int) and isinstance(width, int):
            factor = self.pipe.vae_scale_factor * 2  # two latents to a token
            return height // factor, width // factor
        return self.packed_grid(inputs)

    def packed_grid(self, inputs: Inputs) -> tuple[int, int]:
        """(height, width) in tokens where no pipeline is calling."""
        raise NotImplementedError

    def text_slice(self, layer: AttentionLayer, inputs: Inputs) -> slice | None:
        return slice(0, self.text_length(inputs))


class FluxAdapter(PackedAdapter):
    """FluxTransformer2DModel, also of the img2img, inpaint, ControlNet, Fill and Kontext pipelines.

    The text's position is 0 for every token, so a negative of any length takes the same. The pooled text vector stays
    the prompt's, for the image and for both texts: the image stream is one. The official NAG gives the negative text
    its own pooled vector, and with it a second image stream that drifts from the first.
    """

    positional = (
        "hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids", "guidance",
        "joint_attention_kwargs", "controlnet_block_samples", "controlnet_single_block_samples", "return_dict",
        "controlnet_blocks_repeat",
    )  # fmt: skip
    batched = (
        "hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "guidance",
        "controlnet_block_samples", "controlnet_single_block_samples",
    )  # fmt: skip

    def __init__(self, pipe: Any, denoiser: nn.Module) -> None:
        super().__init__(pipe, denoiser)
        # A single block joins text and image before its attention, which cannot be seen from its attention module.
        self.layers = [replace(layer, kind="joint", index=i) for i, layer in enumerate(self.layers)]

    @property
    def family(self) -> str:
        return "flux"

    def packed_grid(self, inputs: Inputs) -> tuple[int, int]:
        height, width = (int(inputs["img_ids"][..., axis].max()) + 1 for axis in (1, 2))
        return height, width

    def extend_text(self, inputs: Inputs, texts: Sequence[Text]) -> Inputs:
        ids = inputs["txt_ids"]
        more = ids.new_zeros(*ids.shape[:-2], sum(text.embeddings.shape[1] for text in texts), ids.shape[-1])
        return {**super().extend_text(inputs, texts), "txt_ids": torch.cat([ids, more], -2)}

    def encode_text(self, texts: Sequence[str], running: Running) -> Text:
        scale = (running.arguments.get("joint_attention_kwargs") or {}).get("scale")
        return Text(self.encode_prompt(running, texts, texts, lora_scale=scale)[0])

    def tokenizer(self) -> Any:
        return self.pipe.tokenizer_2

    def prompt(self, running: Running) -> Any:
        return running.arguments.get("prompt_2") or super().prompt(running)

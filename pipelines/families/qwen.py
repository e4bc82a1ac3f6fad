"""Qwen-Image: joint attention over [text, image] with masked text, packed latents, guidance in two calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...attention.hook import hook_after
from ...plugins.base import Text
from .base import Inputs
from .flux import PackedAdapter
from .running import Running


class QwenAdapter(PackedAdapter):
    """QwenImageTransformer2DModel. There is no pooled text, so sharing the image stream is exact."""

    positional = (
        "hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "timestep", "img_shapes", "guidance",
        "attention_kwargs", "controlnet_block_samples", "additional_t_cond", "return_dict",
    )  # fmt: skip
    batched = (
        "hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "timestep", "img_shapes", "guidance",
        "controlnet_block_samples", "additional_t_cond",
    )  # fmt: skip

    @property
    def latent_channels(self) -> int:
        config: Any = self.denoiser.config
        return config.in_channels  # its out_channels are those of a cell, not of a token

    @property
    def family(self) -> str:
        return "qwen"

    def packed_grid(self, inputs: Inputs) -> tuple[int, int]:
        shape = inputs["img_shapes"][0]
        return tuple((shape[0] if isinstance(shape, list) else shape)[1:])

    def extend_text(self, inputs: Inputs, texts: Sequence[Text]) -> Inputs:
        name, words = "encoder_hidden_states_mask", inputs[self.text]
        masks = [inputs.get(name), *(text.mask for text in texts)]
        if all(mask is None for mask in masks):
            return super().extend_text(inputs, texts)
        lengths = [self.text_length(inputs), *(text.embeddings.shape[1] for text in texts)]
        full = [
            words.new_ones(len(words), n, dtype=torch.bool) if mask is None else mask.to(words.device, torch.bool)
            for mask, n in zip(masks, lengths, strict=True)
        ]
        extended = super().extend_text(inputs, [Text(text.embeddings) for text in texts])
        return {**extended, name: torch.cat(full, 1)}

    def hooks(self, run: Callable[[], Any]) -> Sequence[Callable[[], None]]:
        """Each text counts its positions from its own start."""
        transformer: Any = self.denoiser

        def after(args: Any, kwargs: Any, output: tuple[torch.Tensor, torch.Tensor] | None) -> Any:
            here = run()
            if here is None or not here.streams or output is None:
                return None
            image, text = output
            return image, torch.cat([text[:n] for n in here.streams])

        return [hook_after(transformer, transformer.pos_embed, after)]

    def encode_text(self, texts: Sequence[str], running: Running) -> Text:
        embeds, mask = self.encode_prompt(running, texts)
        return Text(embeds, None if mask is None else mask.bool())

"""PixArt-alpha and PixArt-Sigma: cross-attention to masked T5 text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...plugins.base import Text
from .base import Adapter, Inputs
from .running import Running


class CaptionAdapter(Adapter):
    """A transformer [B, C, h, w] -> [B, C', h, w] whose cross-attention sees a projected, masked caption."""

    sample, timestep, text = "hidden_states", "timestep", "encoder_hidden_states"

    def grid(self, inputs: Inputs, running: Running) -> tuple[int, int]:
        height, width = inputs[self.sample].shape[-2:]
        config: Any = self.denoiser.config
        return height // config.patch_size, width // config.patch_size

    def encode_text(self, texts: Sequence[str], running: Running) -> Text:
        embeds, mask = self.encode_prompt(running, texts)[:2]
        return Text(embeds, mask.bool())

    def layer_text(self, text: Text) -> Text:
        transformer: Any = self.denoiser
        text = self.to_denoiser(text)
        if transformer.caption_projection is None:
            return text
        return Text(transformer.caption_projection(text.embeddings), text.mask)


class PixArtAdapter(CaptionAdapter):
    """PixArtTransformer2DModel: rows [uncond, cond]; the prediction may carry a learned variance."""

    positional = (
        "hidden_states", "encoder_hidden_states", "timestep", "added_cond_kwargs", "cross_attention_kwargs",
        "attention_mask", "encoder_attention_mask", "return_dict",
    )  # fmt: skip
    batched = tuple(name for name in positional if name not in ("cross_attention_kwargs", "return_dict"))

    @property
    def family(self) -> str:
        return "pixart"

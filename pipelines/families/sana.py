"""Sana and Sana-Sprint: cross-attention to masked Gemma text; the image's own attention is linear and has no map."""

from __future__ import annotations

from typing import Any

from ...plugins.base import Text
from .pixart import CaptionAdapter


class SanaAdapter(CaptionAdapter):
    """SanaTransformer2DModel: rows [uncond, cond]."""

    positional = (
        "hidden_states", "encoder_hidden_states", "timestep", "guidance", "encoder_attention_mask", "attention_mask",
        "attention_kwargs", "controlnet_block_samples", "return_dict",
    )  # fmt: skip
    batched = tuple(name for name in positional if name not in ("attention_kwargs", "return_dict"))

    @property
    def family(self) -> str:
        return "sana"

    def layer_text(self, text: Text) -> Text:
        transformer: Any = self.denoiser
        projected = super().layer_text(text)
        return Text(transformer.caption_norm(projected.embeddings), projected.mask)

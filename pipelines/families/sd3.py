"""Stable Diffusion 3 and 3.5: joint attention over [image, text] in every block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...attention.layer import AttentionLayer
from ...attention.step import Rows
from ...plugins.base import Text
from .base import Adapter, Inputs
from .running import Running


class SD3Adapter(Adapter):
    """SD3Transformer2DModel: rows [uncond, cond]; skip-layer guidance makes a third call without either.

    The text carries no positions, so a negative may have any length. The pooled text vector stays the prompt's.
    """

    sample, timestep, text = "hidden_states", "timestep", "encoder_hidden_states"
    positional = (
        "hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "block_controlnet_hidden_states",
        "joint_attention_kwargs", "return_dict", "skip_layers",
    )  # fmt: skip
    batched = positional[:5]

    @property
    def family(self) -> str:
        return "sd3"

    def groups(self, inputs: Inputs, running: Running) -> Rows:
        if inputs.get("skip_layers") is not None:
            return {"perturbed": slice(0, len(inputs[self.sample]))}
        return super().groups(inputs, running)

    def grid(self, inputs: Inputs, running: Running) -> tuple[int, int]:
        height, width = inputs[self.sample].shape[-2:]
        config: Any = self.denoiser.config
        return height // config.patch_size, width // config.patch_size

    def text_slice(self, layer: AttentionLayer, inputs: Inputs) -> slice | None:
        if layer.kind != "joint":
            return None
        config: Any = self.denoiser.config
        height, width = (side // config.patch_size for side in inputs[self.sample].shape[-2:])
        return slice(height * width, height * width + self.text_length(inputs))

    def encode_text(self, texts: Sequence[str], running: Running) -> Text:
        scale = (running.arguments.get("joint_attention_kwargs") or {}).get("scale")
        return Text(self.encode_prompt(running, texts, texts, texts, lora_scale=scale)[0])

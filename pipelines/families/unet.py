"""SD1.x, SD2.x, SDXL and their img2img, inpaint and ControlNet pipelines: everything on UNet2DConditionModel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ...attention.errors import UnsupportedPipelineError
from ...attention.step import Rows
from ...plugins.base import Text, Words
from .base import Adapter, Inputs, arguments_of
from .running import Running

_ADDED, _POOLED = "added_cond_kwargs", "text_embeds"
_GUIDED_OTHERWISE = ("InstructPix2Pix", "SemanticStableDiffusion", "StableDiffusionPipelineSafe", "LEditsPP")
"""In names of pipelines whose batch holds other rows than [uncond, cond]."""


class UNetAdapter(Adapter):
    """UNet2DConditionModel: rows [uncond, cond], or [cond] without guidance; PAG adds [perturbed]."""

    def __init__(self, pipe: Any, denoiser: nn.Module) -> None:
        super().__init__(pipe, denoiser)
        self.positional = arguments_of(type(denoiser).forward)
        others = ("cross_attention_kwargs", "return_dict")
        self.batched = tuple(name for name in self.positional if name not in others)

    def groups(self, inputs: Inputs, running: Running) -> Rows:
        name = type(running.pipe).__name__
        if any(part in name for part in _GUIDED_OTHERWISE):
            raise UnsupportedPipelineError(
                f"{name} guides by more than a prompt and a negative prompt at once; use it without plugins"
            )
        groups = super().groups(inputs, running)
        if "StableDiffusionSAG" in name and "uncond" in groups:
            raise UnsupportedPipelineError(
                f"{name} under guidance makes a second, unguided call that cannot be told from the first: set "
                "guidance_scale=1, or use StableDiffusionPAGPipeline"
            )
        return groups

    def grid(self, inputs: Inputs, running: Running) -> tuple[int, int]:
        height, width = inputs["sample"].shape[-2:]
        return height, width

    def take(self, inputs: Inputs, rows: slice | torch.Tensor) -> Inputs:
        taken, given = super().take(inputs, rows), inputs.get("cross_attention_kwargs") or {}
        if "gligen" in given:  # boxes and phrases of each row
            grounding = {name: value[rows] for name, value in given["gligen"].items()}
            taken["cross_attention_kwargs"] = given | {"gligen": grounding}
        return taken

    @property
    def films(self) -> bool:
        return type(self.denoiser).__name__ == "UNetMotionModel"

    @property
    def rewords(self) -> bool:
        return not self.films

    def with_words(self, inputs: Inputs, rows: slice, text: Text) -> Inputs:
        if self.films:
            raise UnsupportedPipelineError(
                f"form='rows': {type(self.pipe).__name__} gives its UNet a text for every frame; use form='streams'"
            )
        changed, count = super().with_words(inputs, rows, replace(text, pooled={})), rows.stop - rows.start
        pooled = {n: v[[i * len(v) // count for i in range(count)]] for n, v in text.pooled.items()}
        return _with_pooled(changed, rows, pooled)

    def words(self, inputs: Inputs, rows: slice) -> Words:
        words, pooled = super().words(inputs, rows), (inputs.get(_ADDED) or {}).get(_POOLED)
        if pooled is None:
            return words
        return replace(words, pooled={_POOLED: pooled[rows]}, given=[*words.given, pooled])

    def reworded(self, inputs: Inputs, rows: slice, words: Words) -> Inputs:
        return _with_pooled(super().reworded(inputs, rows, replace(words, pooled={})), rows, words.pooled)

    def late_blocks(self) -> Sequence[tuple[str, nn.Module]]:
        unet: Any = self.denoiser
        mid = [("mid_block", unet.mid_block)] if unet.mid_block is not None else []
        return [*mid, *((f"up_blocks.{i}", block) for i, block in enumerate(unet.up_blocks))]

    def without_control(self, inputs: Inputs, rows: slice) -> Inputs:
        names = ("down_block_additional_residuals", "mid_block_additional_residual")

        def cleared(residual: Any) -> Any:
            residual = residual.clone()
            residual[rows] = 0
            return residual

        return inputs | {name: tree_map(cleared, inputs[name]) for name in names if inputs.get(name) is not None}

    def can_join_late(self, inputs: Inputs, block: str) -> bool:
        # ControlNet's middle residual is added behind the middle block, for the rows that came in.
        return block != "mid_block" or inputs.get("mid_block_additional_residual") is None

    @property
    def family(self) -> str:
        config: Any = self.denoiser.config
        width = config.cross_attention_dim
        width = width if isinstance(width, int) else width[0]
        return {128: "picturebook", 768: "sd15", 1024: "sd2", 2048: "sdxl"}.get(width, "unet")

    def layer_text(self, text: Text, inputs: Inputs) -> tuple[torch.Tensor, dict[str, Any]]:
        unet: Any = self.denoiser
        words, others = super().layer_text(text, inputs)
        return (unet.encoder_hid_proj(words) if unet.config.encoder_hid_dim_type == "text_proj" else words), others

    def encode_text(self, texts: Sequence[str], running: Running) -> Text:
        pipe = self.pipe
        if getattr(pipe, "tokenizer", None) is None and getattr(pipe, "tokenizer_2", None) is None:
            return super().encode_text(texts, running)
        scale = (running.arguments.get("cross_attention_kwargs") or {}).get("scale")
        found = self.encode_prompt(running, texts, lora_scale=scale)
        return Text(found[0], pooled={_POOLED: found[2]} if len(found) > 2 else {})


def _with_pooled(inputs: Inputs, rows: slice, pooled: Mapping[str, torch.Tensor]) -> Inputs:
    """The same call in which some rows have other pooled texts, SDXL's."""
    added = dict(inputs.get(_ADDED) or {})
    for name, value in pooled.items():
        added[name] = torch.cat([added[name][: rows.start], value.to(added[name]), added[name][rows.stop :]])
    return inputs | {_ADDED: added} if pooled else inputs

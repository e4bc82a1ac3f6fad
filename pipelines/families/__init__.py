"""One small adapter a model family, chosen by the denoiser's class."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...attention.errors import UnsupportedPipelineError
from .base import Adapter
from .flux import FluxAdapter
from .pixart import PixArtAdapter
from .qwen import QwenAdapter
from .sana import SanaAdapter
from .sd3 import SD3Adapter
from .unet import UNetAdapter

ADAPTERS: dict[str, type[Adapter]] = {
    "UNet2DConditionModel": UNetAdapter,
    "PixArtTransformer2DModel": PixArtAdapter,
    "SanaTransformer2DModel": SanaAdapter,
    "FluxTransformer2DModel": FluxAdapter,
    "SD3Transformer2DModel": SD3Adapter,
    "QwenImageTransformer2DModel": QwenAdapter,
}
"""Denoiser class name -> adapter. A subclass of a listed class is served too."""


def adapter_for(pipe: Any) -> Adapter:
    """The adapter for a pipeline's denoiser (its `unet` or `transformer`, compiled or not).

    Raises:
        UnsupportedPipelineError: not a diffusers pipeline, or a family without an adapter.
    """
    denoiser = getattr(pipe, "unet", None)
    denoiser = getattr(pipe, "transformer", None) if denoiser is None else denoiser
    denoiser = getattr(denoiser, "_orig_mod", denoiser)  # torch.compile(unet) wraps it
    if isinstance(denoiser, nn.Module):
        for base in type(denoiser).__mro__:
            if base.__name__ in ADAPTERS:
                return ADAPTERS[base.__name__](pipe, denoiser)
    found = type(pipe).__name__ + (f" with {type(denoiser).__name__}" if denoiser is not None else "")
    raise UnsupportedPipelineError(f"{found} is not supported; diffgraft edits pipelines on {', '.join(ADAPTERS)}")

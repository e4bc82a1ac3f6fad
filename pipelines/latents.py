"""Between pictures and latents, with the pipeline's own autoencoder and scheduler."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch

from ..attention.step import Step


def encode_image(pipe: Any, image: Any, size: tuple[int, int] | None = None) -> torch.Tensor:
    """Latent of a picture by the posterior's mode, in the scheduler's space.

    Args:
        pipe: any pipeline with a `vae`.
        image: PIL, numpy or torch picture, or a list of them of one size.
        size: latent (height, width) to which the picture is resized; None keeps its size.
    Returns:
        [n, C, h, w] on the pipeline's device in the VAE's dtype.
    """
    vae = pipe.vae
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = (None, None) if size is None else (size[0] * factor, size[1] * factor)
    processor = _processor(factor)
    pixels = processor.preprocess(image, height=height, width=width)
    with torch.no_grad(), _wide_enough(vae):
        mode = vae.encode(pixels.to(device=pipe._execution_device, dtype=vae.dtype)).latent_dist.mode()
    return ((mode - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor).to(vae.dtype)


@contextmanager
def _wide_enough(vae: Any) -> Generator[None]:
    """SDXL's autoencoder overflows in float16: it runs in float32 then, as diffusers' own pipelines let it."""
    narrow = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if narrow:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if narrow:
            vae.to(torch.float16)


def decode_latents(pipe: Any, latents: torch.Tensor, output_type: str = "pil") -> Any:
    """Pictures of latents [n, C, h, w]: a list of PIL images, or "pt" / "np" arrays."""
    vae = pipe.vae
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    latents = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
    with torch.no_grad():
        pixels = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    return _processor(factor).postprocess(pixels, output_type=output_type)


def signal(scheduler: Any, step: Step) -> tuple[float, float]:
    """(alpha, sigma) at a step: noised = alpha * clean + sigma * noise, in the space of the pipeline's latents."""
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    timestep = torch.as_tensor(step.timestep).flatten()[:1].cpu()
    noise = getattr(scheduler, "add_noise", None)
    if noise is None:  # flow matching: scale_noise(sample, timestep, noise)
        return (
            float(scheduler.scale_noise(one, timestep, one * 0)),
            float(scheduler.scale_noise(one * 0, timestep, one)),
        )
    return float(noise(one, one * 0, timestep)), float(noise(one * 0, one, timestep))


def _processor(factor: int) -> Any:
    from diffusers.image_processor import VaeImageProcessor

    return VaeImageProcessor(vae_scale_factor=factor, do_normalize=True)

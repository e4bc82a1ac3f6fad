"""Between pictures and latents, with the pipeline's own autoencoder and scheduler."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ...attention.errors import NonFiniteError, SettingError
from ...attention.pictures import as_rgb
from ...attention.step import Step
from .family import Family, names_of
from .table import FAMILIES

_WIDE = threading.RLock()
_SIZED_BY_DECODER = ("ZImageTransformer2DModel",)
"""Denoisers that do not know the size of their pictures, and whose pipelines do not either."""


def encode_image(pipe: Any, image: Any, size: tuple[int, int] | None = None) -> torch.Tensor:
    """Latent of a picture by the posterior's mode, in the scheduler's space.

    Args:
        pipe: any pipeline with a `vae`.
        image: PIL (upright, transparency over white), a path, numpy or torch picture, or a list of them of one size.
        size: latent (height, width) to which the picture is resized; None keeps its size.
    Returns:
        [n, C, h, w] on the pipeline's device in the VAE's dtype.
    Raises:
        SettingTypeError, SettingError: not a picture, unreadable, or of several sizes.
    """
    vae, factor = pipe.vae, pixels_of(pipe)
    height, width = (None, None) if size is None else (size[0] * factor, size[1] * factor)
    pixels = _pixels(image, _processor(factor * (1 if size else patch(pipe))), height, width)
    channels = getattr(vae.config, "in_channels", 3)
    if pixels.ndim != 4 or pixels.shape[1] != channels or not pixels.isfinite().all():
        raise SettingError(f"pictures of shape {list(pixels.shape)}: [n, {channels}, h, w] of finite values is needed")
    with torch.no_grad(), _wide_enough(vae):
        pixels = pixels.to(device=pipe._execution_device, dtype=vae.dtype)
        mode = _mode(vae.encode(pixels[:, :, None] if _scale(pipe) == "channel" else pixels))
    return scaled(pipe, mode).to(vae.dtype)


def scaled(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """What the autoencoder gives in the scheduler's space, [n, C, h, w]."""
    shift, factor = _statistics(pipe, latents)
    if _scale(pipe) == "channel":
        latents = latents[:, :, 0]
    elif _scale(pipe) == "batch norm":
        latents = F.pixel_unshuffle(latents, 2)
    return (latents - shift) * factor


def unscaled(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """The reverse of `scaled`."""
    shift, factor = _statistics(pipe, latents)
    latents = latents / factor + shift
    if _scale(pipe) == "channel":
        return latents[:, :, None]
    return F.pixel_shuffle(latents, 2) if _scale(pipe) == "batch norm" else latents


def _statistics(pipe: Any, like: torch.Tensor) -> tuple[Any, Any]:
    """(shift, factor): scheduler's = (autoencoder's - shift) * factor."""
    vae, how = pipe.vae, _scale(pipe)
    if how == "config":
        return getattr(vae.config, "shift_factor", None) or 0.0, vae.config.scaling_factor
    if how == "channel":
        mean, deviation = (torch.tensor(given).to(like) for given in (vae.config.latents_mean, vae.config.latents_std))
    else:
        mean = vae.bn.running_mean.to(like)
        deviation = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps).to(like)
    return mean.view(1, -1, 1, 1), 1 / deviation.view(1, -1, 1, 1)


def _scale(pipe: Any) -> str:
    """How the family's latents are scaled."""
    denoiser = getattr(pipe, "transformer", None)
    said = (FAMILIES.get(name) for name in names_of(getattr(denoiser, "_orig_mod", denoiser)))
    return next((one.latent.scale for one in said if isinstance(one, Family)), "config")


def channels_of(pipe: Any) -> int:
    """Channels of a pipeline's latents [n, C, h, w]."""
    config = pipe.vae.config
    channels = config.z_dim if hasattr(config, "z_dim") else config.latent_channels
    return channels * 4 if _scale(pipe) == "batch norm" else channels


def pixels_of(pipe: Any) -> int:
    """Pixels, in each direction, of one of a pipeline's latents [n, C, h, w]."""
    return pipe.vae_scale_factor * (2 if _scale(pipe) == "batch norm" else 1)


def _mode(encoded: Any) -> torch.Tensor:
    """The posterior's mode; tiny and deep-compression autoencoders have no posterior."""
    plain = next((getattr(encoded, name) for name in ("latents", "latent") if hasattr(encoded, name)), None)
    return encoded.latent_dist.mode() if plain is None else plain


def _pixels(given: Any, processor: Any, height: int | None, width: int | None) -> torch.Tensor:
    """[n, c, h, w] in -1 ... 1. Floats are diffusers' to read; everything else has eight bits."""
    if isinstance(given, (torch.Tensor, np.ndarray)) and given.ndim == 4:
        return _pixels(list(cast("Iterable[Any]", given)), processor, height, width)
    several = list(cast("Sequence[Any]", given)) if isinstance(given, (list, tuple)) else [given]
    pictures = [image if _floats(image) else as_rgb(image) for image in several]
    try:
        return torch.cat([processor.preprocess(picture, height=height, width=width) for picture in pictures])
    except (ValueError, RuntimeError) as error:
        raise SettingError(f"the pictures cannot be read as a batch: {error}") from error


def _floats(image: Any) -> bool:
    return isinstance(image, (torch.Tensor, np.ndarray)) and "float" in str(image.dtype)


@contextmanager
def _wide_enough(vae: Any) -> Generator[None]:
    """SDXL's autoencoder overflows in float16: it runs in float32 then, as diffusers' own pipelines let it.

    One thread after the other, since they may share it.
    """
    if not getattr(vae.config, "force_upcast", False):
        yield
        return
    with _WIDE:
        narrow = vae.dtype == torch.float16
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
    with torch.no_grad():
        pixels = vae.decode(unscaled(pipe, latents).to(vae.dtype), return_dict=False)[0]
    pixels = pixels[:, :, 0] if pixels.ndim == 5 else pixels
    return _processor(pipe.vae_scale_factor).postprocess(pixels, output_type=output_type)


def as_pil(pixels: np.ndarray) -> list[Image.Image]:
    """Pictures of decoded pixels [n, h, w, 3] in 0 ... 1.

    Raises:
        NonFiniteError: NaN or infinity, which would be black pictures.
    """
    if not np.isfinite(pixels).all():
        raise NonFiniteError("decoding produced non-finite pixels: keep the VAE in float32, or use an fp16-fixed one")
    return [Image.fromarray((picture * 255).round().astype(np.uint8)) for picture in pixels]


def native_side(pipe: Any) -> int:
    """The side in pixels of the pictures that a model was made for, the shorter one."""
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    if type(denoiser).__name__ in _SIZED_BY_DECODER:
        return pipe.vae.config.sample_size
    config = denoiser.config
    side = config.sample_size if hasattr(config, "sample_size") else pipe.default_sample_size
    return pipe.vae_scale_factor * (side if isinstance(side, int) else min(side))


def unsaid_size(pipe: Any) -> dict[str, int]:
    """Height and width for a pipeline that takes 1024 whatever its model was made for; nothing for one that asks it."""
    if type(getattr(pipe, "transformer", None)).__name__ not in _SIZED_BY_DECODER:
        return {}
    side = native_side(pipe)
    return {"height": side, "width": side}


def side_multiple(pipe: Any) -> int:
    """What the sides of a picture must be multiples of; pipelines ask for 8 whatever their autoencoder does."""
    return patch(pipe) * max(8, pixels_of(pipe))


def patch(pipe: Any) -> int:
    """What the sides of latents must be multiples of."""
    return 1 if hasattr(pipe, "unet") or _scale(pipe) == "batch norm" else 2


def signal(scheduler: Any, step: Step) -> tuple[float, float]:
    """(alpha, sigma) at a step: noised = alpha * clean + sigma * noise, in the space of the pipeline's latents."""
    clean = torch.tensor([1.0, 0.0], dtype=torch.float64).view(2, 1, 1, 1)  # both asked in one go
    timesteps = torch.as_tensor(step.timestep).flatten()[:1].cpu().expand(2)
    if hasattr(scheduler, "add_noise"):
        alpha, sigma = scheduler.add_noise(clean, 1 - clean, timesteps).flatten().tolist()
    else:  # flow matching
        alpha, sigma = scheduler.scale_noise(clean, timesteps, 1 - clean).flatten().tolist()
    return alpha, sigma


def _processor(factor: int) -> Any:
    from diffusers.image_processor import VaeImageProcessor

    return VaeImageProcessor(vae_scale_factor=factor, do_normalize=True)

"""A rough look at a picture that is being made: a colour for each latent cell, guessed by a straight-line fit."""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..images import load_image
from .examples import EXAMPLES

SIDE = 128
LEARNED_FROM = ("ball", "fish", "flower", "moon", "winter", "mosaic")
NOTE = "A rough look: colours are guessed from the latents, not decoded."


@dataclass(frozen=True)
class Guess:
    """RGB out of latent channels: `weights` [C + 1, 3] for one autoencoder."""

    weights: torch.Tensor

    def picture(self, latent: torch.Tensor) -> Image.Image:
        """A picture [SIDE, SIDE] of a latent [C, h, w]."""
        rows = latent.detach().float().cpu().flatten(1).T
        colours = torch.cat([rows, torch.ones(len(rows), 1)], 1) @ self.weights
        pixels = colours.nan_to_num(0.5).clamp(0, 1).mul(255).byte().numpy().reshape(*latent.shape[1:], 3)
        return Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


@torch.no_grad()
def learn(pipe: Any) -> Guess | None:
    """Fit colours to latents on the example pictures; None for an autoencoder that gives no latents [n, C, h, w]."""
    vae = getattr(pipe, "vae", None)
    if not hasattr(vae, "encode"):
        return None
    pictures = [load_image(EXAMPLES / f"{name}.png").resize((SIDE, SIDE)) for name in LEARNED_FROM]
    pixels = torch.from_numpy(np.stack([np.asarray(one) for one in pictures])).movedim(-1, 1).float() / 255
    try:
        encoded = vae.encode((2 * pixels - 1).to(vae.device, vae.dtype))
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        latents = (latents - (getattr(vae.config, "shift_factor", None) or 0)) * vae.config.scaling_factor
        seen = torch.nn.functional.adaptive_avg_pool2d(pixels, latents.shape[-2:]).movedim(1, -1).reshape(-1, 3)
        rows = latents.float().cpu().movedim(1, -1).reshape(len(seen), -1)
    except (AttributeError, RuntimeError, TypeError, ValueError):  # a look is a courtesy: never a reason to fail
        return None
    ones = torch.ones(len(rows), 1)
    return Guess(torch.linalg.lstsq(torch.cat([rows, ones], 1), seen).solution)


def clean(scheduler: Any, sample: torch.Tensor, output: torch.Tensor, time: float) -> torch.Tensor:
    """The picture's latent [C, h, w] as the denoiser sees it behind the noise of its input [C, h, w]."""
    output = output[: len(sample)]
    signals = getattr(scheduler, "alphas_cumprod", None)
    if signals is None:  # a flow: what is predicted points from the picture to the noise
        return sample - time / scheduler.config.get("num_train_timesteps", 1000) * output
    signal = float(signals[min(int(time), len(signals) - 1)])
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind == "sample":
        return output
    if kind == "v_prediction":
        return signal**0.5 * sample - (1 - signal) ** 0.5 * output
    return (sample - (1 - signal) ** 0.5 * output) / max(signal, 1e-4) ** 0.5


def as_html(what: str, picture: Image.Image | None) -> str:
    """What is going on, with the rough look if there is one."""
    if not what:
        return ""
    shown = ""
    if picture is not None:
        data = io.BytesIO()
        picture.save(data, "PNG")
        shown = f'<img alt="A rough look at the picture" src="data:image/png;base64,{_text(data.getvalue())}">'
    note = f"<br><small>{NOTE}</small>" if shown else ""
    return f'<div class="dg-look" role="status">{shown}<p>{html.escape(what)}{note}</p></div>'


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()

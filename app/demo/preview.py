"""A rough look at a picture that is being made: a colour for each latent cell, guessed by a straight-line fit."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...pipelines.families.latents import encode_image
from ...pipelines.families.solve import Solve
from ...plugins.startpoint import unpack
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
    if not hasattr(getattr(pipe, "vae", None), "encode"):
        return None
    pictures = [load_image(EXAMPLES / f"{name}.png").resize((SIDE, SIDE)) for name in LEARNED_FROM]
    pixels = torch.from_numpy(np.stack([np.asarray(one) for one in pictures])).movedim(-1, 1).float() / 255
    try:
        latents = encode_image(pipe, pictures)
        seen = torch.nn.functional.adaptive_avg_pool2d(pixels, latents.shape[-2:]).movedim(1, -1).reshape(-1, 3)
        rows = latents.float().cpu().movedim(1, -1).reshape(len(seen), -1)
    except (AttributeError, RuntimeError, TypeError, ValueError):  # a look is a courtesy: never a reason to fail
        return None
    ones = torch.ones(len(rows), 1)
    return Guess(torch.linalg.lstsq(torch.cat([rows, ones], 1), seen).solution)


def spread(tokens: torch.Tensor, given: Mapping[str, Any], channels: int) -> torch.Tensor | None:
    """Tokens [B, n, C or 4 C] of FLUX and its like as latents [B, C, h, w]; None where nothing says how they lie.

    Args:
        given: what the denoiser was called with, its positions among it.
    """
    shapes, ids = given.get("img_shapes"), given.get("img_ids")
    if shapes is not None:
        first = shapes[0]
        rows, columns = (first[0] if isinstance(first, list) else first)[1:]
    elif isinstance(ids, torch.Tensor):
        rows, columns = (int(ids[..., axis].max()) + 1 for axis in (1, 2))
    else:
        return None
    own = tokens[:, : rows * columns]  # pictures to edit come behind
    if own.shape[1] != rows * columns or own.shape[2] not in (channels, 4 * channels):
        return None
    if own.shape[2] == channels:
        return own.mT.unflatten(-1, (rows, columns))
    return unpack(own, (rows, columns))


def clean(
    scheduler: Any, sample: torch.Tensor, output: torch.Tensor, time: float, solve: Solve | None = None
) -> torch.Tensor:
    """The picture's latent [C, h, w] as the denoiser sees it behind the noise of its input [C, h, w].

    Args:
        time: what the denoiser was told, counted as its family's `solve` says.
    """
    output = output[: len(sample)]
    signals = getattr(scheduler, "alphas_cumprod", None)
    if signals is None:  # a flow: what is predicted points from the picture to the noise
        return sample - _noise(scheduler, time, solve) * output * (-1 if solve is not None and solve.negated else 1)
    signal = float(signals[min(int(time), len(signals) - 1)])
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind == "sample":
        return output
    if kind == "v_prediction":
        return signal**0.5 * sample - (1 - signal) ** 0.5 * output
    return (sample - (1 - signal) ** 0.5 * output) / max(signal, 1e-4) ** 0.5


def _noise(scheduler: Any, time: float, solve: Solve | None) -> float:
    """A flow's share of noise, 0 ... 1."""
    how = "steps" if solve is None else solve.time
    if how in ("unit", "rising"):
        return time if how == "unit" else 1 - time
    return time / scheduler.config.get("num_train_timesteps", 1000)


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

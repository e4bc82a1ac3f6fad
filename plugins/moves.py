"""How far and in which direction a gradient moves a latent. All are pure functions on [n, C, h, w]."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F

from ..attention.errors import UnsupportedPipelineError

LOSS_SCALE = 2.0**12
"""Factor on a loss whose gradient goes through float16, where a mean over a layer's values would underflow."""


def step_factor(index: int, total: int, decay: float) -> float:
    """sqrt of the line from 1 at the first step to `decay` at the last: Attend-and-Excite's schedule for decay 0.5."""
    return (1 - (1 - decay) * index / max(1, total - 1)) ** 0.5


def gradient_step(gradient: torch.Tensor, factor: float, signal: tuple[float, float]) -> torch.Tensor:
    """factor * (alpha^2 + sigma^2) * gradient: the same move of the picture in every scheduler's space.

    A latent is alpha * clean + sigma * noise; the sum of squares is 1 in variance-preserving schedulers and
    sigma^2 + 1 where the latent is the clean one plus noise (Euler).
    """
    return factor * (signal[0] ** 2 + signal[1] ** 2) * gradient


def relative_step(gradient: torch.Tensor, factor: float, latent: torch.Tensor) -> torch.Tensor:
    """The gradient of each picture brought to `factor` times the norm of its latent [n, C, h, w]."""
    dims = tuple(range(1, latent.ndim))
    norm = torch.linalg.vector_norm(gradient, dim=dims, keepdim=True)
    size = factor * torch.linalg.vector_norm(latent, dim=dims, keepdim=True)
    return gradient * (size / norm.clamp_min(torch.finfo(norm.dtype).tiny))


def low_pass(gradient: torch.Tensor, cell: int) -> torch.Tensor:
    """[n, C, h, w] averaged over cell x cell blocks and interpolated back, linearly."""
    height, width = gradient.shape[-2:]
    coarse = F.adaptive_avg_pool2d(gradient, (-(-height // cell), -(-width // cell)))
    return F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)


def shuffled(noise: torch.Tensor, number: int) -> torch.Tensor:
    """[n, C, h, w] with the values of each picture in another order, the same for every picture; number 0 as it is.

    Values of Gaussian noise are exchangeable, so this is another draw of it, with the same norm, made without any
    random state but `number`.
    """
    if number == 0:
        return noise
    order = torch.randperm(noise[0].numel(), generator=torch.Generator().manual_seed(number)).to(noise.device)
    return noise.flatten(1)[:, order].view_as(noise)


_NO_GRADIENT = (
    "the attention maps have no gradient with respect to the latent (quantised layers without a backward pass, or a "
    "processor under no_grad; {}): load the model in float16, bfloat16 or float32"
)
_WAYS = ("does not require grad", "not have been used in the graph", "derivative for", "not implemented", "backward")


def gradient_of(loss: torch.Tensor, latent: torch.Tensor, scale: float) -> torch.Tensor:
    """d loss / d latent, computed with the loss times `scale`.

    Raises:
        UnsupportedPipelineError: there is none, or layers on the way have no backward pass.
    """
    need_gradients([loss])
    try:
        (gradient,) = torch.autograd.grad(scale * loss, latent)
    except RuntimeError as error:
        if not any(way in str(error) for way in _WAYS) or isinstance(error, torch.OutOfMemoryError):
            raise
        raise UnsupportedPipelineError(_NO_GRADIENT.format(" ".join(str(error).split())[:150])) from error
    return gradient / scale


def need_gradients(parts: Iterable[torch.Tensor]) -> None:
    """Refuse parts of a loss of which some are cut off from the latent: the others' gradient would mislead.

    Raises:
        UnsupportedPipelineError: so it is.
    """
    found = [part.requires_grad for part in parts]
    if not all(found):
        raise UnsupportedPipelineError(_NO_GRADIENT.format(f"{len(found) - sum(found)} of {len(found)} are cut off"))

"""The startpoint by search: noise whose picture has a small loss, found on a one-step surrogate (DITTO-2, ReNO)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from PIL import Image

from ...attention.errors import NonFiniteError, SettingError, SettingTypeError
from ...attention.plain import plainly
from ...plugins.base import Plugin, finite
from ...plugins.concepts import Concepts
from ...plugins.losses import Loss
from ...plugins.startpoint_losses import PictureLoss, noise_energy
from ..families import adapter_for
from ..families.latents import native_side
from ..grafting.graft import graft
from .generate import as_list, check_call, resolve_seed, sample
from .search import Objective, OnMaps, OnPictures, Surrogate


@dataclass
class Startpoint:
    """What a search found.

    Attributes:
        latents: the noise of the lowest loss, [n, C, h, w] float32, unit variance; `pipe(latents=...)` takes it.
        losses: by picture, the loss before each update: the first is that of the seed's own noise.
        pictures: drawn from `latents` by the pipeline itself. interrupted: whether Ctrl-C ended the search.
    """

    latents: torch.Tensor
    losses: list[list[float]]
    pictures: list[Image.Image] = field(default_factory=list[Image.Image])
    interrupted: bool = False

    @property
    def picture(self) -> Image.Image:
        """The first picture."""
        return self.pictures[0]


class SearchError(NonFiniteError):
    """A search that met NaN or infinity.

    Attributes:
        startpoint: the best noise so far and the losses, without pictures.
    """

    def __init__(self, message: str, startpoint: Startpoint) -> None:
        super().__init__(message)
        self.startpoint = startpoint


@plainly
def optimise_startpoint(
    pipe: Any,
    prompt: str | Sequence[str],
    loss: PictureLoss | Loss | str,
    *,
    concepts: Concepts | None = None,
    surrogate: Any = None,
    surrogate_steps: int = 1,
    surrogate_guidance: float | None = None,
    iterations: int = 50,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int | None = None,
    n: int = 1,
    rate: float = 5.0,
    momentum: float = 0.9,
    clip: float = 0.1,
    regularise: float = 0.01,
    plugins: Sequence[Plugin] = (),
    checkpointed: bool = True,
    callback: Callable[[int, list[float]], Any] | None = None,
    width: int | None = None,
    height: int | None = None,
    **call: Any,
) -> Startpoint:
    """Search the initial noise for one whose picture has a small loss, then draw it.

    Gradient steps on the noise as in ReNO (arXiv 2406.04312); the split into a one-step surrogate for the gradient and
    the pipeline's own steps for the picture as in DITTO-2 (arXiv 2405.20289).

    Args:
        pipe: a text-to-image pipeline, which draws the pictures.
        prompt: one text (`n` pictures), or one for each picture.
        loss: a function (pictures [1, 3, H, W] in 0 ... 1, prompt) -> one number, differentiable; with `concepts`, a
            name of `diffgraft.LOSSES` or a function of `diffgraft.Maps`.
        concepts: words of the prompt, as for `AttentionSegregation`: the loss is one of their maps at the first step,
            which needs neither the decoder nor the unguided half.
        surrogate: a pipeline of the same latents for the search, such as a one-step student. None: `pipe`.
        surrogate_steps, surrogate_guidance: of the search. Guidance None is the call's own `guidance` on `pipe`, and
            none (0) on a surrogate.
        iterations: updates of the noise, 0 ... 10000; each costs one forward and one backward pass a step.
        steps, guidance: of the final sampling. None: 25 steps, the pipeline's guidance.
        seed, n: picture i has seed + i.
        rate, momentum, clip: of the update: SGD with Nesterov momentum, each picture's gradient cut to the norm `clip`.
        regularise: weight of `noise_energy`, which keeps the noise as long as noise is.
        plugins: grafted in the search and in the final sampling.
        checkpointed: run denoiser and decoder again for the gradient instead of keeping what they computed; memory
            then does not grow with `surrogate_steps`. With plugins the decoder alone.
        callback: called after each update with its number and the losses; Ctrl-C in it or anywhere in the search ends
            it, and the best noise so far is drawn.
        width, height, call: as for `generate`.
    Raises:
        SettingError, SettingTypeError: a value out of range, a loss without a gradient. SearchError: a loss or gradient
            that is NaN or infinite; its `startpoint` is the best so far.
    """
    check_call(pipe, call, ("latents",))
    texts, first = _texts(prompt, n), resolve_seed(seed)
    seeds = [first + i for i in range(len(texts))]
    numbers = {"rate": rate, "momentum": momentum, "clip": clip, "regularise": regularise}
    for name, value in numbers.items():
        finite(value, name, 0.0, 1e12)
    _whole(iterations, "iterations", 0, 10_000)
    _whole(surrogate_steps, "surrogate_steps", 1, 1000)
    own = guidance if surrogate is None else 0.0
    size = {name: value for name, value in (("width", width), ("height", height)) if value is not None}
    used, where = as_list(plugins), pipe if surrogate is None else surrogate
    seen = own if surrogate_guidance is None else surrogate_guidance
    objective = _objective(Surrogate(where, texts, surrogate_steps, seen, used, checkpointed, size), loss, concepts)
    found = search(objective, initial_noise(pipe, seeds, width, height), iterations, callback=callback, **numbers)
    call |= size | {"steps": 25 if steps is None else steps, "guidance": guidance}
    dtype: torch.dtype = getattr(adapter_for(pipe).denoiser, "dtype", torch.float32)
    start = adapter_for(pipe).as_sample(found.latents)
    with graft(pipe, *used):
        found.pictures = sample(pipe, texts, seeds, latents=start.to(dtype), **call)
    for picture, losses in zip(found.pictures, found.losses, strict=True):
        picture.info["diffgraft"] |= {"task": "optimise", "losses": [round(x, 6) for x in losses]}
        picture.info["diffgraft"]["plugins"] = [{"plugin": type(p).__name__} | p.settings() for p in used]
    return found


def _whole(value: Any, name: str, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise SettingError(f"{name}={value!r}: a whole number, {low} ... {high}, is needed")


def _texts(prompt: Any, n: int) -> list[str]:
    texts = as_list(prompt)
    _whole(n, "n", 1, 1024)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise SettingTypeError(f"prompt={prompt!r}: a text, or a list of texts, is needed")
    return [text for text in texts for _ in range(n)]


def _objective(at: Surrogate, loss: Any, concepts: Concepts | None) -> Objective:
    if concepts is not None:
        return OnMaps(at, concepts, cast("Loss | str", loss))
    if not callable(loss):
        raise SettingTypeError(f"loss={loss!r}: a function of pictures and prompt; the name of a loss needs concepts=")
    return OnPictures(at, cast("PictureLoss", loss))


def initial_noise(pipe: Any, seeds: Sequence[int], width: int | None, height: int | None) -> torch.Tensor:
    """The noise that the pipeline itself draws for these seeds, [n, C, h, w] float32 on its device."""
    factor = pipe.vae_scale_factor
    side = native_side(pipe)
    size = ((height or side) // factor, (width or side) // factor)
    channels = pipe.vae.config.latent_channels
    drawn = [torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.cat(drawn).to(pipe._execution_device)


def search(
    objective: Objective, noise: torch.Tensor, iterations: int, *, rate: float, momentum: float, clip: float,
    regularise: float, callback: Callable[[int, list[float]], Any] | None = None,
) -> Startpoint:  # fmt: skip
    """Nesterov descent on noise [n, C, h, w]; of each picture the iterate with the lowest loss is kept.

    The last iterate is measured too: `iterations` updates are iterations + 1 measurements.
    """
    z, velocity = noise, torch.zeros_like(noise)
    best, lowest = z, torch.full((len(z),), torch.inf, device=z.device)
    found = Startpoint(z, [[] for _ in z])
    try:
        for number in range(iterations + 1):
            losses, gradient = objective(z)
            _check_finite(losses, gradient, number, found)
            lower = losses < lowest
            best = torch.where(lower.view(-1, 1, 1, 1), z, best)
            lowest = torch.where(lower, losses, lowest)
            found.latents = best
            for of, loss in zip(found.losses, losses.tolist(), strict=True):
                of.append(loss)
            if callback is not None:
                callback(number, losses.tolist())
            if number < iterations:
                z, velocity = updated(z, velocity, gradient, rate, momentum, clip, regularise)
    except KeyboardInterrupt:
        found.interrupted = True
    return found


def updated(
    z: torch.Tensor, velocity: torch.Tensor, gradient: torch.Tensor, rate: float, momentum: float, clip: float,
    regularise: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(noise, velocity) after one step of SGD with Nesterov momentum; each picture's gradient is cut to norm `clip`."""
    with torch.enable_grad():
        at = z.detach().requires_grad_()
        (pull,) = torch.autograd.grad(noise_energy(at).sum(), at)
    whole = gradient.to(z) + regularise * pull
    norm = whole.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    whole = whole * (clip / norm.clamp_min(1e-30)).clamp_max(1.0)
    velocity = momentum * velocity + whole
    return z - rate * (whole + momentum * velocity), velocity


def _check_finite(losses: torch.Tensor, gradient: torch.Tensor, number: int, found: Startpoint) -> None:
    if losses.isfinite().all() and gradient.isfinite().all():
        return
    raise SearchError(
        f"update {number} of the startpoint met a loss or gradient that is NaN or infinite: try a smaller rate, or the "
        "model in float32 or bfloat16; the error's `startpoint` holds the best noise so far",
        found,
    )

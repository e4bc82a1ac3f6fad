"""Sampling that regenerates a hole and keeps the rest: blended latents on any image-to-image or inpainting pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ...attention.errors import UnsupportedPipelineError
from ...attention.step import Step
from ...plugins.base import Plugin, Probe

Callback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


class Source(Protocol):
    """The source picture's latents at every noise level of a run."""

    @property
    def clean(self) -> torch.Tensor:
        """[n, C, h, w] without noise."""
        ...

    def at(self, scheduler: Any, timestep: torch.Tensor) -> torch.Tensor:
        """[n, C, h, w] as they are before the step at `timestep` (of shape [1])."""
        ...


@dataclass(frozen=True)
class Noised:
    """One noise for all levels (blended latent diffusion, arXiv 2206.02779): what is outside denoises to the source."""

    clean: torch.Tensor
    noise: torch.Tensor

    def at(self, scheduler: Any, timestep: torch.Tensor) -> torch.Tensor:
        return scheduler.add_noise(self.clean, self.noise, timestep)


@dataclass(frozen=True)
class Inverted:
    """The trajectory of an inversion (DiffEdit, arXiv 2210.11427), by timestep."""

    clean: torch.Tensor
    path: Callable[[Any], torch.Tensor]

    def at(self, scheduler: Any, timestep: torch.Tensor) -> torch.Tensor:
        return self.path(timestep)


class Blend:
    """A step callback: after every step, what is outside the hole becomes the source at the new noise level.

    After the last step it is the source itself.

    Args:
        source: the picture's latents.
        hole: [h, w] boolean.
        then: the user's own callback, called after the blend.
        laid: from [n, C, h, w] to how the pipeline keeps its latents.
    """

    def __init__(
        self, source: Source, hole: torch.Tensor, then: Callback | None = None,
        laid: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.source, self.then, self.laid = source, then, laid
        self.hole = hole if laid is None else laid(hole.expand_as(source.clean))
        self.begin = 0

    def __call__(self, pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents = tensors["latents"]
        known = self.known(pipe.scheduler, index, timestep)
        known = (known if self.laid is None else self.laid(known)).to(latents)
        tensors = {**tensors, "latents": torch.where(self.hole.to(latents.device), latents, known)}
        return tensors if self.then is None else self.then(pipe, index, timestep, tensors)

    def known(self, scheduler: Any, index: int, timestep: Any) -> torch.Tensor:
        """The source at the noise level that step `index` of this call ends on."""
        times = scheduler.timesteps
        if index == 0:
            begin = getattr(scheduler, "begin_index", None)
            self.begin = int((times == timestep).nonzero()[0]) if begin is None else begin
        following = self.begin + index + 1
        if following >= len(times):
            return self.source.clean
        return self.source.at(scheduler, times[following : following + 1])


class StartAt(Plugin):
    """Begins a run with the source's latents at its first noise level, whatever the pipeline prepared.

    Args:
        empty: [n, 1, h, w] boolean, where noise alone begins; `source` has a `noise` then.
    """

    def __init__(self, source: Source, scheduler: Any, empty: torch.Tensor | None = None) -> None:
        super().__init__()
        self._source, self._scheduler, self._empty = source, scheduler, empty

    def moves(self, step: Step) -> bool:
        return step.index == 0

    def latent(self, step: Step, latent: torch.Tensor, probe: Probe) -> torch.Tensor:
        time = step.timestep if step.time is None else step.time  # the denoiser may count otherwise
        at = torch.as_tensor(time).flatten()[:1].to(self._scheduler.timesteps)
        known = self._source.at(self._scheduler, at).to(latent)
        if self._empty is None:
            return known
        noise: Any = getattr(self._source, "noise").to(latent)  # noqa: B009
        noise = noise * getattr(self._scheduler, "init_noise_sigma", 1.0)
        return torch.where(self._empty.to(latent.device), noise, known)


def sibling(pipe: Any) -> tuple[Any, bool]:
    """A pipeline of the same parts that starts from a picture, and whether its denoiser wants the mask as input.

    Raises:
        UnsupportedPipelineError: no such pipeline in diffusers.
    """
    import diffusers

    inpainting = _channels(pipe) == 9
    for base in type(pipe).__mro__:
        plain = base.__name__.removesuffix("Pipeline").replace("Img2Img", "").replace("Inpaint", "")
        kind = getattr(diffusers, f"{plain}{'Inpaint' if inpainting else 'Img2Img'}Pipeline", None)
        if plain != "Diffusion" and kind is not None:
            return (pipe if type(pipe) is kind else same_parts(pipe, kind)), inpainting
    raise UnsupportedPipelineError(
        f"diffusers has no {'inpainting' if inpainting else 'image-to-image'} form of {type(pipe).__name__} with "
        f"its {type(pipe.unet).__name__}: use a pipeline of SD1, SD2 or SDXL, with ControlNet or not"
    )


def _channels(pipe: Any) -> int:
    denoiser = getattr(pipe, "unet", None)
    if not isinstance(denoiser, nn.Module):
        raise UnsupportedPipelineError(
            f"{type(pipe).__name__} has no UNet and no transformer that paints: use a pipeline of SD1, SD2, SDXL, SD3, "
            "FLUX, Qwen-Image, Z-Image or Chroma"
        )
    config: Any = getattr(denoiser, "_orig_mod", denoiser).config
    if config.in_channels not in (4, 9):
        raise UnsupportedPipelineError(
            f"the UNet takes {config.in_channels} channels: use one with 4 (latents) or 9 (and mask, masked picture)"
        )
    return config.in_channels


def same_parts(pipe: Any, kind: Any) -> Any:
    """A pipeline of class `kind` on the very same components; `from_pipe` would cast them to float32.

    Raises:
        UnsupportedPipelineError: diffusers' class does not take them.
    """
    parts, options = kind._get_signature_keys(kind)
    given = {name: part for name, part in pipe.components.items() if name in parts}
    given |= {name: pipe.config[name] for name in options if name in pipe.config}
    if "pag_applied_layers" in options and hasattr(pipe, "pag_applied_layers"):
        given["pag_applied_layers"] = pipe.pag_applied_layers
    if "add_watermarker" in options:
        given["add_watermarker"] = getattr(pipe, "watermark", None) is not None
    try:
        made = kind(**given)
    except (TypeError, ValueError) as error:  # such as a UNet made for pictures that are not square
        message = f"{kind.__name__} cannot be made of the parts of this {type(pipe).__name__}: {error}"
        raise UnsupportedPipelineError(message) from error
    made.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return made

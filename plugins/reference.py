"""A picture as the latents that a run compares with at each of its steps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image

from ..attention.errors import SettingError, SettingTypeError
from ..attention.step import Step
from .base import Session

_SEED = 2312090082  # as in startpoint.py: no seed that a person picks for the pictures


@runtime_checkable
class Trajectory(Protocol):
    """An `Inversion` that kept its trajectory."""

    def at(self, timestep: Any) -> torch.Tensor:
        """Latents [n, C, h, w] at a timestep, in the scheduler's space."""
        ...


_KINDS = (str, os.PathLike, list, tuple, np.ndarray, torch.Tensor, Image.Image, Trajectory)


class Reference:
    """A style or a content: points of its trajectory, or the picture under one noise.

    Args:
        given: a picture, latents [1 or n, C, h, w], or a `Trajectory` on the timesteps that will be sampled.
        generator: draws the noise; without it the noise is always the same, for every picture.
        role: what to call it when something is wrong with it.

    Raises:
        SettingTypeError: none of these.
    """

    def __init__(self, given: Any, generator: torch.Generator | None = None, role: str = "style") -> None:
        if not isinstance(given, _KINDS):
            raise SettingTypeError(
                f"a {role} is a picture, a path, latents or an inversion, not {type(given).__name__}"
            )
        if not isinstance(generator, torch.Generator | None):
            raise SettingTypeError(f"generator={generator!r}: a torch.Generator is needed")
        self._role = role
        self._given, self._generator = given, generator

    def begin(self, session: Session) -> Sight:
        """Encode and draw for a new call."""
        if isinstance(self._given, Trajectory):
            return Sight(session, self._role, session.latent_size, self._given)
        clean = self._encoded(session)
        source = self._generator or torch.Generator().manual_seed(_SEED)
        shape = clean.shape if self._generator else clean[:1].shape  # a batch is its pictures
        noise = torch.randn(shape, generator=source, device=source.device).to(clean)
        return Sight(session, self._role, session.latent_size, None, clean, noise)

    def _encoded(self, session: Session) -> torch.Tensor:
        given, size = self._given, session.latent_size
        if not isinstance(given, torch.Tensor) or given.shape[-3:-2] == (3,) != (session.latent_channels,):
            return session.encode_image(given, size).float()
        wanted = (session.latent_channels, *size)
        if given.ndim != 4 or tuple(given.shape[1:]) != wanted or not given.isfinite().all():
            raise SettingError(
                f"{self._role} latents of shape {tuple(given.shape)}: [n, {', '.join(map(str, wanted))}] of finite "
                "values is needed here; give a picture instead, it is resized"
            )
        return given


@dataclass(frozen=True)
class Sight:
    """A reference in one pipeline call: a trajectory, or clean latents and the noise over them."""

    session: Session
    role: str
    size: tuple[int, int]
    path: Trajectory | None
    clean: torch.Tensor | None = None
    noise: torch.Tensor | None = None

    def at(self, step: Step) -> torch.Tensor:
        """Its latents [1 or n, C, h, w] at a step, in the scheduler's space."""
        n = self.session.prompt.pictures
        if self.path is not None:
            latent = self.path.at(_scheduled(step))
        else:
            assert self.clean is not None and self.noise is not None
            alpha, sigma = self.session.signal(step)
            latent = alpha * self.clean + sigma * self.noise
        if len(latent) not in (1, n):
            raise SettingError(f"{len(latent)} {self.role}s for {n} pictures: give one, or one for each")
        if tuple(latent.shape[-2:]) != self.size:
            raise SettingError(
                f"{self.role} latents of {_named(latent.shape[-2:])} in a call of {_named(self.size)}: invert the "
                f"{self.role} at the size that is sampled"
            )
        return latent


def _scheduled(step: Step) -> Any:
    """The step's timestep as the scheduler counts it; some denoisers are told another one."""
    told = torch.as_tensor(step.timestep).flatten()[:1]
    return step.timestep if step.time in (None, float(told)) else torch.tensor([step.time])


def _named(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"

"""A picture as the latents that a run compares with at each of its steps."""

from __future__ import annotations

import os
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
        generator: draws the noise; without it the noise is always the same.

    Raises:
        SettingTypeError: none of these.
    """

    def __init__(self, given: Any, generator: torch.Generator | None = None) -> None:
        if not isinstance(given, _KINDS):
            raise SettingTypeError(f"a style is a picture, a path, latents or an inversion, not {type(given).__name__}")
        self._given, self._generator = given, generator
        self.forget()

    def forget(self) -> None:
        """Drop what was made for one call."""
        self._session: Session | None = None
        self._clean: torch.Tensor | None = None
        self._noise: torch.Tensor | None = None

    def begin(self, session: Session) -> None:
        """Encode and draw for a new call."""
        self._session = session
        if not isinstance(self._given, Trajectory):
            self._clean = self._encoded(session)
            source = self._generator or torch.Generator().manual_seed(_SEED)
            self._noise = torch.randn(self._clean.shape, generator=source, device=source.device).to(self._clean)

    def at(self, step: Step) -> torch.Tensor:
        """Its latents [1 or n, C, h, w] at a step, in the scheduler's space."""
        assert self._session is not None
        n = self._session.prompt.pictures
        if isinstance(self._given, Trajectory):
            latent = self._given.at(step.timestep)
        else:
            assert self._clean is not None and self._noise is not None
            alpha, sigma = self._session.signal(step)
            latent = alpha * self._clean + sigma * self._noise
        if len(latent) not in (1, n):
            raise SettingError(f"{len(latent)} styles for {n} pictures: give one, or one for each")
        return latent

    def _encoded(self, session: Session) -> torch.Tensor:
        given, size = self._given, session.latent_size
        if not isinstance(given, torch.Tensor) or given.shape[-3:-2] == (3,) != (session.latent_channels,):
            return session.encode_image(given, size).float()
        if given.ndim != 4 or tuple(given.shape[-2:]) != size:
            raise SettingError(
                f"style latents of shape {tuple(given.shape)}: [n, C, {size[0]}, {size[1]}] is needed "
                "here; give a picture instead, it is resized"
            )
        return given

"""A picture as the latents that a run compares with at each of its steps."""

from __future__ import annotations

import os
from collections.abc import Sequence
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
        self.forget()

    def forget(self) -> None:
        """Drop what was made for one call."""
        self._session: Session | None = None
        self._size = (0, 0)
        self._clean: torch.Tensor | None = None
        self._noise: torch.Tensor | None = None

    def begin(self, session: Session) -> None:
        """Encode and draw for a new call."""
        self._session, self._size = session, session.latent_size
        if not isinstance(self._given, Trajectory):
            self._clean = self._encoded(session)
            source = self._generator or torch.Generator().manual_seed(_SEED)
            shape = self._clean.shape if self._generator else self._clean[:1].shape  # a batch is its pictures
            self._noise = torch.randn(shape, generator=source, device=source.device).to(self._clean)

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
            raise SettingError(f"{len(latent)} {self._role}s for {n} pictures: give one, or one for each")
        if tuple(latent.shape[-2:]) != self._size:
            raise SettingError(
                f"{self._role} latents of {_named(latent.shape[-2:])} in a call of {_named(self._size)}: invert the "
                f"{self._role} at the size that is sampled"
            )
        return latent

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


def _named(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"

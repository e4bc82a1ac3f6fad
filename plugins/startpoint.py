"""Startpoint manipulation: the frequency filter of StyleSSP (arXiv 2501.11319) on initial latents.

The high frequencies of an inverted latent carry its outlines, the low ones its colours and washes. Damping the low ones
before sampling keeps the layout and lets another style in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch

from ..attention.errors import SettingError, SettingTypeError
from ..attention.step import Step
from .base import Plugin, Probe, Session, finite

Generators = torch.Generator | Sequence[torch.Generator]
Refill = Literal["unit", "match", "none"]
_SEED = 250111319  # no seed that a person picks: latents drawn from the same one would be refilled with themselves


def low_pass(size: tuple[int, int], sigma: float, like: torch.Tensor) -> torch.Tensor:
    """exp(-r^2 / (2 sigma^2)) on the frequencies of `rfft2`, r in units of Nyquist along each axis: [h, w // 2 + 1]."""
    fy = torch.fft.fftfreq(size[0], 0.5, dtype=like.dtype, device=like.device)
    fx = torch.fft.rfftfreq(size[1], 0.5, dtype=like.dtype, device=like.device)
    return torch.exp(-(fy[:, None] ** 2 + fx**2) / (2 * sigma**2))


def damp_low(latent: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """IFFT(FFT(z) * (1 - (1 - alpha) * M)) over the last two dimensions, M = `low_pass`; scales the mean by alpha.

    Written as z less what is damped: the transforms round that alone, a quarter of the error on all of z.
    """
    height, width = latent.shape[-2:]
    damped = (1 - alpha) * low_pass((height, width), sigma, latent)
    return latent - torch.fft.irfft2(torch.fft.rfft2(latent) * damped, s=(height, width))


def official_mask(size: tuple[int, int, int], sigma: float, like: torch.Tensor) -> torch.Tensor:
    """What the authors' program damps, on the frequencies of `rfftn` over (channel, h, w): 1 + LP(sigma) - LP(0.9).

    The channels count as a third axis, and LP falls off along it with a fixed 0.3.
    """
    channel, fy = (torch.fft.fftfreq(n, 0.5, dtype=like.dtype, device=like.device) for n in size[:2])
    fx = torch.fft.rfftfreq(size[2], 0.5, dtype=like.dtype, device=like.device)
    squared = fy[:, None] ** 2 + fx**2
    band = torch.exp(-squared / (2 * sigma**2)) - torch.exp(-squared / (2 * 0.9**2))
    return 1 + torch.exp(-(channel**2) / (2 * 0.3**2))[:, None, None] * band


def official(latent: torch.Tensor, noise: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """The filter of the authors' program on [..., C, h, w], for comparing with it; it is not the paper's.

    White noise leaves it with 0.76 of its deviation at nearly all frequencies, refilled to 0.82.
    """
    size = (latent.shape[-3], latent.shape[-2], latent.shape[-1])
    spectrum, mask = torch.fft.rfftn(latent, dim=(-3, -2, -1)), official_mask(size, sigma, latent)
    kept, other = (
        torch.fft.irfftn(spectrum * gain, s=size, dim=(-3, -2, -1))
        for gain in (1 - (1 - alpha) * mask, alpha + (1 - alpha) * mask)
    )
    return kept + (1 - alpha) * noise * (_range(other) / _range(noise))


def _range(x: torch.Tensor) -> torch.Tensor:
    return x.amax((-3, -2, -1), True) - x.amin((-3, -2, -1), True)


def unpack(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """[B, H*W, 4C] of FLUX and its like as [B, C, 2H, 2W]; `grid` = (H, W) in tokens."""
    blocks = tokens.unflatten(1, grid).unflatten(-1, (-1, 2, 2))
    return blocks.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def pack(latent: torch.Tensor) -> torch.Tensor:
    """The inverse of `unpack`."""
    blocks = latent.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))
    return blocks.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class StartpointFilter(Plugin):
    """Damps the low frequencies of initial latents and refills them with noise (StyleSSP, section 3.2).

    Call it on latents, or graft it: then it filters the latents of every pipeline call once, before the first step.

    Args:
        alpha: gain at zero frequency, 0 ... 1; 1 is neutral, returns its input and draws nothing.
        sigma: width of the damped band in units of the Nyquist frequency, above 0.
        generator: draws the refill, one for all or one for each picture. Without it the refill is always the
            same, for every picture.
        refill: its deviation before the factor 1 - alpha: "unit" (the paper), "match" (the latents' own) or "none".
        preset: "official" runs the filter of the authors' program instead, for parity with it only.

    Raises:
        SettingError, SettingTypeError: a setting, or what it is called on, is out of range.

    Example:
        >>> start = StartpointFilter(generator=torch.Generator().manual_seed(0))(latents)
    """

    def __init__(
        self, alpha: float = 0.7, sigma: float = 0.3, *, generator: Generators | None = None, refill: Refill = "unit",
        preset: Literal["official"] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.alpha, self.sigma = finite(alpha, "alpha", 0, 1), finite(sigma, "sigma", 1e-3)
        if refill not in ("unit", "match", "none"):
            raise SettingError(f"refill={refill!r}: choose unit, match or none")
        if preset not in (None, "official"):
            raise SettingError(f"preset={preset!r}: 'official' or None")
        self.refill, self.preset, self._generator = refill, preset, _checked(generator)

    @property
    def neutral(self) -> bool:
        return self.alpha == 1

    def __call__(
        self, latent: torch.Tensor, *, generator: Generators | None = None, grid: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Filtered latents.

        Args:
            latent: [B, C, h, w], or any tensor whose last two dimensions are spatial, [C, h, w] being one picture; or
                packed [B, tokens, 4C].
            generator: instead of the plugin's own.
            grid: (height, width) in tokens of packed latents.
        Returns:
            same shape, dtype, device and memory format; computed in at least float32.
        """
        if not isinstance(latent, torch.Tensor) or not latent.is_floating_point():
            raise SettingTypeError("latents are a tensor of floating point numbers")
        if 0 in latent.shape or not (latent.ndim >= 3 if grid is None else _fits(latent, grid)):
            raise SettingError(
                f"latents of shape {tuple(latent.shape)}{'' if grid is None else f' on grid={grid}'}: give "
                "[B, C, h, w], or [B, tokens, 4C] with grid=(height, width) in tokens"
            )
        if not latent.isfinite().all():
            raise SettingError("the latents hold NaN or infinity: filter what a run or an inversion really gave")
        return latent if self.neutral else self._filter(latent, _checked(generator), grid, 1.0)

    def begin(self, session: Session, step: Step) -> None:
        step.notes[self] = session
        self.tell(session, dict)

    def moves(self, step: Step) -> bool:
        return step.index == 0

    def latent(self, step: Step, latent: torch.Tensor, probe: Probe) -> torch.Tensor | None:
        session: Session = step.notes[self]
        alpha, sigma = session.signal(step)
        scale = (alpha**2 + sigma**2) ** 0.5  # 1 where latents keep unit variance, large in the space of Euler
        moved = self._filter(latent, None, step.size if latent.ndim == 3 else None, scale)
        done = {"deviation": f"{float(latent.std()):.3f} -> {float(moved.std()):.3f}"}
        self.tell(session, lambda: done)
        return moved

    def _filter(
        self, latent: torch.Tensor, generator: Generators | None, grid: tuple[int, int] | None, scale: float
    ) -> torch.Tensor:
        z = latent.to(torch.promote_types(latent.dtype, torch.float32))
        z = unpack(z, grid) if grid is not None else z[None] if z.ndim == 3 else z
        noise = torch.zeros_like(z) if self.refill == "none" else scale * _noise(z, generator or self._generator)
        if self.refill == "match":
            noise = noise * z.flatten(1).std(1).view(-1, *[1] * (z.ndim - 1)) / scale
        if self.preset == "official":
            moved = official(z, noise, self.alpha, self.sigma)
        else:
            moved = damp_low(z, self.alpha, self.sigma) + (1 - self.alpha) * noise
        return torch.empty_like(latent).copy_(moved.view_as(latent) if grid is None else pack(moved))


def _fits(latent: torch.Tensor, grid: Any) -> bool:
    """Whether these are packed latents of that many tokens."""
    whole = isinstance(grid, (list, tuple)) and [type(side) for side in cast("Sequence[Any]", grid)] == [int, int]
    return whole and latent.ndim == 3 and latent.shape[1] == grid[0] * grid[1] and latent.shape[2] % 4 == 0


def _checked(generator: Any) -> Any:
    every: Any = generator if isinstance(generator, (list, tuple)) else [] if generator is None else [generator]
    if not all(isinstance(one, torch.Generator) for one in every):
        raise SettingTypeError("generator= is a torch.Generator, or a list with one for each picture")
    return generator


def _noise(like: torch.Tensor, generator: Generators | None) -> torch.Tensor:
    """Standard normal noise, drawn on the generator's own device, row by row where there are several."""
    if isinstance(generator, torch.Generator):
        return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=generator.device).to(like.device)
    generators = generator or [torch.Generator().manual_seed(_SEED) for _ in like]  # a batch is its pictures
    if len(generators) != len(like):
        raise SettingError(f"{len(generators)} generators for {len(like)} latents: one for each, or one for all")
    rows = (torch.randn(like.shape[1:], generator=g, dtype=like.dtype, device=g.device) for g in generators)
    return torch.stack([row.to(like.device) for row in rows])

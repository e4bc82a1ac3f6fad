"""invert(pipe, ...): the noise that a picture would be sampled from, by the pipeline's own denoiser and steps.

Each step solves x_t = reverse_step(x_prev, denoiser(x_t, t)) by fixed-point iteration, as ReNoise (arXiv 2403.14602)
does; without extra iterations it is DDIM inversion. Negative guidance is equation 7 of StyleSSP (arXiv 2501.11319).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ...attention.errors import NonFiniteError, SettingError, SettingTypeError, UnsupportedSchedulerError
from ...attention.plain import plainly
from ...plugins.base import finite
from ..families import latents as pictures
from ..families.loop import Loop, loop_for
from ..grafting.blocks import suspended
from .negative import Negative, negative_for
from .schedule import Grid, grid_of, predicted_noise, reverse_step, same_start


@dataclass(frozen=True)
class Inversion:
    """The result of `invert`.

    Attributes:
        latents: as the pipeline's `latents=` takes them, [n, C, h, w] or packed: `pipe(..., latents=...)`.
        residuals: for each step, clean to noisy, the last change of its fixed point: RMS, the largest of the pictures.
        timesteps: of the steps, noisiest first.
        evaluations: rows that the denoiser computed for each picture.
        negative: where the negative came from: "none", "text", "image" (IP-Adapter) or "attention".
        trajectory: latents at each of `timesteps` in the scheduler's space, if asked for; see `at`.
        clean: the picture's own latents [n, C, h, w].
        scheduler: the one that was inverted, for sampling back.
    """

    latents: torch.Tensor
    residuals: list[float]
    timesteps: list[float]
    evaluations: int
    negative: str
    guidance: float
    clean: torch.Tensor
    scheduler: Any
    grid: Grid = field(repr=False)
    trajectory: list[torch.Tensor] | None = field(default=None, repr=False)

    @property
    def residual(self) -> float:
        """The largest of `residuals`."""
        return max(self.residuals)

    def at(self, timestep: Any) -> torch.Tensor:
        """The trajectory's latents at a timestep, [n, C, h, w] in the scheduler's space.

        Raises:
            SettingError: inverted without `trajectory=True`, or on other timesteps.
        """
        if self.trajectory is None:
            raise SettingError("this inversion kept no trajectory: invert(..., trajectory=True)")
        time = float(torch.as_tensor(timestep).flatten()[0])
        nearest = min(range(len(self.timesteps)), key=lambda i: abs(self.timesteps[i] - time))
        if abs(self.timesteps[nearest] - time) > 1e-2:  # of 1000: a schedule that begins later rounds otherwise
            raise SettingError(f"the trajectory has no timestep {time:g}: sample with {len(self.timesteps)} steps")
        return self.trajectory[nearest]

    def call(self, pipe: Any, steps: int | None = None) -> dict[str, Any]:
        """Arguments with which `pipe` starts where the inversion ended: `pipe(prompt, **inversion.call(pipe))`.

        Args:
            pipe: the pipeline that will sample.
            steps: its `num_inference_steps` if other than the inversion's; must begin at the same timestep.
        Raises:
            UnsupportedSchedulerError: its first timestep or noise scale is another one.
        """
        count = len(self.timesteps) if steps is None else _whole(steps, "steps", 1)
        if type(pipe.scheduler) is not type(self.scheduler):
            wrong = [f"scheduler {type(self.scheduler).__name__} is now {type(pipe.scheduler).__name__}"]
        else:
            loop = loop_for(pipe)
            size = (self.clean.shape[-2], self.clean.shape[-1])
            there = grid_of(pipe.scheduler, count, **loop.timing(size, count, pipe.scheduler))
            wrong = same_start(self.grid, there)
        if wrong:
            raise UnsupportedSchedulerError(
                f"these latents start elsewhere ({'; '.join(wrong)}): sample with the scheduler and the steps that "
                "were inverted, pipe.scheduler = inversion.scheduler"
            )
        return {"latents": self.latents, "num_inference_steps": count}


@plainly
@torch.no_grad()
def invert(
    pipe: Any, image_or_latents: Any, *, prompt: str | Sequence[str] = "", negative: Any = None, guidance: float = 1.5,
    steps: int = 50, iterations: int = 5, tolerance: float = 1e-3, trajectory: bool = False,
    generator: torch.Generator | None = None,
) -> Inversion:  # fmt: skip
    """The latents from which `pipe` samples a picture again, without guidance and with the same prompt.

    Runs as if no graft were on. Its scheduler is left as it is; one without an exact inverse is replaced, see
    `Inversion.scheduler`.

    Args:
        pipe: a supported pipeline.
        image_or_latents: a picture or a list of pictures of one size (PIL, paths, arrays, tensors), encoded by the
            autoencoder's mode, sides rounded down to what it takes; or clean latents [n, C, h, w].
        prompt: what the pictures show; one text, or one for each.
        negative: what to steer away from: texts, or a picture such as the style's. For a picture an IP-Adapter is
            used if the pipe has one, else the negative rows attend to the picture. None runs no negative pass.
        guidance: omega; the prediction is e+ + (omega - 1)(e+ - e-). 1 runs no negative pass.
        steps: as many as will be sampled.
        iterations: extra evaluations a step at most; 0 is DDIM inversion.
        tolerance: a picture's step is done when its last change is below this RMS; 0 runs all iterations.
        trajectory: keep the latents of every step.
        generator: draws the noise of a picture that is a negative by attention.

    Raises:
        SettingError, SettingTypeError: a setting out of range. NonFiniteError: the iteration diverged.
        UnsupportedPipelineError, UnsupportedSchedulerError: cannot be inverted.
    """
    iterations, steps = _whole(iterations, "iterations", 0), _whole(steps, "steps", 1)
    guidance, tolerance = finite(guidance, "guidance"), finite(tolerance, "tolerance", 0)
    loop = loop_for(pipe)
    if not isinstance(generator, torch.Generator | None):
        raise SettingTypeError(f"generator={generator!r}: a torch.Generator is needed")
    clean = _clean(pipe, image_or_latents)
    size = (clean.shape[-2], clean.shape[-1])
    grid = grid_of(pipe.scheduler, steps, clean.device, **loop.timing(size, steps, pipe.scheduler))
    weight = 0.0 if negative is None else guidance - 1
    source = negative_for(loop, clean, negative if weight else None, image_or_latents, generator)
    with suspended():
        texts = source.texts(_texts(prompt, len(clean)))
        inputs = loop.with_images(loop.conditions(texts, size), source.pictures)
        z, evaluations = clean, 0
        residuals, path = list[float](), list[torch.Tensor]()
        for i in reversed(range(len(grid.timesteps))):
            step = _Step(loop, grid, i, inputs, source, weight)
            z, residual, used = fixed_point(partial(step.back, z), z, iterations, tolerance)
            if not z.isfinite().all():
                raise NonFiniteError(f"inversion diverged at timestep {float(grid.timesteps[i]):g}: lower the guidance")
            residuals.append(float(residual.max()))
            evaluations += used * source.rows
            path.insert(0, grid.latents(z, i)) if trajectory else None
    start = loop.hand_over(grid.latents(z, 0) / grid.noise_scale).to(loop.denoiser.dtype)
    return Inversion(
        start, residuals, [float(t) for t in grid.timesteps], evaluations, source.kind, guidance,
        clean, grid.scheduler, grid, path if trajectory else None,
    )  # fmt: skip


@dataclass(frozen=True)
class _Step:
    """One step of the loop."""

    loop: Loop
    grid: Grid
    index: int
    inputs: dict[str, Any]
    negative: Negative
    weight: float

    def back(self, z: torch.Tensor, guess: torch.Tensor) -> torch.Tensor:
        """Where the step to `z` began if the denoiser says there what it says at `guess`."""
        start, end, prediction = self.grid.starts[self.index], self.grid.ends[self.index], self.grid.prediction
        output = self._guided(guess, self.grid.timesteps[self.index])
        if prediction == "sample":
            output, prediction = predicted_noise(guess, output, start, prediction), "epsilon"
        return reverse_step(z, output, start, end, prediction)

    def _guided(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        rows = self.negative.batch(x, self.grid.starts[self.index]).to(self.loop.denoiser.dtype)
        with self.negative.edited(len(x), timestep):
            return self.negative.guided(self.loop.predict(rows, timestep, self.inputs).to(x.dtype), self.weight)


def fixed_point(
    step: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor, iterations: int, tolerance: float
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Iterates x <- step(x) for each row until its last change is at most `tolerance` in RMS.

    A row whose change grows is damped: it goes half of the way. Rows that are done stay, so a batch is its rows.

    Returns:
        x, the last change of each row [n], evaluations (1 + the extra ones).
    """
    x = step(start)
    residual = _rms(x - start)
    done = torch.zeros_like(residual, dtype=torch.bool)
    for used in range(iterations):
        change = step(x) - x
        size = _rms(change)
        pace = torch.where((size > residual) & (used > 0), 0.5, 1.0)
        x = torch.where(_wide(done, x), x, x + _wide(pace, x) * change)
        residual = torch.where(done, residual, size)
        done = done | ((residual <= tolerance) & (tolerance > 0))
        if bool(done.all()):
            return x, residual, used + 2
    return x, residual, iterations + 1


def _rms(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).pow(2).mean(1).sqrt()


def _wide(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return rows.view(-1, *[1] * (like.ndim - 1)).to(torch.bool if rows.dtype == torch.bool else like.dtype)


def _clean(pipe: Any, given: Any) -> torch.Tensor:
    """Clean latents in at least float32."""
    channels = pictures.channels_of(pipe)
    if isinstance(given, torch.Tensor) and given.ndim == 4 and given.shape[1] == channels and channels != 3:
        if not given.numel() or not given.isfinite().all():
            raise SettingError(f"latents of shape {tuple(given.shape)}: finite values are needed, of a picture or more")
        if any(side % pictures.patch(pipe) for side in given.shape[2:]):
            raise SettingError(f"latents of shape {tuple(given.shape)}: this model takes even sides")
        z = given.to(pipe._execution_device)
    else:
        z = pictures.encode_image(pipe, given)
    return z.to(torch.promote_types(z.dtype, torch.float32))


def _texts(prompt: str | Sequence[str], n: int) -> list[str]:
    texts: list[Any] = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt] * n
    if not all(isinstance(text, str) for text in texts):
        raise SettingTypeError(f"prompt={prompt!r}: a text is needed, or one for each picture")
    if len(texts) != n:
        raise SettingError(f"{len(texts)} prompts for {n} pictures: one for each, or one for all")
    return texts


def _whole(value: Any, name: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise SettingTypeError(f"{name}={value!r}: a whole number is needed")
    if not least <= value <= 1000:
        raise SettingError(f"{name}={value}: must be {least} ... 1000")
    return value

"""What a search for a startpoint descends on: the loss of noise, and its gradient, through a pipeline."""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ...attention.errors import SettingError, SettingTypeError, UnsupportedPipelineError
from ...attention.step import Step
from ...plugins.base import Plugin, Probe
from ...plugins.concepts import Concepts
from ...plugins.losses import Loss
from ...plugins.moves import LOSS_SCALE
from ...plugins.segregation import AttentionSegregation
from ..families import adapter_for
from ..grafting.graft import graft

Measured = tuple[torch.Tensor, torch.Tensor]
"""(losses [n], gradient like the noise)."""


class Objective(Protocol):
    """measure(noise [n, C, h, w]) -> losses and gradient."""

    def __call__(self, noise: torch.Tensor) -> Measured: ...


@dataclass
class Surrogate:
    """The pipeline on which the gradient is taken.

    Attributes:
        prompts: one a picture. plugins: grafted on it. call: further arguments of the pipeline.
        checkpointed: whether denoiser and decoder are run again for the gradient instead of kept.
    """

    pipe: Any
    prompts: Sequence[str]
    steps: int
    guidance: float | None
    plugins: Sequence[Plugin] = ()
    checkpointed: bool = True
    call: dict[str, Any] = field(default_factory=dict[str, Any])

    def run(self, noise: torch.Tensor, **more: Any) -> torch.Tensor:
        """The pipeline's latents of packed noise, with gradients if they are on."""
        adapter = adapter_for(self.pipe)
        given = {"guidance_scale": self.guidance} if self.guidance is not None else {}
        body = type(self.pipe).__call__
        body = getattr(body, "__wrapped__", body)  # below its no_grad
        out = body(
            self.pipe, prompt=list(self.prompts), latents=adapter.as_sample(noise), num_inference_steps=self.steps,
            output_type="latent", **given, **self.call, **more,
        )  # fmt: skip
        return out.images

    def scale(self) -> float:
        """Factor on the loss: gradients through float16 would vanish."""
        return LOSS_SCALE if adapter_for(self.pipe).denoiser.dtype == torch.float16 else 1.0


@dataclass
class OnPictures:
    """A loss of decoded pictures."""

    surrogate: Surrogate
    loss: Callable[..., torch.Tensor]

    def __call__(self, noise: torch.Tensor) -> Measured:
        at = self.surrogate
        with torch.enable_grad(), prepared(at), graft(at.pipe, *at.plugins) if at.plugins else ExitStack():
            z = noise.detach().requires_grad_()
            pictures = self._decoded(at.run(z), z)
            losses = [self.loss(one[None], prompt) for one, prompt in zip(pictures, at.prompts, strict=True)]
            for loss in losses:
                if not isinstance(loss, torch.Tensor) or loss.numel() != 1:  # pyright: ignore[reportUnnecessaryIsInstance]
                    raise SettingTypeError(f"loss= gave {type(loss).__name__} for a picture: one number is needed")
            values = torch.cat([loss.reshape(1) for loss in losses])
            if not values.requires_grad:
                raise SettingError("loss= has no gradient with respect to the pictures: use torch operations only")
            scale = at.scale()
            (gradient,) = torch.autograd.grad(scale * values.sum(), z)
        return values.detach(), gradient / scale

    def _decoded(self, latents: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """[n, 3, H, W] in 0 ... 1, at least float32."""
        pipe = self.surrogate.pipe
        if latents.ndim == 3:
            patch = 2  # packed latents: two by two of them are a token
            size = (like.shape[-2] // patch, like.shape[-1] // patch)
            latents = adapter_for(pipe).latent_of(latents, size)
        config = pipe.vae.config
        latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)

        def decode(x: torch.Tensor) -> torch.Tensor:
            return pipe.vae.decode(x.to(pipe.vae.dtype), return_dict=False)[0]

        pixels = checkpoint(decode, latents, use_reentrant=False) if self.surrogate.checkpointed else decode(latents)
        pixels = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
        return (pixels / 2 + 0.5).clamp(0, 1)


class _Found(BaseException):
    """Ends a run whose losses and gradient are known."""


class _Look(AttentionSegregation):
    """Takes the loss of the first step's maps and its gradient, and ends the run there."""

    found: Measured | None = None

    @property
    def neutral(self) -> bool:
        return False

    def latent(self, step: Step, latent: torch.Tensor, probe: Probe) -> None:
        z = latent.detach().requires_grad_()
        losses = torch.stack(self.losses(self.call(step), z, probe))
        (gradient,) = torch.autograd.grad(losses.sum(), z)
        self.found = losses.detach(), gradient
        raise _Found


@dataclass
class OnMaps:
    """A loss of the concepts' attention maps at the first step: half a forward, and no decoder."""

    surrogate: Surrogate
    concepts: Concepts
    loss: str | Loss

    def __call__(self, noise: torch.Tensor) -> Measured:
        at, look = self.surrogate, _Look(self.concepts, loss=self.loss)
        try:
            with prepared(at), graft(at.pipe, *at.plugins, look):
                at.run(noise.detach())
        except _Found:
            assert look.found is not None
            losses, gradient = look.found
            return losses, gradient * getattr(at.pipe.scheduler, "init_noise_sigma", 1.0)
        raise UnsupportedPipelineError(f"{type(at.pipe.scheduler).__name__} never reached the step with the maps")


@contextmanager
def prepared(at: Surrogate) -> Generator[None]:
    """Parameters without gradients, no bar of the pipeline's own, the denoiser run again for the gradient instead of
    kept; all put back.
    """
    pipe = at.pipe
    with ExitStack() as stack:
        for part in pipe.components.values():
            for parameter in part.parameters() if isinstance(part, nn.Module) else ():
                if parameter.requires_grad:
                    parameter.requires_grad_(False)
                    stack.callback(parameter.requires_grad_, True)
        bar = dict(getattr(pipe, "_progress_bar_config", {}))
        pipe.set_progress_bar_config(**(bar | {"disable": True}))
        stack.callback(pipe.set_progress_bar_config, **bar)
        if at.checkpointed and not at.plugins:  # a plugin's edits belong to a step, and that is over then
            stack.callback(_run_again(adapter_for(pipe).denoiser))
        yield


def _run_again(denoiser: Any) -> Callable[[], None]:
    """Checkpoint the denoiser's whole forward; returns the undo."""
    own, forward = "forward" in denoiser.__dict__, denoiser.forward

    @functools.wraps(forward)
    def again(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    def undo() -> None:
        if own:
            denoiser.forward = forward
        else:
            del denoiser.__dict__["forward"]

    denoiser.forward = again
    return undo

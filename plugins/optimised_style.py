"""Attention distillation as its paper transfers style: one latent is optimised over all timesteps."""

from __future__ import annotations

from typing import Any

import torch

from ..attention.step import Step
from .base import Probe, Session
from .distillation import AttentionDistillation
from .style_injection import Layers


class OptimisedStyle(AttentionDistillation):
    """Moves a latent of its own from the clean content along the gradient of attention distillation's loss.

    One Adam goes over the timesteps of a whole pipeline call, and style and content are looked at without noise. What
    the pipeline samples meanwhile is of no interest: `found` is the result, `diffgraft.stylize(method="optimised")`
    decodes it. An object serves one call.

    Args:
        style, content: clean latents [1 or n, C, h, w] or pictures. rate, content_weight, updates, layers: as of
            `AttentionDistillation`.

    Attributes:
        found: the latent [n, C, h, w] in the autoencoder's scaled space, None before the first step.
    """

    def __init__(
        self, style: Any, content: Any, *, rate: float = 0.05, content_weight: float = 0.25, updates: int = 1,
        layers: Layers | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            style, content=content, rate=rate, content_weight=content_weight, updates=updates, layers=layers
        )
        self.found: torch.Tensor | None = None
        self._adam: torch.optim.Adam | None = None

    def begin(self, session: Session, step: Step) -> None:
        super().begin(session, step)
        call = self.call(step)
        assert self._content_given is not None
        call.clean = self._content_given.begin(session).clean
        self.found, self._adam = None, None

    def latent(self, step: Step, latent: torch.Tensor, probe: Probe) -> torch.Tensor | None:
        call = self.call(step)
        assert call.clean is not None and call.style.clean is not None
        alpha, sigma = call.session.signal(step)
        scale = max(1.0, (alpha**2 + sigma**2) ** 0.5)  # the model is shown the latent as it is
        if self.found is None or self._adam is None:
            self.found = call.clean.to(latent).expand_as(latent).clone()
            self._adam = torch.optim.Adam([self.found], lr=self.rate)
        step.may_stop = False
        try:
            content = None if call.content is None else call.clean.to(latent) * scale
            self.refer(call, probe, call.style.clean.to(latent) * scale, content)
            done = self.updated(call, self.found, self._adam, probe, scale)
        finally:
            step.may_stop = True
            call.forget()
        return self.found * scale if done else None

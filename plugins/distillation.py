"""Attention distillation (arXiv 2502.20235): the latent is moved until its self-attention gives what it would give with
the keys and values of a style picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..attention.call import AttentionCall
from ..attention.edit import Edit
from ..attention.errors import SettingError, SettingTypeError
from ..attention.layer import AttentionLayer
from ..attention.step import Step
from .base import Plugin, Probe, Session, finite, listed
from .moves import LOSS_SCALE, gradient_of
from .reference import Reference
from .style_injection import Layers, choose_layers


def difference(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean of |x - target| of each picture [n]: the L1 distance of equations 3 and 4, for x of [n, H, N, D]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) - target.to(wide)).abs().flatten(1).mean(1)


class AttentionDistillation(Plugin):
    """Moves the latent, before each step, along the gradient of a loss on self-attention.

    The loss of a layer is the distance of softmax(Q K^T) V from softmax(Q K_s^T) V_s, the style's keys and values held
    fixed, plus `content_weight` times the distance of Q from the content's. Style and content are looked at under the
    call's own prompt. Each update costs a pass with gradients over the layers up to the last chosen one.

    Args:
        style: a picture, latents [1 or n, C, h, w], or an `Inversion` with its trajectory.
        content: the same for the picture whose layout is to be kept, or None.
        rate: step of Adam in latents of unit variance; 0 is neutral. The paper uses 0.05.
        content_weight: the paper uses 0.25 for a style. 0 leaves the content out.
        updates: of each step; Adam starts anew at every step.
        layers: as of `StyleInjection`; "decoder" are the paper's six of SD1.5.
        generator: draws the noise of a style or a content that is a picture.
        start, end: fractions of the steps.

    Raises:
        SettingError, SettingTypeError: a setting out of range.
    """

    def __init__(
        self, style: Any, *, content: Any = None, rate: float = 0.05, content_weight: float = 0.25, updates: int = 1,
        layers: Layers = "decoder", generator: torch.Generator | None = None, start: float = 0.0, end: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(start=start, end=end)
        if isinstance(updates, bool) or not isinstance(updates, int):
            raise SettingTypeError(f"updates={updates!r}: a whole number is needed")
        if not 1 <= updates <= 1000:
            raise SettingError(f"updates={updates}: must be 1 ... 1000")
        self.rate, self.content_weight = finite(rate, "rate", 0), finite(content_weight, "content_weight", 0)
        self.updates = updates
        self.layers: Layers = layers if isinstance(layers, str) else listed(layers)
        self._style = Reference(style, generator)
        reference = None if content is None else Reference(content, generator, "content")
        self._content = reference if content_weight else None
        self._session: Session | None = None
        self._look = _Look()
        self._losses: list[torch.Tensor] = []

    @property
    def neutral(self) -> bool:
        return self.rate == 0

    def bind(self, session: Session) -> None:
        self._look.chosen = choose_layers(session.layers, self.layers)

    def unbind(self) -> None:
        self._session = None
        self._look.forget()
        for reference in (self._style, self._content):
            if reference is not None:
                reference.forget()

    def begin(self, session: Session, step: Step) -> None:
        self._session, self._losses = session, []
        for reference in (self._style, self._content):
            if reference is not None:
                reference.begin(session)

    def edits(self) -> Sequence[Edit]:
        return (self._look,)

    def latent(self, step: Step, latent: torch.Tensor, probe: Probe) -> torch.Tensor | None:
        assert self._session is not None
        step.may_stop = False  # what other plugins have seen is not all that this one wants to see
        try:
            with torch.no_grad():
                self._look.at(probe, self._style.at(step).to(latent), "style")
                if self._content is not None:
                    self._look.at(probe, self._content.at(step).to(latent), "content")
            alpha, sigma = self._session.signal(step)
            return self._moved(latent, probe, self.rate * (alpha**2 + sigma**2) ** 0.5)
        finally:
            step.may_stop = True
            self._look.forget()

    def _moved(self, latent: torch.Tensor, probe: Probe, rate: float) -> torch.Tensor | None:
        """`latent` after Adam's updates, None if a loss or a gradient is not finite."""
        assert self._session is not None
        z = latent.detach().clone().requires_grad_()
        adam = torch.optim.Adam([z], lr=rate)
        for _ in range(self.updates):
            self._look.at(probe, z, "loss")
            losses = self._look.style + self.content_weight * self._look.content
            z.grad = gradient_of(losses.sum(), z, LOSS_SCALE if self._look.dtype == torch.float16 else 1.0)
            if not (z.grad.isfinite().all() and losses.isfinite().all()):
                self._session.skip("the gradient is not finite")
                return None
            adam.step()
            self._losses.append(losses.detach().mean())
        return z.detach()

    def report(self) -> Mapping[str, Any]:
        ends = self._losses[:1] + self._losses[1:][-1:]
        return {"loss, first and last": [round(float(loss), 6) for loss in ends]}


class _Look(Edit):
    """Keeps what layers attend with while a reference is looked at, and sums the losses while the latent is."""

    order = 900  # behind the edits that change what is attended with

    def __init__(self) -> None:
        self.chosen: set[str] = set()
        self.forget()

    def forget(self) -> None:
        """Drop tensors."""
        self.role = ""
        self.keys: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.queries: dict[str, torch.Tensor] = {}
        self.dtype = torch.float32
        self.style = self.content = torch.zeros(())

    def at(self, probe: Probe, latent: torch.Tensor, role: str) -> None:
        """Look at a latent as the "style", as the "content", or for the "loss"."""
        self.style = self.content = torch.zeros((), device=latent.device)
        self.role = role
        try:
            probe(latent)
        finally:
            self.role = ""

    def selects(self, layer: AttentionLayer) -> bool:
        return layer.kind == "self" and layer.name in self.chosen

    def active(self, layer: AttentionLayer, step: Step) -> bool:
        return step.phase == "latent" and bool(self.role)

    def out(self, call: AttentionCall, out: torch.Tensor) -> torch.Tensor:
        name, self.dtype = call.layer.name, call.q.dtype
        if self.role == "style":
            self.keys[name] = call.k, call.v
        elif self.role == "content":
            self.queries[name] = call.q
        elif call.step.probing:  # gradient checkpointing runs the layer again, after the loss is known
            ideal = call.attend(call.q.detach(), *self.keys[name], call.mask)
            self.style = self.style + difference(out, ideal)
            if name in self.queries:
                self.content = self.content + difference(call.q, self.queries[name])
        return out

"""Attention distillation (arXiv 2502.20235): the latent is moved until its self-attention gives what it would give with
the keys and values of a style picture. Where text and image are one sequence, that is the image's attention to itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch

from ..attention.call import AttentionCall
from ..attention.edit import Edit
from ..attention.errors import SettingError, SettingTypeError
from ..attention.layer import AttentionLayer
from ..attention.step import Step
from .base import Plugin, Probe, Session, finite, listed
from .moves import LOSS_SCALE, gradient_of, need_gradients
from .reference import Reference, Sight
from .style_injection import Layers, choose_layers

Order = Literal["before", "after"]
PUBLISHED = 6
"""Self-attention layers of UNets, the last ones, that are published."""


def difference(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean of |x - target| of each picture [n]: the L1 distance of equations 3 and 4, for x of [n, H, N, D]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) - target.to(wide)).abs().flatten(1).mean(1)


class AttentionDistillation(Plugin):
    """Moves the latent, between the steps, along the gradient of a loss on self-attention.

    The loss of a layer is the distance of softmax(Q K^T) V from softmax(Q K_s^T) V_s, the style's keys and values held
    fixed, plus `content_weight` times the distance of Q from the content's. Style and content are looked at under the
    call's own prompt. Each update costs a pass with gradients over the layers up to the last chosen one.

    Args:
        style: a picture, latents [1 or n, C, h, w], or an `Inversion` with its trajectory.
        content: the same for the picture whose layout is to be kept, or None.
        rate: step of Adam in latents of unit variance; 0 is neutral. The paper uses 0.05.
        content_weight: the paper uses 0.25 for a style. 0 leaves the content out.
        updates: of each step; Adam starts anew at every step.
        layers: as of `StyleInjection`; None is the last six of "decoder", as published for SD1.5 and SDXL, and the
            later half of a transformer.
        order: "before" moves the latent before each step, "after" behind each step, as published: not the first noise.
            What is published moves the finished latent once more, which is left out.
        generator: draws the noise of a style or a content that is a picture.
        start, end: fractions of the steps.

    Raises:
        SettingError, SettingTypeError: a setting out of range.
    """

    def __init__(
        self, style: Any, *, content: Any = None, rate: float = 0.05, content_weight: float = 0.25, updates: int = 1,
        layers: Layers | None = None, order: Order = "before", generator: torch.Generator | None = None,
        start: float = 0.0, end: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(start=start, end=end)
        if order not in ("before", "after"):
            raise SettingError(f"order={order!r}: choose before or after")
        if isinstance(updates, bool) or not isinstance(updates, int):
            raise SettingTypeError(f"updates={updates!r}: a whole number is needed")
        if not 1 <= updates <= 1000:
            raise SettingError(f"updates={updates}: must be 1 ... 1000")
        self.rate, self.content_weight = finite(rate, "rate", 0), finite(content_weight, "content_weight", 0)
        self.updates, self.order = updates, order
        self.layers: Layers | None = layers if layers is None or isinstance(layers, str) else listed(layers)
        self._style = Reference(style, generator)
        self._content_given = None if content is None else Reference(content, generator, "content")
        self._content = self._content_given if content_weight else None
        self._chosen: set[str] = set()

    @property
    def neutral(self) -> bool:
        return self.rate == 0

    def bind(self, session: Session) -> None:
        chosen = choose_layers(session.layers, self.layers or "decoder")
        names = [layer.name for layer in session.layers if layer.name in chosen]
        unet = any(layer.place == "up" for layer in session.layers)
        self._chosen = set(names[-PUBLISHED:] if unet and self.layers is None else names)

    def edits(self) -> Sequence[Edit]:
        return (_Look(self, self._chosen),)

    def begin(self, session: Session, step: Step) -> None:
        content = None if self._content is None else self._content.begin(session)
        call = step.notes[self] = Call(session, self._style.begin(session), content)
        self.tell(session, partial(_told, call.losses))

    def call(self, step: Step) -> Call:
        """The state of the pipeline call that runs."""
        return step.notes[self]

    def moves(self, step: Step) -> bool:
        return self.order == "before" or step.index > 0

    def latent(self, step: Step, latent: torch.Tensor, probe: Probe) -> torch.Tensor | None:
        call = self.call(step)
        step.may_stop = False  # what other plugins have seen is not all that this one wants to see
        try:
            content = None if call.content is None else call.content.at(step).to(latent)
            self.refer(call, probe, call.style.at(step).to(latent), content)
            alpha, sigma = call.session.signal(step)
            z = latent.detach().clone()
            adam = torch.optim.Adam([z], lr=self.rate * (alpha**2 + sigma**2) ** 0.5)
            return z if self.updated(call, z, adam, probe) else None
        finally:
            step.may_stop = True
            call.forget()

    def refer(self, call: Call, probe: Probe, style: torch.Tensor, content: torch.Tensor | None) -> None:
        """Look at the references' latents."""
        with torch.no_grad():
            call.look(probe, style, "style")
            if content is not None:
                call.look(probe, content, "content")

    def updated(self, call: Call, z: torch.Tensor, adam: torch.optim.Adam, probe: Probe, scale: float = 1.0) -> bool:
        """Let Adam move `z`, of which the model is shown `scale` z; False if a loss or a gradient is not finite."""
        for _ in range(self.updates):
            z.requires_grad_()
            call.look(probe, z * scale, "loss")
            seen = call.seen
            losses = seen.style + self.content_weight * seen.content
            gradient = gradient_of(losses.sum(), z, LOSS_SCALE if seen.dtype == torch.float16 else 1.0)
            z.requires_grad_(False).grad = gradient
            if not (gradient.isfinite().all() and losses.isfinite().all()):
                call.session.skip("the gradient is not finite")
                return False
            adam.step()
            call.losses.append(losses.detach().mean())
        return True


@dataclass
class Seen:
    """What layers attended with while a reference was looked at, and the losses while the latent was.

    Attributes:
        role: what is looked at: "style", "content", or the latent for the "loss"; "" is nothing.
        keys, queries: by layer. dtype: what the layers compute in. style, content: losses of each picture.
    """

    role: str = ""
    keys: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict[str, Any])
    queries: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    dtype: torch.dtype = torch.float32
    style: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    content: torch.Tensor = field(default_factory=lambda: torch.zeros(()))


@dataclass
class Call:
    """State of one pipeline call; `losses` are the means of all updates, `clean` is the content without noise."""

    session: Session
    style: Sight
    content: Sight | None
    seen: Seen = field(default_factory=Seen)
    losses: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    clean: torch.Tensor | None = None

    def forget(self) -> None:
        """Drop what was looked at, and the graph with it."""
        self.seen = Seen()

    def look(self, probe: Probe, latent: torch.Tensor, role: str) -> None:
        """Look at a latent as the "style", as the "content", or for the "loss"."""
        self.seen.style = self.seen.content = torch.zeros((), device=latent.device)
        self.seen.role = role
        try:
            probe(latent)
        finally:
            self.seen.role = ""


def _told(losses: Sequence[torch.Tensor]) -> Mapping[str, Any]:
    ends = [*losses[:1], *losses[1:][-1:]]
    return {"loss, first and last": [round(float(loss), 6) for loss in ends]}


class _Look(Edit):
    """Keeps what layers attend with while a reference is looked at, and sums the losses while the latent is."""

    order = 900  # behind the edits that change what is attended with
    traced, ragged = True, "each"  # it runs in probes only, which are eager

    def __init__(self, plugin: AttentionDistillation, chosen: set[str]) -> None:
        self.plugin, self.chosen = plugin, chosen

    def selects(self, layer: AttentionLayer) -> bool:
        return layer.name in self.chosen

    def active(self, layer: AttentionLayer, step: Step) -> bool:
        return step.phase == "latent" and bool(self.plugin.call(step).seen.role)

    def out(self, call: AttentionCall, out: torch.Tensor) -> torch.Tensor:
        name, seen = call.layer.name, self.plugin.call(call.step).seen
        seen.dtype = call.q.dtype
        q, k, v, mask, mine = call.q, call.k, call.v, call.mask, out
        if call.layer.kind == "joint":  # the image's part: its attention to itself
            (q, k, v), mask = call.image_part(slice(0, len(q))), None
        if seen.role == "style":
            seen.keys[name] = k, v
        elif seen.role == "content":
            seen.queries[name] = q
        elif call.step.probing:  # gradient checkpointing runs the layer again, after the loss is known
            mine = call.attend(q, k, v, mask) if call.layer.kind == "joint" else out
            if torch.is_grad_enabled():
                need_gradients([q, mine])
            ideal = call.attend(q.detach(), *seen.keys[name], mask)
            seen.style = seen.style + difference(mine, ideal)
            if name in seen.queries:
                seen.content = seen.content + difference(q, seen.queries[name])
        return out

"""The rows of the tables about attention guidance: the default, its parts, other forms, and two controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ... import AttentionSegregation, Plugin
from ...attention.step import Step
from ...plugins.base import Probe
from ...plugins.moves import low_pass, relative_step, step_factor
from .model_card import GUIDANCE
from .rows import Pace
from .world import FRESH, Scene, scene

FIRST = FRESH + 3_000_000  # captions of the reported tables; settings are chosen on others
DEFAULT = AttentionSegregation(["ball", "star"])
USUAL = Pace(20, GUIDANCE)
Row = Callable[[Sequence[Scene], int], Plugin | None]


class RandomDirection(Plugin):
    """Moves as far as the default does, to where a low-passed random field points."""

    def __init__(self, seed: int, size: float = DEFAULT.size) -> None:
        super().__init__(end=DEFAULT.end)
        self.seed, self.size = seed, size
        self.draws = torch.Generator().manual_seed(seed)

    def latent(self, step: Step, latent: torch.Tensor, probe: Probe) -> torch.Tensor:
        field = low_pass(torch.randn(latent.shape, generator=self.draws), 4).to(latent.device)
        return latent - relative_step(field, self.size * step_factor(step.index, step.total, DEFAULT.decay), latent)


class OtherCaption(AttentionSegregation):
    """Moves each picture along the gradient of the loss of the next picture's caption."""

    def latent(self, step: Step, latent: torch.Tensor, probe: Probe) -> torch.Tensor | None:
        return super().latent(step, latent, lambda z: probe(z.roll(1, 0)))


def guided(scenes: Sequence[Scene], seed: int, kind: Any = AttentionSegregation, **settings: Any) -> Plugin:
    """A row's plugin: the concepts are the kinds of each scene, as its caption names them."""
    return kind([[thing.kind for thing in s.things] for s in scenes], **settings)


def bound(scenes: Sequence[Scene], seed: int, **settings: Any) -> Plugin:
    """The same with each colour bound to its kind."""
    colours = [{thing.kind: thing.colour for thing in s.things} for s in scenes]
    return guided(scenes, seed, attributes=colours, binding=1.0, **settings)


def plain(scenes: Sequence[Scene], seed: int) -> None:
    """The row that the others are compared with."""


CONTROLLED: Mapping[str, Row] = {
    "plain pipeline": plain,
    "default": guided,
    "control: random direction": lambda scenes, seed: RandomDirection(seed),
    "control: another caption's gradient": partial(guided, kind=OtherCaption, previous="pre"),
}
PARTS: Mapping[str, Row] = {
    "plain pipeline": plain,
    "default": guided,
    "segregation only": partial(guided, retention=0),
    "retention only": partial(guided, segregation=0),
}
FORMS: Mapping[str, Row] = PARTS | {
    'layout="auto"': partial(guided, layout="auto"),
    "default + colours bound": bound,
    "default, route of values": partial(guided, route="values"),
    "default, best of 8 starts": partial(guided, candidates=8),
    "attend-and-excite, 10%": partial(guided, loss="attend-and-excite", size=0.1),
    "jsd": partial(guided, loss="jsd"),
    'preset="paper"': partial(guided, preset="paper"),
}


def two_objects(count: int, first: int = FIRST) -> list[Scene]:
    """Plain scenes, half of seen pairs of kinds and half of unseen ones."""
    splits = ("seen", "unseen")
    return [scene(first + i, count=2, split=splits[i % 2], style="plain") for i in range(count)]


def three_objects(count: int, first: int = FIRST + 500_000) -> list[Scene]:
    """Plain scenes of three kinds, of triples never seen in training."""
    return [scene(first + i, count=3, split="unseen", style="plain") for i in range(count)]

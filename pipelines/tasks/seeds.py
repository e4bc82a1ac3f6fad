"""Seeds ranked by an attention loss before a picture is drawn: forward only, no gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ...attention.errors import SettingError
from ...attention.plain import plainly
from ...attention.step import Step
from ...plugins.base import Probe
from ...plugins.concepts import Concepts, check_concepts
from ...plugins.losses import Loss
from ...plugins.segregation import AttentionSegregation
from ..grafting.graft import graft
from .generate import resolve_seed, sample


class RankedSeed(NamedTuple):
    """A seed and its loss."""

    seed: int
    loss: float


class _Ranked(BaseException):
    """Ends a run whose losses are known."""


class _Rank(AttentionSegregation):
    """Looks at one step and ends the run there."""

    def __init__(self, concepts: Concepts, at: int, **settings: Any) -> None:
        super().__init__(concepts, end=1.0, **settings)
        self.at, self.found = at, list[float]()

    @property
    def neutral(self) -> bool:
        return False  # nothing is moved, whatever the size

    def moves(self, step: Step) -> bool:
        if self.at >= step.total:
            raise SettingError(f"at={self.at}: this run has {step.total} steps, counted from 0")
        return step.index == self.at

    def latent(self, step: Step, latent: torch.Tensor, probe: Probe) -> None:
        call = self.call(step)
        call.regions.look_back(self._split, call.pictures)
        with torch.no_grad():
            self.found = torch.stack(self.losses(call, latent, probe)).tolist()
        raise _Ranked


@plainly
def rank_seeds(
    pipe: Any,
    prompt: str,
    concepts: Concepts,
    seeds: Sequence[int],
    *,
    loss: str | Loss = "attend-and-excite",
    at: int = 0,
    steps: int = 25,
    guidance: float | None = None,
    batch_size: int = 4,
    settings: dict[str, Any] | None = None,
    **call: Any,
) -> list[RankedSeed]:
    """Candidate seeds, the most promising first; draw the first ones with `generate(..., seed=...)`.

    Args:
        pipe: a text-to-image pipeline.
        prompt: one prompt. concepts: its words, as for `AttentionSegregation`.
        seeds: candidates. At step 0 each costs the conditional half of one forward, up to the last map.
        loss: which loss ranks; what each is worth at which step is in the benchmark `segregation_effect`.
        at: the step whose maps are taken; later ones know more and cost the guided steps before them.
        steps, guidance, call: as the picture will be drawn.
        batch_size: candidates at once; does not change the ranks.
        settings: further arguments of `AttentionSegregation`, such as its normalisation.
    Raises:
        SettingError, SettingTypeError: no seeds or concepts, or `at` outside of the run. ConceptError: a concept is
            not in the prompt.
    """
    if not isinstance(seeds, Sequence) or not seeds:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise SettingError(f"seeds={seeds!r}: give the candidates, such as range(8)")
    for name, value, low in (("at", at, 0), ("batch_size", batch_size, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SettingError(f"{name}={value!r}: a whole number, {low} or more, is needed")
    if len(check_concepts(concepts)) > 1:
        raise SettingError(f"concepts={concepts!r}: one list of words, since there is one prompt")
    if not any(check_concepts(concepts)):
        raise SettingError("concepts= is empty: seeds are ranked by the maps of words, such as ['ball', 'star']")
    taken = {"start", "end", "loss"} & {*(settings or {})}
    if taken:
        raise SettingError(f"settings= holds {', '.join(sorted(taken))}: say when by at=, and loss= beside it")
    numbers = [resolve_seed(seed) for seed in seeds]
    ranked: list[RankedSeed] = []
    for i in range(0, len(numbers), batch_size):
        part = numbers[i : i + batch_size]
        plugin = _Rank(concepts, at, loss=loss, **(settings or {}))
        try:
            with graft(pipe, plugin):
                sample(pipe, [prompt] * len(part), part, steps=steps, guidance=guidance, **call)
        except _Ranked:
            ranked += map(RankedSeed, part, plugin.found)
        else:
            raise SettingError(f"at={at}: {type(pipe.scheduler).__name__} repeats that step; take another")
    return sorted(ranked, key=lambda one: (math.isnan(one.loss), one.loss))

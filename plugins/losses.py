"""Losses on concept maps, as published, and the registry that names them. All are pure functions.

`maps` are [C, h, w], one map a concept of one picture, non-negative, at least float32; losses are scalars.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations

import torch

from ..attention.errors import SettingError


@dataclass(frozen=True)
class Maps:
    """What a loss may look at, for one picture at one step.

    Attributes:
        concepts: [C, h, w].
        regions: [C, h, w], 0 or 1: where each concept was at the previous step, or the user's layout; None at the
            first step without a layout.
        attributes: by number of the concept, [h, w]: its attribute word ("blue" of "ball").
        segregation, retention: the plugin's weights.
    """

    concepts: torch.Tensor
    regions: torch.Tensor | None = None
    attributes: dict[int, torch.Tensor] = field(default_factory=dict[int, torch.Tensor])
    segregation: float = 1.0
    retention: float = 1.0


Loss = Callable[[Maps], torch.Tensor]


def soft_overlap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """sum min(a, b) / sum (a + b) over the last two dimensions: 0.5 for equal maps, 0 for disjoint ones.

    A-STAR calls it an intersection over union; the denominator is the sum. Two empty maps overlap by 0.
    """
    total = (a + b).sum((-2, -1))
    return torch.minimum(a, b).sum((-2, -1)) / total.clamp_min(torch.finfo(total.dtype).tiny)


def segregation_loss(maps: torch.Tensor) -> torch.Tensor:
    """Equation 2 of A-STAR (arXiv 2306.14544): overlap summed over all pairs of concepts, 0 to 0.5 a pair."""
    first, second = _pairs(len(maps), maps.device)
    return soft_overlap(maps[first], maps[second]).sum()


def retention_loss(maps: torch.Tensor, regions: torch.Tensor) -> torch.Tensor:
    """Equation 3 of A-STAR: 1 - overlap with the previous step's region, summed over concepts, 0.5 to 1 each."""
    return (1 - soft_overlap(maps, regions)).sum()


def a_star(maps: Maps) -> torch.Tensor:
    """Equation 4 of A-STAR: segregation + retention, weighted; without regions the first alone."""
    loss = maps.segregation * segregation_loss(maps.concepts)
    if maps.regions is not None:
        loss = loss + maps.retention * retention_loss(maps.concepts, maps.regions)
    return loss


def attend_and_excite(maps: Maps) -> torch.Tensor:
    """Attend-and-Excite (arXiv 2301.13826): 1 - the maximum of the most neglected concept's map."""
    return (1 - maps.concepts.flatten(1).amax(1)).amax()


def jensen_shannon(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Divergence of maps [..., h, w] as distributions over cells, in units of ln 2: 0 equal, 1 disjoint."""
    p, q = _distribution(a), _distribution(b)
    middle = (p + q) / 2
    divergence = (_relative_entropy(p, middle) + _relative_entropy(q, middle)) / 2
    return divergence / math.log(2)


def jensen_shannon_loss(maps: Maps) -> torch.Tensor:
    """1 - divergence, averaged over pairs of concepts (the between-subject term of JEDI, arXiv 2505.19166)."""
    if len(maps.concepts) < 2:
        return maps.concepts.sum() * 0
    first, second = _pairs(len(maps.concepts), maps.concepts.device)
    return (1 - jensen_shannon(maps.concepts[first], maps.concepts[second])).mean()


def binding_loss(maps: Maps) -> torch.Tensor:
    """Attributes bound to their concepts, after Linguistic Binding (arXiv 2306.08877): the mean over attributes of
    divergence from the own concept - mean divergence from the other concepts. -1 is bound, 1 the wrong way round.
    """
    terms: list[torch.Tensor] = []
    for own, attribute in maps.attributes.items():
        divergence = jensen_shannon(maps.concepts, attribute)
        others = [i for i in range(len(maps.concepts)) if i != own]
        terms.append(divergence[own] - (divergence[others].mean() if others else 0))
    return torch.stack(terms).mean() if terms else maps.concepts.sum() * 0


LOSSES: dict[str, Loss] = {
    "a-star": a_star,
    "attend-and-excite": attend_and_excite,
    "jsd": jensen_shannon_loss,
}
"""Losses by name; add your own: `LOSSES["mine"] = lambda maps: ...`."""


def find_loss(loss: str | Loss) -> Loss:
    """A loss of the registry, or the function itself.

    Raises:
        SettingError: no loss of that name.
    """
    if callable(loss):
        return loss
    if not isinstance(loss, str) or loss not in LOSSES:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise SettingError(f"loss={loss!r}: choose one of {', '.join(LOSSES)}, or give a function of Maps")
    return LOSSES[loss]


def _pairs(count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = torch.tensor(list(combinations(range(count), 2)), dtype=torch.long, device=device).view(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _distribution(maps: torch.Tensor) -> torch.Tensor:
    return maps / maps.sum((-2, -1), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)


def _relative_entropy(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    tiny = torch.finfo(p.dtype).tiny
    return (p * (p.clamp_min(tiny).log() - q.clamp_min(tiny).log())).sum((-2, -1))

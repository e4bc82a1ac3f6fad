"""Whether a text holds a concept, at which columns, and what is to be taken out there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from .concept_bank import Bank
from .concept_geometry import phrase_nearness


@dataclass(frozen=True)
class Finding:
    """Settings, see `ConceptBlock`."""

    rule: str
    threshold: float | None
    strength: float
    reach: int


@dataclass(frozen=True)
class Removal:
    """What is taken out of one text for one concept.

    Attributes:
        texts: [T, L, D]: "contrast", the concept and then its stand-ins; "adavd", the concept's phrases.
        weight: [L], strength at each column.
        columns: where the concept stands. score: the highest.
        pooled: the concept's and then its stand-ins' texts as one vector, by the denoiser's argument, [T, ...].
    """

    texts: torch.Tensor
    weight: torch.Tensor
    columns: list[int]
    score: float
    pooled: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])


def find(
    text: torch.Tensor, bank: Bank, settings: Finding, end: int | None = None, mask: torch.Tensor | None = None
) -> Removal | float:
    """What to take out of a text for a concept, or its highest score where that is below the threshold.

    Args:
        text: [L, D] as the denoiser takes it; of several contexts of the encoder, each is looked at by itself.
        end: column of the end mark where it is known; behind it no word is looked for, and what the concept leaves
            there is taken out too.
        mask: [L] boolean, False at padding, where no word is looked for either.
    """
    length = len(text)
    context = bank.others.shape[1]
    parts = F.pad(text, (0, 0, 0, -length % context)).unflatten(0, (-1, context))
    scores = torch.stack([phrase_nearness(parts, p.own.to(text), bank.others.to(text)) for p in bank.phrases])
    scores[..., end if end is not None and len(parts) == 1 else context :] = -2.0
    if mask is not None:
        scores.flatten(1)[:, :length].masked_fill_(~mask.to(scores.device), -2.0)
    threshold = bank.threshold if settings.threshold is None else settings.threshold
    highest = float(scores.max())
    if highest < threshold:
        return highest
    make = _published if settings.rule == "adavd" else _composed
    made = [make(part, bank, scores[:, i], threshold, settings.reach, end) for i, part in enumerate(parts)]
    texts, weight = torch.cat([m[0] for m in made], 1)[:, :length], torch.cat([m[1] for m in made])[:length]
    columns = [i * context + column for i, m in enumerate(made) for column in m[2]]
    return Removal(texts.to(text), settings.strength * weight.to(text), columns, highest, _pooled(bank, scores))


def _pooled(bank: Bank, scores: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of texts that end where the concept is surest, [T, ...] by argument."""
    best = bank.phrases[int(scores.flatten(1).amax(1).argmax())]
    column = int(scores.amax((0, 1)).argmax()) + len(best.own) - 1
    return {
        name: torch.stack([phrase.pooled_at(name, column) for phrase in (best, *bank.stand_ins)])
        for name in best.pooled
    }


Made = tuple[torch.Tensor, torch.Tensor, list[int]]


def _published(
    part: torch.Tensor, bank: Bank, scores: torch.Tensor, threshold: float, reach: int, end: int | None
) -> Made:
    """AdaVD's: the last word's embedding at every column but the first."""
    texts = bank.last[:, None].repeat(1, len(part), 1)
    texts[:, 0] = 0
    return texts, torch.ones(len(part)), (scores.amax(0) >= threshold).nonzero().flatten().tolist()


def _composed(
    part: torch.Tensor, bank: Bank, scores: torch.Tensor, threshold: float, reach: int, end: int | None
) -> Made:
    """The concept's own columns, `reach` columns behind each, and those behind the text's end."""
    texts = bank.others.new_zeros(1 + len(bank.stand_ins), len(part), part.shape[-1])
    if float(scores.max()) < threshold:
        return texts, torch.zeros(len(part)), []
    best = bank.phrases[int(scores.amax(1).argmax())]
    end = len(part) if end is None else end
    if 0 < end < len(part):
        for text, phrase in zip(texts, (best, *bank.stand_ins), strict=True):
            tail = phrase.tail(end)[: len(part) - end]
            text[end : end + len(tail)] = tail
    held = _held(scores, bank, threshold)
    behind = {i + n for i in held for n in range(1, reach + 1)} & set(range(end))
    for column in sorted(behind):
        texts[:, column] = torch.stack([best.behind[column], *(word.behind[column] for word in bank.stand_ins)])
    for column, own in held.items():
        texts[:, column] = torch.stack([own, *(word.own[-1, column] for word in bank.stand_ins)])
    weight = texts.any(-1).all(0).float()  # a column that a word never reaches is left alone
    return texts, weight.cpu(), sorted(held)


def _held(scores: torch.Tensor, bank: Bank, threshold: float) -> dict[int, torch.Tensor]:
    """Columns that hold a token of the concept, each with that token as it is there; the surest phrase wins."""
    held: dict[int, tuple[float, torch.Tensor]] = {}
    for phrase, row in zip(bank.phrases, scores.tolist(), strict=True):
        for start, score in enumerate(row):
            for j, token in enumerate(phrase.own if score >= threshold else ()):
                column = start + j
                if column < len(row) and token[column].any() and score > held.get(column, (-3.0,))[0]:
                    held[column] = score, token[column]
    return {column: token for column, (_, token) in held.items()}

"""A prompt with other words in a blocked concept's place: where its words are known, its own encoder says at every
column what is of the concept, whatever stands around it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .base import Session, Text
from .concept_bank import FILLER, Bank
from .concept_find import Removal

_SAME, _CHANGED = 0.02, 1e-4


@dataclass(frozen=True)
class Blocked:
    """A concept that a prompt holds: its phrases and its bank."""

    phrases: Sequence[str]
    bank: Bank

    def replaced(self, text: str, number: int) -> str:
        """A text with a stand-in where a phrase was, as many tokens long as that was."""
        sizes = {phrase.lower(): len(place.own) for phrase, place in zip(self.phrases, self.bank.phrases, strict=True)}
        found = "|".join(re.escape(phrase) for phrase in sorted(self.phrases, key=len, reverse=True))
        word = self.bank.names[number % len(self.bank.names)]

        def stand_in(match: re.Match[str]) -> str:
            return " ".join([FILLER] * (sizes[match[0].lower()] - 1) + [word])

        return re.sub(rf"(?<!\w)(?:{found})(?!\w)", stand_in, text, flags=re.IGNORECASE)


def in_context(
    session: Session, text: str, row: torch.Tensor, concepts: Sequence[Blocked], removals: Sequence[Removal],
    strength: float,
) -> Removal | None:  # fmt: skip
    """All concepts of one prompt as one removal, the prompt itself against itself with stand-ins in their places.

    Args:
        row: [L, D], the prompt as the denoiser gets it. removals: where the gate has found the concepts in it.
    Returns:
        None where this is no other way to say what the gate found: words that it found stand there in another spelling,
        stand-ins are more tokens, or the denoiser's text is not this prompt's.
    """
    held = {column for removal in removals for column in removal.columns}
    count = max(len(concept.bank.names) for concept in concepts)
    others = [text] * count
    for concept in concepts:
        others = [concept.replaced(other, number) for number, other in enumerate(others)]
    own = session.tokens(text)
    for other in others:
        tokens = session.tokens(other)
        changed = {i for i, (a, b) in enumerate(zip(own, tokens, strict=False)) if a != b}
        if len(tokens) != len(own) or not held <= changed:
            return None
    return _removal(session.encode([text, *others], prompts=True), row, sorted(held), removals, strength)


def _removal(
    text: Text, row: torch.Tensor, columns: list[int], removals: Sequence[Removal], strength: float
) -> Removal | None:
    """The prompt's own text is the first of `text`, its stand-ins are the rest."""
    found = text.embeddings.flatten(2)[:, : len(row)].to(row)
    found = F.pad(found, (0, 0, 0, len(row) - found.shape[1]))
    size, far = found[0].norm(dim=-1), (found[0] - found[1:].mean(0)).norm(dim=-1)
    if float((found[0] - row).norm()) > _SAME * float(row.norm()):
        return None
    weight, score = strength * (far > _CHANGED * size).to(row), max(removal.score for removal in removals)
    return Removal(torch.stack([found[0], found[1:].mean(0)]), weight, columns, score, text.pooled)

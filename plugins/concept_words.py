"""How a blocked concept leaves what the model is given: a text's embeddings, where text and image are one sequence, and
the pooled text of any model that takes one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ..attention.errors import UnsupportedPipelineError
from ..attention.step import Step
from .base import Words
from .concept_context import Blocked, in_context
from .concept_edits import Blocking, without
from .concept_find import Removal
from .concept_geometry import contrast
from .concept_safree import safree

_ALWAYS = 1 << 30
"""Steps."""


@dataclass
class Rewording:
    """The texts of one pipeline call without the concepts.

    Attributes:
        groups: each concept's phrases.
        made: texts by the rows that have been replaced; of the version of `state` that they were made for.
    """

    state: Blocking
    groups: Sequence[Sequence[str]]
    made: dict[tuple[int, ...], Words] = field(default_factory=dict[tuple[int, ...], Words])
    version: int = 0
    parts: list[tuple[torch.Tensor, int]] = field(default_factory=list[tuple[torch.Tensor, int]])
    taken: list[list[Removal]] = field(default_factory=list[list[Removal]])

    def words(self, step: Step, words: Words) -> Words | None:
        """What stands for these texts at this step, None where nothing changes."""
        state = self.state
        state.look(words)
        if not state.open or (state.inside and not (words.pooled and state.settings.rule == "contrast")):
            return None
        if self.version != state.version:
            self.version, self.made = state.version, {}
            self.taken = [self._removals(i, row) for i, row in enumerate(words.rows)]
            self.parts = [self._row(i, row) for i, row in enumerate(words.rows)]
        held = tuple(i for i, (_, steps) in enumerate(self.parts) if step.index < steps)
        if held not in self.made:
            rows = [self.parts[i][0] if i in held else row for i, row in enumerate(words.rows)]
            self.made[held] = replace(words, rows=rows, pooled=self._pooled(words))
        return self.made[held] if held else None

    def _removals(self, number: int, row: torch.Tensor) -> list[Removal]:
        """What is taken out of a text: by its own words where they are known, else by the bank's."""
        state, removals = self.state, self.state.removals(number)
        prompt = state.session.prompt
        texts = None if prompt.second else prompt.texts
        if not removals or texts is None or state.settings.rule != "contrast":
            return removals
        parts = zip(self.groups, state.banks, state.found[number], strict=True)
        concepts = [Blocked(group, bank) for group, bank, one in parts if isinstance(one, Removal)]
        whole = in_context(state.session, texts[number], row.flatten(1), concepts, removals, state.settings.strength)
        return removals if whole is None else [whole]

    def _row(self, number: int, row: torch.Tensor) -> tuple[torch.Tensor, int]:
        """A row's new text and for how many steps it stands."""
        state, removals = self.state, self.taken[number]
        if state.inside or not removals:
            return row, 0 if not removals else _ALWAYS
        if state.settings.rule == "safree":
            return self._safree(number, row)
        left = row.flatten(1)
        for removal in removals:
            left = without(left, removal.texts, removal.weight, state.settings.rule)
        return left.to(row.dtype).reshape(row.shape), _ALWAYS

    def _safree(self, number: int, row: torch.Tensor) -> tuple[torch.Tensor, int]:
        session, texts = self.state.session, self.state.session.prompt.texts
        if texts is None:
            raise UnsupportedPipelineError(
                "rule='safree' masks the prompt's words one by one: give a prompt instead of embeddings, or use "
                "rule='contrast'"
            )
        concepts = torch.cat([session.pooled(phrase) for group in self.groups for phrase in group])
        masked, tokens = session.pooled(texts[number], masked=True), session.token_range(texts[number])
        if session.encoders != 1 or masked.shape[-1] != row.shape[-1]:
            raise UnsupportedPipelineError(
                "rule='safree' needs one CLIP whose pooled text is as wide as its text, as in SD1.x and SD2.x: use "
                "rule='contrast'"
            )
        new, steps = safree(row, masked.to(row), concepts.to(row), tokens, self.state.settings.strength)
        return new.to(row.dtype), steps

    def _pooled(self, words: Words) -> dict[str, torch.Tensor]:
        """The texts as one vector each, without the concepts."""
        found: dict[str, torch.Tensor] = {}
        for name, rows in words.pooled.items():
            new = list(rows.unbind())
            for i in range(len(new)):
                for removal in self.taken[i] if self.state.settings.rule == "contrast" else ():
                    c, *f = removal.pooled[name].to(new[i])
                    weight = new[i].new_tensor([self.state.settings.strength])
                    new[i] = contrast(new[i][None], c[None], torch.stack(f).mean(0)[None], weight)[0].to(new[i])
            found[name] = torch.stack(new)
        return found

"""How a blocked concept leaves a cross-attention layer: its part of the text's values, computed once a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..attention.call import AttentionCall
from ..attention.edit import Edit
from ..attention.layer import AttentionLayer
from ..attention.sequence import placed
from .base import Session, Text, Words
from .concept_bank import Bank
from .concept_find import Finding, Removal, find
from .concept_geometry import adavd, contrast
from .negative_edits import SteeredCross, for_rows, lora_state

_UNKNOWN = torch.empty(0)


@dataclass
class Blocking:
    """What one pipeline call needs.

    Attributes:
        found: by picture, one a concept; a score alone where the picture's text does not hold it.
        gate: [pictures], whose text holds a concept.
        inside: whether the concept leaves the values of cross-attention; it leaves the text itself where not.
        seen: the texts that this was decided for. version: rises when they change.
        deltas: by layer, what is subtracted from the values of the whole batch.
    """

    session: Session
    names: Sequence[str]
    banks: Sequence[Bank]
    settings: Finding
    inside: bool = True
    found: list[list[Removal | float]] = field(default_factory=list[list[Removal | float]])
    gate: torch.Tensor = _UNKNOWN
    seen: Words | None = None
    version: int = 0
    deltas: dict[str, tuple[Any, torch.Tensor]] = field(default_factory=dict[str, tuple[Any, torch.Tensor]])

    @property
    def open(self) -> bool:
        """Whether any picture's text holds a concept."""
        return any(self.removals(i) for i in range(len(self.found)))

    def removals(self, picture: int) -> list[Removal]:
        """What is taken out of a picture's text."""
        return [one for one in self.found[picture] if isinstance(one, Removal)]

    def look(self, words: Words) -> None:
        """Decide for the texts that the denoiser gets; again only where they became others."""
        if words.same(self.seen):
            return
        rows, prompt = [row.detach().flatten(1) for row in words.rows], self.session.prompt
        # Words of a second prompt, and of embeddings, may stand at any column.
        known = None if prompt.second else prompt.texts
        found: list[list[Removal | float]] = []
        for i, row in enumerate(rows):
            same = i > 0 and torch.equal(row, rows[i - 1])  # pictures of one prompt
            end = None if known is None else self.session.token_range(known[i]).stop
            mask = None if words.mask is None else words.mask[i]
            found.append(found[-1] if same else [self._find(row, bank, end, mask) for bank in self.banks])
        self.found, self.seen, self.version = found, words, self.version + 1
        self.gate = torch.tensor([bool(self.removals(i)) for i in range(len(found))], device=rows[0].device)

    def _find(self, row: torch.Tensor, bank: Bank, end: int | None, mask: torch.Tensor | None) -> Removal | float:
        """With its texts as the cross-attention layers get them, or as they reach the denoiser."""
        one = find(row, bank, self.settings, end, mask)
        if not isinstance(one, Removal):
            return one
        texts = self.session.layer_text(Text(one.texts)).embeddings if self.inside else one.texts
        if self.settings.rule == "contrast":  # what projects them is linear: the mean of the stand-ins is enough
            texts = torch.stack([texts[0], texts[1:].mean(0)])
        return replace(one, texts=texts)

    def known(self, layer: AttentionLayer) -> torch.Tensor | None:
        """What a layer's `delta` was, unless the text or the layer's LoRA has become another one."""
        mark, delta = self.deltas.get(layer.name, (None, None))
        return delta if mark == (self.version, *lora_state(layer.module.to_v)) else None

    def delta(self, call: AttentionCall) -> torch.Tensor:
        """What is to be subtracted from the call's values, [B, H, L, D]; zero in rows that are left alone."""
        delta, layer = self._delta(call), call.layer
        if not delta.requires_grad:
            self.deltas[layer.name] = (self.version, *lora_state(layer.module.to_v)), delta
        return delta

    def _delta(self, call: AttentionCall) -> torch.Tensor:
        rows = call.select("cond")
        v, projected = joined_heads(call.v[rows]), self._projected(call)
        taken: list[torch.Tensor] = []
        for i, value in enumerate(v):
            left = value
            for removal in self.removals(i % len(self.found)):
                left = without(left, projected[id(removal)], removal.weight, self.settings.rule)
            taken.append((value - left).to(value.dtype))
        delta = torch.zeros_like(call.v)
        delta[rows] = torch.stack(taken).unflatten(-1, (call.v.shape[1], -1)).transpose(1, 2)
        return delta

    def _projected(self, call: AttentionCall) -> dict[int, torch.Tensor]:
        """Values [T, L, H * D] of each removal's texts in this layer, by its id; projected together."""
        assert call.project is not None
        every = {id(one): one for i in range(len(self.found)) for one in self.removals(i)}
        texts = torch.cat([one.texts for one in every.values()]).to(call.v)
        values = joined_heads(call.project(texts, {"attention_mask": None}).v)
        return dict(zip(every, values.split([len(one.texts) for one in every.values()]), strict=True))

    def told(self, tokens: Sequence[Sequence[str]] | None) -> dict[str, str]:
        """For the report: by picture, which tokens of which concept were touched.

        Args:
            tokens: of each picture's prompt, None for a call with embeddings.
        """
        return {
            f"picture {i}": ", ".join(
                _told(name, one, None if tokens is None else tokens[i], self.inside)
                for name, one in zip(self.names, found, strict=True)
            )
            for i, found in enumerate(self.found)
        }


def _told(name: str, one: Removal | float, tokens: Sequence[str] | None, inside: bool) -> str:
    if not isinstance(one, Removal):
        return f"{name}: not there (highest score {one:.2f})"
    words = [f"{i} {tokens[i]}" if tokens and i < len(tokens) else str(i) for i in one.columns]
    changed = f", {int((one.weight != 0).sum())} columns changed" if inside else ""
    return f"{name}: at {', '.join(words) or 'no column'} (score {one.score:.2f}){changed}"


class Taken(Edit):
    """Takes the concept's part out of one layer's values.

    Args:
        delta: that part where it is known from an earlier step; torch.compile traces the subtraction, not the search.
    """

    rows, keeps_text = ("cond",), True

    def __init__(self, state: Blocking, delta: torch.Tensor | None) -> None:
        self.state, self.delta, self.traced = state, delta, delta is not None

    def qkv(self, call: AttentionCall) -> None:
        known, v = self.delta, call.v
        same = known is not None and (known.shape, known.dtype, known.device) == (v.shape, v.dtype, v.device)
        if known is None or not same or (torch.is_grad_enabled() and v.requires_grad):
            known = self.state.delta(call)
        call.v = v - known


class SteeredWhere(SteeredCross):
    """Steers a cross-attention layer in the rows of some pictures.

    Attributes:
        gate: [pictures], which.
    """

    gate = _UNKNOWN

    def out(self, call: AttentionCall, out: torch.Tensor) -> torch.Tensor:
        rows, steered = call.select("cond"), super().out(call, out)
        gate = for_rows(self.gate, len(out[rows]), self.pictures)
        assert gate is not None
        return placed(out, rows, torch.where(gate[:, None, None, None], steered[rows], out[rows]))


def without(v: torch.Tensor, texts: torch.Tensor, weight: torch.Tensor, rule: str) -> torch.Tensor:
    """v [L, D] without the concept, at least float32; texts as in `Removal`, the stand-ins' mean for "contrast"."""
    return adavd(v, texts, weight) if rule == "adavd" else contrast(v, texts[0], texts[1], weight)


def joined_heads(v: torch.Tensor) -> torch.Tensor:
    """[n, H, L, D] as [n, L, H * D]."""
    return v.transpose(1, 2).flatten(2)

"""Rows that were laid into one, and how they become a batch again."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...attention.step import Rows


@dataclass(frozen=True)
class Fold:
    """Rows that were laid into one.

    Attributes:
        hole: indices of the tokens in which they differ. tokens: of the picture. rows: the batch's groups as they were.
    """

    hole: torch.Tensor
    tokens: int
    rows: Rows

    def spread(self, tokens: torch.Tensor) -> torch.Tensor:
        """[1, tokens + further holes, C] as a batch again."""
        count = self.rows["cond"].stop
        whole = tokens[:, : self.tokens].repeat(count, 1, 1)
        whole[1:, self.hole] = tokens[0, self.tokens :].unflatten(0, (count - 1, len(self.hole)))
        return whole

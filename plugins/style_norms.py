"""StyleAligned's further switch: norms that see the reference (its program's default; the paper does without)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class SharedNorms:
    """A group norm over each picture with its reference below it, of which the picture is kept.

    Attributes:
        style: of each row the row of its style. strength: between the row's own norm and this one.
    """

    style: torch.Tensor
    strength: float

    def run(self, forward: Callable[..., Any], names: tuple[str, ...], args: Any, kwargs: Any) -> Any:
        x: torch.Tensor = kwargs["input"] if "input" in kwargs else args[0]
        together = torch.cat([x, x.index_select(0, self.style)], -2)
        shared = forward(together)[..., : x.shape[-2], :]
        return shared if self.strength == 1 else torch.lerp(forward(x), shared, self.strength)

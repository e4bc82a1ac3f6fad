"""A text's projections, kept from step to step: the prompt is the same tensor in every step of a pipeline call."""

from __future__ import annotations

import weakref
from typing import Any

import torch


class TextMemo:
    """Outputs of linear layers for inputs that did not change. Exact: whatever is not provably the same is computed.

    A layer's own code runs as ever, LoRA included; only the matrix product of an unchanged text by an unchanged
    weight is not done again.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, int], tuple[Any, ...]] = {}

    def linear(self, layer: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """`torch.nn.functional.linear` of a text, remembered for this layer and weight."""
        named: dict[str, Any] = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
        text, weight = named["input"], named["weight"]
        if torch.is_grad_enabled() or text.is_inference() or weight.is_inference():
            return func(*args, **kwargs)
        key, mark = (layer, id(weight)), (text._version, weight._version)
        kept = self._kept.get(key)
        if kept is not None and kept[0] is text and kept[1]() is weight and kept[2] == mark:
            out: torch.Tensor = kept[3]
            if out._version == kept[4]:
                return out
        out = func(*args, **kwargs)
        self._kept[key] = text, weakref.ref(weight), mark, out, out._version
        return out

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()

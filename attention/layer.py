"""The attention layers of a denoiser, by name and in the order in which they run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

Kind = Literal["self", "cross", "joint", "keys", "text"]
Place = Literal["down", "mid", "up", "block"]
_ORDER: tuple[Place, ...] = ("down", "mid", "up", "block")


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """One attention module.

    Attributes:
        name: its path in the denoiser, as in `named_modules()`.
        module: the module itself (an `nn.Module`); call its projections, never read their weights (LoRA, offload).
        kind: "self" (image with itself), "cross" (image with text), "joint" (one sequence of both), "keys" (the image
            attends to text and image, the text to nothing), "text" (text with itself).
        place: "down", "mid" or "up" of a UNet, "block" of a transformer.
        index: position in execution order among the layers of its kind; in a UNet the number of its transformer
            block, as papers count it (SDXL: 0-23 down, 24-33 mid, 34-69 up).
        level: how often a UNet has halved the latent where the layer runs, 0 at full resolution.
    """

    name: str
    module: Any
    kind: Kind
    place: Place
    index: int
    level: int = 0


def find_layers(denoiser: nn.Module, named: Iterable[tuple[str, nn.Module]] | None = None) -> list[AttentionLayer]:
    """Every attention layer of a diffusers denoiser in execution order.

    `named_modules()` of a UNet lists down, up, mid; it runs down, mid, up. `named` is what it lists, where that is
    known already: the walk is dear in a large model.
    """
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention

    found: list[tuple[str, Any]] = [
        (name, module)
        for name, module in (denoiser.named_modules() if named is None else named)
        # GLIGEN's fusers attend over image and grounding tokens: neither kind, never edited.
        if isinstance(module, (Attention, AttentionModuleMixin)) and ".fuser." not in name
    ]
    found.sort(key=_execution_rank)
    counts: dict[Kind, int] = {}
    layers: list[AttentionLayer] = []
    for name, module in found:
        kind = _kind(module)
        layers.append(AttentionLayer(name, module, kind, _place(name), counts.get(kind, 0), _level(name, denoiser)))
        counts[kind] = counts.get(kind, 0) + 1
    return layers


def _execution_rank(named: tuple[str, Any]) -> int:
    return _ORDER.index(_place(named[0]))


def _kind(module: Any) -> Kind:
    if getattr(module, "added_kv_proj_dim", None) is not None:
        return "joint"
    return "cross" if getattr(module, "is_cross_attention", False) else "self"


def _place(name: str) -> Place:
    head = name.split("_", 1)[0].split(".", 1)[0]
    return head if head in ("down", "mid", "up") else "block"


def _level(name: str, denoiser: Any) -> int:
    """Blocks of a UNet go down one level each and up again: the last down, the middle and the first up share one."""
    place, depth = _place(name), len(getattr(denoiser, "up_blocks", ()))
    if place == "block" or not depth:
        return 0
    if place == "mid":
        return depth - 1
    number = int(name.split(".", 2)[1])
    return number if place == "down" else depth - 1 - number

"""The modules of a model, looked for once as long as they stay where they are.

`named_modules()` takes milliseconds in a large model, and a graft for each request asks it before every picture. What
is kept of it holds no module, so a model goes when its owner lets it go.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .layer import AttentionLayer, find_layers

_KEPT: weakref.WeakKeyDictionary[nn.Module, _Walk] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Walk:
    """What a walk found.

    Attributes:
        modules: each of them, weakly. children: of those that have some, their names and identities.
        layers: the attention layers without their modules, each with its module's number.
    """

    modules: Sequence[weakref.ref[nn.Module]]
    children: Sequence[Any]
    layers: Sequence[tuple[int, AttentionLayer]]


def walk(denoiser: nn.Module) -> tuple[list[nn.Module], list[AttentionLayer]]:
    """Every module of a denoiser, itself among them, and its attention layers in execution order."""
    kept = _KEPT.get(denoiser)
    modules = None if kept is None else _still(kept)
    if kept is None or modules is None:
        named = list(denoiser.named_modules())
        modules, layers = [module for _, module in named], find_layers(denoiser, named)
        _KEPT[denoiser] = _noted(modules, layers)
        return modules, layers
    return modules, [AttentionLayer(x.name, modules[i], x.kind, x.place, x.index, x.level) for i, x in kept.layers]


def _noted(modules: Sequence[nn.Module], layers: Sequence[AttentionLayer]) -> _Walk:
    number = {id(module): i for i, module in enumerate(modules)}
    told = [(number[id(layer.module)], replace(layer, module=None)) for layer in layers]
    return _Walk([weakref.ref(module) for module in modules], _children(modules), told)


def _still(kept: _Walk) -> list[nn.Module] | None:
    """The modules of a walk, None unless they are the same ones in the same places; a dead one's identity is free."""
    modules = [module for ref in kept.modules if (module := ref()) is not None]
    return modules if len(modules) == len(kept.modules) and _children(modules) == kept.children else None


def _children(modules: Sequence[nn.Module]) -> list[Any]:
    parts = [module._modules for module in modules]  # pyright: ignore[reportPrivateUsage]
    return [(*own, *map(id, own.values())) for own in parts if own]

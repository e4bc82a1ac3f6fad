"""Where each concept was at the previous step: the regions in which retention keeps it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any, Literal, cast

import torch

from ..attention.edit import Edit
from ..attention.errors import MaskError, SettingError
from ..attention.layer import AttentionLayer
from ..attention.maps import SELF_TOKENS, ByCall, LayerChoice, MapCapture, concept_maps
from ..attention.masks import as_mask, as_masks
from ..attention.regions import Threshold, assign, binarise, places, propagate, to_grid
from ..attention.step import Step
from .base import finite
from .concepts import Picture, Split

Rule = Threshold | Literal["attencraft"]
Layout = list[list[torch.Tensor]]
LEVELS: dict[str, float] = {"max": 0.5, "std": 1.0, "quantile": 0.75, "otsu": 0.5, "attencraft": 0.1}
"""The level of each rule where none is given: share of the maximum, deviations, quantile, unused, margin."""


class Regions:
    """Regions of every picture of a call, from the maps of the step before or from the user.

    Args:
        threshold, level: see `diffgraft.attention.regions.binarise`; "attencraft" spreads the maps along the
            self-attention and gives a cell to the concept that leads all others by `level`, so regions are disjoint.
        previous: "post", the maps of the step's own call; "pre", those that its update was computed from.
        layout: masks [H, W] in the order of the concepts, of all prompts or a list for each, in the place of all that;
            "auto": disjoint places found in the first maps.
    """

    def __init__(
        self, threshold: Rule, level: float | None, previous: str, layout: Layout | Literal["auto"] | None
    ) -> None:
        if threshold not in LEVELS:
            raise SettingError(f"threshold={threshold!r}: choose one of {', '.join(LEVELS)}")
        if previous not in ("post", "pre") or (previous == "pre" and threshold == "attencraft"):
            raise SettingError(f"previous={previous!r}: choose 'post' or 'pre', with threshold='attencraft' 'post'")
        self.threshold: Rule = threshold
        given = LEVELS[threshold] if level is None else level
        self.level = finite(given, "level") if threshold == "std" else finite(given, "level", 0, 1)
        self.follows = None if layout is not None else previous
        self.layout = layout
        self.given: Layout = []
        self.found: list[torch.Tensor | None] = []
        self.cross: MapCapture | None = None
        self.own: MapCapture | None = None

    def fresh(self, layers: Sequence[AttentionLayer], choice: LayerChoice) -> Regions:
        """The same rule for one pipeline call on a model with these layers: nothing is known of the step before."""
        one = copy(self)
        one.given, one.found = [], []
        if self.follows == "post":
            one.cross = MapCapture(layers, "predict", choice=choice)
        if self.follows == "post" and self.threshold == "attencraft":
            one.own = MapCapture(layers, "predict", kind="self", tokens=SELF_TOKENS)
        return one

    def edits(self, of: Callable[[Step], Regions]) -> list[Edit]:
        """What watches the layers for the regions of a call, which `of` finds by its step."""
        watch: list[Edit] = []
        if self.cross is not None:
            watch.append(ByCall(self.cross, lambda step: _there(of(step).cross)))
        if self.own is not None:
            watch.append(ByCall(self.own, lambda step: _there(of(step).own)))
        return watch

    def begin(self, pictures: int, given: Layout) -> None:
        """A call of so many pictures; `given`: the layout of each, if there is one."""
        self.given, self.found = given, [None] * pictures

    def look_back(self, split: Split, pictures: Sequence[Picture]) -> None:
        """Take the regions from what the previous step's own call looked at, if there was one."""
        if self.cross is None or not self.cross.maps:
            return
        taken = self.cross.averaged()
        if self.own is None:
            self.keep([concepts for concepts, _ in split(taken, pictures)])
        else:
            self.found = [self._spread(*of) for of in zip(taken, self.own.averaged(), pictures, strict=True)]
            self.own.clear()
        self.cross.clear()

    def keep(self, maps: Sequence[torch.Tensor]) -> None:
        """Take the regions from these concept maps, [C, h, w] for each picture."""
        self.found = [self._binary(concepts) if len(concepts) else None for concepts in maps]

    def settle(self, maps: Sequence[torch.Tensor]) -> None:
        """With layout="auto": fix the places where these first maps [C, h, w] of each picture are."""
        if self.layout == "auto" and not any(found is not None for found in self.found):
            self.found = [places(concepts) if len(concepts) else None for concepts in maps]

    def of(self, number: int, maps: torch.Tensor) -> torch.Tensor | None:
        """Regions of a picture's concepts, 0 or 1, like their present `maps` [C, h, w]; None where nothing is known."""
        if self.given:
            return torch.stack([to_grid(mask, maps) for mask in self.given[number]])
        found = self.found[number]
        if found is None and self.layout == "auto":
            found = places(maps)
        return None if found is None else found.to(maps)

    def _binary(self, maps: torch.Tensor) -> torch.Tensor:
        assert self.threshold != "attencraft"
        return binarise(maps, self.threshold, self.level)

    def _spread(self, cross: torch.Tensor, own: torch.Tensor, picture: Picture) -> torch.Tensor | None:
        columns = [found.columns for found in picture.concepts]
        if not columns:
            return None
        if picture.tokens is None or picture.tokens.start > 0:
            columns.append([0])  # the start mark looks at the background
        maps = concept_maps(cross, columns, normalisation="none", smoothing="none")
        masks = assign(propagate(maps, own.flatten(1).T), self.level)[: len(picture.concepts)]
        return torch.stack([to_grid(mask, cross) * bool(mask.any()) for mask in masks])


def _there(capture: MapCapture | None) -> MapCapture:
    assert capture is not None
    return capture


def read_layout(layout: Any, concepts: Sequence[Sequence[Any]]) -> Layout | Literal["auto"] | None:
    """A layout as masks [H, W], one for each of the concepts: of all prompts, or of each; None and "auto" as they are.

    Raises:
        MaskError: not a mask, or an empty one. SettingError: not one for each concept.
    """
    if layout is None or (isinstance(layout, str) and layout == "auto"):
        return layout
    if isinstance(layout, Mapping):
        named = {str(name): as_mask(mask) for name, mask in cast("Mapping[Any, Any]", layout).items()}
        names = list(dict.fromkeys(str(concept) for group in concepts for concept in group))
        if set(named) != set(names):
            raise SettingError(f"layout= names {', '.join(named)}; the concepts are {', '.join(names)}")
        groups = [[named[str(concept)] for concept in group] for group in concepts]
    else:
        groups = [[as_mask(one) for one in layout] if isinstance(layout, (list, tuple)) else as_masks(layout)]
        for group in concepts:
            if group and len(group) != len(groups[0]):
                raise SettingError(f"layout= has {len(groups[0])} masks for {len(group)} concepts: give one for each")
    empty = [i for members in groups for i, mask in enumerate(members) if not mask.any()]
    if empty:
        raise MaskError(f"layout= leaves concept {empty[0]}, counted from 0, no place: its mask is empty")
    return [[torch.from_numpy(mask) for mask in members] for members in groups]

"""Attention segregation and retention: A-STAR (arXiv 2306.14544), and other losses on the same machinery."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch

from ..attention.edit import Edit
from ..attention.errors import SettingError, SettingTypeError
from ..attention.maps import ByCall, LayerChoice, MapCapture, Normalisation, Smoothing, ValuesOnly, concept_maps
from ..attention.step import Step
from .base import Plugin, Probe, Session, finite
from .concepts import Concepts, Picture, attributes_by_prompt, check_concepts, find_picture, for_pictures
from .losses import Loss, Maps, attend_and_excite, binding_loss, find_loss
from .moves import (
    LOSS_SCALE,
    gradient_of,
    gradient_step,
    low_pass,
    need_gradients,
    relative_step,
    shuffled,
    step_factor,
)
from .presets import Route, Units, check_choices, check_refine, filled
from .retention import Regions, Rule, read_layout

_MAX_REFINEMENTS = 20


class AttentionSegregation(Plugin):
    """Every concept of the prompt appears, none melts into another.

    At each step the latent is moved against the gradient of a loss on the concepts' cross-attention maps: A-STAR's
    segregation (maps of different concepts must not overlap) plus retention (a concept stays where it was).

    Args:
        concepts: words or phrases of the prompt, or token columns; for several prompts a list for each.
        segregation, retention: weights of the two terms, 0 or more; both 0 is neutral. None is 1, but 0 for
            segregation where `layout` holds masks: as in the paper retention alone draws the concepts there, and it is
            measured to be followed more often than both. Segregation alone lets the weaker concept vanish.
        preset: None, the setting measured on the picture book; "paper", the published numbers, with
            Attend-and-Excite's where A-STAR states none. Whatever you give beside it wins.
        layout: a mask for each concept ({concept: mask}, a list in their order, or a stack [C, h, w]): where they are
            to be, instead of where they were. White, True or 1 is inside. "auto": disjoint discs around where the first
            step looks for them.
        start, end: fractions of the steps. end: 0.4, "paper" 1, and 1 where `start` is no earlier.
        loss: "a-star", "attend-and-excite", "jsd" (`diffgraft.LOSSES`), or a function of `diffgraft.Maps`.
        binding: weight of a further term that keeps each word of `attributes` with its concept.
        attributes: attribute of a concept by the concept as given: {"ball": "blue"}; for several prompts one for each.
            Of a word that occurs several times, the nearest is meant.
        normalisation: of the maps. "max": each by its maximum; "minmax"; "sum1"; "none"; "ae": softmax of 100 A over
            all tokens but the start mark, "eot" over those before the end mark. Default "max"; "ae" in "paper" and for
            Attend-and-Excite.
        smoothing: 3x3 filter, "mean", "gaussian" or "none". Default "mean", "paper" "gaussian".
        rule: "relative": the move has `size` times the latent's norm (default, 0.05). "gradient": it is `size` times
            the gradient, in units of a variance-preserving scheduler ("paper", 20).
        size: see `rule`; 0 is neutral, at most 1 if relative.
        decay: square of what is left of the size at the last step of the run.
        lowpass: side of the cells over which the move is averaged, in latent cells. 0: not at all. Default: 4 where
            maps have as many cells as the latent, else 0.
        layers: "auto", "decoder", "all" or a function of a layer, see `diffgraft.attention.maps.choose_layers`.
        threshold, level: rule that makes a region of the previous step's map: "max" (at least 0.5 of the maximum),
            "std", "quantile", "otsu", or "attencraft" (spread along the self-attention, disjoint by a margin of 0.1).
        previous: "post": the map that the previous step really used. "pre": the one before its update.
        every: update at every n-th step only.
        route: what the gradient passes through: "exact", everything; "values", not through where layers other than the
            captured ones look. Cheaper, and steady where deep layers look at single tokens and the exact one turns
            with the last digits of the latent (a half-trained picture book did, this version's does not).
        refine: step number -> loss to reach before going on, by at most 20 updates, as in Attend-and-Excite.
        candidates: starts compared by the loss before the first step, forward only: the run's own noise, and shuffles
            of it, which are noise as good (1: its own alone). Runs that do not start from noise keep their start. Not
            measured to help: the first step's maps say little (`rank_seeds` can look at later ones).
        loss_scale: factor on the loss against underflow, halved when a gradient overflows. Default 4096 in float16,
            else 1.

    Raises:
        SettingError, SettingTypeError: a value out of range. MaskError: a layout that does not fit the concepts.
        ConceptError: while sampling, a concept that is not in the prompt.

    Example:
        >>> with dg.graft(pipe, dg.AttentionSegregation(["ball", "star"])):
        ...     image = pipe("a blue ball and a yellow star , night").images[0]
    """

    def __init__(
        self,
        concepts: Concepts | Sequence[Concepts],
        *,
        segregation: float | None = None,
        retention: float = 1.0,
        preset: str | None = None,
        layout: Any = None,
        start: float = 0.0,
        end: float | None = None,
        loss: str | Loss = "a-star",
        binding: float = 0.0,
        attributes: Mapping[str, str] | Sequence[Mapping[str, str]] | None = None,
        normalisation: Normalisation | None = None,
        smoothing: Smoothing | None = None,
        rule: Units | None = None,
        size: float | None = None,
        decay: float | None = None,
        lowpass: int | None = None,
        layers: LayerChoice = "auto",
        threshold: Rule = "max",
        level: float | None = None,
        previous: Literal["post", "pre"] = "post",
        every: int = 1,
        route: Route | None = None,
        refine: Mapping[int, float] | None = None,
        candidates: int = 1,
        loss_scale: float | None = None,
    ) -> None:
        chosen = filled(
            preset, smoothing=smoothing, rule=rule, size=size, decay=decay, lowpass=lowpass, route=route,
        )  # fmt: skip
        last: float = 1.0 if finite(start, "start") >= chosen["end"] else chosen["end"]
        super().__init__(start=start, end=last if end is None else end)
        self.concepts = check_concepts(concepts)
        self.attributes = attributes_by_prompt(attributes)
        self.layers: LayerChoice = layers
        self.threshold, self.level, self.previous, self.layout = threshold, level, previous, layout
        self._set_loss(loss, segregation, retention, binding)
        self.preset, self.candidates = preset, candidates
        self._set_maps(chosen, normalisation)
        self._set_moves(chosen, every, refine, loss_scale)
        check_choices(self)
        if candidates > 1 and start > 0:
            raise SettingError("candidates= are compared before the first step: leave start=0, or candidates=1")
        self._check_attributes()
        masks = read_layout(layout, self.concepts)
        self._regions = self._watched = Regions(threshold, level, previous, masks)
        self._probed: MapCapture | None = None

    def _set_loss(self, loss: str | Loss, segregation: float | None, retention: float, binding: float) -> None:
        """What is asked of the maps. A layout of masks asks for retention alone unless it is told more."""
        self.retention = finite(retention, "retention", 0)
        usual = 0.0 if self.retention and self.layout is not None and not isinstance(self.layout, str) else 1.0
        self.segregation = finite(usual if segregation is None else segregation, "segregation", 0)
        self.binding = finite(binding, "binding", 0)
        self.loss, self._loss = loss, find_loss(loss)

    def _set_maps(self, chosen: Mapping[str, Any], normalisation: Normalisation | None) -> None:
        """How maps are made comparable."""
        sharp = self._loss is attend_and_excite  # a map divided by its maximum has no maximum left to raise
        self.normalisation: Normalisation = normalisation or ("ae" if sharp else chosen["normalisation"])
        self.smoothing: Smoothing = chosen["smoothing"]

    def _set_moves(
        self, chosen: Mapping[str, Any], every: int, refine: Mapping[int, float] | None, loss_scale: float | None
    ) -> None:
        """How the loss moves the latent."""
        self.rule: Units = chosen["rule"]
        self.size = finite(chosen["size"], "size", 0, 1 if self.rule == "relative" else 1e6)
        self.decay = finite(chosen["decay"], "decay", 0, 1)
        self.lowpass: int | None = chosen["lowpass"]
        self.route: Route = chosen["route"]
        self.every, self.refine = every, check_refine(refine)
        self.loss_scale = None if loss_scale is None else finite(loss_scale, "loss_scale", 1)

    def _check_attributes(self) -> None:
        named = {str(concept) for group in self.concepts for concept in group}
        unknown = sorted({word for group in self.attributes for word in group} - named)
        if unknown:
            raise SettingError(f"attributes= names {unknown}, which are not among the concepts {sorted(named)}")
        if self.binding and not any(self.attributes):
            raise SettingError("binding= needs attributes=, such as {'ball': 'blue'}")
        if self.loss == "a-star" and self.segregation and not self.retention:
            warnings.warn("segregation without retention lets the weaker concept vanish", stacklevel=3)

    # -- life --------------------------------------------------------------------------------------------------

    @property
    def neutral(self) -> bool:
        published = self.loss != "a-star" or self.segregation > 0 or self.retention > 0
        return self.size == 0 or not any(self.concepts) or not (published or self.binding > 0)

    def bind(self, session: Session) -> None:
        self._probed = MapCapture(session.layers, "latent", choice=self.layers)
        self._watched = self._regions.fresh(session.layers, self.layers)

    def edits(self) -> Sequence[Edit]:
        probed, watched = self._probed, self._watched
        assert probed is not None
        route = [ValuesOnly(probed)] if self.route == "values" else []
        captured = ByCall(probed, lambda step: self.call(step).probed)
        return [*route, captured, *watched.edits(lambda step: self.call(step).regions)]

    def begin(self, session: Session, step: Step) -> None:
        prompt = session.prompt
        texts = prompt.texts or [None] * prompt.pictures
        groups = for_pictures(self.concepts, session, "concepts")
        attributes = for_pictures(self.attributes, session, "attributes")
        pictures = [find_picture(session, *of) for of in zip(texts, groups, attributes, strict=True)]
        self._check_refine(step)
        layout = self._regions.layout
        given = for_pictures(layout, session, "layout") if isinstance(layout, list) else []
        regions = self._regions.fresh(session.layers, self.layers)
        regions.begin(len(pictures), given)
        probed = MapCapture(session.layers, "latent", choice=self.layers)
        step.notes[self] = Call(session, probed, regions, pictures, self.loss_scale or 0.0)
        self.tell(session, partial(_told, pictures))

    def _check_refine(self, step: Step) -> None:
        named = [replace(step, index=i) for i in sorted(self.refine)]
        left = [
            at.index
            for at in named
            if not (at.index < step.total and at.within(self.start, self.end) and self.moves(at))
        ]
        if left:
            warnings.warn(f"refine= names steps {left}, at which this run of {step.total} moves nothing", stacklevel=3)

    def call(self, step: Step) -> Call:
        """The state of the pipeline call that runs."""
        return step.notes[self]

    def moves(self, step: Step) -> bool:
        return step.index % self.every == 0

    # -- one step ----------------------------------------------------------------------------------------------

    def latent(self, step: Step, latent: torch.Tensor, probe: Probe) -> torch.Tensor | None:
        call = self.call(step)
        call.regions.look_back(self._split, call.pictures)
        goal, before = self.refine.get(step.index), latent
        if self.candidates > 1 and step.index == 0 and call.session.prompt.from_noise:
            latent = self._best_start(call, latent, probe)
        waiting = [True] * len(latent)
        for _ in range(1 if goal is None else 1 + _MAX_REFINEMENTS):
            move, losses, usable = self._move(call, step, latent, probe)
            waiting = [on and ok for on, ok in zip(waiting, usable, strict=True)]
            if not any(waiting):
                break
            keep = torch.tensor(waiting, device=latent.device).view(-1, *[1] * (latent.ndim - 1))
            latent = torch.where(keep, latent - move, latent)
            if goal is not None:  # a picture that has reached its goal had its last update
                waiting = [on and loss.item() > goal for on, loss in zip(waiting, losses, strict=True)]
        if call.regions.follows == "pre":
            call.regions.keep(call.last)
        return None if latent is before else latent

    def _best_start(self, call: Call, latent: torch.Tensor, probe: Probe) -> torch.Tensor:
        """Of each picture's noise and its shuffles, the one with the lowest loss."""
        starts = torch.stack([shuffled(latent, number) for number in range(self.candidates)])
        with torch.no_grad():
            losses = torch.stack([torch.stack(self.losses(call, start, probe)) for start in starts])
        best = losses.nan_to_num(float("inf")).argmin(0)
        return starts[best, torch.arange(len(latent), device=best.device)]

    def _move(
        self, call: Call, step: Step, latent: torch.Tensor, probe: Probe
    ) -> tuple[torch.Tensor, list[torch.Tensor], list[bool]]:
        """What to take off the latent, the losses, and which pictures have a gradient to follow."""
        z = latent.detach().requires_grad_()
        losses = self.losses(call, z, probe)
        call.regions.settle(call.last)
        for picture, loss in zip(call.pictures, losses, strict=True):
            picture.losses.append(loss.detach())
        grid, scale = call.probed.grid, call.scale_for(call.probed.dtype)
        call.probed.clear()
        gradient = gradient_of(torch.stack(losses).sum(), z, scale)
        usable = self.usable(call, gradient)
        cell = self.lowpass if self.lowpass is not None else 4 * (tuple(z.shape[-2:]) == grid)
        if cell > 1:
            gradient = low_pass(gradient, cell)
        factor = self.size * step_factor(step.index, step.total, self.decay)
        if self.rule == "relative":
            return relative_step(gradient, factor, latent), losses, usable
        return gradient_step(gradient, factor, call.session.signal(step)), losses, usable

    def losses(self, call: Call, latent: torch.Tensor, probe: Probe) -> list[torch.Tensor]:
        """The loss of each picture at `latent` [n, C, h, w]; a picture without concepts has 0."""
        call.probed.clear()
        probe(latent)
        if latent.requires_grad:
            need_gradients(call.probed.maps.values())
        maps = self._split(call.probed.averaged(), call.pictures)
        call.last = [concepts.detach() for concepts, _ in maps]
        return [self._loss_of(call.regions, i, *both) for i, both in enumerate(maps)]

    def _loss_of(
        self, regions: Regions, number: int, concepts: torch.Tensor, attributes: dict[int, torch.Tensor]
    ) -> torch.Tensor:
        if not len(concepts):
            return concepts.sum()
        seen = Maps(concepts, regions.of(number, concepts), attributes, self.segregation, self.retention)
        loss = self._loss(seen)
        if not isinstance(loss, torch.Tensor) or loss.ndim:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SettingTypeError(f"loss= gave {type(loss).__name__} for a picture: a tensor of one number is needed")
        if self.binding:
            loss = loss + self.binding * binding_loss(seen)
        return loss

    def usable(self, call: Call, gradient: torch.Tensor) -> list[bool]:
        """Which pictures have a gradient to follow; the others are reported and left alone."""
        usable: list[bool] = []
        for picture, size in zip(call.pictures, gradient.abs().flatten(1).sum(1).tolist(), strict=True):
            usable.append(0 < size < float("inf"))
            if picture.concepts and not usable[-1]:
                call.session.skip("the gradient is zero" if size == 0 else "the gradient is not finite")
                call.scale = max(1.0, call.scale / (1 if size == 0 else 2))
        return usable

    def _split(
        self, taken: torch.Tensor, pictures: Sequence[Picture]
    ) -> list[tuple[torch.Tensor, dict[int, torch.Tensor]]]:
        """Maps of each picture's concepts [C, h, w] and of their attributes by concept."""
        result: list[tuple[torch.Tensor, dict[int, torch.Tensor]]] = []
        for maps, picture in zip(taken, pictures, strict=True):
            groups = [found.columns for found in (*picture.concepts, *picture.attributes.values())]
            both, count = maps[:0], len(picture.concepts)
            if groups:
                both = concept_maps(
                    maps, groups, normalisation=self.normalisation, smoothing=self.smoothing, tokens=picture.tokens
                )
            result.append((both[:count], dict(zip(picture.attributes, both[count:], strict=True))))
        return result

    def settings(self) -> dict[str, Any]:
        alone = {"concepts": self.concepts[0], "attributes": self.attributes[0]} if len(self.concepts) == 1 else {}
        return super().settings() | alone


@dataclass
class Call:
    """State of one pipeline call.

    Attributes:
        session: of the call. probed: what its probes look at. regions: where its concepts are to stay.
        pictures: its concepts and losses. scale: factor on the loss, 0 until it is known. last: maps of the last probe.
    """

    session: Session
    probed: MapCapture
    regions: Regions
    pictures: list[Picture]
    scale: float
    last: list[torch.Tensor] = field(default_factory=list[torch.Tensor])

    def scale_for(self, dtype: torch.dtype) -> float:
        """The factor on the loss where layers compute in `dtype`."""
        if not self.scale:
            self.scale = LOSS_SCALE if dtype == torch.float16 else 1.0
        return self.scale


def _told(pictures: Sequence[Picture]) -> Mapping[str, Any]:
    values: dict[str, Any] = {}
    for i, picture in enumerate(pictures):
        words = [f"{x.concept} at {x.columns}{f' ({x.note})' if x.note else ''}" for x in picture.concepts]
        values[f"picture {i}"] = ", ".join(words)
        if picture.concepts and picture.losses:
            values[f"loss {i}"] = [round(float(loss), 4) for loss in picture.losses]
    return values

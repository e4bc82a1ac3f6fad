"""The techniques that can be evaluated: where their cases come from, and how one is drawn with and without."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ... import AttentionSegregation, ConceptBlock, NegativeAway, erase, generate, stylize
from ...attention.errors import SettingError
from ..errors import DataError
from . import folders, worlds
from .cases import Case, opened
from .grammar import attend_and_excite
from .prompts import read_prompts

Draw = Callable[..., Image.Image]


@dataclass(frozen=True)
class Technique:
    """One line of the table.

    Attributes:
        plugin: what the pictures are made with, for the table's head.
        task: settings are those of `erase` or `stylize` and go to both arms.
        read: cases of a folder or file. own: those that need none, by the bench's world or by a grammar, or None.
        draw: `draw(pipe, case, grafted, settings, **call)`, one picture.
        fits: whether a case has what is needed. needs: that, in words.
    """

    plugin: str
    task: bool
    read: Callable[[Path], list[Case]]
    world: Callable[[], list[Case]]
    own: Callable[[], list[Case]] | None
    draw: Draw
    fits: Callable[[Case], bool]
    needs: str

    def cases(self, data: Path | None, embedded: bool) -> tuple[list[Case], int]:
        """The cases that fit, and how many do not.

        Raises:
            DataError: no data, or none of it fits.
        """
        own = self.world if embedded else self.own
        if data is None and own is None:
            raise DataError(f"give --data: {self.needs}")
        found = self.read(data) if data is not None else own()  # type: ignore[misc]
        fitting = [case for case in found if self.fits(case)]
        if not fitting:
            raise DataError(f"none of the {len(found)} rows has what is needed: {self.needs}")
        return fitting, len(found) - len(fitting)


def _segregated(pipe: Any, case: Case, grafted: bool, settings: Mapping[str, Any], **call: Any) -> Image.Image:
    plugins = [AttentionSegregation(list(case.concepts), **settings)] if grafted else []
    return generate(pipe, case.prompt, plugins=plugins, **call)[0]


def _kept_away(pipe: Any, case: Case, grafted: bool, settings: Mapping[str, Any], **call: Any) -> Image.Image:
    plugins = [NegativeAway(case.negative, **settings)] if grafted else []
    return generate(pipe, case.prompt, plugins=plugins, **call)[0]


def _blocked(pipe: Any, case: Case, grafted: bool, settings: Mapping[str, Any], **call: Any) -> Image.Image:
    plugins = [ConceptBlock(case.gone, **settings)] if grafted else []
    return generate(pipe, case.prompt, plugins=plugins, **call)[0]


def _blockable(data: Path) -> list[Case]:
    """Rows whose negative is what is blocked: it is to go from a prompt that holds it, and is no wanted concept."""
    return [
        replace(case, gone=case.negative, negative="", concepts=tuple(c for c in case.concepts if c != case.negative))
        for case in read_prompts(data)
    ]


def _erased(pipe: Any, case: Case, grafted: bool, settings: Mapping[str, Any], **call: Any) -> Image.Image:
    """Without: blended diffusion from the same start, mask and noise."""
    changed = {**settings} if grafted else {**settings, "scale": 0.0}
    return erase(pipe, opened(case.image), opened(case.mask), prompt=case.prompt, **changed, **call)


def _stylized(pipe: Any, case: Case, grafted: bool, settings: Mapping[str, Any], **call: Any) -> Image.Image:
    """Without: the content inverted and sampled again, none of the style."""
    changed = {**settings} if grafted else {**settings, "strength": 0.0}
    return stylize(pipe, opened(case.image), opened(case.style), prompt=case.prompt, **changed, **call)


TECHNIQUES: Mapping[str, Technique] = {
    "segregation": Technique(
        "AttentionSegregation", False, read_prompts, worlds.compositions, attend_and_excite, _segregated,
        lambda case: len(case.concepts) > 1,
        "prompts of two concepts or more, found in short phrases or given as \"concepts\"",
    ),
    "negative": Technique(
        "NegativeAway", False, read_prompts, worlds.negatives, None, _kept_away, lambda case: bool(case.negative),
        'rows of "prompt" and "negative" as .jsonl, .csv or .tsv',
    ),
    "concept": Technique(
        "ConceptBlock", False, _blockable, worlds.blocked, None, _blocked, lambda case: bool(case.gone),
        'rows of "prompt" and "negative", the concept that is blocked, as .jsonl, .csv or .tsv',
    ),
    "redirection": Technique(
        "SelfAttentionRedirection", True, folders.removals, worlds.removals, None, _erased,
        lambda case: case.image is not None, "a folder with image/, mask/ and, if known, truth/",
    ),
    "style": Technique(
        "StyleInjection", True, folders.styles, worlds.styles, None, _stylized, lambda case: case.style is not None,
        "a folder with content/ and style/",
    ),
}  # fmt: skip
"""By the name on the command line."""


def technique(name: str) -> Technique:
    """The technique of that name.

    Raises:
        SettingError: there is none.
    """
    if name not in TECHNIQUES:
        raise SettingError(f"no technique {name!r}; there are {', '.join(TECHNIQUES)}")
    return TECHNIQUES[name]

"""What Generate, Compose and the seeds have in common: a request that was checked, and one picture of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image

import diffgraft

from ...attention.errors import ConceptError, UnsupportedPipelineError
from ...plugins.base import Plugin
from . import checks
from .drawing import layout_of
from .parts import Shown, keep_plain
from .studio import Job

SMALL_WORDS = {"a", "an", "and", "the", "of", "on", "in", "with", "at", "to", "style"}
MOST_WORDS = 6


@dataclass(frozen=True)
class Asked:
    """What is to be painted: `wish` goes to `dg.generate`."""

    text: str
    concepts: list[str]
    plugins: list[Plugin]
    seed: int
    wish: dict[str, Any]


def asked(
    prompt: Any, concepts: Any, negative: Any, never: Any, places: Any, drawing: Any, seed: Any, **sampling: Any
) -> Asked:
    """The fields of Generate, checked.

    Raises:
        SettingError, SettingTypeError, MaskError, ImageError: one of them cannot be used.
    """
    wish = {
        **checks.sampling(sampling["steps"], sampling["guidance"]),
        "width": checks.side(sampling["width"], "width"),
        "height": checks.side(sampling["height"], "height"),
    }
    together = checks.words(concepts, "concepts")
    layout = layout_of(drawing, checks.text(places, "the places"), together)
    plugins = techniques(together, checks.text(negative, "the negative"), checks.words(never, "never"), layout)
    return Asked(checks.text(prompt, "the prompt", needed=True), together, plugins, checks.seed(seed), wish)


def techniques(concepts: list[str], negative: str, never: list[str], layout: list[Image.Image] | None) -> list[Plugin]:
    """What the fields stand for."""
    plugins: list[Plugin] = []
    if concepts:
        plugins.append(diffgraft.AttentionSegregation(concepts, layout=layout))
    if negative:
        plugins.append(diffgraft.NegativeAway(negative))
    if never:
        plugins.append(diffgraft.ConceptBlock(never))
    return plugins


def paint(job: Job, prompt: str, plugins: list[Plugin], seed: int, wish: dict[str, Any], what: str) -> Image.Image:
    """One picture, with its progress."""
    job.expect(what, wish["steps"])
    [picture] = diffgraft.generate(job.pipe, prompt, plugins=plugins, seed=seed, **wish)
    return picture


def look(job: Job, ask: Asked, what: str) -> tuple[Image.Image, Shown]:
    """One picture and, where its model has such maps, where the concepts or the prompt's first words looked."""
    words = ask.concepts or telling_words(ask.text)
    ignored = (UnsupportedPipelineError,) if ask.concepts else (UnsupportedPipelineError, ConceptError)
    job.expect(what, ask.wish["steps"])
    given = {"plugins": ask.plugins, "seed": ask.seed, **ask.wish}
    try:
        maps = diffgraft.attention_maps(job.pipe, ask.text, words, **given) if words else None
    except ignored:
        maps = None
    if maps is None:
        return paint(job, ask.text, ask.plugins, ask.seed, ask.wish, what), []
    maps.image.info["diffgraft"]["plugins"] = [{"plugin": type(p).__name__} | p.settings() for p in ask.plugins]
    return maps.image, [(keep_plain(maps.overlay(word), "map"), word) for word in maps]


def telling_words(prompt: str) -> list[str]:
    """The first words of a prompt that name something."""
    words = [word.strip(".,;:!?()").lower() for word in prompt.split()]
    return list(dict.fromkeys(word for word in words if word.isalpha() and word not in SMALL_WORDS))[:MOST_WORDS]


def caption(plugins: list[Plugin], seed: int) -> str:
    """What stands under a picture."""
    names = {"AttentionSegregation": "concepts", "NegativeAway": "negative", "ConceptBlock": "never"}
    used = " + ".join(names.get(type(plugin).__name__, type(plugin).__name__) for plugin in plugins)
    return f"{used or 'plain'}, seed {seed}"

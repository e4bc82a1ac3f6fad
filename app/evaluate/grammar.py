"""Attend-and-Excite's prompts by their public grammar (Chefer et al., 2301.13826, section 4), and nouns of prompts."""

from __future__ import annotations

import random
import re
from itertools import combinations, product

from .cases import Case

ANIMALS = (
    "cat", "dog", "bird", "bear", "lion", "horse", "elephant", "monkey", "frog", "turtle", "rabbit", "mouse",
)  # fmt: skip
OBJECTS = (
    "backpack", "glasses", "crown", "suitcase", "chair", "balloon", "bow", "car", "bowl", "bench", "clock", "apple",
)  # fmt: skip
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "gray", "black", "white")
WORN = ("glasses", "crown", "bow")
"""An animal is drawn *with* these, and they get no colour then."""


def attend_and_excite(seed: int = 0) -> list[Case]:
    """All 276 combinations: 66 of two animals, 144 of an animal and an object, 66 of two objects.

    Args:
        seed: of the colours, which the authors drew at random too; their article is always "a".
    """
    rng, cases = random.Random(f"attend and excite {seed}"), list[Case]()
    for a, b in combinations(ANIMALS, 2):
        cases.append(_case("animals", f"a {a} and a {b}", (a, b)))
    for animal, thing in product(ANIMALS, OBJECTS):
        colour = rng.choice(COLOURS)
        prompt = f"a {animal} with a {thing}" if thing in WORN else f"a {animal} and a {colour} {thing}"
        own = () if thing in WORN else ((thing, colour),)
        cases.append(_case("animals and objects", prompt, (animal, thing), own))
    for a, b in combinations(OBJECTS, 2):
        first, second = rng.choice(COLOURS), rng.choice(COLOURS)
        cases.append(_case("objects", f"a {first} {a} and a {second} {b}", (a, b), ((a, first), (b, second))))
    return cases


def _case(group: str, prompt: str, concepts: tuple[str, ...], attributes: tuple[tuple[str, str], ...] = ()) -> Case:
    return Case(prompt.replace(" ", "-"), group, prompt, concepts, attributes)


_BETWEEN = re.compile(
    r"\b(?:and|with|next to|near|on side of|on the (?:top|bottom|left|right)(?: side)? of|in front of|beside|behind|"
    r"above|below|under|over|left of|right of|in|on|at|by)\b|[,.;]"
)
_PHRASE = re.compile(r"(?:(?:a|an|the|some|one|two|three|four|five|six|seven|eight)\s+)?((?:[\w'-]+\s+){0,3}[\w'-]+)")
_LITTLE = {"a", "an", "the", "of", "is", "are", "to", "for"}


def nouns(prompt: str) -> tuple[str, ...]:
    """The last word of every noun phrase of a short prompt such as "a green bench and a blue bowl".

    Returns:
        () where the prompt is a sentence or says a noun twice: what its concepts are is not guessed.
    """
    parts = [part.strip() for part in _BETWEEN.split(prompt.lower().removeprefix("a photo of ")) if part.strip()]
    matches = [_PHRASE.fullmatch(part) for part in parts]
    words = [match[1].split() for match in matches if match is not None]
    if len(words) < len(parts) or any(_LITTLE & set(phrase) for phrase in words):
        return ()
    found = tuple(phrase[-1] for phrase in words)
    return found if len(set(found)) == len(found) else ()

"""Captions that ask for a concept, plainly and in other forms; and the ones that never name it."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .backgrounds import BACKGROUNDS
from .judge import Verdict
from .shapes import COLOURS, SHAPES

KINDS, PAINTS = list(SHAPES), list(COLOURS)
CONCEPTS = [*KINDS, *PAINTS]
ASKED = 10


@dataclass(frozen=True)
class Asked:
    """A caption that asks for a concept, and the other thing in it as (colour, kind), None where there is none."""

    text: str
    other: tuple[str, str] | None
    background: str

    def kept(self, verdict: Verdict) -> bool:
        """Whether the other thing is there in its colour, on the background; of one thing, the background alone."""
        there = self.other is None or verdict.colours.get(self.other[1]) == self.other[0]
        return there and verdict.background == self.background


def shown(verdict: Verdict, concept: str) -> bool:
    """Whether the judge sees the concept anywhere."""
    return concept in verdict.colours or concept in verdict.colours.values()


def asking(concept: str) -> list[Asked]:
    """Ten captions: eight of two things, the concept first and second in turn, and two of one thing."""
    rng, found = random.Random(f"asking for {concept}"), list[Asked]()
    for number in range(ASKED):
        background = rng.choice(list(BACKGROUNDS))
        kinds = [kind for kind in KINDS if kind != concept]
        paints = [paint for paint in PAINTS if paint != concept]
        kind, other_kind = rng.sample(kinds, 2)
        paint, other_paint = rng.sample(paints, 2)
        own = (paint, concept) if concept in KINDS else (concept, kind)
        other = (other_paint, other_kind) if number < 8 else None
        things = [own] if other is None else [own, other] if number % 2 else [other, own]
        words = " and ".join(f"a {colour} {kind}" for colour, kind in things)
        found.append(Asked(f"{words} , {background}", other, background))
    return found


def oddly(concept: str) -> list[Asked]:
    """The same wish in forms that no caption of the training has."""
    background, paint, kind = "sky", "blue", "ball" if concept != "ball" else "box"
    paint = "green" if concept == paint else paint
    pair = f"{paint} {concept}" if concept in KINDS else f"{concept} {kind}"
    swapped = " ".join(reversed(pair.split()))
    forms = [
        f"a a {pair} , sky", f"a {swapped} , sky", f"{pair} {pair} {pair} , sky", f"sky , a {pair}",
        f"{concept} {concept} , sky", f"a {pair} and a {pair} , sky",
    ]  # fmt: skip
    return [Asked(form, None, background) for form in forms]


def silent(concept: str) -> list[str]:
    """Captions that never name the concept, made of those of other concepts."""
    return [one.text for other in CONCEPTS if other != concept for one in asking(other) if concept not in one.text][:20]

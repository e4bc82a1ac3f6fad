"""The cases that the embedded model is measured on: those of the tables under app/bench/."""

from __future__ import annotations

from PIL import Image

from ..bench import world
from ..bench.negative_effect import PAIRS
from ..bench.redirection_scores import cases
from ..bench.segregation_rows import three_objects, two_objects
from .cases import Case

COUNT = 20


def compositions() -> list[Case]:
    """Captions of two and of three things, each with its colour."""
    found = {"two objects": two_objects(COUNT), "three objects": three_objects(COUNT)}
    return [_composition(f"{group[:3]}-{i}", group, s) for group, some in found.items() for i, s in enumerate(some)]


def _composition(name: str, group: str, scene: world.Scene) -> Case:
    return Case(
        name, group, world.caption(scene), tuple(t.kind for t in scene.things),
        tuple((t.kind, t.colour) for t in scene.things),
    )  # fmt: skip


def blocked() -> list[Case]:
    """Captions of two things, the first of which is not to be drawn."""
    return [
        Case(f"block-{i}", scene.things[0].kind, world.caption(scene), (scene.things[1].kind,),
             ((scene.things[1].kind, scene.things[1].colour),), gone=scene.things[0].kind)
        for i, scene in enumerate(two_objects(COUNT))
    ]  # fmt: skip


def negatives() -> list[Case]:
    """Captions that leave something open, and the negative that it should not be."""
    return [
        Case(f"pair-{i}", "colours" if i < 8 else "backgrounds and styles", prompt, (_kind(prompt),), negative=negative)
        for i, (prompt, negative) in enumerate(PAIRS)
    ]


def _kind(prompt: str) -> str:
    return prompt.split(" , ")[0].split()[-1]


def removals() -> list[Case]:
    """Scenes of two things, the first of which is to go, with the true background."""
    return [
        Case(f"scene-{i}", case.scene.style, image=case.image, mask=Image.fromarray(case.marked), truth=case.truth,
             gone=case.scene.things[0].kind)
        for i, case in enumerate(cases(COUNT, "grown"))
    ]  # fmt: skip


def styles() -> list[Case]:
    """Plain contents in every style, with the true re-rendering."""
    from ..bench.style_effect import pairs

    return [
        Case(f"pair-{i}", pair.style.style, image=world.render(pair.content), style=world.render(pair.style),
             truth=pair.truth, concepts=tuple(thing.kind for thing in pair.content.things))
        for i, pair in enumerate(pairs(COUNT // 4))
    ]  # fmt: skip

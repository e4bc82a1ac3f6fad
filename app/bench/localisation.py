"""Where the words look: for each layer that attends to text and each step, whether a kind's map lies on its thing.

    python -m diffgraft.app.bench localisation --full

Prints, for two plain things, the share of a word's attention (mean over heads) that lies on its own thing and on the
other one, as the judge's kind maps find them in the finished picture: of its noun and of its colour. The share of the
area that the thing takes is the value of a blind map. Where text and image are one sequence, it is what the image looks
at the text beside itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from ... import Plugin, graft
from ...attention.edit import Edit
from ...attention.layer import AttentionLayer
from ...attention.maps import MapCapture, kind_of_maps
from ...attention.step import Rows, Step
from ...plugins.base import Session
from ...plugins.concepts import find_concept
from .judge import KINDS, Judge, load_judge
from .model_card import ROWS
from .rows import KEPT, Pace, drawing, fingerprint, pace, subject
from .rows import Rows as Kept
from .training import share_cores
from .world import Scene, caption

USUAL, BATCH = Pace(25, 4.0), 16
Shares = list[tuple[float, float, float]]
"""Of each thing found: of its word's attention what lies on itself and on the other thing, and its area."""
WORDS = {"": "kind", ", colour": "colour"}  # of a thing, by what is added to the layer's name


class Watch(Plugin):
    """Notes the maps of each thing's words in every layer at some steps.

    Args:
        steps: of the whole sampling.
    Attributes:
        seen: by layer (and word) and step, of each scene, of each of its things: [16, 16], with a sum of 1.
    """

    def __init__(self, scenes: Sequence[Scene], steps: int) -> None:
        super().__init__()
        self.scenes, self.moments = scenes, moments(steps)
        self.seen: dict[tuple[str, int], list[list[torch.Tensor]]] = {}

    def bind(self, session: Session) -> None:
        kind = kind_of_maps(session.layers, "cross")
        levels = sorted({layer.level for layer in session.layers if layer.kind == kind})
        self.captures = [MapCapture(session.layers, "predict", choice=at_level(level)) for level in levels]

    def edits(self) -> Sequence[Edit]:
        return self.captures

    def begin(self, session: Session, step: Step) -> None:
        self.columns = {
            suffix: [
                [find_concept(session, caption(scene), getattr(thing, word)).columns for thing in scene.things]
                for scene in self.scenes
            ]
            for suffix, word in WORDS.items()
        }

    def combine(self, step: Step, prediction: torch.Tensor, rows: Rows) -> None:
        for capture in self.captures:
            for name, maps in capture.maps.items() if step.index in self.moments else ():
                for suffix, columns in self.columns.items():
                    self.seen[name + suffix, step.index] = [
                        [cells(one[:, own].mean(1)) for own in things]
                        for one, things in zip(maps, columns, strict=True)
                    ]
            capture.clear()


def moments(steps: int) -> list[int]:
    """Five steps from the first to the last, or all of fewer."""
    return sorted({round(i * (steps - 1) / 4) for i in range(5)})


def at_level(level: int) -> Callable[[AttentionLayer], bool]:
    """A choice of the layers of one grid."""
    return lambda layer: layer.level == level


def cells(flat: torch.Tensor) -> torch.Tensor:
    """A square map [h*h] on 16 x 16 cells, with a sum of 1."""
    side = round(len(flat) ** 0.5)
    grown = F.interpolate(flat.float().view(1, 1, side, side), size=(16, 16), mode="nearest")[0, 0]
    return grown / grown.sum()


@torch.no_grad()
def watched(pipe: Any, judge: Judge, scenes: Sequence[Scene], first: int, at: Pace) -> dict[str, Shares]:
    """By "layer at step" the shares of all things of one batch that are there; scene i has the seed first + i."""
    share_cores()
    watch = Watch(scenes, at.steps)
    generators = [torch.Generator().manual_seed(first + i) for i in range(len(scenes))]
    with graft(pipe, watch):
        how = drawing(pipe, *at) | {"generator": generators, "output_type": "pt"}
        pictures = pipe([caption(scene) for scene in scenes], **how).images
    where = judge(pictures.cpu() * 2 - 1)[0].softmax(1) > 0.5
    return {f"{layer} at {step}": shares(maps, where, scenes) for (layer, step), maps in watch.seen.items()}


def shares(maps: Sequence[Sequence[torch.Tensor]], where: torch.Tensor, scenes: Sequence[Scene]) -> Shares:
    """Of scenes of which both things are found, by cells [N, kinds, 16, 16]."""
    found: Shares = []
    for nouns, seen, scene in zip(maps, where, scenes, strict=True):
        own = [seen[KINDS.index(thing.kind)].cpu() for thing in scene.things]
        for i, noun in enumerate(nouns) if all(mask.any() for mask in own) else ():
            on = noun.cpu()
            found.append((float(on[own[i]].sum()), float(on[own[1 - i]].sum()), float(own[i].float().mean())))
    return found


def localisation(
    pipe: Any, judge: Judge, scenes: Sequence[Scene], kept: Kept, key: Mapping[str, str], at: Pace = USUAL
) -> dict[str, Shares]:
    """By "layer at step" the shares of all scenes, measured or remembered."""
    found: dict[str, Shares] = {}
    for first in range(0, len(scenes), BATCH):
        part = scenes[first : first + BATCH]
        captions = [caption(scene) for scene in part]
        label = {**key, "localisation": captions, "words": [*WORDS.values()], "first": first, **at._asdict()}
        for name, values in kept.remember(label, partial(watched, pipe, judge, part, first, at)).items():
            found.setdefault(name, []).extend(tuple(value) for value in values)
    return found


def lines(found: Mapping[str, Shares], steps: int) -> list[str]:
    """The table: a line a layer and word, own / other at five moments of the sampling."""
    at = moments(steps)
    table = ["| layer | area | " + " | ".join(f"step {m}" for m in at) + " |", "|---" * (2 + len(at)) + "|"]
    for layer in dict.fromkeys(name.rsplit(" at ", 1)[0] for name in found):
        means = [[100 * _mean(found[f"{layer} at {m}"], of) for of in range(3)] for m in at]
        inside = " | ".join(f"{own:.0f} / {other:.0f}%" for own, other, _ in means)
        table.append(f"| {layer} | {means[0][2]:.0f}% | {inside} |")
    return table


def _mean(shares: Shares, of: int) -> float:
    return sum(one[of] for one in shares) / len(shares) if shares else float("nan")


def run(full: bool, model: Path | None = None) -> None:
    """Print the table: 256 pictures, or 32 for a quick look."""
    pipe, kept, at = subject(model), Kept(KEPT / "localisation.jsonl"), pace(model, *USUAL)
    found = localisation(pipe, load_judge(), ROWS[2].scenes(256 if full else 32), kept, fingerprint(pipe), at)
    sys.stdout.write("\n".join(lines(found, at.steps)) + "\n")

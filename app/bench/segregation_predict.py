"""Which attention loss, at which step, tells among the seeds of one caption which picture will fail."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ... import LOSSES, Maps, Plugin, graft
from ...attention.edit import Edit
from ...attention.maps import MapCapture, Normalisation, concept_maps
from ...attention.regions import binarise
from ...attention.step import Rows, Step
from ...plugins.base import Session
from ...plugins.concepts import find_concept
from ...plugins.losses import binding_loss, segregation_loss
from .judge import Judge, load_judge, look
from .rows import KEPT, Pace, drawing, fingerprint, pace, subject
from .rows import Rows as Kept
from .segregation_rows import FIRST, USUAL, three_objects
from .statistics import share
from .training import share_cores
from .world import Scene, caption

Key = Mapping[str, str]
AT = (0, 2, 4, 8, 12)
LOOKS: dict[str, tuple[Normalisation, Any]] = {
    "attend-and-excite, sharpened maps": ("ae", LOSSES["attend-and-excite"]),
    "attend-and-excite, raw maps": ("none", LOSSES["attend-and-excite"]),
    "A-STAR segregation, maps / max": ("max", lambda maps: segregation_loss(maps.concepts)),
    "A-STAR segregation, sharpened maps": ("ae", lambda maps: segregation_loss(maps.concepts)),
    "A-STAR both terms, maps / max": ("max", LOSSES["a-star"]),
    "jsd of the kinds": ("none", LOSSES["jsd"]),
    "colours bound": ("none", binding_loss),
}


class Watch(Plugin):
    """Notes every loss at the chosen steps of a plain run."""

    def __init__(self, scene: Scene) -> None:
        super().__init__()
        self.scene = scene
        self.seen: dict[tuple[str, int], list[float]] = {}

    def bind(self, session: Session) -> None:
        self.capture = MapCapture(session.layers, "predict")

    def edits(self) -> Sequence[Edit]:
        return (self.capture,)

    def begin(self, session: Session, step: Step) -> None:
        words = [t.kind for t in self.scene.things] + [t.colour for t in self.scene.things]
        self.columns = [find_concept(session, caption(self.scene), word).columns for word in words]
        self.before: dict[str, list[torch.Tensor]] = {}

    def combine(self, step: Step, prediction: torch.Tensor, rows: Rows) -> None:
        taken = self.capture.averaged()
        self.capture.clear()
        for name, (normalisation, loss) in LOOKS.items():
            both = [concept_maps(maps, self.columns, normalisation=normalisation) for maps in taken]
            count = len(self.scene.things)
            regions = self.before.get(name, [None] * len(both))
            if step.index in AT:
                self.seen[name, step.index] = [
                    float(loss(Maps(maps[:count], past, dict(enumerate(maps[count:])))))
                    for maps, past in zip(both, regions, strict=True)
                ]
            self.before[name] = [binarise(maps[:count]) for maps in both]


def wins(losses: Sequence[float], failed: Sequence[bool]) -> tuple[float, int]:
    """Pairs of a failure and a success in which the failure had the larger loss (ties count half), and all pairs."""
    bad = [x for x, f in zip(losses, failed, strict=True) if f]
    good = [x for x, f in zip(losses, failed, strict=True) if not f]
    return sum((b > g) + 0.5 * (b == g) for b in bad for g in good), len(bad) * len(good)


def watched(pipe: Any, judge: Judge, scene: Scene, seeds: int, at: Pace) -> dict[str, Any]:
    """Which seeds of a scene's caption fail, and every loss of each: {"failed": [...], "name at step": [...]}."""
    share_cores()
    watch = Watch(scene)
    generators = [torch.Generator().manual_seed(50_000 + i) for i in range(seeds)]
    settings = drawing(pipe, *at) | {"output_type": "pt", "generator": generators}
    with graft(pipe, watch):
        pictures = pipe([caption(scene)] * seeds, **settings).images
    verdicts = look(judge, pictures.cpu() * 2 - 1)
    failed = [any(v.colours.get(t.kind) != t.colour for t in scene.things) for v in verdicts]
    return {"failed": failed} | {f"{name} at {step}": losses for (name, step), losses in watch.seen.items()}


def picked(losses: Sequence[float], failed: Sequence[bool], of: int = 8) -> list[bool]:
    """Whether the seed with the lowest loss is right, for each `of` seeds in their order."""
    groups = [range(i, i + of) for i in range(0, len(failed) - of + 1, of)]
    return [not failed[min(group, key=lambda i: losses[i])] for group in groups]


def predictors(
    pipe: Any, judge: Judge, scenes: Sequence[Scene], seeds: int, kept: Kept, key: Key, how: Pace = USUAL
) -> Iterator[str]:
    """Lines of the table: area under the curve, and how often the best of 8 seeds is right. Captions that always or
    never fail say nothing of the first.
    """
    moments = [at for at in AT if at < how.steps]
    seen: list[dict[str, Any]] = []
    for scene in scenes:
        label = {**key, "predict": caption(scene), "seeds": seeds, **how._asdict()}
        seen.append(kept.remember(label, partial(watched, pipe, judge, scene, seeds, how)))
    telling = sum(0 < sum(one["failed"]) < seeds for one in seen)
    right = [not failed for one in seen for failed in one["failed"]]
    yield f"{telling} of {len(scenes)} captions fail for some of {seeds} seeds only; right: {share(right).percent()}"
    yield ""
    yield "| loss | " + " | ".join(f"step {at} | best of 8" for at in moments) + " |"
    yield "|---" * (2 * len(moments) + 1) + "|"
    for name in LOOKS:
        cells: list[str] = []
        for at in moments:
            both = [(one[f"{name} at {at}"], one["failed"]) for one in seen]
            won, pairs = map(sum, zip(*(wins(*one) for one in both), strict=True))
            best = [ok for one in both for ok in picked(*one)]
            cells += [f"{won / pairs:.2f}" if pairs else "-", f"{100 * sum(best) / len(best):.0f}%"]
        yield f"| {name} | {' | '.join(cells)} |"


def run(full: bool, model: Path | None = None) -> None:
    """Print the table; full mode draws 768 pictures, quick mode 24."""
    pipe, telling = subject(model), three_objects(24 if full else 3, FIRST + 900_000)
    sys.stdout.write("Area under the curve of the loss against failure, among seeds of one caption of three things\n\n")
    kept, how = Kept(KEPT / "segregation.jsonl"), pace(model, *USUAL)
    for line in predictors(pipe, load_judge(), telling, 32 if full else 8, kept, fingerprint(pipe), how):
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

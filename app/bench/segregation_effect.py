"""Does attention guidance put every object into the picture, with its colour? Maps, predictors, controls, effect.

1. What each cross-attention layer looks at, step by step, as a picture.
2. Which loss, at which step, predicts failure among the seeds of one caption (area under the curve, 0.5 is blind).
3. Guidance beside two controls of equal step norm: a random direction, and the gradient of another caption's loss.
4. The effect on two and three objects, with paired bootstrap intervals, for the default and for its parts.
5. Whether things stand where a layout says.

Whatever has been drawn is kept under outputs/bench/ and not drawn again: a full run goes on where it was cut.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ... import Plugin, attention_maps, graft
from ...attention.layer import AttentionLayer
from ...pipelines.tasks.overlay import overlay, sheet, strip
from .judge import Judge, Verdict, load_judge, look
from .rows import KEPT, Pace, Rows, drawing, fingerprint, pace, scale_of, subject
from .segregation_layout import layouts
from .segregation_rows import CONTROLLED, FORMS, PARTS, USUAL, Row, three_objects, two_objects
from .statistics import Estimate, paired_difference, share
from .training import share_cores
from .world import Scene, caption

BATCH = 20
ASIDE = ("kinds", "background", "style")


@dataclass(frozen=True)
class Outcome:
    """What the judge says of one picture."""

    right: bool
    kinds: bool
    background: bool
    style: bool


def outcome(verdict: Verdict, truth: Scene) -> Outcome:
    """Right: every thing is there in its colour, whatever else is."""
    return Outcome(
        all(verdict.colours.get(thing.kind) == thing.colour for thing in truth.things),
        all(thing.kind in verdict.colours for thing in truth.things),
        verdict.background == truth.background,
        verdict.style == truth.style,
    )


def draw(pipe: Any, scenes: Sequence[Scene], seed: int, plugin: Plugin | None, at: Pace = USUAL) -> torch.Tensor:
    """Pictures [N, 3, 128, 128] in -1 ... 1 of a batch; picture i has the generator seed + i."""
    share_cores()
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(scenes))]
    settings = drawing(pipe, *at) | {"output_type": "pt", "generator": generators}
    with graft(pipe, *([plugin] if plugin else [])):
        return pipe([caption(s) for s in scenes], **settings).images.cpu() * 2 - 1


def outcomes(
    pipe: Any, judge: Judge, row: Row, scenes: Sequence[Scene], repeats: int, kept: Rows, key: dict[str, str],
    at: Pace = USUAL,
) -> list[Outcome]:  # fmt: skip
    """Of every scene, in every repeat, drawn or remembered."""
    found: list[Outcome] = []
    for repeat in range(repeats):
        for i in range(0, len(scenes), BATCH):
            part, seed = scenes[i : i + BATCH], 1_000_000 * repeat + i
            plugin, captions = row(part, seed), [caption(s) for s in part]
            grafted = None if plugin is None else {"plugin": type(plugin).__name__, **plugin.settings()}
            label = {**key, "row": grafted, **at._asdict(), "captions": captions, "seed": seed}
            make = partial(_drawn, pipe, judge, plugin, part, seed, at)
            found += [Outcome(**one) for one in kept.remember(label, make)]
    return found


def _drawn(
    pipe: Any, judge: Judge, plugin: Plugin | None, scenes: Sequence[Scene], seed: int, at: Pace
) -> list[dict[str, bool]]:
    pictures = draw(pipe, scenes, seed, plugin, at)
    return [asdict(outcome(v, s)) for v, s in zip(look(judge, pictures), scenes, strict=True)]


def change(after: Sequence[Outcome], before: Sequence[Outcome], repeats: int) -> Estimate:
    """By how much more is right; the interval is over captions, since the seeds of one caption fail together."""
    of_captions = [np.reshape([one.right for one in found], (repeats, -1)).mean(0) for found in (after, before)]
    return paired_difference(*of_captions)


def effect_rows(
    pipe: Any, judge: Judge, scenes: Sequence[Scene], repeats: int, rows: Mapping[str, Row], at: Pace = USUAL
) -> Iterator[str]:
    """Lines of the table. The first row is compared with, of the second the lead over each further one is told."""
    firsts: list[list[Outcome]] = []
    kept, key = Rows(KEPT / "segregation.jsonl"), fingerprint(pipe)
    for name, row in rows.items():
        found = outcomes(pipe, judge, row, scenes, repeats, kept, key, at)
        firsts = [*firsts, found][:2]
        failures = sum(not one.right for one in firsts[0])
        cut = 1 - sum(not one.right for one in found) / failures if failures else 0.0
        cells = [name, share([one.right for one in found]).percent()]
        cells += ["-", "-"] if found is firsts[0] else [points(change(found, firsts[0], repeats)), f"{100 * cut:.0f}%"]
        cells.append("-" if any(found is one for one in firsts) else points(change(firsts[1], found, repeats)))
        cells += [f"{100 * sum(getattr(o, x) for o in found) / len(found):.1f}%" for x in ASIDE]
        yield f"| {' | '.join(cells)} |"


def points(change: Estimate) -> str:
    """As "+24.2 (+19.2 to +29.2)"."""
    return f"{100 * change.value:+.1f} ({100 * change.low:+.1f} to {100 * change.high:+.1f})"


def map_sheet(pipe: Any, truth: Scene, at: Pace = USUAL) -> Path:
    """The picture of maps by layer and step of the scene's first kind."""

    def only(name: str, layer: AttentionLayer) -> bool:
        return layer.name == name

    word, rows = truth.things[0].kind, dict[str, Any]()
    guidance = drawing(pipe, *at)["guidance_scale"]
    names = [layer.name for layer in graft(pipe).layers if layer.kind in ("cross", "joint")]
    for name in names:
        call = {"layers": partial(only, name), "steps": at.steps, "guidance": guidance}
        maps = attention_maps(pipe, caption(truth), [word], **call)
        rows[f"{word}, {name}"] = (overlay(maps.image, maps[word]), strip(maps.steps[word], 8))
    path = KEPT / "segregation-maps.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet(maps.image, rows).save(path)
    return path


def run(full: bool, model: Path | None = None) -> None:
    """Print the tables; quick mode draws a few hundred pictures, full mode ten thousand."""
    pipe, judge, at = subject(model), load_judge(), pace(model, *USUAL)
    say(f"{scale_of(full)}: maps of each layer and step: {map_sheet(pipe, two_objects(1)[0], at)}\n")
    pairs, triples = two_objects(200 if full else 20), three_objects(100 if full else 20)
    effect(pipe, judge, "Three objects", triples, 4 if full else 1, CONTROLLED, at)
    effect(pipe, judge, "Two objects", pairs, 4 if full else 1, CONTROLLED, at)
    if full:
        effect(pipe, judge, "Two objects, parts", pairs, 1, PARTS, at)
        effect(pipe, judge, "Three objects, parts and other forms", triples, 1, FORMS, at)
    kept, key = Rows(KEPT / "segregation.jsonl"), fingerprint(pipe)
    count = 160 if full else 16
    say(f"\nLayouts: {count} captions of two objects\n")
    for line in layouts(pipe, count, kept, key, at):
        say(line)


def effect(
    pipe: Any, judge: Judge, title: str, scenes: Sequence[Scene], seeds: int, rows: Mapping[str, Row], at: Pace = USUAL
) -> None:
    """Print one table."""
    say(f"\n{title}: {len(scenes)} captions, seeds: {seeds}, {at.steps} steps, guidance {at.guidance:g}\n")
    say(
        "| | every object right | change, points | failures cut | lead of the second row | kinds | background | style |"
    )
    say("|---|---|---|---|---|---|---|---|")
    for line in effect_rows(pipe, judge, scenes, seeds, rows, at):
        say(line)


def say(line: str) -> None:
    """Print a line now, not when the table is done."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()

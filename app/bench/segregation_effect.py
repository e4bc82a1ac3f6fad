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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ... import AttentionSegregation, Plugin, attention_maps, graft
from ...attention.layer import AttentionLayer
from ...attention.step import Step
from ...pipelines.overlay import overlay, sheet, strip
from ...plugins.base import Probe
from ...plugins.moves import low_pass, relative_step, step_factor
from .evaluate import GUIDANCE
from .judge import Judge, Verdict, load_judge, look
from .rows import KEPT, Rows, fingerprint, scale_of, subject
from .segregation_layout import layouts
from .segregation_predict import predictors
from .statistics import paired_difference, share
from .training import share_cores
from .world import FRESH, Scene, caption, scene

FIRST = FRESH + 3_000_000  # captions of the reported tables; settings are chosen on others
STEPS, BATCH = 20, 20


@dataclass(frozen=True)
class Outcome:
    """What the judge says of one picture."""

    right: bool
    kinds: bool
    background: bool
    style: bool


class RandomDirection(Plugin):
    """Moves as far as the default does, to where a low-passed random field points."""

    def __init__(self, seed: int) -> None:
        super().__init__(end=_DEFAULT.end)
        self.draws = torch.Generator().manual_seed(seed)

    def latent(self, step: Step, latent: torch.Tensor, probe: Probe) -> torch.Tensor:
        field = low_pass(torch.randn(latent.shape, generator=self.draws), 4).to(latent.device)
        factor = _DEFAULT.size * step_factor(step.index, step.total, _DEFAULT.decay)
        return latent - relative_step(field, factor, latent)


class OtherCaption(AttentionSegregation):
    """Moves each picture along the gradient of the loss of the next picture's caption."""

    def latent(self, step: Step, latent: torch.Tensor, probe: Probe) -> torch.Tensor | None:
        return super().latent(step, latent, lambda z: probe(z.roll(1, 0)))


_DEFAULT = AttentionSegregation(["ball", "star"])
Row = Callable[[Sequence[Scene], int], Plugin | None]


def concepts(scenes: Sequence[Scene]) -> list[list[str]]:
    """The kinds of each scene, as its caption names them."""
    return [[thing.kind for thing in s.things] for s in scenes]


def guided(scenes: Sequence[Scene], seed: int, kind: Any = AttentionSegregation, **settings: Any) -> Plugin:
    """A row's plugin."""
    return kind(concepts(scenes), **settings)


def bound(scenes: Sequence[Scene], seed: int, **settings: Any) -> Plugin:
    """The same with each colour bound to its kind."""
    colours = [{thing.kind: thing.colour for thing in s.things} for s in scenes]
    return AttentionSegregation(concepts(scenes), attributes=colours, binding=1.0, **settings)


ROWS: dict[str, Row] = {
    "plain pipeline": lambda scenes, seed: None,
    "default": guided,
    "control: random direction": lambda scenes, seed: RandomDirection(seed),
    "control: another caption's gradient": partial(guided, kind=OtherCaption, previous="pre"),
    "segregation only": partial(guided, retention=0),
    "retention only": partial(guided, segregation=0),
    'layout="auto"': partial(guided, layout="auto"),
    "default + colours bound": bound,
    "default, route of values": partial(guided, route="values"),
    "default, best of 8 starts": partial(guided, candidates=8),
    "attend-and-excite, 10%": partial(guided, loss="attend-and-excite", size=0.1),
    "jsd": partial(guided, loss="jsd"),
    'preset="paper"': partial(guided, preset="paper"),
}
CONTROLLED = list(ROWS)[:4]
PARTS = list(ROWS)[:6]
OTHERS = [name for name in ROWS if name not in CONTROLLED[2:]]


def two_objects(count: int, first: int = FIRST) -> list[Scene]:
    """Plain scenes, half of seen pairs of kinds and half of unseen ones."""
    splits = ("seen", "unseen")
    return [scene(first + i, count=2, split=splits[i % 2], style="plain") for i in range(count)]


def three_objects(count: int, first: int = FIRST + 500_000) -> list[Scene]:
    """Plain scenes of three kinds, of triples never seen in training."""
    return [scene(first + i, count=3, split="unseen", style="plain") for i in range(count)]


def outcome(verdict: Verdict, truth: Scene) -> Outcome:
    """Right: every thing is there in its colour, whatever else is."""
    return Outcome(
        all(verdict.colours.get(thing.kind) == thing.colour for thing in truth.things),
        all(thing.kind in verdict.colours for thing in truth.things),
        verdict.background == truth.background,
        verdict.style == truth.style,
    )


def draw(pipe: Any, scenes: Sequence[Scene], seed: int, plugin: Plugin | None) -> torch.Tensor:
    """Pictures [N, 3, 128, 128] in -1 ... 1 of a batch; picture i has the generator seed + i."""
    share_cores()
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(scenes))]
    settings = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "pt", "generator": generators}
    with graft(pipe, *([plugin] if plugin else [])):
        return pipe([caption(s) for s in scenes], **settings).images.cpu() * 2 - 1


def outcomes(
    pipe: Any, judge: Judge, name: str, scenes: Sequence[Scene], repeats: int, kept: Rows, key: dict[str, str]
) -> list[Outcome]:
    """Of every scene and repeat, drawn or remembered."""
    found: list[Outcome] = []
    for repeat in range(repeats):
        for i in range(0, len(scenes), BATCH):
            part, seed = scenes[i : i + BATCH], 1_000_000 * repeat + i
            captions = [caption(s) for s in part]
            label = {**key, "row": name, "steps": STEPS, "guidance": GUIDANCE, "captions": captions, "seed": seed}
            found += [Outcome(**one) for one in kept.remember(label, partial(_drawn, pipe, judge, name, part, seed))]
    return found


def _drawn(pipe: Any, judge: Judge, name: str, scenes: Sequence[Scene], seed: int) -> list[dict[str, bool]]:
    pictures = draw(pipe, scenes, seed, ROWS[name](scenes, seed))
    return [asdict(outcome(v, s)) for v, s in zip(look(judge, pictures), scenes, strict=True)]


def effect_rows(pipe: Any, judge: Judge, scenes: Sequence[Scene], repeats: int, names: Sequence[str]) -> Iterator[str]:
    """Lines of the table, the plain pipeline first."""
    plain: list[Outcome] = []
    kept, key = Rows(KEPT / "segregation.jsonl"), fingerprint(pipe)
    for name in names:
        found = outcomes(pipe, judge, name, scenes, repeats, kept, key)
        plain = plain or found
        right = share([one.right for one in found]).percent()
        gain = paired_difference([one.right for one in found], [one.right for one in plain])
        failures = sum(not one.right for one in plain)
        cut = 1 - sum(not one.right for one in found) / failures if failures else 0.0
        rest = (
            f"{100 * sum(getattr(o, x) for o in found) / len(found):.1f}%" for x in ("kinds", "background", "style")
        )
        change = f"{100 * gain.value:+.1f} ({100 * gain.low:+.1f} to {100 * gain.high:+.1f}) | {100 * cut:.0f}%"
        yield f"| {name} | {right} | {'- | -' if found is plain else change} | {' | '.join(rest)} |"


def map_sheet(pipe: Any, truth: Scene) -> Path:
    """The picture of maps by layer and step of the scene's first kind."""

    def only(name: str, layer: AttentionLayer) -> bool:
        return layer.name == name

    word, rows = truth.things[0].kind, dict[str, Any]()
    names = [layer.name for layer in graft(pipe).layers if layer.kind == "cross"]
    for name in names:
        maps = attention_maps(pipe, caption(truth), [word], layers=partial(only, name), steps=STEPS, guidance=GUIDANCE)
        rows[f"{word}, {name}"] = (overlay(maps.image, maps[word]), strip(maps.steps[word], 8))
    path = KEPT / "segregation-maps.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet(maps.image, rows).save(path)
    return path


def run(full: bool, model: Path | None = None) -> None:
    """Print the tables; quick mode draws a few hundred pictures, full mode ten thousand."""
    pipe, judge = subject(model), load_judge()
    _say(f"{scale_of(full)}: maps of each layer and step: {map_sheet(pipe, two_objects(1)[0])}\n")
    pairs, triples = two_objects(200 if full else 20), three_objects(100 if full else 20)
    _effect(pipe, judge, "Three objects", triples, 4 if full else 1, CONTROLLED)
    _effect(pipe, judge, "Two objects", pairs, 4 if full else 1, CONTROLLED[:2])
    if full:
        _effect(pipe, judge, "Two objects, controls and parts", pairs, 1, PARTS)
        _effect(pipe, judge, "Three objects, parts and other forms", triples, 1, OTHERS)
    _say("\nArea under the curve of the loss against failure, among seeds of one caption of three things\n")
    for line in predictors(pipe, judge, three_objects(24 if full else 3, FIRST + 900_000), 32 if full else 8):
        _say(line)
    count = 160 if full else 16
    _say(f"\nLayouts: {count} captions of two objects\n")
    for line in layouts(pipe, count):
        _say(line)


def _effect(pipe: Any, judge: Judge, title: str, scenes: Sequence[Scene], seeds: int, names: Sequence[str]) -> None:
    _say(f"\n{title}: {len(scenes)} captions, seeds: {seeds}, {STEPS} steps, guidance {GUIDANCE:g}\n")
    _say("| | every object right | change, points | failures cut | kinds | background | style |")
    _say("|---|---|---|---|---|---|---|")
    for line in effect_rows(pipe, judge, scenes, seeds, names):
        _say(line)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()

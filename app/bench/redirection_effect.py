"""Object removal on the picture book, against the true background: what is left, what is invented, how well it fits.

Scenes of two things, one to go, marked in four ways; redirection and its parts beside plain blended diffusion and
fills without a model. What has been measured is kept under outputs/bench/: a full run goes on where it was cut.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ... import erase
from ...attention.morphology import grow
from ...pipelines.families import adapter_for
from ...pipelines.families.latents import decode_latents, encode_image
from ...plugins.redirection_joint import choose_layers
from .fills import FILLS
from .judge import WEIGHTS, load_judge, look
from .redirection_scores import FIRST, KINDS, Case, Score, cases, score, textured
from .rows import KEPT, Rows, fingerprint, scale_of, subject
from .statistics import mean, paired_difference, share
from .training import share_cores

PLAIN, CLEAN, PUBLISHED = "blended diffusion", "clean start (the default)", "redirection as published"
CAP = "the truth behind the autoencoder"
"""What no model on this autoencoder can pass, but by pasting."""
BACKGROUND = "<background>"
_AS_PUBLISHED: dict[str, Any] = {"origin": "picture"}
_NAMED: dict[str, Any] = {"prompt": BACKGROUND, "guidance": 3.0}
DIFFUSION: dict[str, dict[str, Any]] = {
    PLAIN: _AS_PUBLISHED | {"scale": 0.0},
    CLEAN: {},
    "clean start, background named": _NAMED,
    "clean start, noise alone in the hole": {"strength": 1.0, "scale": 9.0},
    PUBLISHED: _AS_PUBLISHED,
    f"{PUBLISHED}, background named": _AS_PUBLISHED | _NAMED,
    f"{PUBLISHED}, inverted start": _AS_PUBLISHED | {"method": "dip"},
    f"{PUBLISHED}, no suppression": _AS_PUBLISHED | {"suppression": 1.0},
}
SEVERAL = (PLAIN, CLEAN, PUBLISHED)
"""What is measured with all seeds."""
BLOCK_SCENES = 20
SPLITS: dict[str, Callable[[Case], bool]] = {
    "plain": lambda case: case.scene.style == "plain",
    "styled": lambda case: case.scene.style != "plain",
    "textured": textured,
}
BATCH = 20
Found = list[list[Score]]
"""Scores by scene, for each the same number of seeds."""


class Bench:
    """Measures fills on one model, batch by batch, and remembers.

    Args:
        pipe: the model.
        path: where measurements are kept.
        steps: of the schedule, None for the default of `erase`.
    """

    def __init__(self, pipe: Any, path: Path = KEPT / "redirection.jsonl", steps: int | None = None) -> None:
        self.pipe, self.rows, self.key = pipe, Rows(path), fingerprint(pipe)
        self.more = {} if steps is None else {"steps": steps}
        self.judge = load_judge() if WEIGHTS.exists() else None
        self.ways = DIFFUSION | blocks(pipe)

    def measure(self, name: str, kind: str, scenes: int, seeds: int) -> Found:
        """Scores of a fill by its name; but for those in `SEVERAL`, one seed a scene."""
        chosen, found = list(cases(scenes, kind)), [list[Score]() for _ in range(scenes)]
        bare = {"judge": self.key["judge"]}
        what = bare if name in FILLS else self.key | {"settings": self.ways.get(name, {}) | self.more}
        for seed in range(seeds if name in SEVERAL else 1):
            for start in range(0, scenes, BATCH):
                part = chosen[start : start + BATCH]
                key = {**what, "fill": name, "kind": kind, "scenes": [start, start + len(part)], "seed": seed}
                made = partial(self._scored, name, part, FIRST + 10_000 * seed + start)
                for scene, values in zip(found[start:], self.rows.remember(key, made), strict=False):
                    scene.append(Score(**values))
                sys.stderr.write(f"{name}, {kind}, seed {seed}: {start + len(part)} of {scenes}\n")
        return found

    def _scored(self, name: str, chosen: Sequence[Case], seed: int) -> list[dict[str, Any]]:
        share_cores()
        outs = self._made(name, chosen, seed)
        scores = [score(case, out) for case, out in zip(chosen, outs, strict=True)]
        if self.judge is not None:
            verdicts = look(self.judge, [Image.fromarray(out.round().astype(np.uint8)) for out in outs])
            scores = [replace(s, colours=v.colours) for s, v in zip(scores, verdicts, strict=True)]
        return [asdict(one) for one in scores]

    def _made(self, name: str, chosen: Sequence[Case], seed: int) -> list[NDArray[Any]]:
        if name in FILLS:
            return _without_model(FILLS[name], chosen)
        if name == CAP:
            outs = decode_latents(self.pipe, encode_image(self.pipe, [case.truth for case in chosen]))
            return [np.asarray(out, float) for out in outs]
        return self._by_model(name, chosen, seed)

    def _by_model(self, name: str, chosen: Sequence[Case], seed: int) -> list[NDArray[Any]]:
        call = {"prompt": "", "batch_size": BATCH} | self.ways[name] | self.more
        if call["prompt"] == BACKGROUND:
            call["prompt"] = [case.scene.background for case in chosen]
        images, marks = [case.image for case in chosen], [case.marked for case in chosen]
        return [np.asarray(out, float) for out in erase(self.pipe, images, marks, seed=seed, **call)]


def blocks(pipe: Any) -> dict[str, dict[str, Any]]:
    """On a transformer: one redirected row in which layers, and what the hole starts from; 12 steps."""
    if not hasattr(pipe, "transformer"):
        return {}
    few, noised = {"scale": 1.0, "steps": 12}, {"scale": 1.0, "steps": 12, "origin": "picture"}
    own = choose_layers(adapter_for(pipe).layers, "all")
    alone = {f"{layer.name} alone": noised | {"layers": [layer.name]} for layer in own}
    return {
        "no layer": noised | {"scale": 0.0}, "all layers": noised, "the first half": noised | {"layers": "early"},
        "the last half": noised | {"layers": "late"}, "all layers, the hole from fresh noise": few | {"strength": 1.0},
        "all layers, from a clean start": few, "the last half, from a clean start": few | {"layers": "late"}, **alone,
    }  # fmt: skip


def _without_model(fill: Callable[..., NDArray[Any]], chosen: Sequence[Case]) -> list[NDArray[Any]]:
    """It gets the same two pixels around the mark as `erase` takes."""
    return [np.clip(fill(np.asarray(case.image, float), grow(case.marked, 2)), 0, 255) for case in chosen]


HEAD = (
    "| fill | colours left, median | at least 10% left | judge still sees it | judge sees another thing "
    "| hole PSNR dB | seam PSNR dB | hole PSNR against blended diffusion |\n|---|---|---|---|---|---|---|---|\n"
)


def row(name: str, found: Found, reference: Found | None, chosen: Sequence[Case]) -> str:
    """One line of the table, with 95% intervals: Wilson's of shares, the bootstrap's over scenes of the rest."""
    left = [abs(one.left) for scores in found for one in scores]
    cells = [name, f"{np.median(left):.1%}", share([x >= 0.1 for x in left]).percent(), *_judged(found, chosen)]
    for kind in ("psnr", "seam"):
        estimate = mean(_by_scene(found, kind))
        cells.append(f"{estimate.value:.1f} ({estimate.low:.1f} to {estimate.high:.1f})")
    if reference is None:
        return "| " + " | ".join([*cells, ""]) + " |\n"
    gain = paired_difference(_by_scene(found, "psnr"), _by_scene(reference, "psnr"))
    return "| " + " | ".join([*cells, f"{gain.value:+.1f} ({gain.low:+.1f} to {gain.high:+.1f})"]) + " |\n"


def _by_scene(found: Found, kind: str) -> list[float]:
    """Means over the seeds of each scene: the seeds of one scene are no independent samples."""
    return [float(np.mean([getattr(one, kind) for one in scores])) for scores in found]


def _judged(found: Found, chosen: Sequence[Case]) -> tuple[str, str]:
    """How often the judge still sees the thing, and how often one that was never there."""
    stays, invented = list[bool](), list[bool]()
    for case, scores in zip(chosen, found, strict=True):
        gone, other = case.scene.things
        for seen in (one.colours for one in scores if one.colours is not None):
            stays.append(gone.kind in seen)
            invented.append(bool(set(seen) - {gone.kind, other.kind}))
    return (share(stays).percent(), share(invented).percent()) if stays else ("-", "-")


SPLIT_HEAD = (
    "| scenes | fill | hole PSNR dB, mean / median / worst | against harmonic fill | at least 10% left "
    "| judge sees another thing |\n|---|---|---|---|---|---|\n"
)


def by_split(found: dict[str, Found], chosen: Sequence[Case]) -> str:
    """The table by kind of scene."""
    text = SPLIT_HEAD
    for split, belongs in SPLITS.items():
        index = [i for i, case in enumerate(chosen) if belongs(case)]
        some = [chosen[i] for i in index]
        for name, scores in found.items() if index else ():
            mine, smooth = ([of[i] for i in index] for of in (scores, found["harmonic"]))
            psnr = [one.psnr for scene in mine for one in scene]
            gain = paired_difference(_by_scene(mine, "psnr"), _by_scene(smooth, "psnr"))
            left = share([abs(one.left) >= 0.1 for scene in mine for one in scene])
            text += (
                f"| {split} ({len(index)}) | {name} | {np.mean(psnr):.1f} / {np.median(psnr):.1f} / {min(psnr):.1f} "
                f"| {gain.value:+.1f} ({gain.low:+.1f} to {gain.high:+.1f}) | {left.percent()} "
                f"| {_judged(mine, some)[1]} |\n"
            )
    return text


def run(full: bool, model: Path | None = None) -> None:
    """Print a table for each kind of mask: 100 scenes with 3 seeds, or 8 with one for a quick look."""
    sys.stdout.write(f"{scale_of(full)}: ")
    tables(Bench(subject(model)), *((100, 3) if full else (8, 1)))


def tables(bench: Bench, scenes: int, seeds: int) -> None:
    """The same with a choice of how many."""
    sys.stdout.write(f"{scenes} scenes, seeds: {seeds}\n")
    for kind in KINDS:
        sys.stdout.write(f"\nMasks: {kind}\n\n{HEAD}")
        chosen, found = list(cases(scenes, kind)), dict[str, Found]()
        for name in [*((*DIFFUSION, CAP) if kind == "exact" else SEVERAL), *FILLS]:
            found[name] = bench.measure(name, kind, scenes, seeds)
            sys.stdout.write(row(name, found[name], None if name == PLAIN else found[PLAIN], chosen))
            sys.stdout.flush()
        sys.stdout.write(f"\n{by_split(found, chosen)}")
    by_block(bench, min(scenes, BLOCK_SCENES))


def by_block(bench: Bench, scenes: int) -> None:
    """The table of what `blocks` names, on exact masks."""
    chosen, first = list(cases(scenes, "exact")), None
    for name in blocks(bench.pipe):
        if first is None:
            sys.stdout.write(f"\nOne redirected row, by layer: {scenes} scenes\n\n{HEAD}")
        found = bench.measure(name, "exact", scenes, 1)
        sys.stdout.write(row(name, found, first, chosen))
        first = first or found

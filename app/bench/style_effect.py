"""Style transfer against the true re-rendering: what each ingredient does, with intervals, and a Pareto plot.

What has been measured is kept under outputs/bench/: a full run goes on where it was cut.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoPipelineForImage2Image
from PIL import Image

from ... import AttentionDistillation, Inversion, Plugin, StartpointFilter, StyleInjection, graft, invert
from ...pipelines.families.latents import decode_latents, encode_image
from ...pipelines.tasks.stylize import distilling, look_of
from ...plugins.optimised_style import OptimisedStyle
from . import world
from .judge import WEIGHTS, Verdict, load_judge, look
from .rows import KEPT, Rows, drawing, fingerprint, scale_of, subject
from .statistics import mean, paired_difference, share
from .style_plot import plot
from .style_scores import layout_accuracy, leak, psnr, style_distance
from .training import share_cores

STEPS, OPTIMISED = 20, 50
ITERATIONS = 0
"""Extra evaluations a step of an inversion."""
HEAD = (
    "| way | pairs | PSNR to the truth, dB | layout accuracy | style distance / nothing done | canary leak "
    "| judge: style right | judge: kinds kept | judge sees the style picture's thing |\n"
    "|---|---|---|---|---|---|---|---|---|\n"
)
MEASURED, JUDGED = ("psnr", "layout", "style", "leak"), ("right", "kept", "intruder")
"""Kinds of scores."""
STYLES = ("sketch", "mosaic", "dots", "watercolor")
BATCH = 2 * len(STYLES)


@dataclass(frozen=True)
class Pair:
    """A plain content scene, and a scene with one foreign object on the same background in another style."""

    content: world.Scene
    style: world.Scene

    @property
    def truth(self) -> Image.Image:
        """The content in that style."""
        return world.render(self.content.in_style(self.style.style))


@dataclass(frozen=True)
class Way:
    """A row of the table: how pairs are stylised, and how many at most, with the leak or without."""

    name: str
    method: str | None = "styleid"
    strength: float = 1.0
    filtered: bool = False
    omega: float | None = None
    inverted: bool = True
    words: bool = False
    more: tuple[tuple[str, Any], ...] = ()
    pairs: int = 100
    canaries: int = 24

    def key(self) -> dict[str, Any]:
        """What its scores depend on; what was added later is left out where it is as it always was."""
        left = {"name", "pairs", "canaries", *(() if self.more else ("more",))}
        return {name: value for name, value in asdict(self).items() if name not in left}


ALL = (("layers", "all"),)
FEW = {"pairs": 24, "canaries": 8}
"""Of what was measured to be no choice, or costs most: fewer pairs."""


def late(strength: float = 1.0) -> Way:
    """What `stylize` does on the picture book; its strength is in the rate."""
    look = look_of("picturebook", "distillation", strength=strength)
    more = tuple(sorted(distilling("picturebook", look, STEPS).items()))
    return Way("attention distillation, late (the default)", "distillation", more=more)


DEFAULT = late()
WAYS = (
    DEFAULT,
    Way("plain img2img, style in words", None, words=True, pairs=24),
    Way("AdaIN of the startpoint only", None, **FEW),
    Way("StyleID"),
    Way("StyleAligned", "stylealigned", more=ALL, pairs=24),
    Way("attention distillation", "distillation", pairs=24),
    Way("StyleID, style under noise instead of inverted", inverted=False, **FEW),
    Way("StyleAligned, norms shared", "stylealigned", more=(*ALL, ("share_norms", True)), **FEW),
    Way("attention distillation, optimised in 50 steps (its paper's loop)", "optimised", **FEW),
    Way("StyleID + filter", filtered=True, **FEW),
    Way("StyleID + negative 1.5", omega=1.5, **FEW),
    Way("StyleID + both (StyleSSP)", filtered=True, omega=1.5, **FEW),
    Way("StyleID + negative 0.5", omega=0.5, **FEW),
)
APART = (("apart", 1.0),)
JOINT_WAYS = (
    DEFAULT,
    Way("StyleAligned", "stylealigned", more=ALL, pairs=60),
    Way("StyleAligned, moved aside", "stylealigned", more=APART, pairs=60),
    Way("StyleAligned, moved aside, keys weighted", "stylealigned", more=(*APART, ("key_weights", (0.5, 1.2))), **FEW),
    Way("StyleAligned, moved aside, start filtered, AdaIN", "stylealigned", filtered=True,
        more=(*APART, ("start_adain", True)), **FEW),
    Way("StyleID", **FEW),
    Way("StyleID, moved aside", more=APART, **FEW),
    Way("attention distillation", "distillation", **FEW),
    Way("plain img2img, style in words", None, words=True, pairs=24),
    Way("AdaIN of the startpoint only", None, **FEW),
)  # fmt: skip
"""Where text and image are one sequence, there is no negative by attention, and positions are rotary."""
STRENGTHS = (0.25, 0.5, 0.75, 1.0)
SWEEP = (
    *(
        replace(way, name=f"{way.name}, strength {strength}", strength=strength)
        for way in WAYS
        if way.name in ("StyleID", "StyleAligned", "StyleID + filter")
        for strength in STRENGTHS
    ),
    *(replace(late(strength), name=f"{DEFAULT.name}, strength {strength}") for strength in STRENGTHS),
)


@dataclass
class Scores:
    """One value a pair of each kind; the last four are the judge's, empty without one."""

    psnr: list[float] = field(default_factory=list[float])
    layout: list[float] = field(default_factory=list[float])
    style: list[float] = field(default_factory=list[float])
    leak: list[float] = field(default_factory=list[float])
    right: list[bool] = field(default_factory=list[bool])
    kept: list[bool] = field(default_factory=list[bool])
    intruder: list[bool] = field(default_factory=list[bool])
    ground: list[bool] = field(default_factory=list[bool])

    def judge(self, pair: Pair, verdict: Verdict) -> None:
        """What the judge sees of a pair: the style, the content's kinds, the style picture's thing, the content's
        background.
        """
        self.right.append(verdict.style == pair.style.style)
        self.kept.append({thing.kind for thing in pair.content.things} <= set(verdict.colours))
        self.intruder.append(pair.style.things[0].kind in verdict.colours)
        self.ground.append(pair.content.background == verdict.background)


def pairs(contents: int, split: str = "any", *, elsewhere: bool = False) -> list[Pair]:
    """Every content in every style; the style picture's object is of a kind and a colour that the content lacks.

    Args:
        elsewhere: the style picture is on a background that is not the content's, instead of on the same.
    """
    made: list[Pair] = []
    for i in range(contents):
        content = world.scene(world.FRESH + 50_000 + i, count=2, split=split, style="plain")
        for j, style in enumerate(STYLES):
            seed = world.FRESH + 60_000 + len(STYLES) * i + j
            taken = {(t.kind, t.colour) for t in content.things}
            while _alike(other := world.scene(seed, count=1, style=style), taken) or (
                elsewhere and other.background == content.background
            ):
                seed += 1_000_000
            made.append(Pair(content, other if elsewhere else replace(other, background=content.background)))
    return made


def _alike(other: world.Scene, taken: Collection[tuple[str, str]]) -> bool:
    """Whether its thing has the kind or the colour of one of these."""
    return any(other.things[0].kind == kind or other.things[0].colour == colour for kind, colour in taken)


class Studio:
    """Stylises pairs in batches; inversions of contents are shared.

    Args:
        pipe: the model.
        path: where scores are kept.
        steps: of inversions and of sampling.
        iterations: extra evaluations a step of every inversion.
    """

    def __init__(
        self, pipe: Any, path: Path = KEPT / "style.jsonl", steps: int = STEPS, iterations: int = ITERATIONS
    ) -> None:
        self.pipe, self.steps, self.rows, self.iterations = pipe, steps, Rows(path), iterations
        self.inversions: dict[Any, Inversion] = {}
        self.key = fingerprint(pipe) | {"steps": steps, "iterations": iterations}
        self.judge = load_judge() if WEIGHTS.exists() else None

    def paint(self, way: Way, batch: Sequence[Pair], styles: Sequence[Image.Image], seed: int) -> list[Image.Image]:
        """One output a pair, for these style pictures."""
        pipe, n = self.pipe, len(batch)
        if way.words:
            return self._in_words(batch, seed)
        if way.method == "optimised":
            return self._optimised(batch, styles, way.strength)
        content, reference = self._contents(batch, way.omega, styles), encode_image(pipe, list(styles))
        if way.inverted:
            reference = self._remembered(("styles", *(s.tobytes() for s in styles)), lambda: self._invert(styles, None))
        noise = torch.Generator().manual_seed(seed)
        plugins = [StartpointFilter(generator=noise)] if way.filtered else []
        with graft(pipe, *plugins, _technique(way, reference, content, noise)):
            call = drawing(pipe, self.steps, 1.0) | content.call(pipe)
            out = pipe([""] * n, output_type="latent", **call).images
        return decode_latents(pipe, out)

    def _contents(self, batch: Sequence[Pair], omega: float | None, styles: Sequence[Image.Image]) -> Any:
        scenes = [pair.content for pair in batch]
        if omega is not None:
            key = (omega, *scenes, *(style.tobytes() for style in styles))
            pictures = [world.render(scene) for scene in scenes]
            return self._remembered(key, lambda: self._invert(pictures, list(styles), omega))
        unique = list(dict.fromkeys(scenes))
        made = self._remembered(tuple(unique), lambda: self._invert([world.render(scene) for scene in unique], None))
        index = [unique.index(scene) for scene in scenes]
        return replace(made, latents=made.latents[index], trajectory=[z[index] for z in made.trajectory or ()])

    def _remembered(self, key: tuple[Any, ...], make: Callable[[], Inversion]) -> Inversion:
        if key not in self.inversions:
            self.inversions[key] = make()
        return self.inversions[key]

    def _invert(self, pictures: Sequence[Image.Image], negative: Any, omega: float = 1.5) -> Inversion:
        return invert(
            self.pipe, list(pictures), steps=self.steps, negative=negative, guidance=omega, trajectory=True,
            iterations=self.iterations,
        )  # fmt: skip

    def _optimised(self, batch: Sequence[Pair], styles: Sequence[Image.Image], strength: float) -> list[Image.Image]:
        pipe, contents = self.pipe, [world.render(pair.content) for pair in batch]
        clean = [encode_image(pipe, pictures).float() for pictures in (list(styles), contents)]
        plugin, steps = OptimisedStyle(*clean, rate=0.05 * strength), min(OPTIMISED, 10 * self.steps)
        with graft(pipe, plugin):
            pipe([""] * len(batch), output_type="latent", **drawing(pipe, steps, 1.0))
        return decode_latents(pipe, plugin.found)

    def _in_words(self, batch: Sequence[Pair], seed: int) -> list[Image.Image]:
        noise = [torch.Generator().manual_seed(seed + i) for i in range(len(batch))]
        other: Any = AutoPipelineForImage2Image.from_pipe(self.pipe)
        other.set_progress_bar_config(disable=True)
        return other(
            [world.caption(pair.content.in_style(pair.style.style)) for pair in batch],
            image=[world.render(pair.content) for pair in batch], strength=0.6, generator=noise,
            **drawing(self.pipe, self.steps, 4.0),
        ).images  # fmt: skip


def _technique(way: Way, reference: Any, content: Any, noise: torch.Generator) -> Plugin:
    if way.method is None:
        return StartAdaIN(StyleInjection(reference, generator=noise))
    if way.method == "distillation":
        slow: dict[str, Any] = {"content": content, "rate": 0.05 * way.strength, **dict(way.more)}
        return AttentionDistillation(reference, generator=noise, **slow)
    method: Any = way.method
    how: dict[str, Any] = {"content": content, "strength": way.strength, **dict(way.more)}
    return StyleInjection(reference, method=method, generator=noise, **how)


class StartAdaIN(StartpointFilter):
    """Only the first latents take the style's mean and deviation."""

    def __init__(self, style: StyleInjection) -> None:
        super().__init__()
        self._inner = style

    def begin(self, session: Any, step: Any) -> None:
        self._inner.begin(session, step)

    def latent(self, step: Any, latent: torch.Tensor, probe: Any) -> torch.Tensor | None:
        return self._inner.latent(step, latent, probe)


def measure(studio: Studio, way: Way, chosen: Sequence[Pair], canaries: int) -> Scores:
    """Scores of one way on the pairs, made or remembered; the leak on the first `canaries` of them."""
    scores = Scores()
    for start in range(0, len(chosen), BATCH):
        batch, canary = chosen[start : start + BATCH], start < canaries and not way.words
        key = {**studio.key, "way": way.key(), "pairs": _named(batch), "canary": canary}
        made = studio.rows.remember(key, partial(scored, studio, way, batch, start, canary))
        for name, values in made.items():
            getattr(scores, name).extend(values)
        sys.stderr.write(f"{way.name}: {start + len(batch)} of {len(chosen)}\n")
    return scores


def scored(studio: Studio, way: Way, batch: Sequence[Pair], seed: int, canary: bool) -> dict[str, list[float]]:
    """Scores of one batch."""
    share_cores()
    scores = Scores()
    styles = [world.render(pair.style) for pair in batch]
    outs = studio.paint(way, batch, styles, seed)
    _score(studio, scores, batch, styles, outs)
    if canary:
        bare = [world.render(pair.style.empty()) for pair in batch]
        others = studio.paint(way, batch, bare, seed)
        for values in zip(outs, others, batch, styles, bare, strict=True):
            scores.leak.append(leak(values[0], values[1], values[2].style, (values[3], values[4])))
    return asdict(scores)


def _score(
    studio: Studio, scores: Scores, batch: Sequence[Pair], styles: Sequence[Image.Image], outs: Sequence[Image.Image]
) -> None:
    for pair, style, out in zip(batch, styles, outs, strict=True):
        scores.psnr.append(psnr(out, pair.truth))
        scores.layout.append(layout_accuracy(out, pair.content))
        scores.style.append(style_distance(out, style) / _nothing(pair))
    if studio.judge is not None:
        for pair, verdict in zip(batch, look(studio.judge, outs), strict=True):
            scores.judge(pair, verdict)


@cache
def _nothing(pair: Pair) -> float:
    """How far the content is from the style."""
    return style_distance(world.render(pair.content), world.render(pair.style))


def given(studio: Studio, chosen: Sequence[Pair]) -> dict[str, Scores]:
    """What needs no sampling: doing nothing, the truth, and both behind the autoencoder."""
    kinds: dict[str, Callable[[Pair], Image.Image]] = {
        "doing nothing": lambda pair: world.render(pair.content),
        "the true re-rendering": lambda pair: pair.truth,
        "the style picture": lambda pair: world.render(pair.style),
        "the truth behind the autoencoder": lambda pair: decoded(studio.pipe, pair.truth),
    }
    key = {**studio.key, "pairs": _named(chosen)}
    return {
        name: Scores(**studio.rows.remember({**key, "given": name}, partial(_given, studio, make, chosen)))
        for name, make in kinds.items()
    }


def _given(studio: Studio, make: Callable[[Pair], Image.Image], chosen: Sequence[Pair]) -> dict[str, Any]:
    scores = Scores()
    for pair in chosen:
        _score(studio, scores, [pair], [world.render(pair.style)], [make(pair)])
    return asdict(scores)


def _named(chosen: Sequence[Pair]) -> str:
    return hashlib.sha256(repr(list(chosen)).encode()).hexdigest()[:24]


def decoded(pipe: Any, picture: Image.Image) -> Image.Image:
    """A picture behind the autoencoder."""
    [out] = decode_latents(pipe, encode_image(pipe, picture))
    return out


def line(name: str, scores: Scores) -> str:
    """A row of the table."""

    def cell(values: list[float], form: str) -> str:
        if not values:
            return "-"
        found = mean(values)
        return f"{found.value:{form}} ({found.low:{form}} to {found.high:{form}})"

    cells = [cell(scores.psnr, ".2f"), cell(scores.layout, ".3f"), cell(scores.style, ".3f"), cell(scores.leak, ".3f")]
    cells += [share(judged).percent() if judged else "-" for judged in (scores.right, scores.kept, scores.intruder)]
    return f"| {name} | {len(scores.psnr)} | {' | '.join(cells)} |"


def run(full: bool, model: Path | None = None) -> None:
    """Print the table, the differences that the paper claims, and draw the Pareto plot.

    100 pairs, 24 of them for the leak and the sweep of strengths, fewer in some rows; a quick look takes 8 pairs and
    no sweep.
    """
    _write(f"{scale_of(full)}: ")
    studio = Studio(subject(model))
    ways = WAYS if hasattr(studio.pipe, "unet") else JOINT_WAYS
    tables(studio, pairs(25 if full else 2), 24 if full else 8, 24 if full else 0, ways)


def tables(studio: Studio, chosen: Sequence[Pair], canaries: int, swept: int, ways: Sequence[Way] = WAYS) -> None:
    """The same with a choice of pairs and ways, StyleID among them."""
    _write(f"{len(chosen)} pairs; intervals: 95%, bootstrap over pairs\n\n")
    _write(HEAD)
    for name, scores in given(studio, chosen).items():
        _write(line(name, scores) + "\n")
    found: dict[str, Scores] = {}
    for way in ways:
        found[way.name] = measure(studio, way, chosen[: way.pairs], min(canaries, way.canaries))
        _write(line(way.name, found[way.name]) + "\n")
    _against("StyleID", [way.name for way in ways if way.name.startswith("StyleID ")], found)
    for base in ("StyleID", "StyleAligned"):
        _against(base, [way.name for way in ways if way.name.startswith(f"{base}, moved")], found, JUDGED)
    if swept:
        sweep_strength(studio, chosen[:swept], ways)


def _against(base: str, names: Sequence[str], found: dict[str, Scores], more: Sequence[str] = ()) -> None:
    """What each adds to `base`, pair by pair."""
    if not names:
        return
    _write(f"\nAgainst {base} alone, pair by pair:\n\n")
    heads = ["added", "PSNR, dB", *MEASURED[1:], *(f"judge: {kind}" for kind in more)]
    _write(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|\n")
    for name in names:
        _write(_difference(name.removeprefix(base).strip(" ,"), found[name], found[base], (*MEASURED, *more)) + "\n")


def _difference(name: str, after: Scores, before: Scores, kinds: Sequence[str]) -> str:
    values = [(getattr(after, kind), getattr(before, kind)) for kind in kinds]
    shared = [(one[: len(other)], other[: len(one)]) for one, other in values]
    deltas = [paired_difference(one, other) if one and other else None for one, other in shared]
    cells = [f"{d.value:+.3f} ({d.low:+.3f} to {d.high:+.3f})" if d else "-" for d in deltas]
    return f"| {name} | {' | '.join(cells)} |"


def sweep_strength(studio: Studio, chosen: Sequence[Pair], ways: Sequence[Way]) -> None:
    """Print and draw what `strength` trades; what the table has measured, with its leaks, is not measured again."""
    canaries = {repr(way.key()): way.canaries for way in ways}
    sweep = {way: measure(studio, way, chosen, canaries.get(repr(way.key()), 0)) for way in SWEEP}
    _write("\n" + HEAD.replace("| way |", "| strength sweep |"))
    for way, scores in sweep.items():
        _write(line(way.name, scores) + "\n")
    path = studio.rows.path.with_name("style-pareto.png")
    plot({way.name: (mean(s.layout).value, mean(s.style).value) for way, s in sweep.items()}, path)
    _write(f"\nPareto plot: {path}\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()

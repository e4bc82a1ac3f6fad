"""What a negative removes: sixteen pairs of caption and negative, judged; plain, guided and steered pictures.

The share of pictures that show the negative should fall to under a quarter, and the asked-for kind stay.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ... import NegativeAway, graft
from .judge import Judge, Verdict, load_judge, look
from .model_card import GUIDANCE
from .rows import KEPT, Rows, drawing, fingerprint, pace, subject
from .statistics import Estimate, share
from .training import share_cores

PAIRS = [
    ("a ball , sky", "red"), ("a star , meadow", "yellow"), ("a heart , snow", "pink"), ("a flower , desert", "purple"),
    ("a house , sky", "white"), ("a fish , sea", "orange"), ("a box , night", "blue"), ("a boat , sea", "green"),
    ("a house", "night"), ("a red ball", "snow"), ("a yellow star", "night"), ("a tree", "desert"),
    ("a blue fish", "sea"), ("a green tree , meadow", "sketch style"), ("a red heart , sky", "mosaic style"),
    ("a white moon , night", "dots style"),
]  # fmt: skip
"""(caption, negative): eight colours, five backgrounds, three styles, each left open by its caption."""
PLOT = KEPT / "negative_effect.png"
SCALES = {
    "nasa": (0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0), "nag": (1.0, 2.0, 4.0, 6.0, 9.0, 14.0),
    "vsf": (0.25, 0.5, 1.0, 1.5, 2.0, 3.0), "ong": (0.15, 0.3, 0.5, 0.8, 1.2, 2.0),
}  # fmt: skip
SEED = 70_000


@dataclass(frozen=True)
class Outcome:
    """Shares over all pairs: pictures that show the negative, pictures with exactly the asked-for kind."""

    shown: Estimate
    kind: Estimate

    def row(self, name: str) -> str:
        return f"| {name} | {self.shown.percent()} | {self.kind.percent()} |\n"


def shows(verdict: Verdict, negative: str) -> bool:
    """Whether the judge sees the negative: a colour of any object, the background, or the style."""
    word = negative.removesuffix(" style")
    return word in verdict.colours.values() or word in (verdict.background, verdict.style)


@dataclass(frozen=True)
class Sampling:
    """How a row of the table is drawn: steps, guidance (at most 1 is none), and what guidance steers away from."""

    steps: int
    guidance: float = 0.0
    own_negative: bool = False


def draw(pipe: Any, prompt: str, negative: str, seeds: int, how: Sampling, batch: int = 25) -> torch.Tensor:
    """Pictures [seeds, 3, 128, 128] in -1 ... 1, eight bits deep; picture i has seed SEED + i, whatever the batch."""
    drawn: list[torch.Tensor] = []
    for start in range(0, seeds, batch):
        share_cores()
        generators = [torch.Generator().manual_seed(SEED + i) for i in range(start, min(start + batch, seeds))]
        pictures = pipe(
            [prompt] * len(generators), **drawing(pipe, how.steps, how.guidance),
            negative_prompt=[negative] * len(generators) if how.own_negative else None, generator=generators,
            output_type="pt",
        ).images  # fmt: skip
        drawn.append((pictures.cpu() * 255).round() / 127.5 - 1)
    return torch.cat(drawn)


class Bench:
    """A model and its judge; what was drawn is remembered by pair."""

    def __init__(self, pipe: Any, judge: Judge, path: Path = KEPT / "negative.jsonl") -> None:
        self.pipe, self.judge, self.rows, self.key = pipe, judge, Rows(path), fingerprint(pipe)

    def measure(self, seeds: int, how: Sampling, **steer: Any) -> Outcome:
        """All pairs with `seeds` pictures each, steered by `NegativeAway(negative, **steer)` if a rule is given."""
        seen: list[tuple[bool, bool]] = []
        for pair in PAIRS:
            key = {**self.key, "pair": pair, "seeds": seeds, "sampling": asdict(how), "steer": steer}
            seen += self.rows.remember(key, partial(self._seen, *pair, seeds, how, steer))
        return Outcome(share([shown for shown, _ in seen]), share([kind for _, kind in seen]))

    def _seen(
        self, prompt: str, negative: str, seeds: int, how: Sampling, steer: dict[str, Any]
    ) -> list[tuple[bool, bool]]:
        """For each picture whether it shows the negative, and whether it has exactly the asked-for kind."""
        with graft(self.pipe, *([NegativeAway(negative, **steer)] if steer else [])):
            pictures = draw(self.pipe, prompt, negative, seeds, how)
        asked = prompt.split(" , ")[0].split()[-1]
        return [(shows(v, negative), set(v.colours) == {asked}) for v in look(self.judge, pictures)]


def table(name: str, bench: Bench, seeds: int, rows: Sequence[Sampling]) -> None:
    """Print one model's rows: each sampling alone, and steered in every way; these beside guidance with fewer seeds."""
    out = sys.stdout.write
    out(f"\n| {name} | pictures | shows the negative | kind right |\n|---|---|---|---|\n")
    for how in rows:
        alone, some = (f"guidance {how.guidance:g}", _fewer(seeds)) if how.guidance > 1 else ("no guidance", seeds)
        every = len(PAIRS) * seeds
        out(bench.measure(seeds, how).row(f"{alone}{', its own negative' * how.own_negative} | {every}"))
        for way, steer in () if how.own_negative else steered(bench.pipe).items():
            out(bench.measure(some, how, **steer).row(f"{alone}, {way} | {len(PAIRS) * some}"))
            sys.stdout.flush()


def steered(pipe: Any) -> dict[str, dict[str, str]]:
    """Every rule at its default; where text and image are one sequence, NASA's other form too."""
    ways = {rule: {"rule": rule} for rule in SCALES}
    joint = any(layer.kind == "joint" for layer in graft(pipe).layers)
    return ways | ({'nasa, joint="full"': {"rule": "nasa", "joint": "full"}} if joint else {})


def _fewer(seeds: int) -> int:
    return max(seeds // 4, min(seeds, 12))


def curve(bench: Bench, seeds: int, how: Sampling, path: Path = PLOT) -> None:
    """Print and plot the outcome over the scale of every rule."""
    base, found = bench.measure(seeds, how), dict[str, list[Outcome]]()
    sys.stdout.write(f"\n{len(PAIRS) * seeds} pictures a row\n")
    sys.stdout.write("\n| rule | scale | shows the negative | kind right |\n|---|---|---|---|\n")
    for rule, scales in SCALES.items():
        found[rule] = []
        for scale in scales:
            found[rule].append(bench.measure(seeds, how, rule=rule, scale=scale))
            sys.stdout.write(found[rule][-1].row(f"{rule} | {scale:g}"))
            sys.stdout.flush()
    _plot(base, found, path)
    sys.stdout.write(f"\nplotted to {path}\n")


def _plot(base: Outcome, found: dict[str, list[Outcome]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, (rule, outcomes) in zip(figure.subplots(1, len(found), sharey=True), found.items(), strict=True):
        scales: Sequence[float] = SCALES[rule]
        axes.plot(scales, [100 * o.shown.value for o in outcomes], "o-", color="#c23b22", label="shows the negative")
        axes.plot(scales, [100 * o.kind.value for o in outcomes], "s-", color="#2a62a8", label="kind right")
        axes.axhline(100 * base.shown.value, color="#c23b22", linestyle=":", label="without")
        axes.axhline(100 * base.kind.value, color="#2a62a8", linestyle=":", label="without")
        axes.set(title=rule, xlabel="scale", ylim=(0, 100))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("% of pictures")
    figure.axes[0].legend(fontsize=8, loc="center right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def run(full: bool, model: Path | None = None) -> None:
    """The one-step student, and the 20-step model with and without guidance.

    A `model` of your own stands for the latter, and there is no student then; a student by name is drawn at its own
    steps, without guidance.
    """
    judge, seeds = load_judge(), 100 if full else 12
    if model is None:
        _student(judge, seeds)
    seeds, usual = (seeds // 4, 20) if full else (2, 10)
    steps, guidance = pace(model, usual, GUIDANCE)
    guided = [Sampling(steps, guidance), Sampling(steps, guidance, True)] if guidance > 1 else []
    rows = [Sampling(steps), *guided]
    table(f"{steps} steps", Bench(subject(model), judge), seeds, rows)


def _student(judge: Judge, seeds: int) -> None:
    bench = Bench(subject(one_step=True), judge)
    table("one step", bench, seeds, [Sampling(1), Sampling(1, 2.0), Sampling(1, 2.0, True)])
    curve(bench, 12, Sampling(1))

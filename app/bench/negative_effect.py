"""What a negative removes: sixteen pairs of caption and negative, judged; plain, guided and steered pictures.

The share of pictures that show the negative should fall to under a quarter, and the asked-for kind stay.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ... import ModelLoadError, NegativeAway, graft, picturebook
from .judge import Judge, Verdict, load_judge, look
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
PLOT = Path("outputs") / "negative_effect.png"
SCALES = {
    "nasa": (0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0), "nag": (1.0, 2.0, 4.0, 6.0, 9.0, 14.0),
    "vsf": (0.25, 0.5, 1.0, 1.5, 2.0, 3.0),
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
            [prompt] * len(generators), num_inference_steps=how.steps, guidance_scale=how.guidance,
            negative_prompt=[negative] * len(generators) if how.own_negative else None, generator=generators,
            output_type="pt",
        ).images  # fmt: skip
        drawn.append((pictures * 255).round() / 127.5 - 1)
    return torch.cat(drawn)


def measure(
    pipe: Any, judge: Judge, seeds: int, how: Sampling, plugin: Callable[[str], NegativeAway] | None = None
) -> Outcome:
    """All pairs with `seeds` pictures each."""
    shown, kind = list[bool](), list[bool]()
    for prompt, negative in PAIRS:
        with graft(pipe, *([plugin(negative)] if plugin else [])):
            pictures = draw(pipe, prompt, negative, seeds, how)
        asked = prompt.split(" , ")[0].split()[-1]
        for verdict in look(judge, pictures):
            shown.append(shows(verdict, negative))
            kind.append(set(verdict.colours) == {asked})
    return Outcome(share(shown), share(kind))


def table(name: str, pipe: Any, judge: Judge, seeds: int, rows: Sequence[Sampling]) -> None:
    """Print one model's rows: each sampling alone, and with the three rules at their defaults."""
    out = sys.stdout.write
    out(f"\n| {name}, {seeds} pictures a pair | shows the negative | kind right |\n|---|---|---|\n")
    for how in rows:
        alone = f"guidance {how.guidance:g}" if how.guidance > 1 else "no guidance"
        out(measure(pipe, judge, seeds, how).row(alone + (", its own negative" if how.own_negative else "")))
        for rule in () if how.own_negative else SCALES:
            steered = measure(pipe, judge, seeds, how, lambda text, rule=rule: NegativeAway(text, rule=rule))
            out(steered.row(f"{alone}, {rule}"))
            sys.stdout.flush()


def curve(pipe: Any, judge: Judge, seeds: int, how: Sampling, path: Path = PLOT) -> None:
    """Print and plot the outcome over the scale of every rule."""
    base, found = measure(pipe, judge, seeds, how), dict[str, list[Outcome]]()
    sys.stdout.write("\n| rule | scale | shows the negative | kind right |\n|---|---|---|---|\n")
    for rule, scales in SCALES.items():
        found[rule] = []
        for scale in scales:
            def plugin(text: str, rule: str = rule, scale: float = scale) -> NegativeAway:
                return NegativeAway(text, rule=rule, scale=scale)

            found[rule].append(measure(pipe, judge, seeds, how, plugin))
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


def run(full: bool) -> None:
    """The one-step student where there is one, and the 20-step model with and without guidance."""
    judge, seeds = load_judge(), 100 if full else 12
    try:
        student = picturebook(one_step=True)
    except ModelLoadError:
        sys.stdout.write("(no one-step model in this installation: the model of 20 steps only)\n")
    else:
        student.set_progress_bar_config(disable=True)
        table("one step", student, judge, seeds, [Sampling(1), Sampling(1, 2.0), Sampling(1, 2.0, True)])
        curve(student, judge, seeds, Sampling(1))
    pipe = picturebook()
    pipe.set_progress_bar_config(disable=True)
    seeds, steps = (seeds, 20) if full else (2, 10)
    table(f"{steps} steps", pipe, judge, seeds, [Sampling(steps), Sampling(steps, 4.0), Sampling(steps, 4.0, True)])

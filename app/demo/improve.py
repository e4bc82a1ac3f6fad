"""A better startpoint for one seed: a few updates of its noise on the one-step student, and what became of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

import diffgraft

from ...attention.errors import SettingError
from ...plugins.segregation import AttentionSegregation
from . import parts
from .painting import Asked, asked, paint, telling_words
from .parts import keep
from .studio import Job, Studio

UPDATES = 8
LOSS = "a-star"
_WIDE, _HIGH, _EDGE = 320, 110, 14


def fields() -> tuple[gr.ImageSlider, gr.HTML]:
    """Where the picture is shown before and after, and the curve; once something was improved."""
    both = parts.slider("Before and after the search")
    both.visible = False
    return both, gr.HTML(visible=False, elem_classes="dg-curve")


@dataclass(frozen=True)
class ImprovePart:
    """The handler behind "Improve this seed"."""

    studio: Studio

    def improve(
        self,
        prompt: str,
        concepts: str = "",
        negative: str = "",
        steps: int = 25,
        guidance: float = 2.5,
        seed: int | None = None,
        width: int | None = None,
        height: int | None = None,
        model: str = "",
        never: str = "",
        request: gr.Request | None = None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Any:
        """Search the noise of one seed for a picture in which every concept has its own place, by the maps of one step.

        Args:
            prompt: What to paint.
            concepts: Two or more words of the prompt that must all appear, with commas; empty takes its first words.
            negative: What to keep away; empty switches this off.
            steps: Denoising steps of the two pictures, 1 to 100; the search takes one a time.
            guidance: Classifier-free guidance, 0 to 30.
            seed: 0 or more; empty or -1 draws one.
            width: Pixels, a multiple of 8; empty leaves it to the model.
            height: Pixels, a multiple of 8; empty leaves it to the model.
            model: Empty for the page's model, else a folder, a .safetensors file or a Hub id.
            never: Words that must not be drawn, separated by commas.

        Returns:
            The picture before and after, the curve of the loss as SVG, the seed, and the settings as JSON.
        """
        ask = asked(
            prompt, concepts, negative, never, "", None, seed, steps=steps, guidance=guidance, width=width,
            height=height,
        )  # fmt: skip
        name = self.studio.check(model)
        with parts.turn(self.studio, model, request, progress) as job:
            before, after, losses = improved(job, ask, self.studio.surrogate(name))
            made = keep(before, name), keep(after, name)
        settings = parts.as_json(after.info["diffgraft"])
        return gr.ImageSlider(made, visible=True), gr.HTML(curve(losses), visible=True), str(ask.seed), settings


def improved(job: Job, ask: Asked, surrogate: Any) -> tuple[Any, Any, list[float]]:
    """The seed's picture, the one from the noise that was found, and the losses.

    The search stands in the place of `AttentionSegregation`; the other techniques run in all of it.

    Raises:
        SettingError: fewer than two words to look for.
    """
    words = ask.concepts or telling_words(ask.text)
    if len(words) < 2:
        raise SettingError("Improve needs two concepts or more, words of the prompt that must all appear")
    plugins = [plugin for plugin in ask.plugins if not isinstance(plugin, AttentionSegregation)]
    before = paint(job, ask.text, plugins, ask.seed, ask.wish, "before")
    job.expect("searching", UPDATES + 1)

    def tick(number: int, losses: list[float]) -> None:
        job.tick(number + 1)
        if number == UPDATES:
            job.expect("after", ask.wish["steps"])

    found = diffgraft.optimise_startpoint(
        job.pipe, ask.text, LOSS, concepts=words, surrogate=surrogate, iterations=UPDATES, seed=ask.seed,
        plugins=plugins, callback=tick, **ask.wish,
    )  # fmt: skip
    return before, found.picture, found.losses[0]


def curve(losses: Sequence[float]) -> str:
    """The losses as a line, the lowest marked; what it shows is also said in words.

    Args:
        losses: one or more finite numbers.
    """
    low, high = min(losses), max(losses)
    best, span = losses.index(low), (high - low) or 1.0
    across = (_WIDE - 2 * _EDGE) / max(1, len(losses) - 1)
    points = [
        (_EDGE + i * across, _EDGE + (_HIGH - 2 * _EDGE) * (high - loss) / span) for i, loss in enumerate(losses)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    said = f"Loss {losses[0]:.3f} at the seed's own noise, {low:.3f} after {best} of {len(losses) - 1} updates"
    x, y = points[best]
    return (
        f'<figure role="img" aria-label="{said}"><svg viewBox="0 0 {_WIDE} {_HIGH}" width="{_WIDE}" '
        f'height="{_HIGH}" fill="none"><polyline points="{line}" stroke="currentColor" stroke-width="2"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="#e08a00"/></svg><figcaption>{said}.</figcaption></figure>'
    )

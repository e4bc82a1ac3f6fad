"""Eight seeds tried at once, the most promising first: `dg.rank_seeds`, with a rough picture of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

import diffgraft

from ...attention.errors import SettingError
from . import parts
from .painting import Asked, asked, paint, telling_words
from .parts import Shown, keep
from .studio import Job, Studio

HOW_MANY, ROUGH = 8, 8
LOOKED_AT = 0.4
"""Share of the steps after which the maps are compared: at the first they say little."""


def gallery() -> gr.Gallery:
    """Where the seeds are shown, once some were tried."""
    return gr.Gallery(
        label="Eight seeds, ranked: choose one", columns=4, height="auto", interactive=False,
        allow_preview=False, buttons=[], visible=False, format="png", elem_classes="dg-seeds",
    )  # fmt: skip


def picked(event: gr.SelectData, thumbs: Any) -> int:
    """The seed of the thumbnail that was chosen."""
    if not (thumbs and event.index in range(len(thumbs))):
        raise SettingError("there is no such seed: try some first")
    return int(str(thumbs[event.index][1]).split()[-1])


@dataclass(frozen=True)
class SeedsPart:
    """The handler behind "Try 8 seeds"."""

    studio: Studio

    def seeds(
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
        places: str = "",
        drawing: dict[str, Any] | None = None,
        request: gr.Request | None = None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Any:
        """Try eight seeds of a prompt and rank them by where its concepts look; a rough picture of each.

        Args:
            prompt: What to paint.
            concepts: Words of the prompt that must all appear, separated by commas; empty takes its first words.
            negative: What to keep away; empty switches this off.
            steps: Denoising steps of the picture that is wanted, 1 to 100; the rough ones take 8 at most.
            guidance: Classifier-free guidance, 0 to 30.
            seed: The first of the eight; empty or -1 draws one.
            width: Pixels, a multiple of 8; empty leaves it to the model.
            height: Pixels, a multiple of 8; empty leaves it to the model.
            model: Empty for the page's model, else a folder, a .safetensors file or a Hub id.
            never: Words that must not be drawn, separated by commas.
            places: Where each concept is to be, in their order; empty leaves it open.
            drawing: The page's canvas.

        Returns:
            The rough pictures with their seeds, the most promising first.
        """
        ask = asked(
            prompt, concepts, negative, never, places, drawing, seed, steps=steps, guidance=guidance, width=width,
            height=height,
        )  # fmt: skip
        name, shown = self.studio.check(model), Shown()
        rough = ask.wish | {"steps": min(ROUGH, ask.wish["steps"])}
        with parts.turn(self.studio, model, request, progress) as job:
            for place, number in enumerate(ranked(job, ask)):
                made = paint(job, ask.text, ask.plugins, number, rough, f"rough picture {place + 1} of {HOW_MANY}")
                shown.append((keep(made, name), f"{place + 1}. seed {number}"))
        return gr.Gallery(shown, visible=True)


def ranked(job: Job, ask: Asked) -> list[int]:
    """Eight seeds from the asked one on, the most promising first."""
    numbers = list(range(ask.seed, ask.seed + HOW_MANY))
    words = ask.concepts or telling_words(ask.text)
    if not words:
        return numbers
    at = int(LOOKED_AT * (ask.wish["steps"] - 1))
    job.expect(f"looking at {HOW_MANY} seeds", (at + 1) * HOW_MANY)
    found = diffgraft.rank_seeds(job.pipe, ask.text, words, numbers, at=at, batch_size=1, **ask.wish)
    return [one.seed for one in found]

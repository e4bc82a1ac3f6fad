"""Tab "Generate": concepts that all appear, a negative prompt that is kept away, or both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import gradio as gr
from PIL import Image

import diffgraft

from ...attention.errors import ConceptError, UnsupportedPipelineError
from ...plugins.base import Plugin
from . import checks, parts
from .parts import Shown, keep, keep_plain
from .shown import shown
from .studio import Job, Studio

SMALL_WORDS = {"a", "an", "and", "the", "of", "on", "in", "with", "at", "to", "style"}
MOST_WORDS = 6
EXAMPLES = [
    ["a blue ball and a yellow star and a red house , snow", "ball, star, house", ""],
    ["a blue ball and a yellow star , night", "ball, star", ""],
    ["a red house and a green tree , snow", "house, tree", ""],
    ["a flower , meadow", "", "red"],
    ["a yellow moon and a white boat , sea", "moon, boat", "purple"],
]
LABELS = [
    "a ball, a star and a house",
    "a ball and a star",
    "a house and a tree",
    "a flower, but not red",
    "a moon and a boat, not purple",
]


@dataclass(frozen=True)
class GenerateTab:
    """The tab and its handler."""

    studio: Studio
    name: ClassVar[str] = "generate"
    first: ClassVar[dict[str, Any]] = {
        "prompt": EXAMPLES[0][0], "concepts": EXAMPLES[0][1], "compare": True, "seed": 1, "steps": 25, "guidance": 2.5,
    }  # fmt: skip

    def build(self) -> None:
        """Lay the tab out."""
        made, seen, used, how = shown(self.name)
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                prompt = gr.Textbox(EXAMPLES[0][0], label="Prompt", lines=2)
                concepts = gr.Textbox(
                    EXAMPLES[0][1],
                    label="Concepts that must all appear",
                    info="Words of the prompt, with commas. Empty: off",
                )
                negative = gr.Textbox(
                    "", label="Keep away", info="A negative prompt inside the attention. Empty: off", placeholder="red"
                )
                never = gr.Textbox(
                    "", label="Never draw", info="Words that a prompt may not ask for, with commas. Empty: off",
                    placeholder="star",
                )  # fmt: skip
                compare = gr.Checkbox(True, label="Also paint it plain, with the same seed")
                buttons = parts.buttons("Paint")
                knobs = parts.knobs(self.studio, steps=25, guidance=2.5, seed=self.first["seed"])
                with gr.Accordion("Size", open=False):
                    width, height = parts.size_row()
                gr.Examples(EXAMPLES, [prompt, concepts, negative], label="Try", example_labels=LABELS)
            with gr.Column(scale=5, min_width=300):
                pictures = parts.gallery("Pictures", made)
                maps = parts.gallery("Where each word looked", seen, columns=4)
                seed, settings = parts.facts(used, how)
        inputs = [
            prompt, concepts, negative, compare, knobs.steps, knobs.guidance, knobs.count, knobs.seed, width, height,
            knobs.model, never,
        ]  # fmt: skip
        parts.runs("generate", self.studio, self.generate, inputs, [pictures, maps, seed, settings], buttons)

    def generate(
        self,
        prompt: str,
        concepts: str = "",
        negative: str = "",
        compare: bool = False,
        steps: int = 25,
        guidance: float = 2.5,
        count: int = 1,
        seed: int | None = None,
        width: int | None = None,
        height: int | None = None,
        model: str = "",
        never: str = "",
        request: gr.Request | None = None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Shown, Shown, str, str]:
        """Paint a prompt so that every concept appears and the negative stays away.

        Args:
            prompt: What to paint; the embedded model knows texts like "a blue ball and a yellow star , night".
            concepts: Words of the prompt that must all appear, separated by commas; empty switches this off.
            negative: What to keep away, without a second pass; empty switches this off.
            compare: Also paint the plain picture of each seed.
            steps: Denoising steps, 1 to 100.
            guidance: Classifier-free guidance, 0 to 30.
            count: Number of pictures, 1 to 6; picture i gets seed + i.
            seed: 0 or more; empty or -1 draws one.
            width: Pixels, a multiple of 8; empty leaves it to the model.
            height: Pixels, a multiple of 8; empty leaves it to the model.
            model: Empty for the page's model, else a folder, a .safetensors file or a Hub id.
            never: Words that must not be drawn, separated by commas; empty switches this off.

        Returns:
            Pictures, attention maps of the first one, its seed, and its settings as JSON.
        """
        wish: dict[str, Any] = {
            **checks.sampling(steps, guidance),
            "width": checks.side(width, "width"),
            "height": checks.side(height, "height"),
        }
        text, kept_away = checks.text(prompt, "the prompt", needed=True), checks.text(negative, "the negative")
        together, first = checks.words(concepts, "concepts"), checks.seed(seed)
        number = checks.whole(count, "pictures", 1, checks.PICTURES)
        name = self.studio.check(model)
        plugins = techniques(together, kept_away, checks.words(never, "never"))
        shown: Shown = []
        with parts.turn(self.studio, model, request, progress) as job:
            made, seen = look(job, text, together, plugins, first, wish, f"picture 1 of {number}")
            settings = made.info["diffgraft"]
            for i in range(number):
                if i:
                    made = paint(job, text, plugins, first + i, wish, f"picture {i + 1} of {number}")
                shown.append((keep(made, name), caption(plugins, first + i)))
                if compare is True and plugins:
                    plain = paint(job, text, [], first + i, wish, f"plain picture {i + 1} of {number}")
                    shown.append((keep(plain, name), caption([], first + i)))
        return shown, seen, str(first), parts.as_json(settings)


def techniques(concepts: list[str], negative: str, never: list[str]) -> list[Plugin]:
    """What the three fields stand for."""
    plugins: list[Plugin] = []
    if concepts:
        plugins.append(diffgraft.AttentionSegregation(concepts))
    if negative:
        plugins.append(diffgraft.NegativeAway(negative))
    if never:
        plugins.append(diffgraft.ConceptBlock(never))
    return plugins


def look(
    job: Job, prompt: str, concepts: list[str], plugins: list[Plugin], seed: int, wish: dict[str, Any], what: str
) -> tuple[Image.Image, Shown]:
    """One picture and, where its model has such maps, where the concepts or the prompt's first words looked."""
    words = concepts or telling_words(prompt)
    ignored = (UnsupportedPipelineError,) if concepts else (UnsupportedPipelineError, ConceptError)
    job.expect(what, wish["steps"])
    try:
        maps = diffgraft.attention_maps(job.pipe, prompt, words, plugins=plugins, seed=seed, **wish) if words else None
    except ignored:
        maps = None
    if maps is None:
        return paint(job, prompt, plugins, seed, wish, what), []
    maps.image.info["diffgraft"]["plugins"] = [{"plugin": type(p).__name__} | p.settings() for p in plugins]
    return maps.image, [(keep_plain(maps.overlay(word), "map"), word) for word in maps]


def telling_words(prompt: str) -> list[str]:
    """The first words of a prompt that name something."""
    words = [word.strip(".,;:!?()").lower() for word in prompt.split()]
    return list(dict.fromkeys(word for word in words if word.isalpha() and word not in SMALL_WORDS))[:MOST_WORDS]


def paint(job: Job, prompt: str, plugins: list[Plugin], seed: int, wish: dict[str, Any], what: str) -> Image.Image:
    """One picture, with its progress."""
    job.expect(what, wish["steps"])
    [picture] = diffgraft.generate(job.pipe, prompt, plugins=plugins, seed=seed, **wish)
    return picture


def caption(plugins: list[Plugin], seed: int) -> str:
    """What stands under a picture."""
    names = {"AttentionSegregation": "concepts", "NegativeAway": "negative", "ConceptBlock": "never"}
    used = " + ".join(names.get(type(plugin).__name__, type(plugin).__name__) for plugin in plugins)
    return f"{used or 'plain'}, seed {seed}"

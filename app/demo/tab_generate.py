"""Tab "Generate": concepts that all appear, a negative prompt that is kept away, or both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import gradio as gr

from . import checks, improve, parts, seeds
from .drawing import WORDS, as_text, canvas, legend
from .painting import asked, caption, look, paint
from .parts import Laid, Runs, Shown, keep
from .shown import shown
from .studio import Studio
from .told import told

EXAMPLES = [
    ["a blue ball and a yellow star and a red house , snow", "ball, star, house", "", ""],
    ["a blue ball and a yellow star , night", "ball, star", "", "left, top right"],
    ["a red house and a green tree , snow", "house, tree", "", ""],
    ["a flower , meadow", "", "red", ""],
    ["a yellow moon and a white boat , sea", "moon, boat", "purple", ""],
]
LABELS = [
    "a ball, a star and a house", "a ball left, a star top right", "a house and a tree", "a flower, but not red",
    "a moon and a boat, not purple",
]  # fmt: skip


@dataclass(frozen=True)
class GenerateTab:
    """The tab and its handler."""

    studio: Studio
    name: ClassVar[str] = "generate"
    first: ClassVar[dict[str, Any]] = {
        "prompt": EXAMPLES[0][0], "concepts": EXAMPLES[0][1], "compare": True, "seed": 1, "steps": 25, "guidance": 2.5,
    }  # fmt: skip

    def build(self, model: gr.Dropdown) -> Laid:
        """Lay the tab out."""
        made, seen, used, how = shown(self.name)
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                note = parts.note()
                prompt = gr.Textbox(EXAMPLES[0][0], label="Prompt", lines=2)
                concepts = gr.Textbox(
                    EXAMPLES[0][1], label="Concepts that must all appear",
                    info="Words of the prompt, with commas. Empty: off",
                )  # fmt: skip
                drawer, places, drawing = where(concepts)
                negative = gr.Textbox(
                    "", label="Keep away", info="A negative prompt inside the attention. Empty: off", placeholder="red"
                )
                never = gr.Textbox(
                    "", label="Never draw", info="Words that a prompt may not ask for, with commas. Empty: off",
                    placeholder="star",
                )  # fmt: skip
                compare = gr.Checkbox(True, label="Also paint it plain, with the same seed")
                run, halt = parts.buttons("Paint")
                runs = Runs(self.studio, halt)
                with gr.Row():
                    tries = gr.Button("Try 8 seeds, rank them", min_width=140)
                    better = gr.Button("Improve this seed", min_width=140)
                knobs = parts.knobs(steps=25, guidance=2.5, seed=self.first["seed"])
                with gr.Accordion("Size", open=False):
                    width, height = parts.size_row()
                gr.Examples(EXAMPLES, [prompt, concepts, negative, places], label="Try", example_labels=LABELS)
            with gr.Column(scale=5, min_width=300):
                thumbs = seeds.gallery()
                both, line = improve.fields()
                pictures = parts.gallery("Pictures", made)
                maps = parts.gallery("Where each word looked", seen, columns=4)
                seed, settings = parts.facts(used, how)
        inputs = [
            prompt, concepts, negative, compare, knobs.steps, knobs.guidance, knobs.count, knobs.seed, width, height,
            model, never, places, drawing,
        ]  # fmt: skip
        outputs = [pictures, maps, seed, settings]
        painted = runs.on(run.click, self.generate, inputs, outputs)
        picked = thumbs.select(told(seeds.picked), thumbs, knobs.seed, api_visibility="private", queue=False)
        again = runs.on(picked.success, self.generate, inputs, outputs)
        trying = [*inputs[:3], *inputs[4:6], *inputs[7:]]
        trial = seeds.SeedsPart(self.studio).seeds
        runs.on(tries.click, trial, trying, [thumbs])
        search = improve.ImprovePart(self.studio).improve
        runs.on(better.click, search, trying[:-2], [both, line, seed, settings])
        runs.offer(search, [both, line, seed, settings])
        runs.offer(self.generate, outputs)
        runs.offer(trial, [thumbs])
        runs.close()
        names = ["prompt", "concepts", "negative", "compare", "steps", "guidance", "count", "seed", "width", "height"]
        fields = dict(zip([*names, "model", "never", "places", "drawing"], inputs, strict=True))
        lost = [(field, "AttentionSegregation") for field in (concepts, drawer, places, drawing, tries, better)]
        needs = [*lost, (never, "ConceptBlock"), (negative, "NegativeAway")]
        return Laid(self.name, pictures, [painted, again], fields, needs, note, knobs)

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
        places: str = "",
        drawing: dict[str, Any] | None = None,
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
            places: Where each concept is to be, in their order, such as "left, top right"; empty leaves it open.
            drawing: The page's canvas: a place painted for each concept; counts before `places`.

        Returns:
            Pictures, attention maps of the first one, its seed, and its settings as JSON.
        """
        ask = asked(
            prompt, concepts, negative, never, places, drawing, seed, steps=steps, guidance=guidance, width=width,
            height=height,
        )  # fmt: skip
        page = parts.typed(self.name, locals())
        page["page"]["drawing"] = as_text(drawing)
        number, name = checks.whole(count, "pictures", 1, checks.PICTURES), self.studio.check(model)
        shown: Shown = []
        with parts.turn(self.studio, model, request, progress) as job:
            made, seen = look(job, ask, f"picture 1 of {number}")
            settings = made.info["diffgraft"]
            for i in range(number):
                at = ask.seed + i
                if i:
                    made = paint(job, ask.text, ask.plugins, at, ask.wish, f"picture {i + 1} of {number}")
                shown.append((keep(made, name, page), caption(ask.plugins, at)))
                if compare is True and ask.plugins:
                    plain = paint(job, ask.text, [], at, ask.wish, f"plain picture {i + 1} of {number}")
                    shown.append((keep(plain, name, page), caption([], at)))
        return shown, seen, str(ask.seed), parts.as_json(settings)


def where(concepts: gr.Textbox) -> tuple[gr.Accordion, gr.Textbox, gr.ImageEditor]:
    """The drawer in which each concept gets its place, in words or by hand."""
    with gr.Accordion("Place them", open=False) as drawer:
        places = gr.Textbox(
            "", label="In words, in the order of the concepts", placeholder="left, right, top",
            info=f"Each of {', '.join(WORDS)}, or two together. Empty: anywhere",
        )  # fmt: skip
        colours = gr.HTML(legend(concepts.value))
        drawing = canvas()
        gr.Markdown(
            "Paint a blob for each, or a box: what an outline encloses counts as inside. *Paint* and *Try 8 seeds* use "
            "the places; *Improve this seed* searches without them."
        )
    concepts.change(legend, concepts, colours, queue=False, api_visibility="private", show_progress="hidden")
    return drawer, places, drawing

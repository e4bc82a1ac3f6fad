"""Tab "One step": a negative prompt that works while there is no second pass for it, live while it is typed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import gradio as gr

import diffgraft

from ...plugins.base import Plugin
from ..models import ONE_STEP, STUDENTS, suits
from . import checks, parts
from .painting import paint
from .parts import Laid, Runs, keep
from .shown import shown
from .studio import Studio
from .told import told

STEPS = 4
RULES = ["nasa", "nag", "vsf"]
EXAMPLES = [["a star , night", "yellow"], ["a ball , sky", "yellow"], ["a house , snow", "tree"]]

LABELS = [f"{prompt.partition(' ,')[0]}, not {negative}" for prompt, negative in EXAMPLES]


@dataclass(frozen=True)
class OneStepTab:
    """The tab and its handler."""

    studio: Studio
    name: ClassVar[str] = "one_step"
    first: ClassVar[dict[str, Any]] = {"prompt": EXAMPLES[0][0], "negative": EXAMPLES[0][1], "seed": 5}

    def build(self, model: gr.Dropdown) -> Laid:
        """Lay the tab out."""
        both, used_before, how = shown(self.name)
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                note = parts.note()
                prompt = gr.Textbox(EXAMPLES[0][0], label="Prompt", lines=2)
                negative = gr.Textbox(EXAMPLES[0][1], label="Keep away", info="Type: the picture follows")
                with gr.Row():
                    rule = gr.Dropdown(RULES, value="nasa", label="Rule", min_width=120)
                    scale = gr.Slider(0, 5, 0, step=0.05, label="Strength", info="0: the measured one", min_width=180)
                run, halt = parts.buttons("Paint")
                runs = Runs(self.studio, halt)
                with gr.Accordion("Seed and steps", open=False), gr.Row():
                    seed = gr.Number(
                        self.first["seed"], label="Seed", info="-1: a new one each time", precision=0, min_width=120
                    )
                    steps = gr.Slider(1, STEPS, 1, step=1, label="Steps", min_width=120)
                gr.Examples(EXAMPLES, [prompt, negative], label="Try", example_labels=LABELS)
            with gr.Column(scale=5, min_width=300):
                slider = parts.slider("Without and with the negative", both)
                used, settings = parts.facts(used_before, how)
        inputs, outputs = [prompt, negative, rule, scale, steps, seed, model], [slider, used, settings]
        painted = runs.on(run.click, self.one_step, inputs, outputs)
        runs.offer(self.one_step, outputs)
        runs.close()
        model.change(self.own_steps, model, steps, api_visibility="private", queue=False, show_progress="hidden")
        gr.on(
            [negative.input, scale.release, rule.input], told(self.one_step), inputs, outputs, api_visibility="private",
            concurrency_id=parts.MODEL, concurrency_limit=1, trigger_mode="always_last", show_progress="minimal",
        )  # fmt: skip

        fields = dict(zip(["prompt", "negative", "rule", "scale", "steps", "seed", "model"], inputs, strict=True))
        return Laid(self.name, slider, [painted], fields, [(field, "NegativeAway") for field in (negative, run)], note)

    def student(self, asked: str) -> str:
        """The model that paints: where the page's own is no student, the embedded one stands for it."""
        name = asked or self.studio.model
        return ONE_STEP if name == self.studio.model and name not in STUDENTS else name

    def own_steps(self, asked: str) -> int:
        """The steps that suit the model; what is no student is looked at after one."""
        return min(STEPS, suits(self.student(asked)).get("steps", 1))

    def one_step(
        self,
        prompt: str,
        negative: str = "",
        rule: str = "nasa",
        scale: float = 0.0,
        steps: int = 1,
        seed: int | None = None,
        model: str = "",
        request: gr.Request | None = None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[tuple[str, str], str, str]:
        """Paint a prompt in one step, with and without a negative prompt; no guidance pass is needed.

        Args:
            prompt: What to paint.
            negative: What to keep away.
            rule: "nasa", "nag" or "vsf".
            scale: Strength, 0 to 100; 0 takes the one that was measured for the model.
            steps: Denoising steps, 1 to 4.
            seed: 0 or more; empty or -1 draws one.
            model: Empty, or the page's own, for the embedded one-step student, else a folder, a file or a Hub id.

        Returns:
            The picture without and with the negative, the seed, and the settings as JSON.
        """
        wish: dict[str, Any] = {"steps": checks.whole(steps, "steps", 1, STEPS), "guidance": 0.0}
        text, kept_away = checks.text(prompt, "the prompt", needed=True), checks.text(negative, "the negative")
        strength, used = checks.number(scale, "strength", 0, 100), checks.seed(seed)
        name = self.student(checks.text(model, "the model"))
        page = parts.typed(self.name, locals())
        plugins: list[Plugin] = []
        if kept_away:
            plugins.append(
                diffgraft.NegativeAway(kept_away, rule=checks.text(rule, "the rule"), scale=strength or None)
            )
        with parts.turn(self.studio, name, request, progress) as job:
            plain = paint(job, text, [], used, wish, "without the negative")
            made = paint(job, text, plugins, used, wish, "with the negative") if plugins else plain
        return (keep(plain, name, page), keep(made, name, page)), str(used), parts.as_json(made.info["diffgraft"])

"""Tab "One step": a negative prompt that works while there is no second pass for it, live while it is typed."""

from __future__ import annotations

from typing import Any

import gradio as gr

import diffgraft

from ...attention.errors import ModelLoadError
from ...plugins.base import Plugin
from ..models import ONE_STEP
from . import checks, parts
from .parts import keep
from .studio import Studio
from .tab_generate import paint
from .told import escaped, told, warn

STEPS = 4
RULES = ["nasa", "nag", "vsf"]
EXAMPLES = [["a ball , meadow", "red"], ["a flower , desert", "yellow"], ["a house , snow", "tree"]]

LABELS = [f"{prompt.partition(' ,')[0]}, not {negative}" for prompt, negative in EXAMPLES]


class OneStepTab:
    """The tab and its handler."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    def build(self) -> None:
        """Lay the tab out."""
        missing = student_missing()
        if missing:
            gr.HTML(
                f'<p class="dg-note"><b>{escaped(missing)}.</b> Until then, name a one-step or turbo checkpoint under '
                "<i>Model</i>: a folder or a Hub id such as stabilityai/sd-turbo.</p>",
                padding=False,
            )
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                prompt = gr.Textbox(EXAMPLES[0][0], label="Prompt", lines=2)
                negative = gr.Textbox(EXAMPLES[0][1], label="Keep away", info="Type: the picture follows")
                with gr.Row():
                    rule = gr.Dropdown(RULES, value="nasa", label="Rule", min_width=120)
                    scale = gr.Slider(0, 5, 0, step=0.05, label="Strength", info="0: the measured one", min_width=120)
                buttons = parts.buttons("Paint")
                with gr.Accordion("Seed, steps, model", open=bool(missing)):
                    with gr.Row():
                        seed = gr.Number(7, label="Seed", info="-1: a new one each time", precision=0, min_width=120)
                        steps = gr.Slider(1, STEPS, 1, step=1, label="Steps", min_width=120)
                    model = gr.Textbox(
                        "", label="Model", placeholder=ONE_STEP, interactive=not self.studio.fixed,
                        info="Empty: the embedded student. Else a folder, a .safetensors file or a Hub id",
                    )  # fmt: skip
            with gr.Column(scale=5, min_width=300):
                slider = gr.ImageSlider(
                    label="Without and with the negative", interactive=False, type="filepath", format="png",
                    max_height=460,
                )  # fmt: skip
                used, settings = parts.facts()
        inputs, outputs = [prompt, negative, rule, scale, steps, seed, model], [slider, used, settings]
        parts.runs("one_step", self.studio, self.one_step, inputs, outputs, buttons)
        gr.on(
            [negative.input, scale.release, rule.input], told(self.one_step), inputs, outputs, api_visibility="private",
            concurrency_id=parts.MODEL, concurrency_limit=1, trigger_mode="always_last", show_progress="minimal",
        )  # fmt: skip
        gr.Examples(EXAMPLES, [prompt, negative], label="Try", example_labels=LABELS)

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
            model: Empty for the embedded one-step student, else a folder, a .safetensors file or a Hub id.

        Returns:
            The picture without and with the negative, the seed, and the settings as JSON.
        """
        wish: dict[str, Any] = {"steps": checks.whole(steps, "steps", 1, STEPS), "guidance": 0.0}
        text, kept_away = checks.text(prompt, "the prompt", needed=True), checks.text(negative, "the negative")
        strength, used = checks.number(scale, "strength", 0, 100), checks.seed(seed)
        name = model.strip() if checks.text(model, "the model") else ONE_STEP
        plugins: list[Plugin] = []
        if kept_away:
            plugins.append(
                diffgraft.NegativeAway(kept_away, rule=checks.text(rule, "the rule"), scale=strength or None)
            )
        with self.studio.job(name, parts.visitor(request), parts.teller(progress)) as job:
            plain = paint(job, text, [], used, wish, "without the negative")
            made = paint(job, text, plugins, used, wish, "with the negative") if plugins else plain
        warn(job.warnings)
        return (keep(plain, name), keep(made, name)), str(used), parts.as_json(made.info["diffgraft"])


def student_missing() -> str:
    """Why the embedded one-step student cannot be used, "" if it can."""
    try:
        diffgraft.picturebook(one_step=True)
    except ModelLoadError as error:
        return str(error).partition(";")[0]
    return ""

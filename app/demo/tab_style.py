"""Tab "Style": a picture repainted in the style of another one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import gradio as gr

import diffgraft

from ...attention.pictures import as_picture
from . import checks, parts
from .parts import Laid, Runs, example, keep, keep_plain, upload
from .shown import shown
from .studio import Studio
from .uploads import picture

PASSES = 3  # the content is inverted, the style is inverted, the result is sampled
METHODS = {"the model's usual one": "", "StyleID: takes the style picture's colours and background along": "styleid"}
EXAMPLES = [
    ("winter", "dots", "a house and a tree , snow"), ("winter", "sketch", "a house and a tree , snow"),
    ("fish", "sketch", "a fish , sea"),
]  # fmt: skip


@dataclass(frozen=True)
class StyleTab:
    """The tab and its handler."""

    studio: Studio
    name: ClassVar[str] = "stylize"
    first: ClassVar[dict[str, Any]] = {
        "content": example(EXAMPLES[0][0]), "style": example(EXAMPLES[0][1]), "prompt": EXAMPLES[0][2],
        "strength": 1.0, "structure": 0.2, "seed": 4,
    }  # fmt: skip

    def build(self, model: gr.Dropdown) -> Laid:
        """Lay the tab out."""
        both, used, how = shown(self.name)
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                note = parts.note()
                with gr.Row():
                    content, style = (upload(*pair) for pair in zip(EXAMPLES[0][:2], ("Content", "Style"), strict=True))
                how_to = gr.Dropdown(list(METHODS.items()), value="", label="Method")
                strength = gr.Slider(0, 1, 1, step=0.05, label="Style", info="How much of its colours and texture")
                structure = gr.Slider(
                    0, 1, 0.2, step=0.05, label="Structure", info="How firmly the layout is held; StyleID: 0.5 or more"
                )
                prompt = gr.Textbox(
                    EXAMPLES[0][2], label="What the content shows", info="May be empty; naming it keeps it what it is"
                )
                run, halt = parts.buttons("Repaint")
                runs = Runs(self.studio, halt)
                knobs = parts.knobs(steps=20, guidance=1.0, seed=self.first["seed"])
                knobs.count.visible = False
                gr.Examples(
                    [[example(a), example(b), text] for a, b, text in EXAMPLES], [content, style, prompt], label="Try",
                    example_labels=[f"{a} as {b}" for a, b, _ in EXAMPLES],
                )  # fmt: skip
            with gr.Column(scale=5, min_width=300):
                slider = parts.slider("Before and after", both)
                seed, settings = parts.facts(used, how)
        inputs = [content, style, strength, structure, prompt, knobs.steps, knobs.guidance, knobs.seed, model, how_to]
        outputs = [slider, seed, settings]
        repainted = runs.on(run.click, self.stylize, inputs, outputs)
        runs.offer(self.stylize, outputs)
        runs.close()
        names = ["content", "style", "strength", "structure", "prompt", "steps", "guidance", "seed", "model", "method"]
        fields = dict(zip(names, inputs, strict=True))
        return Laid(self.name, slider, [repainted], fields, [(run, "stylize")], note)

    def stylize(
        self,
        content: str,
        style: str,
        strength: float = 1.0,
        structure: float = 0.2,
        prompt: str = "",
        steps: int = 20,
        guidance: float = 1.0,
        seed: int | None = None,
        model: str = "",
        method: str = "",
        request: gr.Request | None = None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[tuple[str, str], str, str]:
        """Repaint a picture in the style of another one, its layout kept.

        Args:
            content: The picture whose layout is kept.
            style: The picture whose style is wanted.
            strength: How much of the style, 0 to 1.
            structure: How firmly the layout is held, 0 to 1.
            prompt: What the content shows; may be empty.
            steps: Denoising steps, 1 to 100.
            guidance: Classifier-free guidance while sampling, 0 to 30; 1 is off.
            seed: 0 or more; empty or -1 draws one.
            model: Empty for the page's model, else a folder, a .safetensors file or a Hub id.
            method: How style gets in, such as "styleid" or "stylealigned"; empty for the model's usual way.

        Returns:
            Before and after, the seed, and the settings as JSON.
        """
        before, wanted = picture(content, "the content"), picture(style, "the style")
        wish: dict[str, Any] = {
            "strength": checks.number(strength, "style", 0, 1),
            "structure": checks.number(structure, "structure", 0, 1),
            "prompt": checks.text(prompt, "the prompt"),
            "method": checks.text(method, "the method") or None,
            **checks.sampling(steps, guidance),
        }
        used, name = checks.seed(seed), self.studio.check(model)
        page = parts.typed(self.name, locals())
        with parts.turn(self.studio, model, request, progress) as job:
            job.expect("looking closely, then painting", PASSES * wish["steps"])
            made = diffgraft.stylize(job.pipe, before, wanted, seed=used, **wish)
        files = keep_plain(as_picture(before), "before"), keep(made, name, page)
        return files, str(used), parts.as_json(made.info["diffgraft"])

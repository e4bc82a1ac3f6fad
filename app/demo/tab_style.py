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
REFINEMENTS = 2
EXAMPLES = [
    ("winter", "mosaic", "a house and a tree , snow"), ("winter", "sketch", "a house and a tree"),
    ("fish", "sketch", "a fish , sea"), ("winter", "dots", ""),
]  # fmt: skip


def usual(pipe: Any) -> dict[str, Any]:
    """StyleID on UNets: visitors' style pictures have backgrounds of their own, whose colours it takes along too."""
    return {"method": "styleid"} if getattr(pipe, "unet", None) is not None else {}


@dataclass(frozen=True)
class StyleTab:
    """The tab and its handler."""

    studio: Studio
    name: ClassVar[str] = "stylize"
    first: ClassVar[dict[str, Any]] = {
        "content": example(EXAMPLES[0][0]), "style": example(EXAMPLES[0][1]), "prompt": EXAMPLES[0][2],
        "strength": 0.8, "seed": 4,
    }  # fmt: skip

    def build(self, model: gr.Dropdown) -> Laid:
        """Lay the tab out."""
        both, used, how = shown(self.name)
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                note = parts.note()
                with gr.Row():
                    content, style = (upload(*pair) for pair in zip(EXAMPLES[0][:2], ("Content", "Style"), strict=True))
                strength = gr.Slider(0, 1, 0.8, step=0.05, label="Style", info="How much of its colours and texture")
                structure = gr.Slider(0, 1, 0.5, step=0.05, label="Structure", info="How firmly the layout is held")
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
        inputs = [content, style, strength, structure, prompt, knobs.steps, knobs.guidance, knobs.seed, model]
        outputs = [slider, seed, settings]
        repainted = runs.on(run.click, self.stylize, inputs, outputs)
        runs.offer(self.stylize, outputs)
        runs.close()
        names = ["content", "style", "strength", "structure", "prompt", "steps", "guidance", "seed", "model"]
        fields = dict(zip(names, inputs, strict=True))
        return Laid(self.name, slider, [repainted], fields, [(run, "stylize")], note)

    def stylize(
        self,
        content: str,
        style: str,
        strength: float = 0.6,
        structure: float = 0.5,
        prompt: str = "",
        steps: int = 20,
        guidance: float = 1.0,
        seed: int | None = None,
        model: str = "",
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

        Returns:
            Before and after, the seed, and the settings as JSON.
        """
        before, wanted = picture(content, "the content"), picture(style, "the style")
        wish: dict[str, Any] = {
            "strength": checks.number(strength, "style", 0, 1),
            "structure": checks.number(structure, "structure", 0, 1),
            "prompt": checks.text(prompt, "the prompt"),
            **checks.sampling(steps, guidance),
        }
        used, name = checks.seed(seed), self.studio.check(model)
        page = parts.typed(self.name, locals())
        with parts.turn(self.studio, model, request, progress) as job:
            job.expect("looking closely, then painting", PASSES * wish["steps"])
            how = wish | usual(job.pipe)
            made = diffgraft.stylize(job.pipe, before, wanted, seed=used, iterations=REFINEMENTS, **how)
        files = keep_plain(as_picture(before), "before"), keep(made, name, page)
        return files, str(used), parts.as_json(made.info["diffgraft"])

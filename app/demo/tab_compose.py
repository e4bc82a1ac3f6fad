"""Tab "Compose": any techniques together, in an order that is shown, and what they did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import gradio as gr

from ...pipelines.grafting.graft import Graft, graft
from ...plugins.base import Plugin
from ..techniques import build, techniques
from . import checks, parts
from .forms import REDRAWING, forms, redrawn
from .painting import paint
from .parts import Laid, Runs, Shown, keep
from .shown import shown
from .specs import MOST, read_specs, rewritten, starting_specs, with_uploads
from .studio import Studio
from .told import told

AT_ONCE: dict[str, Any] = {"api_visibility": "private", "queue": False}
PROMPT = "a house and a tree and a star , snow"
FIRST = ["AttentionSegregation", "NegativeAway"]


@dataclass(frozen=True)
class ComposeTab:
    """The tab and its handlers."""

    studio: Studio
    name: ClassVar[str] = "compose"
    first: ClassVar[dict[str, Any]] = {"prompt": PROMPT, "plugins": starting_specs(FIRST), "seed": 3}

    def build(self, model: gr.Dropdown) -> Laid:
        """Lay the tab out."""
        made, rows, said, used, how = shown(self.name)
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                note = parts.note()
                prompt = gr.Textbox(PROMPT, label="Prompt", lines=2)
                chosen = gr.Dropdown(
                    list(techniques()), value=FIRST, multiselect=True, max_choices=MOST, label="Techniques",
                    info="Their order is the order of their edits, where two are of equal rank",
                    elem_classes="dg-techniques",
                )  # fmt: skip
                lacking = gr.State({})
                specs = gr.Code(
                    starting_specs(FIRST), language="json", label="Their settings, as in a batch row", lines=6,
                    max_lines=16, wrap_lines=True, show_line_numbers=False, buttons=["copy"], render=False,
                )  # fmt: skip
                drawn = forms(specs, chosen, lacking)
                with gr.Accordion("The same as JSON, with every argument", open=False):
                    specs.render()
                again = {"fn": redrawn, "inputs": [specs, drawn], "outputs": [chosen, drawn], **REDRAWING}
                specs.blur(**again | {"fn": told(redrawn)})
                turned = chosen.input(told(rewritten), [chosen, specs, lacking], specs, **AT_ONCE)
                turned.success(**again)
                with gr.Accordion('Pictures for "upload"', open=False), gr.Row():
                    mask, style = parts.upload("ball-mask", "Mask"), parts.upload("mosaic", "Style")
                run, halt = parts.buttons("Paint")
                runs = Runs(self.studio, halt)
                knobs = parts.knobs(steps=25, guidance=2.5, seed=self.first["seed"])
            with gr.Column(scale=5, min_width=300):
                pictures = parts.gallery("Pictures", made)
                order = gr.Dataframe(
                    rows, headers=["#", "technique", "rank", "layers", "steps"], label="Order", interactive=False,
                    wrap=True, buttons=[],
                )  # fmt: skip
                report = gr.Textbox(
                    said, label="Report", lines=8, max_lines=14, interactive=False, elem_classes="report"
                )
                seed, settings = parts.facts(used, how)
        inputs = [prompt, specs, mask, style, knobs.steps, knobs.guidance, knobs.count, knobs.seed, model]
        outputs = [pictures, order, report, seed, settings]
        painted = runs.on(run.click, self.compose, inputs, outputs)
        runs.offer(self.compose, outputs)
        runs.close()
        names = ["prompt", "plugins", "mask", "style", "steps", "guidance", "count", "seed", "model"]
        fields = dict(zip(names, inputs, strict=True))
        return Laid(self.name, pictures, [painted], fields, [], note, knobs, chosen, lacking, again)

    def compose(
        self,
        prompt: str,
        plugins: str,
        mask: str | None = None,
        style: str | None = None,
        steps: int = 25,
        guidance: float = 2.5,
        count: int = 1,
        seed: int | None = None,
        model: str = "",
        request: gr.Request | None = None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Shown, list[list[Any]], str, str, str]:
        """Paint a prompt with any techniques together, next to the plain picture.

        Args:
            prompt: What to paint.
            plugins: JSON list in order, such as [{"plugin": "NegativeAway", "negative": "red"}]; a mask or a style
                is written "upload" and given below.
            mask: The picture for "mask": "upload".
            style: The picture for "style": "upload".
            steps: Denoising steps, 1 to 100.
            guidance: Classifier-free guidance, 0 to 30.
            count: Number of pictures, 1 to 6; picture i gets seed + i.
            seed: 0 or more; empty or -1 draws one.
            model: Empty for the page's model, else a folder, a .safetensors file or a Hub id.

        Returns:
            Pictures, the techniques in the order in which they edit, a report, the first seed, its settings as JSON.
        """
        wish = checks.sampling(steps, guidance)
        text, first = checks.text(prompt, "the prompt", needed=True), checks.seed(seed)
        number, name = checks.whole(count, "pictures", 1, checks.PICTURES), self.studio.check(model)
        specs, page = read_specs(plugins), parts.typed(self.name, locals())
        shown: Shown = []
        with parts.turn(self.studio, model, request, progress) as job:
            used = [build(with_uploads(spec, {"mask": mask, "style": style})) for spec in specs]
            for i in range(number):
                with graft(job.pipe, *used) as on:
                    made = paint(job, text, [], first + i, wish, f"picture {i + 1} of {number}")
                made.info["diffgraft"]["plugins"] = [{"plugin": type(p).__name__} | p.settings() for p in used]
                if i == 0:
                    settings, rows, report = made.info["diffgraft"], in_order(on), str(on.report())
                shown.append((keep(made, name, page), f"together, seed {first + i}"))
                if used:
                    plain = paint(job, text, [], first + i, wish, f"plain picture {i + 1} of {number}")
                    shown.append((keep(plain, name, page), f"plain, seed {first + i}"))
        return shown, rows, report, str(first), parts.as_json(settings)


def in_order(on: Graft) -> list[list[Any]]:
    """Techniques in the order in which their edits run: (place, name, ranks of its edits, layers, steps)."""
    ranks: dict[Plugin, set[int]] = {plugin: set() for plugin in on.plugins}
    layers: dict[Plugin, int] = dict.fromkeys(on.plugins, 0)
    for placed in on.edits.values():
        for plugin in {plugin for plugin, _ in placed}:
            layers[plugin] += 1
        for plugin, edit in placed:
            ranks[plugin].add(edit.order)
    order = sorted(on.plugins, key=lambda plugin: min(ranks[plugin], default=0))
    return [
        [
            i + 1, type(plugin).__name__, ", ".join(map(str, sorted(ranks[plugin]))) or "latents only", layers[plugin],
            "off (neutral)" if plugin.neutral else f"{plugin.start:.0%} to {plugin.end:.0%}",
        ]
        for i, plugin in enumerate(order)
    ]  # fmt: skip

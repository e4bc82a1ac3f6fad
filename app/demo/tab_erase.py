"""Tab "Erase": paint over an object, and it is gone; a few candidates to choose from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import gradio as gr
from PIL import Image

import diffgraft

from ...attention.errors import SettingError
from ...attention.pictures import as_picture
from ...pipelines.tasks.generate import as_list
from ..images import coverage
from . import checks, parts
from .parts import Laid, Runs, Shown, example, keep, keep_plain, upload
from .shown import shown
from .studio import Studio
from .told import told
from .uploads import drawn, unread

BRUSH = "#ff5a5f"
STRENGTH = 0.5
EXAMPLES = [("moon", "night"), ("ball", "meadow"), ("flower", "desert")]


@dataclass(frozen=True)
class EraseTab:
    """The tab and its handlers."""

    studio: Studio
    name: ClassVar[str] = "erase"
    first: ClassVar[dict[str, Any]] = {
        "picture": example("moon"), "mask": example("moon-mask"), "prompt": "night", "seed": 3,
    }  # fmt: skip

    def build(self, model: gr.Dropdown) -> Laid:
        """Lay the tab out."""
        made, both, used, how = shown(self.name)
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                note = parts.note()
                editor = unread(
                    gr.ImageEditor(
                        example("moon"), label="Paint over it", type="filepath",
                        brush=gr.Brush(14, [BRUSH], color_mode="fixed"), eraser=gr.Eraser(14), layers=False,
                        transforms=(), sources=("upload", "clipboard"), format="png", height=380,
                    )
                )  # fmt: skip
                prompt = gr.Textbox("night", label="What is there instead", info="May be empty")
                with gr.Accordion("Or a mask, used where nothing is painted", open=True), gr.Row():
                    mask = upload("moon-mask", "White goes")
                    invert = gr.Checkbox(False, label="Black is removed instead", min_width=120)
                run, halt = parts.buttons("Erase")
                runs = Runs(self.studio, halt)
                with gr.Accordion("Edges and strength", open=False):
                    grow = gr.Slider(0, 24, 2, step=1, label="Grow", info="Pixels around the paint that go too")
                    feather = gr.Slider(0, 24, 2, step=1, label="Soft edge", info="Pixels over which old and new mix")
                    scale = gr.Slider(0, 20, 1, step=0.5, label="Redirection", info="Away from what was there")
                knobs = parts.knobs(steps=30, guidance=3.0, count=3, seed=self.first["seed"])
                tries = [[example(name), example(f"{name}-mask"), there] for name, there in EXAMPLES]
                labels = [name for name, _ in EXAMPLES]
                gr.Examples(tries, [editor, mask, prompt], label="Try", example_labels=labels)
            with gr.Column(scale=5, min_width=300):
                slider = parts.slider("Before and after", both)
                candidates = parts.gallery(
                    "Candidates, the best first: choose one", made, columns=3, allow_preview=False
                )
                seed, settings = parts.facts(used, how)
        rest = [prompt, grow, feather, scale, knobs.steps, knobs.guidance, knobs.count, knobs.seed, model, invert]
        outputs = [candidates, slider, seed, settings]
        gone = runs.on(run.click, self.erase, [editor, mask, *rest], outputs)
        runs.offer(self.erase, outputs)
        runs.close()
        candidates.select(told(chosen), [slider, candidates], [slider, seed], api_visibility="private", queue=False)
        names = ["prompt", "grow", "feather", "scale", "steps", "guidance", "count", "seed", "model", "invert"]
        fields = {"picture": editor, "mask": mask, **dict(zip(names, rest, strict=True))}
        return Laid(self.name, candidates, [gone], fields, [(run, "erase")], note, knobs)

    def erase(
        self,
        picture: str | dict[str, Any] | None,
        mask: str | None = None,
        prompt: str = "",
        grow: int = 2,
        feather: int = 2,
        scale: float = 1.0,
        steps: int = 30,
        guidance: float = 3.0,
        count: int = 3,
        seed: int | None = None,
        model: str = "",
        invert: bool = False,
        request: gr.Request | None = None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> tuple[Shown, tuple[str, str], str, str]:
        """Remove what a mask covers in a picture, and continue the background.

        Args:
            picture: The picture; from the page's editor it comes with what was painted, which counts as the mask.
            mask: A mask of its size: white is removed.
            prompt: What is there instead; may be empty.
            grow: Pixels around the mask that are removed too, 0 to 24.
            feather: Pixels over which the new picture fades into the old one, 0 to 24.
            scale: Guidance away from what was there, 0 to 20.
            steps: Denoising steps, 1 to 100.
            guidance: Classifier-free guidance, towards the prompt, 0 to 30; 1 is off.
            count: Candidates, 1 to 6; candidate i gets seed + i.
            seed: 0 or more; empty or -1 draws one.
            model: Empty for the page's model, else a folder, a .safetensors file or a Hub id.
            invert: Remove what is black in the mask.

        Returns:
            Candidates, the best first (by the rim of the hole, and by how strange its inside is), before and after of
            the first one, its seed, and its settings as JSON.
        """
        image, hole = drawn(picture, mask, invert=invert is True)
        wish = {
            "prompt": checks.text(prompt, "the prompt"),
            "scale": checks.number(scale, "redirection", 0, 20),
            "grow": checks.whole(grow, "grow", 0, 24),
            "feather": checks.whole(feather, "the soft edge", 0, 24),
            **checks.sampling(steps, guidance),
        }
        number, first = checks.whole(count, "pictures", 1, checks.PICTURES), checks.seed(seed)
        name, page = self.studio.check(model), parts.typed(self.name, locals())
        with parts.turn(self.studio, model, request, progress) as job:
            job.expect(f"{number} candidates, then ranked", number * max(1, int(wish["steps"] * STRENGTH)))
            wish |= {"strength": STRENGTH, "best_first": True}
            made: list[Image.Image] = as_list(diffgraft.erase(job.pipe, image, hole, seed=first, n=number, **wish))
        settings = made[0].info["diffgraft"] | {"masked": round(coverage(hole), 4)}
        files = [keep(picture, name, page) for picture in made]
        seeds = [picture.info["diffgraft"]["seed"] for picture in made]
        ranked = [(file, f"seed {number}") for file, number in zip(files, seeds, strict=True)]
        return ranked, (keep_plain(as_picture(image), "before"), files[0]), str(seeds[0]), parts.as_json(settings)


def chosen(event: gr.SelectData, slider: Any, candidates: Any) -> tuple[Any, str]:
    """Show the chosen candidate against the picture before."""
    if not (slider and candidates and event.index in range(len(candidates))):
        raise SettingError("there is no such candidate: erase something first")
    file, caption = candidates[event.index]
    return (slider[0], file), caption.removeprefix("seed ")

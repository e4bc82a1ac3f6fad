"""What the tabs have in common: settings, buttons, and files that carry their settings."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gradio as gr
from gradio import processing_utils, utils
from PIL import Image

from ..metadata import encode_png
from ..models import shown_name
from .checks import GUIDANCE, PICTURES, SIDE, STEPS
from .studio import Job, Studio
from .told import told, warn
from .uploads import unread

MODEL = "model"
EXAMPLES = Path(__file__).parents[2] / "assets" / "examples"
Shown = list[tuple[str, str]]
"""Pictures for a gallery: (file, caption)."""


@dataclass(frozen=True)
class Knobs:
    """The settings that every tab folds away."""

    steps: gr.Slider
    guidance: gr.Slider
    count: gr.Slider
    seed: gr.Number
    model: gr.Textbox


def knobs(studio: Studio, *, steps: int, guidance: float, seed: int, count: int = 1, model: str = "") -> Knobs:
    """Steps, guidance, number of pictures, seed and model, in a closed drawer."""
    with gr.Accordion("Seed, steps, model", open=False):
        with gr.Row():
            start = gr.Number(seed, label="Seed", info="-1: a new one each time", precision=0, min_width=120)
            pictures = gr.Slider(1, PICTURES, count, step=1, label="Pictures", min_width=120)
        with gr.Row():
            how_many = gr.Slider(1, STEPS, steps, step=1, label="Steps", min_width=180)
            strength = gr.Slider(0, GUIDANCE, guidance, step=0.1, label="Guidance", min_width=180)
        which = gr.Textbox(
            model,
            label="Model",
            placeholder=studio.model,
            interactive=not studio.fixed,
            info="Empty: the one of this page. Else a folder, a .safetensors file or a Hub id",
        )
    return Knobs(how_many, strength, pictures, start, which)


def size_row() -> tuple[gr.Number, gr.Number]:
    """Width and height."""
    with gr.Row():
        width = gr.Number(0, label="Width", info=f"0: the model's own; at most {SIDE}", precision=0, min_width=120)
        height = gr.Number(0, label="Height", info="Multiples of 8", precision=0, min_width=120)
    return width, height


def gallery(label: str, value: Any = None, columns: int = 2, allow_preview: bool = True) -> gr.Gallery:
    """Results, to look at and to download."""
    return gr.Gallery(
        value, label=label, columns=columns, height="auto", interactive=False, format="png",
        allow_preview=allow_preview, buttons=["download", "fullscreen"],
    )  # fmt: skip


def upload(name: str, label: str) -> gr.Image:
    """A picture to choose, with an example in it."""
    return unread(
        gr.Image(
            example(name), label=label, type="filepath", height=220, min_width=120, sources=("upload", "clipboard"),
            buttons=[], elem_classes="under-label",
        )
    )  # fmt: skip


gr.set_static_paths([EXAMPLES])  # served as they are; copies in the cache would be gone after a day


def example(name: str) -> str:
    """The file of an example picture."""
    return str(EXAMPLES / f"{name}.png")


def slider(label: str, value: Any = None) -> gr.ImageSlider:
    """Two pictures, one over the other."""
    return gr.ImageSlider(
        value, label=label, interactive=False, type="filepath", format="png", max_height=460, elem_classes="under-label"
    )


def facts(used: str = "", how: str = "") -> tuple[gr.Textbox, gr.Textbox]:
    """Where the used seed and the settings are shown."""
    seed = gr.Textbox(used, label="Seed used", interactive=False, elem_classes="seed")
    with gr.Accordion("Settings (also inside the PNG)", open=False):
        settings = gr.Textbox(
            how, label="Settings", show_label=False, container=False, interactive=False, lines=8, max_lines=18,
            buttons=["copy"], elem_classes="report",
        )  # fmt: skip
    return seed, settings


def runs(
    label: str, studio: Studio, handler: Callable[..., Any], inputs: Sequence[Any], outputs: Sequence[Any],
    buttons: tuple[gr.Button, gr.Button], visibility: Literal["public", "undocumented"] = "public",
) -> Any:  # fmt: skip
    """Let a button run a handler, one at a time for the whole page, and the other one stop it.

    Args:
        label: the endpoint's name.
        buttons: (run, stop).
        visibility: of the endpoint, in the API's pages and among the MCP tools.
    """
    run, halt = buttons
    event = run.click(
        told(handler), inputs, outputs, api_name=label, api_visibility=visibility, concurrency_id=MODEL,
        concurrency_limit=1, scroll_to_output=True, show_progress_on=list(outputs[:1]),
    )  # fmt: skip
    found = gr.State(False)
    halted = halt.click(  # past the queue, which may be full
        stopper(studio), None, found, queue=False, api_visibility="private", cancels=[event]
    )
    halted.then(tell_stopped, found, None, concurrency_limit=None, api_visibility="private")
    return event


def buttons(label: str) -> tuple[gr.Button, gr.Button]:
    """The tab's one primary button, and Stop."""
    with gr.Row():
        run = gr.Button(label, variant="primary", scale=3, min_width=140)
        halt = gr.Button("Stop", variant="stop", scale=1, min_width=80)
    return run, halt


def stopper(studio: Studio) -> Callable[..., bool]:
    """The handler of a Stop button."""

    def press_stop(request: gr.Request) -> bool:
        """Stop what you are running here; a running step is finished first."""
        return studio.stop(visitor(request))

    return press_stop


def tell_stopped(found: bool) -> None:
    """Say whether there was something to stop; only what goes through the queue can say something."""
    gr.Info("Stopped." if found else "Nothing of yours is running.", duration=3)


def visitor(request: gr.Request | None) -> str:
    """Who asks: Gradio's random name of a browser tab or a client."""
    return str(getattr(request, "session_hash", None) or "")


@contextmanager
def turn(studio: Studio, model: str | None, request: gr.Request | None, progress: gr.Progress) -> Iterator[Job]:
    """The model, for one request alone; progress goes to the page's own bar, and what the library warned of is shown.

    Raises:
        Stopped, ModelLoadError: as `Studio.job`.
    """

    def tell(done: tuple[int, int] | None, what: str) -> None:
        progress(0.0 if done is None else done, desc=what)

    with studio.job(model, visitor(request), tell) as job:
        yield job
    warn(job.warnings)


def keep(picture: Image.Image, studio_name: str, extra: Mapping[str, Any] | None = None) -> str:
    """A picture as a PNG file that says how it was made; the file goes with the page's cache."""
    settings = {**picture.info.get("diffgraft", {}), **(extra or {}), "model": shown_name(studio_name)}
    name = f"{settings.get('task', 'picture')}-{settings.get('seed', 0)}.png"
    return processing_utils.save_bytes_to_cache(encode_png(picture, settings), name, utils.get_upload_folder())


def keep_plain(picture: Image.Image, name: str) -> str:
    """A picture that is no result: an overlay, an input shown again."""
    data = io.BytesIO()
    picture.save(data, "PNG")
    return processing_utils.save_bytes_to_cache(data.getvalue(), f"{name}.png", utils.get_upload_folder())


def as_json(settings: Any) -> str:
    """Settings for reading."""
    return json.dumps(settings, indent=2, ensure_ascii=False, default=str)

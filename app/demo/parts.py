"""What the tabs have in common: settings, buttons, and files that carry their settings."""

from __future__ import annotations

import inspect
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio import processing_utils, utils
from PIL import Image

from ..metadata import encode_png
from ..models import shown_name
from .checks import GUIDANCE, PICTURES, SIDE, STEPS
from .examples import example
from .preview import as_html
from .studio import Job, Studio
from .told import told, warn
from .uploads import unread

MODEL = "model"
FILES = ("picture", "mask", "content", "style", "drawing", "model")
TICK = 0.7
"""Seconds between two looks at what is being made."""
Shown = list[tuple[str, str]]
"""Pictures for a gallery: (file, caption)."""


@dataclass(frozen=True)
class Knobs:
    """The settings that every tab folds away."""

    steps: gr.Slider
    guidance: gr.Slider
    count: gr.Slider
    seed: gr.Number


@dataclass(frozen=True)
class Laid:
    """What a tab tells the page of itself.

    Attributes:
        name: of the tab. made: where its results are. events: after which there are new ones.
        fields: by the argument of the handler that they fill.
        needs: what is of no use where a model cannot do it: (component, plugin or task).
        note: where it is said what the model cannot do.
        knobs: of which steps and guidance follow the model; None where they do not.
        techniques: where techniques are chosen. lacking: what cannot be chosen there, with the reasons.
        again: the event that follows when the fields were filled.
    """

    name: str
    made: Any
    events: list[Any]
    fields: dict[str, Any]
    needs: list[tuple[Any, str]]
    note: gr.HTML
    knobs: Knobs | None = None
    techniques: gr.Dropdown | None = None
    lacking: gr.State | None = None
    again: dict[str, Any] | None = None


def knobs(*, steps: int, guidance: float, seed: int, count: int = 1) -> Knobs:
    """Steps, guidance, number of pictures and seed, in a closed drawer."""
    with gr.Accordion("Seed and steps", open=False):
        with gr.Row():
            start = gr.Number(seed, label="Seed", info="-1: a new one each time", precision=0, min_width=120)
            pictures = gr.Slider(1, PICTURES, count, step=1, label="Pictures", min_width=120)
        with gr.Row():
            how_many = gr.Slider(1, STEPS, steps, step=1, label="Steps", min_width=180)
            strength = gr.Slider(0, GUIDANCE, guidance, step=0.1, label="Guidance", min_width=180)
    return Knobs(how_many, strength, pictures, start)


def typed(tab: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What stood in a tab's fields, for the picture's settings: texts and numbers, and no path of this machine."""
    kept = {name: value for name, value in given.items() if isinstance(value, (str, int, float)) and name not in FILES}
    return {"page": {"tab": tab, **kept}}


def note() -> gr.HTML:
    """Where a tab says what the chosen model cannot do."""
    return gr.HTML(visible=False, elem_classes="dg-note")


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


class Runs:
    """What a tab's buttons run, one at a time for the whole page; what Stop ends, and what is seen meanwhile."""

    def __init__(self, studio: Studio, halt: gr.Button) -> None:
        self.studio, self.halt, self.events = studio, halt, list[Any]()
        self.look, self.timer = gr.HTML(elem_classes="dg-look-place"), gr.Timer(TICK, active=False)

    def on(self, trigger: Any, handler: Callable[..., Any], inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
        """Let a trigger, such as `button.click`, run a handler; programs have `offer`."""
        trigger(lambda: gr.Timer(active=True), None, self.timer, **_QUIET)  # first: the page sends them in this order
        event = trigger(
            told(handler), list(inputs), list(outputs), api_name=f"{handler.__name__}_drawn",
            api_visibility="undocumented", concurrency_id=MODEL, concurrency_limit=1, scroll_to_output=True,
            show_progress_on=list(outputs[:1]),
        )  # fmt: skip
        event.then(self._over, None, [self.look, self.timer], **_QUIET)
        self.events.append(event)
        return event

    @staticmethod
    def offer(handler: Callable[..., Any], outputs: Sequence[Any]) -> None:
        """The same for programs, under the handler's name and with its own defaults instead of what the page shows."""
        given = inspect.signature(handler).parameters.values()
        inputs = [_twin(one) for one in given if one.name not in ("drawing", "request", "progress")]
        gr.Button(visible=False).click(
            told(handler), inputs, list(outputs), api_name=handler.__name__, concurrency_id=MODEL, concurrency_limit=1
        )

    def close(self) -> list[Any]:
        """Wire Stop and the look; gives the events."""

        def press_stop(request: gr.Request) -> bool:
            """Stop what you are running here; a running step is finished first."""
            return self.studio.stop(visitor(request))

        def glance(request: gr.Request) -> str:
            return as_html(*self.studio.seen(visitor(request)))

        found = gr.State(False)
        halted = self.halt.click(  # past the queue, which may be full
            press_stop, None, found, queue=False, api_visibility="private", cancels=self.events
        )
        halted.then(tell_stopped, found, None, concurrency_limit=None, api_visibility="private")
        halted.then(self._over, None, [self.look, self.timer], **_QUIET)
        self.timer.tick(glance, None, self.look, **_QUIET)
        return self.events

    @staticmethod
    def _over() -> tuple[str, gr.Timer]:
        return "", gr.Timer(active=False)


def _twin(argument: inspect.Parameter) -> Any:
    """A field that nobody sees, for an argument of a handler."""
    default = None if argument.default is inspect.Parameter.empty else argument.default
    if argument.name in FILES[:4]:
        return unread(gr.Image(type="filepath", visible=False))
    if isinstance(default, bool):
        return gr.Checkbox(default, visible=False)
    if isinstance(default, (int, float)) or argument.name in ("seed", "width", "height"):
        return gr.Number(default, visible=False)
    return gr.Textbox(default, visible=False)


def buttons(label: str) -> tuple[gr.Button, gr.Button]:
    """The tab's one primary button, and Stop."""
    with gr.Row():
        run = gr.Button(label, variant="primary", scale=3, min_width=140)
        halt = gr.Button("Stop", variant="stop", scale=1, min_width=80)
    return run, halt


def tell_stopped(found: bool) -> None:
    """Say whether there was something to stop; only what goes through the queue can say something."""
    gr.Info("Stopped." if found else "Nothing of yours is running.", duration=3)


_QUIET: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}


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

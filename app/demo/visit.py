"""What was made in this visit: a strip of pictures, each of which can go on into Erase or Style."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from ...attention.errors import SettingError
from .parts import Laid, Shown
from .restore import restored
from .told import told

MOST = 24
_SOON: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}


def strip(tabs: Sequence[Laid], switch: gr.Tabs) -> None:
    """Lay the strip out below the tabs, and wire it to them."""
    by_name = {tab.name: tab for tab in tabs}
    with gr.Accordion("This visit", open=True), gr.Row():
        with gr.Column(scale=7, min_width=300):
            made = gr.Gallery(
                label="What you made, the newest first", columns=8, height="auto", interactive=False, format="png",
                allow_preview=False, buttons=[], elem_classes="dg-strip",
            )  # fmt: skip
            chosen, what = gr.State(0), gr.Markdown("Nothing yet.")
            with gr.Row():
                into_erase = gr.Button("Erase in it", size="sm", interactive=False, min_width=120)
                into_style = gr.Button("Restyle it", size="sm", interactive=False, min_width=120)
        with gr.Column(scale=3, min_width=220):
            dropped = gr.File(
                label="Settings out of a PNG", file_types=[".png"], height=150, elem_classes="dg-drop",
            )  # fmt: skip
            gr.Markdown("Drop a PNG made here, on this box or anywhere on the page: its settings come back.")
    for tab in tabs:
        for event in tab.events:
            event.success(
                remember, [made, tab.made], [made, chosen, what, into_erase, into_style], **_SOON
            )  # fmt: skip
    made.select(choose, made, [chosen, what], **_SOON)
    erase, style = by_name["erase"].fields, by_name["stylize"].fields
    for button, name, fill, into in (
        (into_erase, "erase", to_erase, [erase["picture"], erase["mask"], erase["prompt"]]),
        (into_style, "stylize", to_style, [style["content"], style["prompt"]]),
    ):  # the tab first: an editor that was never shown would not take the picture
        opened = button.click(_opener(name), None, switch, **_SOON)
        opened.then(told(fill), [made, chosen], into, **_SOON)
    fields = [field for tab in tabs for field in tab.fields.values()]

    def restore(file: str | None) -> dict[Any, Any]:
        """Put the settings of a picture back where they were typed."""
        name, values = restored(file, {tab.name: tab.fields for tab in tabs})
        updates = {by_name[name].fields[field]: value for field, value in values.items()}
        return {**updates, switch: gr.Tabs(selected=name), dropped: None}

    filled = dropped.upload(told(restore), dropped, list(dict.fromkeys([*fields, switch, dropped])), **_SOON)
    for tab in tabs:
        if tab.again:
            filled.success(**tab.again)


def remember(before: Shown | None, made: Any) -> tuple[Shown, int, str, Any, Any]:
    """Results put in front of the strip: a gallery's pictures, or the second one of a slider."""
    new = [(made[1], "made")] if isinstance(made, tuple) else list(made or [])
    kept = ([*new, *(before or [])])[:MOST]
    live = gr.update(interactive=bool(kept))
    return kept, 0, _about(kept, 0), live, live


def choose(event: gr.SelectData, made: Shown | None) -> tuple[int, str]:
    """Note which picture goes on."""
    return event.index, _about(made, event.index)


def _about(made: Shown | None, index: int) -> str:
    return f"Goes on: picture {index + 1}, {made[index][1]}." if made and index in range(len(made)) else "Nothing yet."


def _file(made: Shown | None, index: Any) -> str:
    if not made or index not in range(len(made)):
        raise SettingError("there is no such picture: make one first")
    return made[index][0]


def _opener(name: str) -> Callable[[], gr.Tabs]:
    return lambda: gr.Tabs(selected=name)


def to_erase(made: Shown | None, index: int) -> tuple[Any, None, str]:
    """The chosen picture on Erase's canvas, without a mask."""
    file = _file(made, index)
    return {"background": file, "layers": [], "composite": file}, None, ""


def to_style(made: Shown | None, index: int) -> tuple[str, str]:
    """The chosen picture as Style's content."""
    return _file(made, index), ""

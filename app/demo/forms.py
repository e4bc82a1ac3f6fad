"""Compose's forms: a drawer for each technique with its documented arguments, and buttons that change the order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr
from gradio.context import Context

from ...attention.errors import GraftError
from ..techniques import techniques
from .arguments import Argument, arguments, shown, written
from .looks import ABSENT
from .specs import PICTURES, STARTS, as_lines, read_specs
from .told import told

REDRAWING: dict[str, Any] = {"concurrency_limit": None, "api_visibility": "private", "show_progress": "hidden"}
"""For events that change the state: only those that pass the queue tell the page of it."""
_SOON: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}


def forms(specs: gr.Code, chosen: gr.Dropdown, lacking: gr.State) -> gr.State:
    """Lay the forms out; they are drawn anew where the state that is given back changes, or what the model lacks.

    Args:
        specs: the JSON list, which every form writes to. chosen: the names in it.
        lacking: what the model cannot do, with the reasons.
    """
    drawn = gr.State(0)
    triggers = [_page_load(), drawn.change, lacking.change]

    @gr.render(inputs=[specs, lacking], triggers=triggers, show_progress="hidden", queue=False)
    def draw(text: str, lacks: dict[str, str]) -> None:
        try:
            listed = read_specs(text)
        except GraftError as error:
            gr.Markdown(f"The JSON below cannot be read, so there is no form: {error}")
            return
        for place, spec in enumerate(listed):
            drawer = _drawer(place, spec, len(listed), specs, chosen, drawn)
            if spec["plugin"] in lacks:
                drawer.label, drawer.open = f"{drawer.label}: {ABSENT}", False
                drawer.elem_classes = ["dg-form", "dg-absent"]

    return drawn


def _page_load() -> Any:
    blocks = Context.root_block
    assert isinstance(blocks, gr.Blocks)
    return blocks.load


def _drawer(
    place: int, spec: dict[str, Any], count: int, specs: gr.Code, chosen: gr.Dropdown, drawn: gr.State
) -> gr.Accordion:
    name = spec["plugin"]
    first = {*STARTS.get(name, {})}
    fields = arguments(name)
    with gr.Accordion(f"{place + 1}. {name}", open=place == 0, elem_classes="dg-form") as drawer:
        gr.Markdown((techniques()[name].__doc__ or "").partition("\n")[0])
        with gr.Row():
            up = gr.Button("Up", size="sm", interactive=place > 0, min_width=60)
            down = gr.Button("Down", size="sm", interactive=place < count - 1, min_width=60)
            away = gr.Button("Remove", size="sm", min_width=60)
        for picture in PICTURES:
            if picture in spec:
                gr.Markdown(f"*{picture}*: the picture dropped below.")
        _fields([one for one in fields if one.needed or one.name in first], place, spec, specs)
        with gr.Accordion("More settings", open=False):
            _fields([one for one in fields if not (one.needed or one.name in first)], place, spec, specs)
    for button, change in (
        (up, lambda listed: _swapped(listed, place, place - 1)),
        (down, lambda listed: _swapped(listed, place, place + 1)),
        (away, lambda listed: [one for number, one in enumerate(listed) if number != place]),
    ):
        button.click(_changing(change), [specs, drawn], [specs, chosen, drawn], **REDRAWING)
    return drawer


def _fields(fields: list[Argument], place: int, spec: dict[str, Any], specs: gr.Code) -> None:
    for argument in fields:
        field = _field(argument, shown(spec, argument))
        typed = [field.input, field.blur]  # what is pasted may be told at the end only
        gr.on(typed, _writing(place, argument), [specs, field], specs, trigger_mode="always_last", **_SOON)


def _field(argument: Argument, value: Any) -> Any:
    """The component for an argument, labelled with what the docstring says."""
    label, info = argument.name.replace("_", " "), argument.about[:1].upper() + argument.about[1:]
    if argument.kind == "choice":
        choices = [("the default", ""), *((one, one) for one in argument.choices)]
        return gr.Dropdown(choices, value=value or "", label=label, info=info, interactive=True)
    if argument.kind == "switch":
        return gr.Dropdown(
            [("the default", ""), ("yes", True), ("no", False)], value=value or "", label=label, info=info
        )
    if argument.kind in ("number", "whole"):
        step = 1 if argument.kind == "whole" else 0.05
        return gr.Number(value, label=label, info=info, step=step, placeholder="the default", interactive=True)
    return gr.Textbox("" if value is None else str(value), label=label, info=info, interactive=True)


def _writing(place: int, argument: Argument) -> Callable[[str, Any], str]:
    """Put a field's value into the JSON."""

    def write(text: str, value: Any) -> str:
        listed = read_specs(text)
        if place < len(listed):
            found = written(value, argument)
            listed[place].pop(argument.name, None)
            if found is not None:
                listed[place][argument.name] = found
        return as_lines(listed)

    return told(write)


def _changing(change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Callable[..., Any]:
    """Change the list itself; the forms follow."""

    def apply(text: str, drawn: int) -> tuple[str, list[str], int]:
        listed = change(read_specs(text))
        return as_lines(listed), [spec["plugin"] for spec in listed], drawn + 1

    return told(apply)


def redrawn(text: str, drawn: int) -> tuple[list[str], int]:
    """The names in the JSON, and the forms anew, after something else has written it."""
    return [spec["plugin"] for spec in read_specs(text)], drawn + 1


def _swapped(listed: list[dict[str, Any]], one: int, other: int) -> list[dict[str, Any]]:
    if min(one, other) >= 0 and max(one, other) < len(listed):
        listed[one], listed[other] = listed[other], listed[one]
    return listed

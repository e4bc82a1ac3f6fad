"""The model menu: what is there, and what the chosen one cannot do, by its family's declaration."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from ...pipelines.families.support import unable
from ..models import FEW_STEPS, ONE_STEP, PICTUREBOOK, TRANSFORMER, embedded, suits
from ..techniques import techniques
from .looks import ABSENT
from .parts import MODEL, Laid, visitor
from .studio import Studio
from .told import told

TITLES = {
    PICTUREBOOK: "picture book",
    ONE_STEP: "picture book, one-step student",
    TRANSFORMER: "picture book, transformer edition",
    FEW_STEPS: "picture book, the transformer's four-step student",
}


def menu(studio: Studio) -> gr.Dropdown:
    """The models that this page has, and room for the name of another."""
    names = list(dict.fromkeys([studio.model, *embedded()]))
    more = "Also: a folder, a .safetensors file or a Hub id" if not studio.fixed else "This page runs these only"
    return gr.Dropdown(
        [(TITLES.get(name, name), name) for name in names], value=studio.model, label="Model", info=more,
        allow_custom_value=True, elem_classes="dg-model",
    )  # fmt: skip


def wire(which: gr.Dropdown, studio: Studio, tabs: Sequence[Laid]) -> None:
    """Let the choice of a model grey out what it cannot do, and set steps and guidance that suit it."""
    greyed = [part for tab in tabs for part, _ in tab.needs]
    notes = [tab.note for tab in tabs]
    turned = [part for tab in tabs if tab.knobs for part in (tab.knobs.steps, tab.knobs.guidance)]
    lists = [part for tab in tabs if tab.techniques for part in (tab.techniques, tab.lacking)]
    usual = [part.value for part in turned]

    def choose(name: str, request: gr.Request, progress: gr.Progress = gr.Progress()) -> list[Any]:  # noqa: B008
        """What the page looks like with another model."""
        lacks = unable(studio.denoiser(name, visitor(request), lambda done, what: progress(0.0, desc=what)))
        suited = suits(studio.check(name))
        keys = ["steps", "guidance"] * (len(turned) // 2)
        knobs = [gr.update(value=suited.get(key, value)) for key, value in zip(keys, usual, strict=True)]
        parts = [barred(part, need in lacks) for tab in tabs for part, need in tab.needs]
        listed = [gr.update(choices=offered(lacks)), lacks]
        return [*parts, *[said(tab, lacks) for tab in tabs], *knobs, *listed * (len(lists) // 2)]

    which.change(
        told(choose), which, [*greyed, *notes, *turned, *lists], concurrency_id=MODEL, concurrency_limit=1,
        api_visibility="private", show_progress_on=[which],
    )  # fmt: skip


def barred(part: Any, absent: bool) -> Any:
    """A part that is of no use on this model, or is again; a drawer is closed and says so."""
    if not isinstance(part, gr.Accordion):
        return gr.update(interactive=not absent)
    if absent:
        return gr.update(label=f"{part.label}: {ABSENT}", open=False, elem_classes=["dg-absent"])
    return gr.update(label=part.label, elem_classes=[])


def offered(lacks: Mapping[str, str]) -> list[tuple[str, str]]:
    """Every technique for a list to choose from; `looks` greys out those that are said not to work on this model."""
    return [(f"{name}: {ABSENT}" if name in lacks else name, name) for name in techniques()]


def said(tab: Laid, lacks: dict[str, str]) -> Any:
    """The note of a tab: what is greyed out there, and why; each reason once."""
    needs = dict.fromkeys(techniques() if tab.techniques else [need for _, need in tab.needs])
    reasons: dict[str, list[str]] = {}
    for need in needs:
        if need in lacks:
            reasons.setdefault(lacks[need], []).append(f"<b>{need}</b>")
    lines = "".join(f"<li>{', '.join(names)}: {html.escape(reason)}</li>" for reason, names in reasons.items())
    text = f"This model cannot do everything here:<ul>{lines}</ul>" if reasons else ""
    return gr.update(value=text + greyed_chips(lacks) if tab.techniques else text, visible=bool(reasons))


def greyed_chips(lacks: Mapping[str, str]) -> str:
    """A style for those that are chosen already: their chips have no name but that of their button, "Remove 1"."""
    chips = [f'.dg-techniques .token:has([title$=" {i}"])' for i, name in enumerate(techniques()) if name in lacks]
    return f"<style>{', '.join(chips)} {{ opacity: .55; }}</style>" if chips else ""

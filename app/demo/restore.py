"""The settings in a picture, back in the fields where they were typed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

from ...attention.errors import SettingError
from ..metadata import read_settings
from . import checks
from .drawing import from_text

FILES = ("picture", "mask", "content", "style")
"""Fields that a picture's settings do not hold."""
Fields = Mapping[str, Any]


def restored(file: str | None, tabs: Mapping[str, Fields]) -> tuple[str, dict[str, Any]]:
    """The tab that a picture was made in, and the values of its fields.

    Args:
        file: a PNG with settings; what it says is checked like anything from outside.
        tabs: the fields of each tab, by its name.
    Raises:
        MetadataError: it holds no settings. SettingError, SettingTypeError: they do not fit the page.
    """
    if not isinstance(file, str):
        raise SettingError("drop a PNG there")
    settings = read_settings(file)
    page = settings.get("page")
    page = page if isinstance(page, dict) else _guessed(settings)
    name = page.get("tab")
    if not isinstance(name, str) or name not in tabs:
        raise SettingError("the picture was made by something that has no tab here")
    said = {**settings, **page} | {key: settings[key] for key in ("seed",) if key in settings}
    said["drawing"] = page.get("drawing") or ""
    values = {
        field: fitting(component, said[field], field)
        for field, component in tabs[name].items()
        if field in said and field not in FILES and said[field] is not None
    }
    return name, values


def fitting(component: Any, value: Any, name: str) -> Any:
    """A value that a component can show.

    Raises:
        SettingError, SettingTypeError: it cannot.
    """
    if isinstance(component, gr.ImageEditor):
        text = checks.text(value, name, longest=20 * checks.LENGTH)
        return from_text(text) if text else None
    if isinstance(component, gr.Checkbox):
        return value is True
    if isinstance(component, gr.Slider):
        return checks.number(value, name, component.minimum, component.maximum)
    if isinstance(component, gr.Number):
        return checks.number(value, name, -1, 2.0**63)
    if isinstance(component, gr.Dropdown):
        known = [choice for _, choice in component.choices]
        return value if value in known else gr.skip()
    return checks.text(value, name, longest=8 * checks.LENGTH)


def _guessed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a picture that was not made on this page."""
    plugins = [spec for spec in settings.get("plugins") or () if isinstance(spec, dict)]
    by_name = {spec.get("plugin"): spec for spec in plugins}
    found: dict[str, Any] = {"tab": settings.get("task")}
    if found["tab"] != "generate":
        return found
    for field, plugin, argument in (
        ("concepts", "AttentionSegregation", "concepts"), ("never", "ConceptBlock", "concepts"),
        ("negative", "NegativeAway", "negative"),
    ):  # fmt: skip
        found[field] = _words(by_name.get(plugin, {}).get(argument))
    return found


def _words(value: Any) -> str:
    """Words with commas out of what a plugin was given."""
    members = value if isinstance(value, list) else [value] if isinstance(value, str) else []
    return ", ".join(word for word in members if isinstance(word, str))

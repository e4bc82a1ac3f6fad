"""Plugins as a person writes them down: {"plugin": "NegativeAway", "negative": "red"}."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffgraft

from ..attention.errors import GraftError, SettingError, SettingTypeError
from ..attention.pictures import expanded
from ..plugins.base import Plugin
from .images import load_image, load_mask

_FILES: Mapping[str, Callable[[Path], Any]] = {
    "mask": load_mask, "layout": load_mask, "style": load_image, "content": load_image, "image": load_image,
}  # fmt: skip
_NO_FILE = ("auto",)
"""Words that these arguments take."""


def techniques() -> dict[str, type[Plugin]]:
    """Every public plugin by name."""
    found = ((name, getattr(diffgraft, name)) for name in diffgraft.__all__)
    return {
        name: kind for name, kind in found if inspect.isclass(kind) and issubclass(kind, Plugin) and kind is not Plugin
    }


def parse(text: str) -> dict[str, Any]:
    """A spec from text: a plugin's name, or the JSON object."""
    if not text.lstrip().startswith("{"):
        return {"plugin": text.strip()}
    try:
        spec = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SettingError(f"{text[:80]!r} is not JSON: {error}") from None
    return spec


def check(spec: Any) -> None:
    """Raise what `build` would raise without opening a file.

    Raises:
        SettingError: unknown plugin or argument. SettingTypeError: not an object.
    """
    _arguments(spec)


def build(spec: Mapping[str, Any], folder: Path = Path()) -> Plugin:
    """The plugin of a spec.

    Args:
        spec: `{"plugin": name, ...}`; masks, layouts, styles and contents are paths, or lists or mappings of them.
        folder: what relative paths start from.

    Raises:
        GraftError: unknown plugin or argument, unusable value or picture.
    """
    kind, arguments = _arguments(spec)
    arguments = with_files(arguments, lambda name, path: _FILES[name](folder / expanded(path)))
    try:
        return kind(**arguments)
    except GraftError:
        raise
    except (TypeError, ValueError) as error:
        raise SettingError(f"{kind.__name__}: {error}") from None


def with_files(spec: Mapping[str, Any], change: Callable[[str, str], Any]) -> dict[str, Any]:
    """A spec with `change(argument, path)` in the place of every path."""

    def changed(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [changed(name, one) for one in value]
        if isinstance(value, Mapping):
            return {key: changed(name, one) for key, one in value.items()}
        return change(name, value) if isinstance(value, str) and value not in _NO_FILE else value

    return {name: changed(name, value) if name in _FILES else value for name, value in spec.items()}


def _arguments(spec: Any) -> tuple[type[Plugin], dict[str, Any]]:
    if not isinstance(spec, Mapping) or not isinstance(spec.get("plugin"), str):
        raise SettingTypeError('a plugin is an object such as {"plugin": "NegativeAway", "negative": "red"}')
    known = techniques()
    name = spec["plugin"]
    if name not in known:
        raise SettingError(f"no plugin {name!r}{_nearest(name, known)}; there are {', '.join(known)}")
    arguments = {key: value for key, value in spec.items() if key != "plugin"}
    signature = inspect.signature(known[name])
    for argument in arguments:
        if argument not in signature.parameters:
            raise SettingError(
                f"{name} has no argument {argument!r}{_nearest(argument, signature.parameters)}; "
                f"it takes {', '.join(signature.parameters)}"
            )
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise SettingError(f"{name}: {error}") from None
    return known[name], arguments


def _nearest(name: str, among: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(among), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""

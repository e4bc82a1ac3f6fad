"""Techniques as they come out of the page: a JSON list whose pictures are uploads, never a path on this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...attention.errors import SettingError
from ..techniques import check
from . import checks
from .told import warn
from .uploads import mask, picture

MOST = 6
UPLOAD = "upload"
PICTURES = ("mask", "style")
NEVER = ("image", "layout", "content", "generator")
STARTS: Mapping[str, Mapping[str, Any]] = {
    "AttentionDistillation": {"style": UPLOAD, "rate": 0.05},
    "AttentionSegregation": {"concepts": ["house", "tree", "star"]},
    "ConceptBlock": {"concepts": ["tree"]},
    "NegativeAway": {"negative": "blue"},
    "SelfAttentionRedirection": {"mask": UPLOAD, "scale": 3.0},
    "StartpointFilter": {"alpha": 0.8, "sigma": 0.3},
    "StyleInjection": {"style": UPLOAD, "strength": 0.6},
}


def starting_specs(names: list[str]) -> str:
    """The specs of techniques with settings to start from, as JSON, one a line."""
    return as_lines([{"plugin": name, **STARTS.get(name, {})} for name in names])


def rewritten(names: list[str], specs: str, lacking: Mapping[str, str] | None = None) -> str:
    """The specs after the choice of techniques changed: what was written for the others stays.

    Args:
        lacking: what the chosen model cannot do, with the reasons; it is told and does not come in.
    """
    known: dict[str, Any] = {spec["plugin"]: spec for spec in read_specs(specs)}
    refused = [name for name in names if name in (lacking or {}) and name not in known]
    warn([f"{name}: {lacking[name]}" for name in refused] if lacking else [])
    kept = [name for name in names if name not in refused]
    return as_lines([known.get(name) or {"plugin": name, **STARTS.get(name, {})} for name in kept])


def as_lines(specs: list[dict[str, Any]]) -> str:
    """Specs as a JSON list, one a line."""
    return "[\n" + ",\n".join(f"  {json.dumps(spec, ensure_ascii=False)}" for spec in specs) + "\n]"


def read_specs(written: Any) -> list[dict[str, Any]]:
    """Specs of plugins out of a request.

    Raises:
        SettingError, SettingTypeError: not a JSON list of at most `MOST` known plugins with known arguments.
    """
    written = checks.text(written, "the list of techniques", longest=8 * checks.LENGTH) or "[]"
    try:
        specs = json.loads(written)
    except (ValueError, RecursionError) as error:
        raise SettingError(f"the list of techniques is not JSON: {error}") from None
    if not isinstance(specs, list) or len(specs) > MOST:
        raise SettingError(f"the techniques are a JSON list of at most {MOST} objects")
    for spec in specs:
        check(spec)
    return specs


def with_uploads(spec: Mapping[str, Any], uploads: Mapping[str, Any]) -> dict[str, Any]:
    """A spec with its pictures: uploads only, never a path on this machine.

    Raises:
        SettingError: a path or an object instead of "upload". ImageError: the upload is missing or unusable.
    """
    filled = dict(spec)
    for argument in NEVER:
        if argument in spec:
            raise SettingError(f"{spec['plugin']}: {argument!r} cannot be given on this page, but in Python")
    for argument in PICTURES:
        if argument in spec:
            if spec[argument] != UPLOAD:
                raise SettingError(f'{spec["plugin"]}: write "{argument}": "{UPLOAD}" and drop the picture below')
            given = uploads[argument]
            filled[argument] = mask(given) if argument == "mask" else picture(given, f"the {argument}")
    return filled

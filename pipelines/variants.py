"""Which forms of its weights a checkpoint's folder holds: plain ones, or variants such as fp16."""

from __future__ import annotations

import re
from pathlib import Path

from ..attention.errors import ModelLoadError

_NAME = re.compile(r"[\w-]+?(?:\.(\w+))?(?:-\d{5}-of-\d{5})?(?:\.(\w+))?\.safetensors")
PLAIN = ""


def variant_for(folder: Path, wanted: str | None) -> str | None:
    """The variant to open a pipeline's folder with: the wanted one, or the only one where there are no plain weights.

    Raises:
        ModelLoadError: there is no such variant, or several and no plain weights; the message names them.
    """
    parts = _parts(folder)
    found = sorted(set().union(*parts.values()) - {PLAIN})
    if wanted is not None:
        if parts and wanted not in found:
            there = ", ".join(map(repr, found)) or "none"
            raise ModelLoadError(f"{str(folder)!r} has no variant {wanted!r}; there is {there}")
        return wanted
    bare = [kinds for kinds in parts.values() if PLAIN not in kinds]
    if not bare:
        return None
    common = sorted(set.intersection(*bare))
    if len(common) == 1:
        return common[0]
    raise ModelLoadError(
        f"{str(folder)!r} has its weights as the variants {', '.join(map(repr, found))} only: choose one, "
        f"variant={found[0]!r} (--variant {found[0]})"
    )


def _parts(folder: Path) -> dict[str, set[str]]:
    """Forms of the weights by component."""
    parts: dict[str, set[str]] = {}
    for path in folder.glob("*/*.safetensors"):
        match = _NAME.fullmatch(path.name)
        if match:
            parts.setdefault(path.parent.name, set()).add(match[1] or match[2] or PLAIN)
    return parts

"""Measurements kept in a file: a table that was cut goes on where it stopped. And the model that a table is about."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...pipelines.families.latents import unsaid_size
from ..models import ONE_STEP, PICTUREBOOK, STUDENTS, open_model, suits
from .judge import WEIGHTS

KEPT = Path("outputs/bench")
"""Where tables keep what they measured, under the folder they are run in."""


class Rows:
    """A file of JSON lines, {"key": ..., "value": ...}, that grows by one whole line at a time.

    Args:
        path: made with its folder at the first line; a line that was cut is measured again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        self._known = {name: value for line in lines for name, value in _read(line)}
        self._cut = bool(lines and lines[-1])

    def remember(self, key: Mapping[str, Any], make: Callable[[], Any]) -> Any:
        """What `make` gives, as JSON holds it; made once for each key, over all runs.

        Args:
            key: everything that the value depends on, in plain values.
        """
        name = json.dumps(key, sort_keys=True)
        if name not in self._known:
            line = json.dumps({"key": key, "value": make()})  # a value keeps its order: tables print in it
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write("\n" * self._cut + line + "\n")
            self._cut = False
            self._known[name] = json.loads(line)["value"]
        return self._known[name]


def _read(line: bytes) -> list[tuple[str, Any]]:
    try:
        row = json.loads(line)
        return [(json.dumps(row["key"], sort_keys=True), row["value"])]
    except (ValueError, TypeError, KeyError):
        return []


def fingerprint(pipe: Any) -> dict[str, str]:
    """Of the weights of a model and of its judge: another model's measurements are not this one's."""
    judge = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()[:16] if WEIGHTS.exists() else ""
    return {"model": weights_digest(pipe), "judge": judge}


def weights_digest(pipe: Any, values: int | None = None) -> str:
    """Of a pipeline's weights.

    Args:
        values: so many of each tensor, evenly spread, where a large model is told from others in a moment; None is all.
    """
    digest = hashlib.sha256()
    for part in pipe.components.values():
        for tensor in part.state_dict().values() if isinstance(part, torch.nn.Module) else ():
            some = tensor if values is None else tensor.flatten()[:: max(1, tensor.numel() // values)]
            digest.update(some.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def subject(model: Path | None = None, *, one_step: bool = False) -> Any:
    """The model that a table is about, quiet, on a GPU if there is one.

    Args:
        model: a folder that `save_pretrained` wrote, or the name of an embedded model; None is the picture book.
        one_step: the embedded model's student.
    """
    name = str(model or (ONE_STEP if one_step else PICTUREBOOK))
    pipe: Any = open_model(name, dtype="float32", device="cuda" if torch.cuda.is_available() else "cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Pace(NamedTuple):
    """Steps of a table's pictures, and their guidance as most pipelines count it: at most 1 is none."""

    steps: int
    guidance: float


def pace(model: Path | None, steps: int, guidance: float) -> Pace:
    """How a table draws: its own steps and guidance, or those of an embedded student, which knows no others."""
    suited = suits(str(model)) if str(model) in STUDENTS else {}
    return Pace(suited.get("steps", steps), suited.get("guidance", guidance))


def drawing(pipe: Any, steps: int, guidance: float) -> dict[str, Any]:
    """Arguments of a pipeline's call, its size among them where it has to be told.

    Args:
        guidance: as most pipelines count it, 1 for none; Z-Image's count from 0.
    """
    counted = max(guidance - 1, 0.0) if type(pipe).__name__.startswith("ZImage") else guidance
    return {"num_inference_steps": steps, "guidance_scale": counted, **unsaid_size(pipe)}


def scale_of(full: bool) -> str:
    """What a table says of its own size."""
    return "full" if full else "quick"

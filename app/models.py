"""Models as a person names them: the embedded ones by name, any other by path or Hub id."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import torch

from ..attention.errors import ModelLoadError, SettingError
from ..attention.pictures import expanded
from ..pipelines.load import check, load
from ..pipelines.picturebook import FEW_STEPS as STUDENT
from ..pipelines.picturebook import TRANSFORMER as FLOW
from ..pipelines.picturebook import picturebook

PICTUREBOOK = "picturebook"
ONE_STEP = "picturebook-one-step"
TRANSFORMER = "picturebook-transformer"
FEW_STEPS = "picturebook-transformer-few-steps"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SUITS: Mapping[str, Mapping[str, Any]] = {
    PICTUREBOOK: {"guidance": 2.5},
    ONE_STEP: {"guidance": 0.0, "steps": 1},
    TRANSFORMER: {"guidance": 1.5},  # its pipeline counts from 0: others would call it 2.5
    FEW_STEPS: {"guidance": 0.0, "steps": 4},
}
EMBEDDED = tuple(_SUITS)
STUDENTS, _FLOWS = (ONE_STEP, FEW_STEPS), (TRANSFORMER, FEW_STEPS)


def open_model(
    name: str = PICTUREBOOK, *, device: str = "auto", dtype: str = "auto", revision: str | None = None,
    variant: str | None = None,
) -> Any:  # fmt: skip
    """A pipeline on a device.

    Args:
        name: "picturebook", "picturebook-one-step", "picturebook-transformer", "picturebook-transformer-few-steps", a
            folder, a `.safetensors` file, or a Hub id.
        device: "auto" takes an accelerator if there is one.
        dtype: "auto" is float32 on a CPU and float16 elsewhere.
        revision: of a Hub id. variant: of the weights' files, such as "fp16".

    Raises:
        ModelLoadError: the model cannot be loaded, or its name is nearly an embedded one's. SettingError: no such
            device or dtype.
    """
    place = find_device(device)
    kind = find_dtype(dtype) or (torch.float32 if place.type == "cpu" else torch.float16)
    if name in EMBEDDED:
        return picturebook(one_step=name in STUDENTS, transformer=name in _FLOWS, dtype=kind, device=place)
    _check_spelling(name)
    return load(name, dtype=kind, device=place, revision=revision, variant=variant)


def check_model(name: str, variant: str | None = None) -> None:
    """Raise what can be said about a model without opening it.

    Raises:
        ModelLoadError: no such file or folder, a pickle, no checkpoint, or nearly an embedded model's name.
    """
    if name not in EMBEDDED:
        _check_spelling(name)
        check(name, variant)


def _check_spelling(name: str) -> None:
    """Nearly an embedded model's name is a slip, which the Hub would only call unknown."""
    near = difflib.get_close_matches(name, EMBEDDED, n=1, cutoff=0.8)
    if near and not expanded(name).exists():
        raise ModelLoadError(f"there is no model {name!r}; did you mean {near[0]}? Embedded: {', '.join(embedded())}")


def denoiser_of(name: str) -> str | None:
    """The class of a model's denoiser, without opening the model; None where only opening tells."""
    if name in EMBEDDED:
        return "ZImageTransformer2DModel" if name in _FLOWS else "UNet2DConditionModel"
    try:
        parts = json.loads((expanded(name) / "model_index.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    found = [parts.get(part) for part in ("unet", "transformer")] if isinstance(parts, dict) else []
    return next((str(part[1]) for part in found if isinstance(part, list) and len(part) == 2 and part[1]), None)


def embedded() -> tuple[str, ...]:
    """The embedded models that this installation has."""
    needed = {TRANSFORMER: FLOW / "model_index.json", FEW_STEPS: STUDENT / "config.json"}
    return tuple(name for name in EMBEDDED if name not in needed or needed[name].is_file())


def find_dtype(name: str) -> torch.dtype | None:
    """The dtype of that name; "auto" is None."""
    if name != "auto" and name not in DTYPES:
        raise SettingError(f"dtype {name!r}: must be auto, {', '.join(DTYPES)}")
    return DTYPES.get(name)


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" is the accelerator if there is one."""
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise SettingError(f"device {name!r} cannot be used here; try auto or cpu") from None
    return device


def suits(name: str) -> dict[str, Any]:
    """Settings that suit a model where the user gave none."""
    return dict(_SUITS.get(name, {}))


def shown_name(name: str) -> str:
    """The name for metadata: a path is cut down to its last part."""
    return PurePath(name.replace("\\", "/")).name if name.count("/") != 1 or name.startswith((".", "/", "~")) else name

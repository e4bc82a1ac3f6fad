"""Open any diffusers checkpoint without running what it contains: safetensors only, no pickle, no remote code."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError

from ..attention.errors import ModelLoadError, SettingError, SettingTypeError
from ..attention.pictures import expanded
from .single_file import open_file
from .variants import variant_for

if TYPE_CHECKING:  # diffusers imports its pipelines when they are first asked for; importing diffgraft must not ask
    from diffusers import DiffusionPipeline

PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def load(
    model: str | os.PathLike[str],
    *,
    pipeline: type[DiffusionPipeline] | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    variant: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> Any:
    """Load a diffusers pipeline from a folder, a `.safetensors` file or a Hub id.

    Args:
        model: the folder that `save_pretrained` wrote, one file with all weights, or "owner/name". `~` is the home
            folder.
        pipeline: the class that is wanted; another one found is an error. Default: the one that the checkpoint names.
        dtype: of the weights; None leaves diffusers' default, float32.
        device: where to put it; None leaves it on the CPU.
        revision: branch, tag or commit of a Hub id.
        variant: of the weights' files, such as "fp16"; None takes the plain ones, or a folder's only variant.
        trust_remote_code: run Python code out of the repository. Needs `revision` to be a full commit, so that what was
            read is what runs.
        options: passed on to `from_pretrained` (components, `local_files_only=True` ...).

    Raises:
        ModelLoadError: missing, offline, gated, pickled, damaged, or not a pipeline of the wanted class.
        SettingError: `trust_remote_code` without a pinned commit.
    """
    if trust_remote_code and not _COMMIT.fullmatch(revision or ""):
        raise SettingError(
            "trust_remote_code runs code from the repository: read it, then pin what you read with "
            "revision=<the full 40-digit commit>"
        )
    if not isinstance(model, (str, os.PathLike)):
        raise SettingTypeError(f"a {type(model).__name__} is no path and no Hub id")
    from diffusers import DiffusionPipeline

    wanted = pipeline or DiffusionPipeline
    path = expanded(model)
    options |= {"dtype": dtype} if dtype is not None else {}
    try:
        check(model, variant)
        if _is_file(path):
            pipe = open_file(path, wanted, options)
        else:
            variant = variant_for(path, variant) if path.is_dir() else variant
            options |= {} if variant is None else {"variant": variant}
            pipe = DiffusionPipeline.from_pretrained(
                str(path), use_safetensors=True, revision=revision, trust_remote_code=trust_remote_code, **options
            )
    except (ModelLoadError, SettingError):
        raise
    except Exception as error:
        raise ModelLoadError(_reason(str(model), error)) from error
    if not isinstance(pipe, wanted):
        raise ModelLoadError(f"{str(model)!r} is a {type(pipe).__name__}; this needs a {wanted.__name__}")
    return pipe if device is None else pipe.to(device)


def check(model: str | os.PathLike[str], variant: str | None = None) -> None:
    """Raise what can be said about a file or folder before diffusers opens it; of a Hub id, nothing.

    Raises:
        ModelLoadError: missing, pickled, no checkpoint, or without this variant.
    """
    path = expanded(model)
    try:
        if _is_file(path):
            _check_file(path)
        else:
            _check_folder(path, str(model))
            if path.is_dir():
                variant_for(path, variant)
    except OSError as error:
        raise ModelLoadError(f"{str(model)[:200]!r} cannot be opened: {error.strerror}") from None


def _is_file(path: Path) -> bool:
    return path.is_file() or path.suffix in (*PICKLES, ".safetensors")


def _check_file(path: Path) -> None:
    if path.suffix in PICKLES:
        raise ModelLoadError(
            f"{path.name} is a pickle, which can run code when it is opened; convert it to .safetensors, "
            "or use a repository that has it"
        )
    if path.suffix != ".safetensors":
        raise ModelLoadError(f"{path.name} is not a checkpoint; expected a folder, a .safetensors file or a Hub id")
    if not path.exists():
        raise ModelLoadError(f"{str(path)!r} does not exist")


def _check_folder(path: Path, name: str) -> None:
    if not path.is_dir():
        if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise ModelLoadError(f"{name!r} does not exist")
        return
    index = path / "model_index.json"
    if not index.is_file():
        single = path / "config.json"
        what = f" (it is a single {_class_name(single)})" if single.is_file() else ""
        raise ModelLoadError(f"{name!r} is not a pipeline folder: model_index.json is missing{what}")
    if not _class_name(index):
        raise ModelLoadError(f"{name!r}: model_index.json does not name a pipeline class")
    pickled = [p for p in path.glob("*/*") if p.suffix in PICKLES and not any(p.parent.glob("*.safetensors"))]
    if pickled:
        raise ModelLoadError(
            f"{name!r} has {pickled[0].parent.name}/{pickled[0].name} only as a pickle, which can run code when it is "
            "opened; convert it to .safetensors"
        )


def _class_name(index: Path) -> str:
    try:
        return str(json.loads(index.read_text("utf-8")).get("_class_name", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def _reason(name: str, error: Exception) -> str:
    chain = list(_chain(error))

    def caused(*kinds: type[BaseException]) -> bool:
        return any(isinstance(e, kinds) for e in chain)

    if caused(GatedRepoError):
        return f"{name!r} is gated: accept its licence on its page, then log in with `hf auth login`"
    if caused(RevisionNotFoundError):
        return f"{name!r} has no such revision"
    if caused(HFValidationError):
        return f"{name!r} is neither a folder here nor a Hub id (owner/name)"
    if caused(OfflineModeIsEnabled, LocalEntryNotFoundError) or any("Connect" in type(e).__name__ for e in chain):
        return f"{name!r} is not on this machine and the Hub cannot be reached; give a folder, or go online to fetch it"
    if caused(RepositoryNotFoundError):
        return f"{name!r} is not on the Hub, or is private: check the spelling, or log in with `hf auth login`"
    if caused(SafetensorError):
        return f"{name!r} has a damaged weights file; fetch it again ({_short(error)})"
    if "trust_remote_code" in str(error):
        return f"{name!r} wants to run code of its own; read it, then pass trust_remote_code=True and revision=<commit>"
    if caused(EntryNotFoundError) or "safetensors" in str(error):
        return f"{name!r} lacks a file that is needed, as safetensors: {_short(error)}"
    return f"{name!r} cannot be loaded: {_short(error)}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

"""How a model is called: one table of families, and the adapter that reads it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ...attention.errors import UnsupportedPipelineError
from .base import Adapter
from .declared import DeclaredAdapter
from .family import Family, Refused, names_of
from .modular import is_modular
from .table import FAMILIES


def adapters_for(pipe: Any) -> list[Adapter]:
    """One adapter for each of a pipeline's denoisers, the first one it runs first.

    Raises:
        UnsupportedPipelineError: not a diffusers pipeline, or a denoiser that nobody declared, or that is refused.
    """
    found = [(name, getattr(pipe, name, None)) for name in ("unet", "transformer", "transformer_2")]
    held = [(name, _bare(module)) for name, module in found if isinstance(_bare(module), nn.Module)]
    if not held:
        raise _unknown(pipe, None, "; call load_components() first" if is_modular(pipe) else "")
    family = _family(pipe, held[0][1])
    if is_modular(pipe) and not family.modular:
        raise _unserved(pipe, held[0][1])
    adapters: list[Adapter] = []
    for name, denoiser in held:
        if name in family.denoisers:
            kind = family.adapter
            adapter = DeclaredAdapter(pipe, denoiser, _family(pipe, denoiser)) if kind is None else kind(pipe, denoiser)
            adapter.modular = family.modular
            if adapters:
                adapter.layers = [replace(layer, name=f"{name}.{layer.name}") for layer in adapter.layers]
            adapters.append(adapter)
    if not adapters:
        raise _unknown(pipe, held[0][1])
    return adapters


def adapter_for(pipe: Any) -> Adapter:
    """The adapter for a pipeline's first denoiser, compiled or not; see `adapters_for`."""
    return adapters_for(pipe)[0]


def _family(pipe: Any, denoiser: nn.Module) -> Family:
    """What is said of this very class; of a subclass that somebody else made, what is said of the nearest base."""
    said = next((FAMILIES[name] for name in names_of(denoiser) if name in FAMILIES), None)
    if isinstance(said, Refused):
        name = type(denoiser).__name__
        raise UnsupportedPipelineError(f"{type(pipe).__name__} with {name} is not supported: {said.reason}")
    if said is None:
        raise _unknown(pipe, denoiser)
    return said


def _bare(module: Any) -> Any:
    return getattr(module, "_orig_mod", module)  # torch.compile(unet) wraps it


def _unserved(pipe: Any, denoiser: nn.Module) -> UnsupportedPipelineError:
    served = ", ".join(name for name, said in FAMILIES.items() if isinstance(said, Family) and said.modular)
    return UnsupportedPipelineError(
        f"{type(pipe).__name__} is a modular pipeline with {type(denoiser).__name__}, and nobody has said what its "
        f"text block makes: load it with diffusers.DiffusionPipeline.from_pretrained. Modular pipelines on {served} "
        "are edited"
    )


def _unknown(pipe: Any, denoiser: nn.Module | None, more: str = "") -> UnsupportedPipelineError:
    found = type(pipe).__name__ + (f" with {type(denoiser).__name__}" if denoiser is not None else "")
    names = ", ".join(name for name, said in FAMILIES.items() if isinstance(said, Family))
    more = more if denoiser is None else (
        f'; if its text meets the image in one of the usual ways, say so: diffgraft.declare_family('
        f'"{type(denoiser).__name__}", diffgraft.Family(...))'
    )  # fmt: skip
    return UnsupportedPipelineError(f"{found} is not supported; diffgraft edits pipelines on {names}{more}")

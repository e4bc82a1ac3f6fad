"""Checkpoints that are one file: what is in it by the names of its tensors, and what has to come from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..attention.errors import ModelLoadError

_PIPELINES = {
    "xl": "StableDiffusionXLPipeline", "sd3": "StableDiffusion3Pipeline", "flux": "FluxPipeline",
    "v1": "StableDiffusionPipeline", "v2": "StableDiffusionPipeline", "inpainting": "StableDiffusionInpaintPipeline",
}  # fmt: skip
"""By the beginning of what diffusers calls the kind of a file."""
_TEXTS = ("cond_stage_model.", "conditioner.embedders.", "text_encoders.")
_VAES = ("first_stage_model.", "vae.")
_DENOISERS = {"sd3": "transformer=SD3Transformer2DModel", "flux": "transformer=FluxTransformer2DModel"}


def open_file(path: Path, pipeline: Any, options: Mapping[str, Any]) -> Any:
    """The pipeline of one `.safetensors` file.

    Args:
        path: the file.
        pipeline: its class, or DiffusionPipeline to go by the file.
        options: of `from_single_file`: `config`, components that the file lacks ...
    Raises:
        ModelLoadError: no whole pipeline, or something of it has to be given; the message says how.
    """
    import diffusers

    tensors = _shapes(path)
    _refuse_lora(path, tensors)
    kind, repository = _kind(tensors)
    name = next((found for start, found in _PIPELINES.items() if kind.startswith(start)), None)
    if not hasattr(pipeline, "from_single_file"):
        if name is None or (kind == "v1" and not any(key.startswith("model.diffusion_model.") for key in tensors)):
            raise ModelLoadError(
                f"{path.name} is a single file: say what it is with pipeline=StableDiffusionPipeline or alike"
            )
        pipeline = getattr(diffusers, name)
    _need_the_rest(path, tensors, kind, repository, options)
    try:
        return pipeline.from_single_file(str(path), **options)
    except Exception as error:
        if "config" not in options and _offline(error):
            raise ModelLoadError(
                f"{path.name} holds weights only; its configuration comes from {repository!r} on the Hub, which is not "
                f"on this machine: go online once, or give config=<a folder with that pipeline's configuration>"
            ) from error
        raise


def _shapes(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in file.keys()}  # noqa: SIM118


def _kind(tensors: Mapping[str, torch.Tensor]) -> tuple[str, str]:
    """What diffusers takes the file for, and the repository that its configuration comes from."""
    from diffusers.loaders import single_file_utils as utils

    try:
        kind = utils.infer_diffusers_model_type(dict(tensors))
    except Exception:  # it expects tensors beside those that it has seen
        return "", ""
    return kind, str(utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS[kind]["pretrained_model_name_or_path"])


def _refuse_lora(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    if any("lora_" in key or ".lora." in key for key in tensors):
        raise ModelLoadError(
            f"{path.name} is a LoRA, not a model: open its model, then pipe.load_lora_weights({path.name!r})"
        )


def _need_the_rest(
    path: Path, tensors: Mapping[str, Any], kind: str, repository: str, options: Mapping[str, Any]
) -> None:
    """Many files hold a denoiser alone: SDXL's are mostly whole, those of SD3 and FLUX mostly not."""
    given = {name.rstrip("_23") for name in options}
    texts = any(key.startswith(_TEXTS) for key in tensors) or "text_encoder" in given
    vae = any(key.startswith(_VAES) for key in tensors) or "vae" in given
    lacks = [name for name, there in (("text encoders", texts), ("autoencoder", vae)) if not there]
    if not lacks:
        return
    family = next((start for start in _DENOISERS if kind.startswith(start)), "")
    denoiser = _DENOISERS.get(family, "unet=UNet2DConditionModel")
    raise ModelLoadError(
        f"{path.name} has no {' and no '.join(lacks)}: open the whole model with these weights in it, "
        f"dg.load({repository!r}, {denoiser}.from_single_file({path.name!r})), or give the missing parts by name, "
        "text_encoder=..., vae=..."
    )


def _offline(error: BaseException | None) -> bool:
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    while error is not None:
        if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)) or "Connect" in type(error).__name__:
            return True
        error = error.__cause__ or error.__context__
    return False

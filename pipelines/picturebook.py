"""The embedded model: a small real text-to-image pipeline, trained for this project on a picture-book world."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from ..attention.errors import ModelLoadError, SettingTypeError
from .load import load

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, ZImagePipeline

PICTUREBOOK = Path(__file__).parent.parent / "assets" / "picturebook"
ONE_STEP = PICTUREBOOK / "one-step"  # what the student has of its own: its denoiser and scheduler
TRANSFORMER = PICTUREBOOK.with_name("picturebook-transformer")
FEW_STEPS = TRANSFORMER / "few-steps"  # its student's denoiser; the scheduler is shared too


@overload
def picturebook(
    *, one_step: bool = False, dtype: torch.dtype = torch.float32, device: str | torch.device | None = None
) -> StableDiffusionPipeline: ...


@overload
def picturebook(
    *,
    transformer: Literal[True],
    one_step: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> ZImagePipeline: ...


def picturebook(
    *,
    transformer: bool = False,
    one_step: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
) -> StableDiffusionPipeline | ZImagePipeline:
    """Load the picture book: 128x128 pictures from captions like "a red ball and a blue star , night".

    It is a plain `StableDiffusionPipeline`; nothing is downloaded. Words it was never trained on give a warning that
    lists the words it knows. About 25 steps at guidance 2.5 suit it; the student takes num_inference_steps=1 and
    guidance_scale=0.

    The transformer edition is a plain `ZImagePipeline`, which counts guidance from 0 (1.5 there is 2.5 elsewhere) and
    draws 1024x1024 unless it is told: height=128, width=128. The tasks, commands and tables tell it by themselves. Its
    student takes num_inference_steps=4 and guidance_scale=0.

    Args:
        transformer: the edition with a flow transformer (Z-Image's) in place of the UNet.
        one_step: the student that was distilled to run without guidance: in a single step, the transformer's in four.
        dtype: of the weights (stored as float16).
        device: None leaves it on the CPU.

    Raises:
        ModelLoadError: the asked-for weights are not part of this installation.
        SettingTypeError: transformer= or one_step= is neither True nor False.
    """
    for name, value in {"transformer": transformer, "one_step": one_step}.items():
        if not isinstance(value, bool):
            raise SettingTypeError(f"{name}={value!r}: give True or False")
    pipe = _flow(one_step, dtype, device) if transformer else _stable(one_step, dtype, device)
    # A hook on the encoder, not on the tokenizer: whatever is encoded passes here, the pipeline's classes stay plain,
    # and torch carries a partial of a module-level function through deepcopy and pickle; save_pretrained skips it.
    hook = partial(_warn_of_unknown_words, _vocabulary(pipe.tokenizer), pipe.tokenizer.unk_token_id)
    pipe.text_encoder.register_forward_pre_hook(hook, with_kwargs=True)
    return pipe


def _flow(one_step: bool, dtype: torch.dtype, device: str | torch.device | None) -> ZImagePipeline:
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    own: dict[str, Any] = {}
    if not (TRANSFORMER / "model_index.json").is_file():
        raise ModelLoadError("the transformer edition is not part of this installation; use picturebook()")
    if one_step:
        if not (FEW_STEPS / "config.json").is_file():
            raise ModelLoadError(
                "the transformer edition's few-step student is not part of this installation; use "
                "picturebook(one_step=True), the UNet's"
            )
        own["transformer"] = ZImageTransformer2DModel.from_pretrained(
            FEW_STEPS, torch_dtype=dtype, use_safetensors=True
        )
    pipe: ZImagePipeline = load(TRANSFORMER, pipeline=ZImagePipeline, dtype=dtype, device=device, **own)
    return pipe


def _stable(one_step: bool, dtype: torch.dtype, device: str | torch.device | None) -> StableDiffusionPipeline:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    own: dict[str, Any] = {}
    if one_step:
        if not ONE_STEP.is_dir():
            raise ModelLoadError("the one-step picture book is not part of this installation; use picturebook()")
        own["unet"] = UNet2DConditionModel.from_pretrained(ONE_STEP / "unet", torch_dtype=dtype, use_safetensors=True)
        own["scheduler"] = DDIMScheduler.from_pretrained(ONE_STEP / "scheduler")
    pipe: StableDiffusionPipeline = load(
        PICTUREBOOK, pipeline=StableDiffusionPipeline, dtype=dtype, device=device, **own
    )
    return pipe


def _vocabulary(tokenizer: Any) -> dict[int, str]:
    """Words by id, in the order of the ids."""
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    return {i: w for w, i in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]) if i not in special}


def _warn_of_unknown_words(
    words: dict[int, str], unknown: int, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    ids: torch.Tensor = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
    for row in ids.tolist():
        if unknown in row:
            read = " ".join("___" if i == unknown else words[i] for i in row if i in words)
            known = " ".join(word for i, word in words.items() if i != unknown)
            warnings.warn(
                f"the picture book reads {read!r}, not knowing the words at ___; it knows: {known}", stacklevel=2
            )

"""Which pipeline is calling the denoiser right now, and what it was asked for.

A denoiser's inputs do not say whether a batch of two is a guided pair or two pictures, and pipelines that share a
denoiser have flags of their own. The pipeline that is running is on the call stack; it is read, and of what is written
there nothing is seen but by us: a mark that goes with the call.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import weakref
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from . import modular

_ASKED = (
    "prompt", "negative_prompt", "negative_prompt_embeds", "batch_size", "clip_skip", "height", "width",
    "max_sequence_length", "clean_caption", "cross_attention_kwargs", "joint_attention_kwargs",
    "do_classifier_free_guidance", "do_true_cfg", "strength", "prompt_2", "original_attn_proc", "apply_cfg",
    "context_name", "prompt_embeds", "negative_prompt_embeds_qwen", "prompt_embeds_qwen", "prompt_image",
    "condition_images", "device",
)  # fmt: skip
"""What adapters and plugins read of a call; a frame holds more, and keeping its latents would keep their memory."""


_MARK, _ENTRIES = "__diffgraft_call__", "entries of the schedule"


class Mark:
    """Lies among the local variables of a pipeline call, and goes with them however the call ends."""


_NO_SETTING = re.compile(
    r"^(negative_)?prompt(_\d)?$|embeds|mask|^device$|^dtype$|num_|batch_size|do_|lora|latents|ids$|^self$|cu_seqlens|"
    r"instruction|chi_|image|"
    r"^guidance|^text_encoder_index"
)
"""In names of parameters of `encode_prompt` that are no settings."""


@dataclass(frozen=True)
class Running:
    """The pipeline on the stack; `found` is False in a loop that somebody wrote by hand.

    Attributes:
        arguments: its call's, and what it made of them. encoding: those that are settings of its `encode_prompt`.
        mark: one for each call, None in a loop by hand.
        group: in a modular pipeline the rows that this call of the denoiser is for, alone in their batch.
        apart: whether guidance makes calls of its own there at this step.
    """

    pipe: Any
    found: bool
    arguments: dict[str, Any] = field(default_factory=dict[str, Any])
    mark: weakref.ref[Mark] | None = None
    encoding: frozenset[str] = frozenset()
    group: str | None = None
    apart: bool = False

    @property
    def steps(self) -> int | None:
        """Entries of the schedule that this call runs; img2img and `denoising_end` run fewer than there are."""
        if self.group is not None:
            return self.arguments.get(_ENTRIES)
        return getattr(self.pipe, "_num_timesteps", None) if self.found else None

    @property
    def guidance_scale(self) -> float | None:
        """The scale of guidance."""
        return getattr(getattr(self.pipe, "guider", self.pipe), "guidance_scale", None)

    @property
    def clip_skip(self) -> int | None:
        """The call's `clip_skip`."""
        return self.arguments.get("clip_skip")

    @property
    def before_pag(self) -> Mapping[str, Any]:
        """The processors that a PAG pipeline took off for this call, by name; none in others."""
        return self.arguments.get("original_attn_proc") or {}


def swap_processors(denoiser: nn.Module, processors: Mapping[str, Any]) -> dict[str, Any]:
    """Set attention processors by their names in `denoiser.attn_processors`; those that were there."""
    before: dict[str, Any] = {}
    for name, processor in processors.items():
        layer: Any = denoiser.get_submodule(name.removesuffix(".processor"))
        before[name] = layer.processor
        layer.set_processor(processor)
    return before


_PART: ContextVar[tuple[Any, Sequence[int], int] | None] = ContextVar("diffgraft_part", default=None)


@contextmanager
def part_of(pipe: Any, numbers: Sequence[int], total: int) -> Generator[None]:
    """Inside, a call of `pipe` makes these of a task's `total` prompts."""
    token = _PART.set((pipe, numbers, total))
    try:
        yield
    finally:
        _PART.reset(token)


def part_for(pipe: Any) -> tuple[Sequence[int], int] | None:
    """What `part_of` says of this pipeline's call."""
    part = _PART.get()
    return part[1:] if part is not None and part[0] is pipe else None


def find_running(denoiser: nn.Module, pipe: Any) -> Running:
    """The innermost pipeline on this thread's stack that owns `denoiser`, else `pipe` with `found=False`."""
    frame, batch = sys._getframe(1), None  # pyright: ignore[reportPrivateUsage]
    while frame is not None:
        if frame.f_code.co_name == "__call__" and "self" in frame.f_code.co_varnames:
            known = frame.f_locals  # made anew each time that it is asked for
            caller, batch = known.get("self"), batch or modular.batch_of(known)
            if modular.is_modular(caller) and owns(caller, denoiser):
                return _modular(caller, known, batch)
            if isinstance(caller, DiffusionPipeline) and owns(caller, denoiser):
                encoding, mark = _settings(caller), known.setdefault(_MARK, Mark())
                told = {name: known[name] for name in (*_ASKED, *encoding) if name in known}
                return Running(caller, True, told, weakref.ref(mark), encoding)
        frame = frame.f_back
    return Running(pipe, False)


def _modular(pipe: Any, known: dict[str, Any], batch: str | None) -> Running:
    """A modular pipeline's call, in which the denoiser runs for one of the guider's batches."""
    mark, values = known.setdefault(_MARK, Mark()), modular.told(pipe, known["state"])
    encoding = modular.settings(pipe)
    told = {k: v for k, v in values.items() if k in _ASKED or k in encoding}
    entries = values.get("timesteps")
    told[_ENTRIES] = None if entries is None else len(entries)
    group = modular.group_of(batch) if batch is not None else modular.counted(pipe)
    return Running(pipe, True, told, weakref.ref(mark), encoding, group, modular.is_guided(pipe, batch))


def _settings(pipe: Any) -> frozenset[str]:
    """Parameters of a pipeline's `encode_prompt` that are settings: no prompt, embeddings, device or count."""
    encode: Any = getattr(pipe, "encode_prompt", None)
    return frozenset() if encode is None else _settings_of(getattr(encode, "__func__", encode))


@functools.lru_cache(64)  # asked at every denoiser call
def _settings_of(encode: Any) -> frozenset[str]:
    taken = inspect.signature(encode).parameters
    return frozenset(name for name in taken if not _NO_SETTING.search(name))


def owns(pipe: Any, denoiser: nn.Module) -> bool:
    """Whether `denoiser` is one of the pipeline's components, compiled or not."""
    parts = vars(pipe).values()  # `pipe.components` asks `inspect`, which takes long
    return any(part is denoiser for part in parts) or any(
        isinstance(part, nn.Module) and getattr(part, "_orig_mod", None) is denoiser for part in parts
    )

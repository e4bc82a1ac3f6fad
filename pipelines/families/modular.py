"""Modular pipelines: a guider has the denoiser called once for each of its batches, and a block encodes texts."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

from ...attention.errors import UnsupportedPipelineError
from ...plugins.base import Text
from .words import own_words

_BLOCKS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_NO_SETTING = re.compile(r"prompt|embeds|mask|latents|num_images|generator")
"""In names of a text block's inputs that are no settings."""


def is_modular(pipe: Any) -> bool:
    """Whether a pipeline is made of blocks."""
    return _is_modular(type(pipe))


@functools.lru_cache(512)  # asked of many things at every denoiser call
def _is_modular(own: type) -> bool:
    return any(kind.__name__ == "ModularPipeline" for kind in own.__mro__)


# -- which call of the guider this is --------------------------------------------------------------------------------


def group_of(name: str) -> str:
    """Rows of a call that a guider or a cache context names."""
    return "uncond" if "uncond" in name else "cond" if name in ("cond", "pred_cond") else "perturbed"


def batch_of(known: Mapping[str, Any]) -> str | None:
    """What a block's local variables say of the guider's batch that it has the denoiser called for; None where it has
    none."""
    batch = known.get("guider_state_batch")
    return None if batch is None else getattr(batch, "__guidance_identifier__", None)


def counted(pipe: Any) -> str:
    """The rows of a call in a loop of somebody's own, by what its guider counts; without one there is one call."""
    guider = getattr(pipe, "guider", None)
    apart = getattr(guider, "_count_prepared", 0) > 0 and not cast("Any", guider).is_conditional
    return "uncond" if apart else "cond"


def is_guided(pipe: Any, batch: str | None) -> bool:
    """Whether the guider has the denoiser called for more than the prompt at this step."""
    guider = getattr(pipe, "guider", None)
    asked = batch is not None or getattr(guider, "_count_prepared", 0) > 0
    return asked and cast("Any", guider).num_conditions > 1


def told(pipe: Any, state: Any) -> dict[str, Any]:
    """What a call was asked for and has made of it, from the state that goes from block to block."""
    values = {name: value for name, value in state.values.items() if value is not None}
    if values.get("image") is None:
        values.pop("strength", None)  # blocks for several tasks have its default at hand
    return values


# -- texts ------------------------------------------------------------------------------------------------------------


def settings(pipe: Any) -> frozenset[str]:
    """Inputs of the pipeline's text block that are neither prompts nor what is made of them."""
    block = text_block(pipe)
    names = () if block is None else cast("Sequence[str]", block.input_names)
    return frozenset(name for name in names if name and not _NO_SETTING.search(name))


def text_block(pipe: Any) -> Any:
    """The block that makes embeddings of prompts, None in a pipeline that wants embeddings."""
    blocks = pipe._blocks
    if blocks not in _BLOCKS:
        _BLOCKS[blocks] = next((one for one in _leaves(blocks) if _makes_text(one)), None)
    return _BLOCKS[blocks]


def encoders(pipe: Any) -> int:
    """Prompts that the text block takes."""
    block = text_block(pipe)
    return 1 + (0 if block is None else sum(f"prompt_{i}" in block.input_names for i in (2, 3, 4)))


def encode(pipe: Any, texts: Sequence[str | tuple[str, ...]], settings: Mapping[str, Any], says: Any) -> Text:
    """Texts by the pipeline's own text block.

    Args:
        texts: a string, or one for each encoder. settings: of the running call.
        says: argument of the denoiser -> the block's output; the text first.
    """
    from diffusers.modular_pipelines.modular_pipeline import PipelineState

    block, state = text_block(pipe), cast("Any", PipelineState())
    if block is None:
        raise UnsupportedPipelineError(
            f"{type(pipe).__name__} has no block that encodes text: pass embeddings instead of strings"
        )
    given = {f"prompt_{i}" if i > 1 else "prompt": _of_encoder(texts, i - 1) for i in range(1, encoders(pipe) + 1)}
    for name, value in (dict(settings) | given).items():
        state.set(name, value)
    with own_words(pipe) as twin:
        block(twin, state)
    found = {argument: state.get(output) for argument, output in says.items()}
    name = next(iter(found))
    words, mask = found.pop(name), next((found.pop(n) for n in [*found] if "mask" in n), None)
    if isinstance(words, list):
        return stacked(cast("list[torch.Tensor]", words))
    return Text(words, None if mask is None else mask.bool(), pooled=found)


def stacked(rows: list[torch.Tensor]) -> Text:
    """Rows [L, D] of several lengths, padded; the mask says how long each is."""
    longest = max(map(len, rows))
    masks = [torch.arange(longest, device=row.device) < len(row) for row in rows]
    return Text(torch.stack([F.pad(row, (0, 0, 0, longest - len(row))) for row in rows]), torch.stack(masks))


def _of_encoder(texts: Sequence[str | tuple[str, ...]], i: int) -> str | list[str]:
    own = [text if isinstance(text, str) else text[min(i, len(text) - 1)] for text in texts]
    return own[0] if len(own) == 1 else own  # FLUX.3's block takes no list


def _leaves(block: Any) -> Iterator[Any]:
    inner = getattr(block, "sub_blocks", None)
    if not inner:
        yield block
    for one in (inner or {}).values():
        yield from _leaves(one)


def _makes_text(block: Any) -> bool:
    made = {output.name for output in block.intermediate_outputs}
    return "prompt_embeds" in made and "prompt" in block.input_names

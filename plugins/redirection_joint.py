"""Redirection where text and image share one sequence, and where layers are in no decoder: which, and how.

Nothing attends to the image's masked tokens, the text neither: a text that has read the object would hand it back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..attention.call import PLAIN, AttentionCall
from ..attention.errors import SettingError, UnsupportedPipelineError
from ..attention.layer import AttentionLayer


def visible(kept: torch.Tensor, image: slice, length: int, others: int = 0) -> torch.Tensor:
    """Columns of a sequence of `length` that are attended to: all but the masked ones of the image.

    Args:
        kept: indices of the image's background tokens. image: its columns. others: so many columns behind the image are
            masked tokens of other candidates.
    """
    head, tail = (torch.arange(*span, device=kept.device) for span in ((image.start,), (image.stop + others, length)))
    return torch.cat([head, kept + image.start, tail])


def redirected(
    call: AttentionCall, kept: torch.Tensor, hidden: torch.Tensor, suppression: float | None
) -> torch.Tensor:
    """Attention [B, H, Lq, D] over everything but the image's masked tokens, as one call on shorter keys.

    Under suppression the masked queries take a further call, in which the logits of the image's keys are scaled.

    Args:
        kept, hidden: indices of the image's tokens outside and inside of the mask.
        suppression: factor of the logits of masked queries on the image's keys, None for none.
    """
    image, asked = call.image, call.asked
    index = visible(kept, image, call.k.shape[-2], call.step.tail)
    k, v = (tensor.index_select(-2, index) for tensor in (call.k, call.v))
    mask = None if call.mask is None else call.mask.index_select(-1, index)
    out = _attend(call, call.q, k, v, mask)
    if suppression is None:
        return out
    seen = slice(image.start, image.start + len(kept))
    scaled = k.clone()
    scaled[:, :, seen] *= suppression
    inside = hidden + asked.start
    if call.step.tail:
        inside = torch.cat([inside, torch.arange(asked.stop, asked.stop + call.step.tail, device=inside.device)])
    if mask is not None and mask.shape[-2] > 1:
        mask = mask.index_select(-2, inside)
    own = _attend(call, call.q.index_select(-2, inside), scaled, v, mask)
    # In place where nobody needs what was there: a layer of a large picture is held down to a few copies.
    return out.index_copy(-2, inside, own) if torch.is_grad_enabled() else out.index_copy_(-2, inside, own)


def _attend(
    call: AttentionCall, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """By the plain kernel: one that shares work with further texts counts on the whole sequence."""
    kernel = call.aside.get(PLAIN, call.kernel)
    return kernel(q, k, v, attn_mask=mask, is_causal=call.causal, scale=call.scale)


def choose_layers(layers: Sequence[AttentionLayer], wanted: str | Sequence[str | int]) -> list[AttentionLayer]:
    """Layers in which the image attends to itself, by place, name, prefix of names, or position in execution order.

    On a transformer "up" is all of them, "early" and "late" are its halves.

    Raises:
        SettingError: nothing of that name or number; the message lists what there is.
        UnsupportedPipelineError: no such layer.
    """
    own = [layer for layer in layers if layer.kind == "self" and layer.place != "block"]
    transformer = not own
    if transformer:
        own = [layer for layer in layers if layer.kind in ("joint", "self", "keys") and not _linear(layer)]
    if not own:
        raise UnsupportedPipelineError(
            "the image attends to itself in no layer that can be redirected here (linear attention has no logits): use "
            "a pipeline of SD1, SD2, SDXL, SD3, FLUX, Qwen-Image, Z-Image, Chroma, Lumina 2 or PixArt"
        )
    if wanted == "all" or (transformer and wanted == "up"):
        return own
    if not wanted:
        raise SettingError("layers is empty: leave it at 'up', or scale=0 to switch redirection off")
    if transformer and wanted in ("early", "late"):
        half = len(own) // 2
        return own[:half] if wanted == "early" else own[half:]
    asked = [wanted] if isinstance(wanted, str) else wanted
    for item in asked:
        if not any(_matches(number, layer, item) for number, layer in enumerate(own)):
            names = ", ".join(f"{number} {layer.name}" for number, layer in enumerate(own))
            places = "up, early, late" if transformer else "up, mid, down"
            raise SettingError(f"no self-attention layer {item!r}; choose {places}, all or among: {names}")
    return [layer for i, layer in enumerate(own) if any(_matches(i, layer, item) for item in asked)]


def _linear(layer: AttentionLayer) -> bool:
    """Whether a layer's attention is linear."""
    return "Linear" in type(getattr(layer.module, "processor", None)).__name__


def _matches(number: int, layer: AttentionLayer, item: str | int) -> bool:
    if isinstance(item, int):
        return not isinstance(item, bool) and number == item
    return item in (layer.place, layer.name) or layer.name.startswith(f"{item}.")

"""Attention that also returns its log-sum-exp, and the exact merge of attentions over disjoint sets of keys.

Softmax attention over keys A and B together is the mean of the two attentions weighted by exp(lse), so whatever two
computations share (the image tokens of a joint sequence) has to be attended to only once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

_SCORES = 2**27


class Partial(NamedTuple):
    """Attention over some of the keys.

    Attributes:
        out: [B, H, Lq, D], zero where no key is visible.
        lse: [B, H, Lq] at least float32, the logarithm of the sum of the exponentials of the logits; -inf there.
    """

    out: torch.Tensor
    lse: torch.Tensor


def attend_with_lse(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> Partial:
    """Scaled dot-product attention with its log-sum-exp.

    torch's fused kernels return it on CPU and CUDA; elsewhere, and where no kernel takes the inputs, the scores are
    computed explicitly.

    Args:
        q: [B, H, Lq, D]. k, v: [B, H, Lk, D]. mask: None, boolean (True attends) or additive, broadcastable to
            [B, H, Lq, Lk]. scale: factor of the logits.
    """
    mask = additive(mask, q.dtype)
    part = _fused(q, k, v, mask, scale) or _explicit(q, k, v, mask, scale)
    if mask is None:
        return part
    blind = (mask == -torch.inf).all(-1)  # kernels disagree on rows that see nothing
    return Partial(part.out.masked_fill(blind[..., None], 0.0), part.lse.masked_fill(blind, -torch.inf))


def log_sum_exp(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """The log-sum-exp of the logits alone, [B, H, Lq]; arguments as in `attend_with_lse`.

    Some queries at a time. Under gradients the scores are made again in the backward pass, and never kept.
    """
    mask, block = additive(mask, q.dtype), max(1, _SCORES // (q.shape[0] * q.shape[1] * k.shape[-2]))
    kept = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    run = partial(checkpoint, _lse, use_reentrant=False, preserve_rng_state=False) if kept else _lse
    parts: list[torch.Tensor] = []
    for start in range(0, q.shape[-2], block):
        rows = slice(start, start + block)
        parts.append(run(q[:, :, rows], k, _of(mask, rows), scale))
    return torch.cat(parts, -1)


def _lse(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    return _logits(q, k, mask, scale).logsumexp(-1)


def _logits(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * scale
    return scores if mask is None else scores + mask


def _of(mask: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    """The mask of some queries."""
    return mask[:, :, rows] if mask is not None and mask.shape[-2] > 1 else mask


def additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask as a summand of [B, H, Lq, Lk] logits: 0 where a boolean one is True, else -inf."""
    if mask is None:
        return None
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask


def merge(parts: Sequence[Partial]) -> Partial:
    """Attention over the union of the parts' keys, which must be disjoint; at least float32 inside."""
    lse = torch.stack([part.lse for part in parts]).logsumexp(0)
    return Partial(sum_weighted(parts, lse), lse)


def sum_weighted(parts: Sequence[Partial], lse: torch.Tensor) -> torch.Tensor:
    """Sum of the parts' outputs weighted by exp(part.lse - lse); zero where `lse` is -inf. [B, H, Lq, D]."""
    seen = lse.masked_fill(lse == -torch.inf, 0.0)
    total = sum((part.lse - seen).exp()[..., None] * part.out.to(lse.dtype) for part in parts)
    assert isinstance(total, torch.Tensor)
    return total.to(parts[0].out.dtype)


def _fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> Partial | None:
    """By a fused kernel of this device, None where there is none for these inputs."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return None
    if q.device.type == "cpu":
        bias = None if mask is None else mask.to(q.dtype)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=bias, scale=scale
        )
        return Partial(out, lse)
    half = q.dtype in (torch.float16, torch.bfloat16)
    if q.device.type == "cuda" and half and mask is None and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, scale=scale)[:2]
        return Partial(out, lse)
    return None


def _explicit(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float) -> Partial:
    """By the scores, some queries at a time: all of a large picture's would fill the memory."""
    block = max(1, _SCORES // (q.shape[0] * q.shape[1] * k.shape[-2]))
    parts: list[Partial] = []
    if q.dtype == torch.float16:  # the product may leave its range
        q, scale = q * scale, 1.0
    for start in range(0, q.shape[-2], block):
        rows = slice(start, start + block)
        scores = _logits(q[:, :, rows], k, _of(mask, rows), scale)
        lse = scores.logsumexp(-1)
        parts.append(Partial((scores - lse[..., None]).exp().to(v.dtype) @ v, lse))
    return Partial(torch.cat([part.out for part in parts], -2), torch.cat([part.lse for part in parts], -1))

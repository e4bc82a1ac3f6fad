"""The equations of shared style: StyleID (arXiv 2312.09008) and StyleAligned (2312.02133)."""

from __future__ import annotations

import torch

from ..attention.step import Rows

UNPROMPTED = "unprompted style"
"""Rows of the style under the text that guidance steers away from."""
Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Query, keys, values and mask of one attention."""


def adain(x: torch.Tensor, reference: torch.Tensor, dims: tuple[int, ...] = (-2, -1)) -> torch.Tensor:
    """(x - mean) / std * std_ref + mean_ref over `dims`: latents by channel (StyleID, eq. 8), tokens by feature."""
    z, ref = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, reference))
    mean, mean_ref = z.mean(dims, keepdim=True), ref.mean(dims, keepdim=True)
    std, std_ref = (t.std(dims, keepdim=True, correction=0) for t in (z, ref))
    return ((z - mean) * (std_ref / std.clamp(min=1e-12)) + mean_ref).to(x.dtype)


def matched(x: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Tokens [..., N, D] with the reference's mean and deviation of each feature, as StyleAligned's program has them:
    deviations are of a sample, with 1e-5 added to the variance.
    """
    z, ref = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, reference))
    std, std_ref = ((t.var(-2, keepdim=True) + 1e-5).sqrt() for t in (z, ref))
    return ((z - z.mean(-2, keepdim=True)) / std * std_ref + ref.mean(-2, keepdim=True)).to(x.dtype)


def reference_of(group: str, rows: Rows) -> str:
    """The group of rows whose style a group takes: guidance's own rows have a reference of their own if there is."""
    return UNPROMPTED if group == "uncond" and UNPROMPTED in rows else "style"


def preserved_query(q: torch.Tensor, content: torch.Tensor, gamma: float) -> torch.Tensor:
    """gamma * q_content + (1 - gamma) * q, equation 6 of StyleID; gamma = 1 keeps the content's query alone."""
    return content if gamma == 1 else torch.lerp(q, content, gamma)


def shared_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    q_ref: torch.Tensor, k_ref: torch.Tensor, v_ref: torch.Tensor, shift: float,
) -> Operands:  # fmt: skip
    """Query, keys, values and additive mask of StyleAligned (equations 3 and 4), all [B, H, L, D].

    Args:
        shift: added to the logits of the reference's keys; the paper's code adds log 2 for real pictures.
    """
    if not k_ref.shape[-2]:
        return q, k, v, None
    q, k = matched(q, q_ref), matched(k, k_ref)
    mask = torch.zeros(k.shape[-2] + k_ref.shape[-2], dtype=q.dtype, device=q.device)
    mask[k.shape[-2] :] = shift
    return q, torch.cat([k, k_ref], -2), torch.cat([v, v_ref], -2), mask.expand(1, 1, q.shape[-2], -1)

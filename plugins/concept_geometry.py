"""Where in a text a concept is, and how it is taken out: pure functions of embeddings.

A text encoder's column is mostly its position and its neighbours, so nothing is compared across positions: a concept
is known by what its word gives *at each position*, against what other words give there.

Shapes: L columns, D numbers each; all in at least float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """In at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def contrast(v: torch.Tensor, c: torch.Tensor, f: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """v - weight * max(0, <u, d> / <d, d>) d, with u = v - f and d = c - f: of what v has beyond something else, the
    concept's part is taken out. Nothing happens where c equals f.

    Args:
        v: values [..., L, D], all heads as one vector. c, f: of the concept and of something else, [..., L, D].
        weight: [..., L], strength at each column; 0 leaves the column as it is.
    Returns:
        [..., L, D], at least float32.
    """
    v, d = wide(v), wide(c) - wide(f)
    size = (d * d).sum(-1)
    share = ((v - wide(f)) * d).sum(-1) / torch.where(size > 0, size, 1.0)
    return v - (weight * share.clamp_min(0))[..., None] * d


def adavd(
    v: torch.Tensor, concepts: torch.Tensor, weight: torch.Tensor | float = 1.0, *, steep: float = 100.0,
    cosine: float = 0.93, most: float = 2.0,
) -> torch.Tensor:  # fmt: skip
    """AdaVD (arXiv 2412.06143) as its authors run it: v - sum of s_k <v, q_k> q_k over K concepts.

    q_k are the concepts' values at a column, orthonormalised in their order (Gram-Schmidt), and the shift
    s_k = most * sigmoid(steep * (cos(v, c_k) - cosine)).

    Args:
        v: [..., L, D]. concepts: [K, ..., L, D]. weight: strength, a number or [..., L].
        steep: 0 with most=2 is the form without the shift, s = 1.
    """
    v, left, basis = wide(v), wide(v), list[torch.Tensor]()
    for c in wide(concepts):
        shift = most * torch.sigmoid(steep * (F.cosine_similarity(v, c.expand_as(v), dim=-1) - cosine))
        q = c
        for known in basis:
            q = q - (q * known).sum(-1, keepdim=True) * known
        size = q.norm(dim=-1, keepdim=True)
        q = torch.where(size > 1e-6 * c.norm(dim=-1, keepdim=True), q / torch.where(size > 0, size, 1.0), 0.0)
        basis.append(q)
        left = left - (weight * shift * (v * q).sum(-1))[..., None] * q
    return left


def nearness(text: torch.Tensor, own: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """By how much each column of a text is nearer to the concept's word at its place than to any other word's, as a
    difference of cosines around their mean: -2 ... 2, above 0 where the concept's word is the nearest.

    Args:
        text: [B, L, D]. own: the concept's word at each position, [L, D]. others: other words there, [N, L, D].
    Returns:
        [B, L]; -2 where `own` is zero, which says that it never stands there.
    """
    text, own, others = wide(text), wide(own), wide(others)
    middle = torch.cat([others, own[None]]).mean(0)
    u = F.normalize(text - middle, dim=-1)
    mine = (u * F.normalize(own - middle, dim=-1)).sum(-1)
    best = torch.einsum("bld,nld->bln", u, F.normalize(others - middle, dim=-1)).amax(-1)
    return torch.where(own.any(-1), mine - best, -2.0)


def phrase_nearness(text: torch.Tensor, own: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """`nearness` of a phrase of m tokens that starts at each column, its least sure token's: [B, L].

    Args:
        own: [m, L, D], token j of the phrase where it stands at each column.
    """
    scores = [nearness(text, token, others) for token in own]
    shifted = [F.pad(score[:, j:], (0, j), value=-2.0) for j, score in enumerate(scores)]
    return torch.stack(shifted).amin(0)


def calibrated(inside: Sequence[float], outside: Sequence[float]) -> float:
    """A threshold between the scores of texts with the concept and of texts without: half way between the least of
    the former and the highest of the latter, and never below 0.12, which on the picture book 18 concepts and the texts
    without them do not reach.
    """
    return max(0.12, (min(inside) + max(outside)) / 2)

"""SAFREE (arXiv 2410.12761): the tokens that bring a concept are taken out of its subspace. Pure functions.

A text is projected onto the span of what is left of it when each of its tokens is masked in turn, and off the span of
the concepts. Only tokens without which the rest is far from the concepts are replaced, and only for as many steps as
the projection changes the text. All in at least float32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .concept_geometry import wide

ALPHA, STEPS = 0.01, 10
_STEEP, _MIDDLE = 5.0, 5.333


def span(vectors: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis [r, D] of what the rows of [K, D] span."""
    vectors = wide(vectors)
    _, sizes, basis = torch.linalg.svd(vectors, full_matrices=False)
    least = torch.finfo(vectors.dtype).eps * max(vectors.shape) * sizes.amax()
    return basis[sizes > least]


def onto(x: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """x [..., D] projected onto the span of an orthonormal basis [r, D]."""
    return (x @ basis.mT) @ basis


def triggers(masked: torch.Tensor, concept: torch.Tensor, alpha: float = ALPHA) -> torch.Tensor:
    """Which tokens bring the concept: without them the text is farther from it than without the others.

    Args:
        masked: [n, D], the pooled text with token i masked. concept: orthonormal basis of the concepts' pooled texts.
        alpha: farther by this share of the others' mean distance.
    Returns:
        [n] boolean; the only token of a text is one.
    """
    masked = wide(masked)
    far = (masked - onto(masked, concept)).norm(dim=-1)
    if len(far) == 1:
        return torch.ones(1, dtype=torch.bool, device=far.device)
    return far >= (1 + alpha) * (far.sum() - far) / (len(far) - 1)


def projected(text: torch.Tensor, masked: torch.Tensor, concept: torch.Tensor) -> torch.Tensor:
    """(I - P_C) P_M e for every e of a text [L, D]."""
    within = onto(wide(text), span(masked))
    return within - onto(within, concept)


def filter_steps(before: torch.Tensor, after: torch.Tensor) -> int:
    """For how many steps the projected text is used: 0 ... 10, more for a text [L, D] that it changes more."""
    change = 1 - float(F.cosine_similarity(wide(before), after, dim=-1).mean())
    return round(STEPS / (1 + math.exp(-_STEEP * (10 * change - _MIDDLE))))


def safree(
    text: torch.Tensor, masked: torch.Tensor, concepts: torch.Tensor, tokens: range, strength: float = 1.0
) -> tuple[torch.Tensor, int]:
    """A text without the concepts, and for how many steps it is used.

    Args:
        text: [L, D]. masked: [n, D], see `triggers`. concepts: [K, D], pooled. tokens: the n columns of the prompt's
            own tokens; the marks before and behind count for the number of steps.
        strength: 1 puts the projection in the place of a token, 0 leaves it.
    Returns:
        [L, D], at least float32, and 0 ... 10.
    """
    basis = span(concepts)
    new, held = projected(text, masked, basis), slice(0, tokens.stop + 1)
    out = wide(text).clone()
    columns = torch.tensor(list(tokens), device=text.device)[triggers(masked, basis)]
    out[columns] += strength * (new[columns] - out[columns])
    return out, filter_steps(text[held], new[held])

"""Which rows of a denoiser call are guidance's, and which belong to one call of several."""

from __future__ import annotations

from typing import Any

import torch

from ...attention.step import Rows
from .family import Family
from .modular import group_of
from .running import Running


def split(family: Family, batch: int) -> Rows:
    """Groups of a guided batch, in the family's order."""
    names = family.guidance.split(", ")
    n = batch // len(names)
    return {name: slice(i * n, (i + 1) * n) for i, name in enumerate(names)}


def call_of(family: Family, text: Any, running: Running) -> str:
    """Whether a call that guidance makes apart is for the prompt ("cond"), its negative or something else."""
    told = running.arguments.get("context_name")  # guider objects name their calls
    if isinstance(told, str):
        return group_of(told)
    negative = running.arguments.get(family.negative)
    if negative is None or isinstance(negative, str):
        return "cond"
    if text is negative:
        return "uncond"
    positive = running.arguments.get(family.negative.removeprefix("negative_"))
    if text is positive or not isinstance(text, torch.Tensor):
        return "cond"
    return "uncond" if _equal(text, negative) and not _equal(text, positive) else "cond"


def looks_guided(sample: Any, text: Any) -> bool:
    """Guidance in a hand-written loop: the same latents twice, with different text."""
    text = text[0] if isinstance(text, tuple) else text
    n, odd = divmod(len(sample), 2)
    if odd or not n or not _same(sample[:n], sample[n:]):
        return False
    return not _same(text[:n], text[n:])


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else all(map(_equal, a, b))


def _equal(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or a.shape != b.shape:
        return False
    return torch.equal(a, b.to(a))

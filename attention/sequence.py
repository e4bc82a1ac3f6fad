"""Text and image tokens of one sequence: taking some out, and putting them back."""

from __future__ import annotations

import torch


def without(tensor: torch.Tensor, columns: slice, dim: int) -> torch.Tensor:
    """`tensor` less some columns of `dim`; a view where they are at an end."""
    length = tensor.shape[dim]
    head, tail = tensor.narrow(dim, 0, columns.start), tensor.narrow(dim, columns.stop, length - columns.stop)
    return tail if not columns.start else head if columns.stop == length else torch.cat([head, tail], dim)


def joined(words: torch.Tensor, image: torch.Tensor, text: slice) -> torch.Tensor:
    """A sequence of its text and its image tokens again."""
    return torch.cat([image[:, :, : text.start], words, image[:, :, text.start :]], -2)


def placed(tensor: torch.Tensor, rows: slice | list[int], new: torch.Tensor) -> torch.Tensor:
    """`tensor` with some rows replaced."""
    if len(new) == len(tensor):
        return new
    tensor = tensor.clone()
    tensor[rows] = new
    return tensor

"""Text and image tokens of one sequence: taking some out, and putting them back."""

from __future__ import annotations

from dataclasses import dataclass

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


def row_mask(mask: torch.Tensor | None, row: int, kept: list[int]) -> torch.Tensor | None:
    """One row's mask over its kept columns, None where it hides nothing."""
    if mask is None:
        return None
    own = (mask[row : row + 1] if len(mask) > 1 else mask)[..., kept]
    own = own[..., kept, :] if own.shape[-2] > 1 else own
    return None if own.dtype == torch.bool and bool(own.all()) else own


def padded(out: torch.Tensor, kept: list[int], length: int) -> torch.Tensor:
    """A row's tokens [1, H, kept, D] at their columns of a sequence of `length`, zeros elsewhere."""
    place = torch.tensor(kept, device=out.device)
    return out.new_zeros(1, out.shape[1], length, out.shape[-1]).index_copy(2, place, out)


@dataclass(frozen=True)
class Columns:
    """Where everything stands in the joint sequence of one batch row, or of all that are alike.

    Attributes:
        text: the prompt's tokens. streams: other texts' tokens, in front of the prompt's. image: the picture's.
    """

    text: slice
    streams: tuple[slice, ...]
    image: slice

    @property
    def shape(self) -> tuple[tuple[int, int], ...]:
        """What two rows must share to be computed at once."""
        return tuple((part.start, part.stop) for part in (self.text, *self.streams, self.image))

    def kept(self) -> tuple[list[int], Columns]:
        """The columns that this row really has, in order, and the same row without its padding."""
        parts = sorted((self.text, *self.streams, self.image), key=lambda part: part.start)
        lengths = [part.stop - part.start for part in parts]

        def moved(part: slice) -> slice:
            start = sum(lengths[: parts.index(part)])
            return slice(start, start + part.stop - part.start)

        whole = Columns(moved(self.text), tuple(map(moved, self.streams)), moved(self.image))
        return [column for part in parts for column in range(part.start, part.stop)], whole

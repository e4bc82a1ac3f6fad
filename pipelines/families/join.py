"""Heard texts in the running call: their tokens stand in front of the prompt's, from the first meeting block on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from ...attention.sequence import Columns
from .base import Inputs
from .declared import DeclaredAdapter
from .family import Along, Meet
from .hear import Heard, Key, Piece


class Joined:
    """Texts that ride through one denoiser call.

    Args:
        heard: the texts. rows: for each row of the batch, which row of a text with several is its own.

    Attributes:
        count: columns that they take. at: where they stand. lengths: of the prompt, for each row.
    """

    def __init__(self, adapter: DeclaredAdapter, heard: Sequence[Heard], inputs: Inputs, pictures: int) -> None:
        self.adapter, self.heard, self.pictures = adapter, heard, pictures
        self.batch, self.count = adapter.batch(inputs), sum(text.width for text in heard)
        self.image, self.lengths = adapter.tokens(inputs), adapter.lengths(inputs)
        self._made: dict[tuple[Key, int], tuple[Any, torch.Tensor]] = {}
        self._columns: list[Columns] | None = None

    @property
    def at(self) -> int:
        """The column at which they stand, the same in every row."""
        return 0 if self.adapter.spec.text_first else self.image

    # -- where everything stands -------------------------------------------------------------------------------

    def columns(self) -> list[Columns]:
        """The sequence of each row; one for all of them where they are alike."""
        if self._columns is None:
            found = [self._row(row) for row in range(self.batch)]
            self._columns = found if any(one.shape != found[0].shape for one in found) else found[:1]
        return self._columns

    def _row(self, row: int) -> Columns:
        start, streams = self.at, list[slice]()
        for text in self.heard:
            length = text.lengths[self._index(text, row)]
            streams.append(slice(start, start + length))
            start += text.width
        words = slice(start, start + self.lengths[row])
        image = slice(words.stop, words.stop + self.image) if self.adapter.spec.text_first else slice(0, self.image)
        return Columns(words, tuple(streams), image)

    def _index(self, text: Heard, row: int) -> int:
        n = len(text.words)
        return 0 if n == 1 else row % self.pictures // (self.pictures // n)

    def measure(self, meet: Meet, arguments: Mapping[str, Any]) -> None:
        """Take the lengths from the arguments that the first meeting block really gets, where they tell them."""
        if meet.text is not None:
            self.settle(arguments[meet.text].shape[1], arguments[meet.sequence].shape[1])

    def settle(self, words: int, image: int) -> None:
        """So many tokens every row's prompt has in the blocks, and so many the image."""
        self.lengths, self.image, self._columns = [words] * self.batch, image, None

    # -- what the blocks get -----------------------------------------------------------------------------------

    def join(self, meet: Meet, first: bool, arguments: dict[str, Any]) -> dict[str, Any]:
        """A meeting block's arguments with the texts in them.

        Args:
            first: the first block, which gets the tokens; later ones have them.
        """
        arguments = dict(arguments)
        if first:
            name, at = (meet.text, 0) if meet.text is not None else (meet.sequence, self.at)
            words = [self._rows(text.words, text) for text in self.heard]
            arguments[name] = _inserted(arguments[name], words, at, 1)
        for along in meet.along:
            arguments[along.argument] = self._argument(along, arguments.get(along.argument))
        return arguments

    def cut(self, output: Any) -> Any:
        """A block's output without them."""
        if not isinstance(output, torch.Tensor):
            return (*output[:-1], self.cut(output[-1]))
        return torch.cat([output[:, : self.at], output[:, self.at + self.count :]], 1)

    def widened(self, residual: Any) -> Any:
        """What is added to the whole sequence, with nothing for these tokens."""
        if not isinstance(residual, torch.Tensor) or residual.ndim < 3:
            return residual
        empty = residual.new_zeros(len(residual), self.count, residual.shape[-1])
        return _inserted(residual, [empty], self.at, 1)

    def _argument(self, along: Along, value: Any) -> Any:
        wanted = {key for text in self.heard for key in text.pieces if key[0] == along.argument}
        if value is None and wanted:  # the prompt alone needed no mask
            pieces = (text.pieces[key] for key in wanted for text in self.heard if key in text.pieces)
            value = self._full(along, next(pieces))
        found, tree = tree_flatten(value)
        for number, leaf in enumerate(found):
            if isinstance(leaf, torch.Tensor) and along.leaf in (None, number):
                found[number] = self._leaf(along, (along.argument, number), leaf)
        return tree_unflatten(found, tree)

    def _full(self, along: Along, like: Piece) -> torch.Tensor:
        shape = list(like.shape)
        shape[like.dim] = max(self.lengths) + (self.image if along.of == "joint" else 0)
        return like.tokens.new_ones(shape)

    def _leaf(self, along: Along, key: Key, leaf: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():  # where equal products are made once anyway
            return self._inserted_into(along, key, leaf)
        kept = self._made.get((key, id(leaf)))
        if kept is None or kept[0] is not leaf:
            kept = self._made[key, id(leaf)] = leaf, self._inserted_into(along, key, leaf)
        return kept[1]

    def _inserted_into(self, along: Along, key: Key, leaf: torch.Tensor) -> torch.Tensor:
        if along.dim and len(leaf) == 1 < self.batch and any(len(text.words) > 1 for text in self.heard):
            rows = leaf.expand(self.batch, *leaf.shape[1:])
        else:
            rows = leaf
        parts = [self._part(along, key, rows, text) for text in self.heard]
        return _inserted(rows, parts, self.at if along.of == "joint" else 0, along.dim)

    def _part(self, along: Along, key: Key, leaf: torch.Tensor, text: Heard) -> torch.Tensor:
        piece = text.pieces.get(key)
        if piece is None:  # heard alone it needed no mask
            shape = list(leaf.shape)
            shape[along.dim] = text.width
            return leaf.new_ones(shape)
        tokens = piece.tokens if not along.dim or len(leaf) == 1 else self._rows(piece.tokens, text)
        return self._moved(along, tokens, piece.image, leaf, text) if piece.image is not None else tokens

    def _moved(
        self, along: Along, tokens: torch.Tensor, origin: torch.Tensor, leaf: torch.Tensor, text: Heard
    ) -> torch.Tensor:
        """Rotary factors of a text as seen from the running image, whose place may be another one."""
        starts = self.lengths if self.adapter.spec.text_first else [0] * self.batch
        running = torch.cat([leaf[row : row + 1].narrow(along.dim, starts[row], 1) for row in range(len(leaf))])
        origin = origin if len(leaf) == 1 else self._rows(origin, text)
        turn = torch.where(running == origin, torch.ones_like(running), running / origin)
        return tokens * turn

    def _rows(self, tensor: torch.Tensor, text: Heard) -> torch.Tensor:
        """A text's tensor with one row for each of the batch."""
        if len(tensor) == 1:
            return tensor.expand(self.batch, *tensor.shape[1:])
        return tensor[[self._index(text, row) for row in range(self.batch)]]


def _inserted(tensor: torch.Tensor, parts: Sequence[torch.Tensor], at: int, dim: int) -> torch.Tensor:
    rest = tensor.shape[dim] - at
    return torch.cat([tensor.narrow(dim, 0, at), *(p.to(tensor) for p in parts), tensor.narrow(dim, at, rest)], dim)

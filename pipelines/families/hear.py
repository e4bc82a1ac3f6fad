"""Another text as a model's own blocks get it: its forward runs on that text and ends where text meets the image.

Refiners, caption projections, register tokens, padding to a multiple, positions and masks are so the model's own, and
none is written again here. `join` puts what was heard into the running call.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_flatten

from ...attention.hook import hook_before
from ...attention.seam import StopForward
from ...attention.step import Step
from ...plugins.base import Text
from .base import Inputs
from .declared import DeclaredAdapter
from .family import Along, Meet

Key = tuple[str, int]
"""A block's argument, and which of its tensors."""


@dataclass(frozen=True)
class Piece:
    """What belongs to a text in an argument with one entry a token.

    Attributes:
        dim: where tokens are counted. tokens: the text's entries. image: the first image token's, for rotary factors.
        shape: of the whole argument.
    """

    dim: int
    tokens: torch.Tensor
    image: torch.Tensor | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Heard:
    """A text at the first block where it meets the image.

    Attributes:
        words: its tokens [n, L, C]. lengths: how many of them each row has.
        pieces: its part of the arguments with one entry a token.
        others: where blocks attend across, arguments of their layers that go with the text, its mask among them.
    """

    words: torch.Tensor
    lengths: list[int]
    pieces: dict[Key, Piece] = field(default_factory=dict[Key, Piece])
    others: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def width(self) -> int:
        """Columns that it takes."""
        return self.words.shape[1]


def hear(adapter: DeclaredAdapter, inputs: Inputs, text: Text, rows: Sequence[int], step: Step) -> Heard:
    """`text` where it meets the image.

    Args:
        inputs: of the running call. text: n rows. rows: of the batch, one a text, whose other inputs it is heard with.
        step: of the running call; no edit runs meanwhile.
    """
    text = adapter.to_denoiser(text, inputs)
    if len(rows) > 1 and adapter.spec.lengths is not None:  # each has a length of its own
        return _together([hear(adapter, inputs, _row(text, i), [row], step) for i, row in enumerate(rows)])
    index = torch.tensor(list(rows))
    given = adapter.with_text(adapter.take(inputs, index), text)
    return _heard(adapter, adapter.spec.meets[0], first_arguments(adapter, given, step), given)


def first_arguments(adapter: DeclaredAdapter, given: Inputs, step: Step) -> dict[str, Any]:
    """What the first meeting block gets, by name, where the denoiser is called with these inputs."""
    found = list[dict[str, Any]]()
    probing, phase = step.probing, step.phase
    remove = _listen(adapter, found)
    step.probing, step.phase = True, "listen"
    try:
        with torch.no_grad():
            adapter.denoiser(**given)
    except StopForward:
        pass
    finally:
        step.probing, step.phase = probing, phase
        remove()
    return found[0]


def _listen(adapter: DeclaredAdapter, found: list[dict[str, Any]]) -> Callable[[], None]:
    """Put an ear at the first meeting block; returns the undo."""
    meet, denoiser = adapter.spec.meets[0], adapter.denoiser
    block, to_the_end, here = blocks(denoiser, meet)[0], _prefetches(denoiser), threading.get_ident()

    def first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() != here:
            return
        if not found:
            found.append(named(block, args, kwargs))
        if not to_the_end:
            raise StopForward

    return hook_before(denoiser, block, first)


def _prefetches(denoiser: nn.Module) -> bool:
    """Whether offloading notes the order of blocks in a first forward, which must then run to its end."""
    hooks = (getattr(getattr(module, "_diffusers_hook", None), "hooks", {}) for module in denoiser.modules())
    return any("prefetch" in name for found in hooks for name in found)


def blocks(denoiser: nn.Module, meet: Meet) -> list[nn.Module]:
    """The meeting's blocks in order."""
    return list(denoiser.get_submodule(meet.path).children())


_signature = functools.lru_cache(512)(inspect.signature)


def named(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A block's arguments by name."""
    signature = _signature(type(module).forward)
    found = signature.bind(module, *args, **kwargs)
    rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")
    given = dict(list(found.arguments.items())[1:])
    return given | given.pop(rest, {})


def leaves(alongs: Sequence[Along], arguments: Mapping[str, Any]) -> Iterator[tuple[Along, Key, torch.Tensor]]:
    """The tensors with one entry a token among a block's arguments."""
    for along in alongs:
        for number, leaf in enumerate(tree_flatten(arguments.get(along.argument))[0]):
            if isinstance(leaf, torch.Tensor) and along.leaf in (None, number):
                yield along, (along.argument, number), leaf


def _heard(adapter: DeclaredAdapter, meet: Meet, arguments: Mapping[str, Any], given: Inputs) -> Heard:
    if meet.how != "joint":
        words, others = arguments[meet.text or ""].detach(), dict[str, Any]()
        for along in meet.along:
            value = arguments.get(along.argument)
            mask = "mask" in along.argument
            others |= value if isinstance(value, dict) else {"attention_mask" if mask else along.argument: value}
        return Heard(words, [words.shape[1]] * len(words), others=others)
    first = adapter.spec.text_first
    if meet.text is not None:
        words, image = arguments[meet.text], arguments[meet.sequence].shape[1]
        lengths, start = [words.shape[1]] * len(words), 0 if first else image
    else:
        lengths, image = adapter.lengths(given), adapter.tokens(given)
        start = 0 if first else image
        words = arguments[meet.sequence].narrow(1, start, lengths[0])
    pieces: dict[Key, Piece] = {}
    for along, key, leaf in leaves(meet.along, arguments):
        tokens = leaf.narrow(along.dim, start if along.of == "joint" else 0, lengths[0])
        at_image = leaf.narrow(along.dim, lengths[0] if first else 0, 1) if along.rope else None
        pieces[key] = Piece(along.dim, tokens, at_image, tuple(leaf.shape))
    return Heard(words.detach(), lengths, pieces)


def _row(text: Text, i: int) -> Text:
    def own(value: Any) -> Any:
        return None if value is None else value[i : i + 1]

    return replace(
        text, embeddings=own(text.embeddings), mask=own(text.mask), more={k: own(v) for k, v in text.more.items()}
    )


def _together(rows: Sequence[Heard]) -> Heard:
    """Texts heard one by one as one; shorter ones are padded, and `lengths` says how far each goes."""
    width = max(row.width for row in rows)

    def piece(key: Key) -> Piece:
        own = [row.pieces[key] for row in rows]
        images = [part.image for part in own if part.image is not None]
        tokens = torch.cat([_padded(part.tokens, part.dim, width) for part in own])
        return replace(own[0], tokens=tokens, image=torch.cat(images) if images else None)

    words = torch.cat([F.pad(row.words, (0, 0, 0, width - row.width)) for row in rows])
    return Heard(words, [row.lengths[0] for row in rows], {key: piece(key) for key in rows[0].pieces})


def _padded(tokens: torch.Tensor, dim: int, width: int) -> torch.Tensor:
    shape = list(tokens.shape)
    shape[dim] = width - shape[dim]
    return torch.cat([tokens, tokens.new_zeros(shape)], dim)

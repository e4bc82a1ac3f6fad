"""Native hooks on the denoiser: they ask whoever put them on, and are inert in copies of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ...attention.hook import hook_after, hook_before

Before = Callable[[tuple[Any, ...], dict[str, Any]], dict[str, Any] | None]
"""before(args, kwargs): the denoiser's arguments by name, None to leave the call alone."""

After = Callable[[Any], Any]
"""after(output): what is returned instead; None leaves it. The output is None where the denoiser raised."""


def hook_denoiser(
    denoiser: nn.Module, positional: Sequence[str], before: Before, after: After
) -> Callable[[], None]:
    """See and change the denoiser's inputs and outputs; returns the undo.

    torch's own hooks, because accelerate's offload drops anything patched on `forward`.

    Args:
        positional: names of the denoiser's positional arguments.
    """

    def first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs = before(args, kwargs)
        if inputs is None:
            return None
        names = positional[: len(args)]  # as they came, or compiled code would be compiled again
        return tuple(inputs[n] for n in names), {n: value for n, value in inputs.items() if n not in names}

    def last(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return after(output)

    undos = hook_after(denoiser, denoiser, last), hook_before(denoiser, denoiser, first)

    def undo() -> None:
        for one in undos:
            one()

    return undo

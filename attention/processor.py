"""The same edits as a classic attention processor, for users of `set_attn_processor`.

`diffgraft.graft` is the first choice: it survives `load_ip_adapter`, `fuse_qkv_projections` and
`set_attn_processor`, each of which replaces processors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from .edit import Edit
from .layer import AttentionLayer, find_layers
from .seam import Work, positional_names, run_edited
from .step import Step


class EditProcessor:
    """Wraps the processor that is there and edits its attention.

    Args:
        layer: the layer that it serves.
        inner: the processor to run; its signature is kept, since diffusers filters keyword arguments by it.
        edits: sorted by `order`.
        step: the step that the edits see, or a function that gives it; by default one step without row groups.
    """

    def __init__(
        self, layer: AttentionLayer, inner: Callable[..., Any], edits: list[Edit], step: Step | Callable[[], Step]
    ) -> None:
        self.layer, self.inner, self.edits, self.step = layer, inner, edits, step
        self._names = positional_names(inner)

        @functools.wraps(inner.__call__)  # pyright: ignore[reportFunctionMemberAccess]
        def call(*args: Any, **kwargs: Any) -> Any:
            return self._run(*args, **kwargs)

        # An instance attribute, because diffusers reads inspect.signature(processor.__call__).
        self.__dict__["__call__"] = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        step = self.step() if callable(self.step) else self.step
        edits = [found for edit in self.edits if (found := edit.planned(self.layer, step)) is not None]
        if not edits:
            return self.inner(*args, **kwargs)
        work = Work(self.layer, step, edits, [edit for edit in edits if edit.every_call])
        return run_edited(work, self.inner, self._names, args, kwargs)


def edit_processors(denoiser: Any, *edits: Edit, step: Step | Callable[[], Step] | None = None) -> dict[str, Any]:
    """Processors for `denoiser.set_attn_processor(...)`: the present ones, wrapped where an edit selects the layer.

    Args:
        denoiser: a diffusers denoiser with `attn_processors`.
        edits: what to run; put the old processors back with `denoiser.set_attn_processor(before)`.
        step: what the edits are told about the run; without it they see step 0 of 1 and no row groups.
    Returns:
        a new dict for every attention layer by processor name. `set_attn_processor` empties the dict that it is given.
    """
    ordered = sorted(edits, key=lambda edit: edit.order)
    processors: dict[str, Any] = dict(denoiser.attn_processors)
    for layer in find_layers(denoiser):
        chosen = [edit for edit in ordered if edit.selects(layer)]
        name = f"{layer.name}.processor"
        if chosen:
            processors[name] = EditProcessor(layer, processors[name], chosen, step or Step())
    return processors

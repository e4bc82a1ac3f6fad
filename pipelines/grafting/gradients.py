"""Gradients through a denoiser that threads share: its parameters held still, and whose backward pass it is."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ..families.base import Adapter
from .run import Run

_LOCK = threading.Lock()
_FROZEN: weakref.WeakKeyDictionary[nn.Module, tuple[int, set[str]]] = weakref.WeakKeyDictionary()
_TASKS: dict[int, Run] = {}
_BACKWARD = (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward)


@contextmanager
def frozen(denoiser: nn.Module) -> Generator[None]:
    """Inside, no parameter takes part in gradients; the first thread switches that and the last one puts it back.

    In a model that is being trained they stay as they are: somebody else's backward pass may be on its way.
    """
    if denoiser.training:
        yield
        return
    with _LOCK:
        held, names = _FROZEN.get(denoiser) or (0, {n for n, p in denoiser.named_parameters() if p.requires_grad})
        _FROZEN[denoiser] = held + 1, names
        if not held:
            _require(denoiser, names, False)
    try:
        yield
    finally:
        with _LOCK:
            held, names = _FROZEN.pop(denoiser)
            if held > 1:
                _FROZEN[denoiser] = held - 1, names
            else:
                _require(denoiser, names, True)


def _require(denoiser: nn.Module, names: set[str], wanted: bool) -> None:
    for name, parameter in denoiser.named_parameters() if names else ():  # offload makes new ones meanwhile
        if name in names:
            parameter.requires_grad_(wanted)


class _Backward(TorchFunctionMode):
    """Notes whose each backward pass is: gradient checkpointing runs layers again, on autograd's own threads."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _BACKWARD:
            return func(*args, **(kwargs or {}))
        begun: list[int] = []

        def begin(*gradients: Any) -> None:
            begun.append(torch._C._current_graph_task_id())  # pyright: ignore
            _TASKS[begun[-1]] = self.run

        handles = [node.register_prehook(begin) for node in _roots(args, kwargs or {})]
        try:
            return func(*args, **(kwargs or {}))
        finally:
            for handle in handles:
                handle.remove()
            for task in begun:
                _TASKS.pop(task, None)


def _roots(args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """Where a backward pass begins: the nodes of its outputs."""
    given = args[0] if args else kwargs.get("outputs", kwargs.get("tensors"))
    outputs: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
    return [output.grad_fn for output in outputs if getattr(output, "grad_fn", None) is not None]


def followed(run: Run) -> Any:
    """Inside, layers that a backward pass runs again know that they belong to `run`."""
    again = getattr(run.adapter.denoiser, "is_gradient_checkpointing", False)
    return _Backward(run) if again else nullcontext()


def run_again_for(adapter: Adapter) -> Run | None:
    """The run on this adapter whose backward pass this thread works on."""
    task = torch._C._current_graph_task_id()  # pyright: ignore
    run = _TASKS.get(task) if task != -1 else None
    return run if run is not None and run.adapter is adapter else None

"""The seam: an unmodified attention processor runs, and its one call of scaled dot-product attention is edited.

The layer's `forward` is wrapped on the instance. While it runs, a `TorchFunctionMode` catches
`F.scaled_dot_product_attention`, where q, k and v arrive after LoRA, norms, rotary embeddings and fused projections.
The processor stays the user's own.

What a layer is to do is laid out for it before the denoiser is called, for each thread by itself: a seam finds its
`Work` or nothing, and decides nothing. torch.compile traces it: so the wrapper is a bound method, of one function for
all layers, and whatever belongs to a layer or a thread hangs on the `Seam` that the module carries.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
import threading
import types
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from .call import AttentionCall, Kernel, Project, TextCall
from .direct import direct
from .dispatched import backend_of, caught, kernel_of
from .edit import Edit, attend
from .errors import AttentionNotReachedError
from .layer import AttentionLayer
from .memo import TextMemo
from .sequence import Columns, padded, row_mask
from .step import Step

_SDPA, _LINEAR = F.scaled_dot_product_attention, F.linear
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_LOCK = threading.RLock()
_KEY = "_diffgraft_seam"


class StopForward(BaseException):
    """Ends a probe once the last layer that matters has been seen. Not an error: nothing but the probe catches it."""


class Task(Protocol):
    """What a seam may find laid out."""

    def run(self, forward: Callable[..., Any], names: tuple[str, ...], args: Any, kwargs: Any) -> Any:
        """Run the module's own `forward`, whose positional arguments have these names, and change what it does."""
        ...


@dataclass(frozen=True, eq=False)
class Work:
    """What one run of a layer does: its attention is edited.

    Attributes:
        layer: which one.
        edits: of its own attention call. more: those of them that run in its further calls, an IP-Adapter's, too.
        kernel: for rows without explicit probabilities. text: columns of the text in a joint sequence, counted from its
            end where negative.
        memo: keeps the products of an unchanged text.
        columns: where further texts stand beside the prompt's: one for all rows, or one a row where they differ.
        asks: how the layer asks its text. total: rows of the denoiser's batch, branches included; 0 where unknown.
        backend: of diffusers' dispatcher, where that is not torch's own attention.
    """

    layer: AttentionLayer
    step: Step
    edits: Sequence[Edit]
    more: Sequence[Edit] = ()
    kernel: Kernel = _SDPA
    text: slice | None = None
    memo: TextMemo | None = None
    columns: Sequence[Columns] = ()
    asks: TextCall = TextCall()
    total: int = 0
    backend: Any = None

    def on(self, backend: Any) -> Work:
        """The same where the layer attends by this backend of diffusers' dispatcher, not by torch."""
        return replace(self, backend=backend, kernel=kernel_of(backend) if self.kernel is _SDPA else self.kernel)

    @property
    def traced(self) -> bool:
        """Whether torch.compile may trace it."""
        return all(edit.traced for edit in self.edits)

    def run(self, forward: Callable[..., Any], names: tuple[str, ...], args: Any, kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and not self.traced:
            return _run_untraced(self, forward, names, args, kwargs)  # compiled after the graft went on
        return run_edited(self, forward, names, args, kwargs)


def _through(func: Any, args: Any, kwargs: Any) -> Any:
    """A torch call that is let through; `unflatten` as the operator that it is, for torch.compile cannot trace the
    method's own call of super()."""
    func = torch.unflatten if func is torch.Tensor.unflatten else func
    return func(*args, **kwargs) if kwargs else func(*args)


class Tap(TorchFunctionMode):
    """While active, sends each scaled dot-product attention through `attend`.

    Args:
        words: the text whose products `work.memo` keeps. heard: gets an entry for each attention.
    """

    def __init__(
        self, work: Work, project: Project | None, words: torch.Tensor | None, heard: list[AttentionCall | None]
    ) -> None:
        self.task, self.project, self.words, self.heard = work, project, words, heard

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _SDPA:
            return self.attend(args, kwargs or {})
        if func is _LINEAR and self.words is not None and args[0] is self.words and self.task.memo is not None:
            return self.task.memo.linear(self.task.layer.name, func, args, kwargs or {})
        return _through(func, args, kwargs)

    def attend(self, args: Any, kwargs: Any) -> Any:
        """In place of one scaled dot-product attention with these arguments."""
        number, task = len(self.heard), self.task
        self.heard.append(None)
        edits = task.edits if number == task.asks.own else task.more
        if not edits:
            return task.kernel(*args, **kwargs)
        given: dict[str, Any] = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
        several = len(task.columns) > 1
        if several and not all(edit.ragged == "each" for edit in edits):
            return _by_row(task, given, number, self.project, edits)
        call = _call(task, given, number, self.project)
        if several:
            call.each = tuple(task.columns)
        elif task.columns:
            call.text, call.streams = task.columns[0].text, task.columns[0].streams
        return attend(call, edits)


def _by_row(
    work: Work, given: dict[str, Any], number: int, project: Project | None, edits: Sequence[Edit]
) -> torch.Tensor:
    """Rows whose texts differ in length, one at a time and without their padding."""
    outs: list[torch.Tensor] = []
    for row, columns in enumerate(work.columns):
        kept, whole = columns.kept()
        own = dict(given, attn_mask=row_mask(given.get("attn_mask"), row, kept))
        own |= {name: given[name][row : row + 1, :, kept] for name in ("query", "key", "value")}
        call = _call(work, own, number, project)
        held = {name: rows for name, rows in work.step.rows.items() if rows.start <= row < rows.stop}
        call.step = replace(work.step, rows=dict.fromkeys(held, slice(0, 1)))
        call.text, call.streams = whole.text, whole.streams
        call.picture = next((row - rows.start for rows in held.values()), None)
        outs.append(padded(attend(call, edits), kept, given["query"].shape[-2]))
    return torch.cat(outs)


def _by_frame(step: Step, batch: int, total: int) -> Step:
    """The step with its rows as a layer has them that takes a film's frames one by one: each row so many times."""
    if not total or batch <= total or batch % total:
        return step
    n = batch // total
    return replace(step, rows={name: slice(rows.start * n, rows.stop * n) for name, rows in step.rows.items()})


class _Listener(TorchFunctionMode):
    """Keeps the layer's own attention call. It ends the forward there; while torch.compile traces, which takes no way
    out but the return, the forward goes on, and what it computes is not used."""

    def __init__(self, work: Work, heard: list[AttentionCall | None]) -> None:
        self.task, self.heard = work, heard

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not _SDPA:
            return _through(func, args, kwargs)
        return self.attend(args, kwargs or {})

    def attend(self, args: Any, kwargs: Any) -> Any:
        """In place of one scaled dot-product attention with these arguments."""
        number, own = len(self.heard), self.task.asks.own
        given: dict[str, Any] = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
        self.heard.append(_call(self.task, given, 0, None) if number == own else None)
        if number != own:
            return _SDPA(*args, **kwargs)
        if torch.compiler.is_compiling():
            return torch.zeros_like(given["query"])
        raise StopForward


def _call(work: Work, given: Mapping[str, Any], number: int, project: Project | None) -> AttentionCall:
    q, k, v, scale = given["query"], given["key"], given["value"], given.get("scale")
    text = None if work.text is None else slice(*work.text.indices(k.shape[-2])[:2])  # it may count from the end
    if given.get("enable_gqa") and k.shape[1] != q.shape[1]:  # no kernel that gives the log-sum-exp knows groups
        k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], 1) for tensor in (k, v))
    scale, step = 1 / math.sqrt(q.shape[-1]) if scale is None else scale, _by_frame(work.step, len(q), work.total)
    return AttentionCall(
        work.layer, q, k, v, given.get("attn_mask"), scale, number, step, text, given.get("is_causal", False),
        False, work.kernel, project, {},
    )  # fmt: skip


def project_text(
    work: Work, forward: Callable[..., Any], arguments: dict[str, Any], text: torch.Tensor, others: Mapping[str, Any]
) -> AttentionCall:
    """The attention call that a layer would make for another text.

    Its own processor runs on one image token, or on one row of them where it rotates queries, up to its attention, so
    LoRA, norms, fused projections and mask handling are the layer's own.

    Args:
        forward, arguments: what is running, and its arguments by name.
        text: [n, L, C] as the layer's block takes it. others: arguments of the layer that go with it, its
            `attention_mask` among them.
    """
    asks = work.asks
    text = text if asks.through is None else asks.through(text)
    given = arguments.get("encoder_hidden_states")
    other = (text, *given[1:]) if isinstance(given, tuple) else text  # the rest is an IP-Adapter's
    image = arguments["hidden_states"][:1] if asks.whole else arguments["hidden_states"][:1, :1]
    changed = {"hidden_states": image.expand(len(text), -1, -1), "encoder_hidden_states": other}
    changed |= {name: value for name, value in others.items() if value is not None or name in arguments}
    heard: list[AttentionCall | None] = []
    _listen(_Listener(work, heard), forward, arguments | changed)
    call = heard[asks.own]
    assert call is not None
    return call


def _listen(ear: _Listener, forward: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Run a layer's forward until its attention has been heard."""
    if torch.compiler.is_compiling():
        with ear:
            forward(**arguments)
        return
    image, rest = arguments["hidden_states"], {n: v for n, v in arguments.items() if n != "hidden_states"}
    short = direct(forward, (image,), rest, None)
    with contextlib.suppress(StopForward):
        if short is not None:
            short(ear.attend, image, **rest)
        else:
            with ear, caught(ear.task.backend, ear):
                forward(**arguments)


def _text_of(arguments: dict[str, Any]) -> torch.Tensor | None:
    given = arguments.get("encoder_hidden_states")
    given = given[0] if isinstance(given, tuple) else given
    return given if isinstance(given, torch.Tensor) else None


def positional_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of a function's arguments, in the order in which they can be given without a name."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, found in inspect.signature(forward).parameters.items() if found.kind in kinds)


@functools.lru_cache(maxsize=512)
def _method_names(method: Callable[..., Any]) -> tuple[str, ...]:
    """The same of a class's function, without `self`: asked for every layer whenever a graft goes on."""
    return positional_names(method)[1:]


def run_edited(work: Work, forward: Callable[..., Any], names: tuple[str, ...], args: Any, kwargs: Any) -> Any:
    """Run `forward` of a layer with its attention edited.

    Args:
        names: of the positional arguments of `forward`.
    Raises:
        AttentionNotReachedError: the layer's processor never called scaled dot-product attention.
    """

    def project(text: torch.Tensor, others: Mapping[str, Any]) -> AttentionCall:
        named = dict(zip(names, args, strict=False)) | kwargs
        return project_text(work, forward, named, text, others)

    heard: list[AttentionCall | None] = []
    tracing = torch.compiler.is_compiling()
    if not tracing and (backend := backend_of(work.layer.module)) is not None:
        work = work.on(backend)
    tap = Tap(work, project, _text_of(kwargs) if work.memo is not None and not tracing else None, heard)
    short = None if tracing else direct(forward, args, kwargs, work.memo)
    if short is not None:
        out = short(tap.attend, *args, **kwargs)
    else:
        with tap, caught(work.backend, tap):
            out = forward(*args, **kwargs)
    if not heard:
        raise AttentionNotReachedError(f"{work.layer.name} {_not_reached(work.layer)}")
    return out


_run_untraced = cast("Callable[..., Any]", torch.compiler.disable(run_edited))


def _not_reached(layer: AttentionLayer) -> str:
    """Why a layer's attention was not caught, and what to do."""
    processor = getattr(layer.module, "processor", None)
    if (backend := backend_of(layer.module)) is not None:  # only code that was compiled with it
        return (
            f"ran on the attention backend {getattr(backend, 'value', backend)!r} in compiled code, where it cannot be "
            "edited: call set_attention_backend('native') on the denoiser, or graft it before it is compiled"
        )
    return (
        f"ran with {type(processor).__name__}, which does not use torch's scaled_dot_product_attention, so it cannot "
        "be edited: call pipe.disable_attention_slicing(), pipe.disable_xformers_memory_efficient_attention() or set "
        "the layer's processor to AttnProcessor2_0"
    )


class Seam:
    """What a wrapped module carries: its own `forward`, and for each thread the work that is laid out for it.

    In a copy of the module it is without work, and its `original` is bound to the copy.

    Attributes:
        key: under which the module carries it. was_own: whether the module had a `forward` of its own before.
        names: of the positional arguments of `forward`.
        users: how many put it on.
        here: `here.task` is this thread's work.
        elsewhere: are asked for work by threads that have none while gradients are on: gradient checkpointing runs
            layers again on autograd's own threads.
    """

    def __init__(self, key: str, original: Callable[..., Any], was_own: bool, names: tuple[str, ...]) -> None:
        self.key, self.original, self.was_own, self.names = key, original, was_own, names
        self.users = 0
        self.here = threading.local()
        self.elsewhere: list[Callable[[], Task | None]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Seam:
        return Seam(self.key, copy.deepcopy(self.original, memo), self.was_own, self.names)

    def __reduce__(self) -> Any:
        return _unpickled, (self.key,)


def _unpickled(key: str) -> Seam:
    """In place of a seam that was pickled; its module's `forward` is the class's again."""
    return Seam(key, _no_forward, False, ())


def _no_forward(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError


@functools.cache
def _seamed(own: Callable[..., Any], key: str) -> Callable[..., Any]:
    """The wrapper around modules whose class has the forward `own`, one for them all."""

    @functools.wraps(own)
    def forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        seam: Seam | None = module.__dict__.get(key)
        if seam is None:  # it went off while this call began
            return own(module, *args, **kwargs)
        task: Task | None = getattr(seam.here, "task", None)
        if task is None and torch.is_grad_enabled() and seam.elsewhere:
            task = next((found for ask in seam.elsewhere if (found := ask()) is not None), None)
        if task is None:
            return seam.original(*args, **kwargs)
        return task.run(seam.original, seam.names, args, kwargs)

    return forward


@contextlib.contextmanager
def seam_on(module: nn.Module, elsewhere: Callable[[], Task | None] | None = None) -> Generator[Seam]:
    """Inside, the module has a seam: a new one, or the one that another user put on; users may leave in any order."""
    asked = [] if elsewhere is None else [elsewhere]
    seam = _put_on(module, asked)
    try:
        yield seam
    finally:
        _take_off(module, seam, asked)


def _put_on(module: nn.Module, asked: list[Callable[[], Task | None]]) -> Seam:
    own = type(module).forward
    with _LOCK:
        key = _KEY
        while key in module.__dict__ and not _is_seamed(module, key):
            key += "_"  # somebody wrapped on top of that one, or the module is an unpickled copy
        if key not in module.__dict__:
            seam = Seam(key, module.forward, "forward" in module.__dict__, _method_names(own))
            module.__dict__[key] = seam
            module.__dict__["forward"] = types.MethodType(_seamed(own, key), module)
        seam: Seam = module.__dict__[key]
        seam.users += 1
        seam.elsewhere = seam.elsewhere + asked
    return seam


def _is_seamed(module: nn.Module, key: str) -> bool:
    """Whether the module's `forward` is the wrapper of that key."""
    return getattr(module.__dict__.get("forward"), "__func__", None) is _seamed(type(module).forward, key)


def _take_off(module: nn.Module, seam: Seam, asked: list[Callable[[], Task | None]]) -> None:
    with _LOCK:
        seam.users -= 1
        seam.elsewhere = [ask for ask in seam.elsewhere if ask not in asked]
        # Whoever wrapped on top of the seam holds it as "the original": then it stays, inert.
        if seam.users or not _is_seamed(module, seam.key):
            return
        if seam.was_own:
            module.__dict__["forward"] = seam.original
        else:
            del module.__dict__["forward"]
        del module.__dict__[seam.key]


def lay_out(plan: Iterable[tuple[Seam, Task]]) -> None:
    """Give seams their work in this thread."""
    for seam, task in plan:
        seam.here.task = task


def clear(seams: Iterable[Seam]) -> None:
    """Take their work from seams in this thread."""
    for seam in seams:
        seam.here.__dict__.pop("task", None)


@contextlib.contextmanager
def laid_out(plan: Sequence[tuple[Seam, Task]]) -> Generator[None]:
    """Inside, seams have this work in this thread; then what they had before."""
    before = [(seam, task) for seam, _ in plan if (task := getattr(seam.here, "task", None)) is not None]
    lay_out(plan)
    try:
        yield
    finally:
        clear(seam for seam, _ in plan)
        lay_out(before)


def stop_probe(step: Step) -> None:
    """End the probe that is running, if it may end early; for an edit that has seen all it needs."""
    if step.probing and step.may_stop:
        raise StopForward

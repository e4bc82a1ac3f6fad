"""The rows of `gpu_check`: one model in one mode, plain, guided and with each plugin."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.utils import counters

from ... import (
    AttentionSegregation,
    NegativeAway,
    Plugin,
    SelfAttentionRedirection,
    StartpointFilter,
    StyleInjection,
    graft,
)
from ...attention.errors import GraftError
from .gpu_measure import kernels, peak, quartiles, ratios, seconds
from .gpu_shapes import Shape, Subject, make
from .redirection_cost import square
from .training import TimeBox

GRAPHS = "CUDA graphs"
MODES = ("eager", "compiled", GRAPHS)
Make = Callable[[Subject], Plugin]
PLUGINS: Mapping[str, Make] = {
    "NegativeAway, nasa": lambda s: NegativeAway(s.negative, rule="nasa"),
    "NegativeAway, nag": lambda s: NegativeAway(s.negative, rule="nag"),
    "AttentionSegregation": lambda s: AttentionSegregation([2, 5]),
    "SelfAttentionRedirection": lambda s: SelfAttentionRedirection(square(s.side, 0.1)),
    "StartpointFilter": lambda s: StartpointFilter(),
    "StyleInjection, a set of two": lambda s: StyleInjection(None, method="stylealigned"),
}
UNFORESEEN = "unforeseen "
REFUSED = (GraftError, torch.OutOfMemoryError, torch._dynamo.exc.TorchDynamoException)


@dataclass
class Row:
    """One line of a table. What was not measured is None, and `note` says why.

    Attributes:
        ratio: quartiles of the time to the plain call in the same mode. memory: peak bytes beyond what was there.
        kernels: attention kernels of one call. graphs, breaks: what torch.compile made for this row.
        restored: whether the plain call gives the same bytes again afterwards.
        error, plain_error: of bfloat16 against float32, with the plugin and without.
    """

    shape: str
    mode: str
    what: str
    steps: int = 0
    seconds: float | None = None
    ratio: tuple[float, float, float] | None = None
    memory: int | None = None
    kernels: dict[str, int] | None = None
    graphs: int | None = None
    breaks: int | None = None
    restored: bool | None = None
    error: float | None = None
    plain_error: float | None = None
    note: str = ""


class Bench:
    """One model on one device in one mode."""

    def __init__(self, shape: Shape, subject: Subject, mode: str, steps: int, most: int = 15) -> None:
        self.shape, self.subject, self.mode, self.steps, self.most = shape, subject, mode, steps, most
        self.device = next(subject.denoiser.parameters()).device
        self.before: torch.Tensor | None = None

    def rows(self, box: TimeBox) -> Iterator[Row]:
        """Plain, guided, and with each plugin, within the box; if the plain call cannot run, nothing else is tried."""
        plain, guided = self.subject.call, self.subject.guided
        todo: dict[str, tuple[dict[str, Any], Make | None]] = {"plain": (plain, None), "guidance": (guided, None)}
        plugins = dict(list(PLUGINS.items())[:1]) if self.mode == GRAPHS else PLUGINS  # whole models compile for long
        todo |= {name: (self.own(name), build) for name, build in plugins.items()}
        for number, (what, (call, build)) in enumerate(todo.items()):
            row = Row(self.shape.name, self.mode, what, self.steps, note=self.subject.note if what == "plain" else "")
            if box.fraction >= 1:
                row.note = "left out: the time is over"
            else:
                self._fill(row, call, build, TimeBox((box.total - box.spent) / 60 / (len(todo) - number)))
            yield row
            if what == "plain" and row.seconds is None:
                return

    def own(self, what: str) -> dict[str, Any]:
        """The call of a plugin: a set of pictures has two."""
        return self.subject.call | ({"num_images_per_prompt": 2} if what.endswith("a set of two") else {})

    def _fill(self, row: Row, call: dict[str, Any], build: Make | None, box: TimeBox) -> None:
        """Measure; what is refused says why."""
        try:
            plugins = [build(self.subject)] if build else []
            with counted(row):
                self.before = self.draw(self.subject.call) if self.before is None else self.before
                with grafted(self.subject.pipe, plugins):
                    self.draw(call)
                    row.kernels = kernels(lambda: self.draw(call), self.device)
                    row.memory = peak(lambda: self.draw(call), self.device)
            row.seconds = self.timed(call, plugins)
            if row.what != "plain":
                base = call if plugins else self.subject.call
                pairs = ratios(lambda: self.timed(base, []), lambda: self.timed(call, plugins), box, self.most)
                row.ratio = quartiles(pairs)
            row.restored = torch.equal(self.before, self.draw(self.subject.call))
        except Exception as error:  # one row must not cost the others their time
            row.note = short(error)

    def draw(self, call: dict[str, Any]) -> torch.Tensor:
        """Latents of one call, always the same noise."""
        noise = torch.Generator().manual_seed(0)
        return self.subject.pipe(**call, num_inference_steps=self.steps, generator=noise).images

    def timed(self, call: dict[str, Any], plugins: Sequence[Plugin]) -> float:
        """Seconds of one call; putting on and taking off are not in them."""
        with grafted(self.subject.pipe, plugins):
            return seconds(lambda: self.draw(call), self.device)


def grafted(pipe: Any, plugins: Sequence[Plugin]) -> AbstractContextManager[Any]:
    """Nothing at all without plugins: even an empty graft would show in the times."""
    return graft(pipe, *plugins) if plugins else nullcontext()


@contextmanager
def counted(row: Row) -> Generator[None]:
    """Notes what torch.compile makes inside."""
    counters.clear()
    yield
    if row.mode != "eager":
        row.graphs = int(counters["stats"]["unique_graphs"])
        row.breaks = sum(counters["graph_break"].values())


@contextmanager
def compiled(denoiser: Any, mode: str, backend: str) -> Generator[None]:
    """The denoiser's repeated blocks are compiled inside, as diffusers advises; eager again afterwards.

    For CUDA graphs it is the whole denoiser: a block's output would be overwritten by the next block's.
    """
    if mode == "eager":
        yield
        return
    torch._dynamo.reset()
    if mode == GRAPHS:
        denoiser.compile(mode="reduce-overhead")
    else:
        denoiser.compile_repeated_blocks(backend=backend)
    try:
        yield
    finally:
        for module in denoiser.modules():
            module._compiled_call_impl = None
        torch._dynamo.reset()


def exactness(shape: Shape, device: torch.device, side: int, little: bool) -> Iterator[Row]:
    """How far bfloat16 is from float32 on a small picture and few layers, with each plugin and without."""
    exact = make(shape, device, torch.float32, side=side, little=little, fewest=True)
    other = make(shape, device, torch.bfloat16, side=side, little=little, fewest=True)
    other.denoiser.load_state_dict(exact.denoiser.state_dict())  # drawn in bfloat16, they would be other weights
    found, notes = dict[str, list[torch.Tensor]](), dict[str, str]()
    for subject in (exact, other):
        bench = Bench(shape, subject, "eager", 2)
        for what, build in {"plain": None, **PLUGINS}.items():
            try:
                with grafted(subject.pipe, [build(subject)] if build else []):
                    found.setdefault(what, []).append(bench.draw(bench.own(what)).float())
            except Exception as error:  # one row must not cost the others their time
                notes[what] = short(error)
    plain = _apart(found.get("plain", []))
    for what in ("plain", *PLUGINS):
        error = _apart(found.get(what, []))
        yield Row(shape.name, "exactness", what, 2, error=error, plain_error=plain, note=notes.get(what, ""))


def _apart(found: Sequence[torch.Tensor]) -> float | None:
    """Relative distance of the two precisions."""
    if len(found) < 2:
        return None
    exact, other = found
    return float((other - exact).norm() / exact.norm())


def short(error: BaseException) -> str:
    """One line of it; what no one foresaw says so."""
    foreseen = "" if isinstance(error, REFUSED) else UNFORESEEN
    return " ".join(f"{foreseen}{type(error).__name__}: {error}".split())[:200]

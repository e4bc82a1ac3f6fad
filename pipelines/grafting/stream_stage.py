"""The stream stage: further texts are heard by the model itself and join the running call where text meets image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...attention.errors import SettingError
from ...attention.hook import hook_after, hook_before
from ...attention.seam import Seam
from ...plugins.base import Plugin, Text
from ..families.base import Adapter, Inputs
from ..families.declared import DeclaredAdapter
from ..families.family import Meet
from ..families.hear import Heard, blocks, first_arguments, hear, named
from ..families.join import Joined
from .run import Plan, Run


def add_streams(run: Run, active: Sequence[Plugin], inputs: Inputs) -> Inputs:
    """Let the model hear the texts that plugins want beside the prompt's.

    Raises:
        SettingError: two plugins bring some where all texts are in one sequence.
    """
    wanted = [texts for plugin in active if (texts := plugin.streams(run.step))]
    if not wanted:
        return inputs
    adapter = run.adapter
    if not isinstance(adapter, DeclaredAdapter) or adapter.spec.how != "joint":
        run.step.heard = {id(text): _across(run, adapter, text, inputs) for texts in wanted for text in texts}
        return inputs
    if len(wanted) > 1:
        raise SettingError(
            "two plugins steer away from negatives at once on a joint-attention model: give all negatives to one "
            "NegativeAway({'first': 1.0, 'second': 1.0})"
        )
    heard, cond = [_kept(run, adapter, text, inputs) for text in wanted[0]], run.step.rows["cond"]
    run.joined = Joined(adapter, heard, inputs, cond.stop - cond.start)
    added = {name: inputs[name] for name in adapter.spec.residuals if inputs.get(name) is not None}
    return inputs | {name: _widened(run.joined, value) for name, value in added.items()}


def _across(run: Run, adapter: Adapter, text: Text, inputs: Inputs) -> tuple[torch.Tensor, dict[str, Any]]:
    """A text for layers that attend across, with what they take with it."""
    if isinstance(adapter, DeclaredAdapter):
        heard = _kept(run, adapter, text, inputs)
        return heard.words, heard.others
    key = ("heard", id(adapter), id(text))
    kept = run.notes.get(key)
    if kept is None:
        kept = run.notes[key] = text, adapter.layer_text(text, inputs)
    return kept[1]


def _kept(run: Run, adapter: DeclaredAdapter, text: Text, inputs: Inputs) -> Heard:
    """The text as heard before in this pipeline call, where nothing that it depends on changes from step to step."""
    key = ("heard", id(adapter), id(text), run.step.size)
    kept = run.notes.get(key) if adapter.spec.still else None
    if kept is None:
        cond, n = run.step.rows["cond"], len(text.embeddings)
        rows = [cond.start + i * ((cond.stop - cond.start) // n) for i in range(n)]
        kept = run.notes[key] = text, hear(adapter, inputs, text, rows, run.step)
    return kept[1]


def heard_across(run: Run, text: Text) -> torch.Tensor:
    """A text as the blocks get it whose layers attend across, [n, L, C]."""
    if not isinstance(run.adapter, DeclaredAdapter):
        return run.adapter.layer_text(text, run.inputs)[0]
    rows = [run.step.rows["cond"].start] * len(text.embeddings)
    return hear(run.adapter, run.inputs, text, rows, run.step).words


def _widened(joined: Joined, value: Any) -> Any:
    if isinstance(value, dict):
        return {name: joined.widened(residual) for name, residual in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(joined.widened(residual) for residual in value)
    return joined.widened(value)


def joins(adapter: Adapter) -> bool:
    """Whether heard texts join the model's own sequence, inside of it."""
    return isinstance(adapter, DeclaredAdapter) and adapter.spec.how == "joint"


@dataclass(frozen=True, eq=False)
class Joining:
    """What a meeting block does in a model that is compiled whole, where hooks of its own would break the graph: it
    takes its arguments with the texts in them.

    Attributes:
        first: the texts' tokens join here. last: they leave behind it.
    """

    joined: Joined
    meet: Meet
    first: bool
    last: bool

    def run(self, forward: Callable[..., Any], names: tuple[str, ...], args: Any, kwargs: Any) -> Any:
        """Run the block."""
        given = dict(zip(names, args, strict=False)) | kwargs
        output = forward(**self.joined.join(self.meet, self.first, given))
        return self.joined.cut(output) if self.last else output


def meetings(adapter: Adapter) -> dict[str, nn.Module]:
    """The blocks at which heard texts join, by name, in order."""
    if not isinstance(adapter, DeclaredAdapter) or not joins(adapter):
        return {}
    return {name: block for name, block, _ in _meetings(adapter)}


def _meetings(adapter: DeclaredAdapter) -> list[tuple[str, nn.Module, Meet]]:
    each = ((meet, i, block) for meet in adapter.spec.meets for i, block in enumerate(blocks(adapter.denoiser, meet)))
    return [(f"{meet.path}.{i}", block, meet) for meet, i, block in each]


def joinings(run: Run, seams: Mapping[str, Seam]) -> Plan:
    """The work of meeting blocks that have seams, where texts join this call."""
    adapter, joined = run.adapter, run.joined
    if joined is None or not isinstance(adapter, DeclaredAdapter):
        return ()
    found = [(name, meet) for name, _, meet in _meetings(adapter) if name in seams]
    if found:
        _settle(run, adapter, joined)
    last = len(found) - 1 if adapter.spec.cut else -1
    return [(seams[name], Joining(joined, meet, i == 0, i == last)) for i, (name, meet) in enumerate(found)]


def _settle(run: Run, adapter: DeclaredAdapter, joined: Joined) -> None:
    """Tell beforehand what the blocks will say of lengths, for compiled code cannot wait for it."""
    meet, key = adapter.spec.meets[0], ("settled", id(adapter), run.step.size, *joined.lengths)
    if meet.text is None:
        return
    if key not in run.notes:
        given = first_arguments(adapter, run.inputs, run.step)
        run.notes[key] = given[meet.text].shape[1], given[meet.sequence].shape[1]
    joined.settle(*run.notes[key])


def hook_meetings(adapter: Adapter, here: Callable[[], Run | None]) -> list[Callable[[], None]]:
    """Hooks by which heard texts join and leave, as their undos; `here()` is the run that is edited now."""
    if not isinstance(adapter, DeclaredAdapter) or not joins(adapter):
        return []
    denoiser, undos = adapter.denoiser, list[Callable[[], None]]()
    for i, (_, block, meet) in enumerate(_meetings(adapter)):
        undos.append(hook_before(denoiser, block, _arrival(block, meet, i == 0, here)))
    if adapter.spec.cut:
        undos.append(hook_after(denoiser, blocks(denoiser, adapter.spec.meets[-1])[-1], _departure(here)))
    return undos


def _arrival(block: nn.Module, meet: Meet, first: bool, here: Callable[[], Run | None]) -> Callable[..., Any]:
    def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run, joined = here(), _joined(here)
        if run is None or joined is None:
            return None
        arguments = named(block, args, kwargs)
        if first:
            joined.measure(meet, arguments)
            run.rejoin()
        return (), joined.join(meet, first, arguments)

    return before


def _departure(here: Callable[[], Run | None]) -> Callable[..., Any]:
    def after(args: Any, kwargs: Any, output: Any) -> Any:
        joined = _joined(here)
        return None if joined is None or output is None else joined.cut(output)

    return after


def _joined(here: Callable[[], Run | None]) -> Joined | None:
    run = here()
    return None if run is None or run.step.probing else run.joined

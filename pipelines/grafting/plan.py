"""What runs where: the part that is decided when a graft is attached, and the plan of one denoiser call.

A plan is made once before the denoiser is called. The seam of a layer finds its work there, and decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...attention.call import Kernel
from ...attention.edit import Edit
from ...attention.errors import SettingError, UnsupportedPipelineError
from ...attention.layer import AttentionLayer
from ...attention.seam import Seam, Task, Work
from ...attention.sequence import Columns
from ...attention.step import Step
from ...plugins.base import Branch, Plugin
from ..families.base import Adapter
from ..families.declared import DeclaredAdapter
from ..families.join import Joined
from .run import Plan, Run
from .stream_stage import joinings


@dataclass(frozen=True)
class Placed:
    """The plugins' edits on the layers of a denoiser.

    Attributes:
        plugins: those whose settings are not neutral.
        layers: those that are edited, by name, in execution order, each with its adapter.
        edits: by name of the layer, sorted by their order, each with its plugin.
        blocks: where extra rows may join, in execution order; "" is the input.
        joins: of a group of rows the first block in which an edit touches it.
        wrapped: modules that a plugin runs itself, by name, each with its adapter and the plugin.
    """

    plugins: tuple[Plugin, ...] = ()
    layers: dict[str, tuple[Adapter, AttentionLayer]] = field(default_factory=dict[str, tuple[Adapter, AttentionLayer]])
    edits: dict[str, list[tuple[Plugin, Edit]]] = field(default_factory=dict[str, list[tuple[Plugin, Edit]]])
    blocks: tuple[str, ...] = ("",)
    joins: dict[str, str] = field(default_factory=dict[str, str])
    wrapped: dict[str, tuple[Adapter, Any, Plugin]] = field(default_factory=dict[str, Any])

    @property
    def brings_rows(self) -> bool:
        """Whether a plugin may ask for extra rows."""
        return any(type(plugin).branches is not Plugin.branches for plugin in self.plugins)

    @property
    def brings_texts(self) -> bool:
        """Whether a plugin may want further texts heard."""
        return any(type(plugin).streams is not Plugin.streams for plugin in self.plugins)

    @property
    def hides(self) -> bool:
        """Whether a plugin may hide tokens from everything."""
        return any(type(plugin).unseen is not Plugin.unseen for plugin in self.plugins)

    @property
    def traced(self) -> bool:
        """Whether torch.compile may trace all edits."""
        return not self.wrapped and all(edit.traced for _, edit in self._all())

    def active(self, step: Step) -> list[Plugin]:
        """Plugins whose window holds this step."""
        return [plugin for plugin in self.plugins if plugin.within(step)]

    def touches(self, group: str) -> bool:
        """Whether an edit changes rows of this group."""
        return any(group in (edit.rows or ()) for _, edit in self._all())

    def join_block(self, branches: Sequence[Branch]) -> str:
        """Name of the block before which these branches may join, "" for the input."""
        if any(not branch.late for branch in branches):
            return ""
        return min((self.joins.get(branch.name, "") for branch in branches), key=self.blocks.index)

    def _all(self) -> Iterator[tuple[Plugin, Edit]]:
        for placed in self.edits.values():
            yield from placed


def place(adapters: Sequence[Adapter], plugins: Sequence[Plugin]) -> Placed:
    """Ask every plugin for its edits and put them on the layers that they select.

    Raises:
        UnsupportedPipelineError: an edit that selects no layer; a plugin for pictures where films are made.
    """
    effective = tuple(plugin for plugin in plugins if not plugin.neutral)
    placed = Placed(effective, blocks=("", *(name for name, _ in adapters[0].late_blocks())))
    for plugin in effective:
        if adapters[0].films and not plugin.films:
            raise UnsupportedPipelineError(
                f"{type(plugin).__name__} works on pictures, and {type(adapters[0].pipe).__name__} makes films: "
                "NegativeAway works there; a plugin of your own says `films = True`"
            )
        for edit in plugin.edits():
            chosen = _chosen(adapters, plugin, edit)
            for layer in chosen:
                placed.edits.setdefault(layer.name, []).append((plugin, edit))
            for group in {*(edit.rows or ()), edit.owns} - {None}:
                _note_join(placed, str(group), chosen)
        _wrap(placed, adapters, plugin)
    for pairs in placed.edits.values():
        pairs.sort(key=lambda pair: pair[1].order)
    every = [(adapter, layer) for adapter in adapters for layer in adapter.layers]
    placed.layers.update((layer.name, (adapter, layer)) for adapter, layer in every if layer.name in placed.edits)
    return placed


def make_plan(run: Run, placed: Placed, active: Sequence[Plugin], seams: Mapping[str, Seam], kernel: Kernel) -> Plan:
    """Decide what runs in which layer at the run's step, and count it for the report."""
    plan: list[tuple[Seam, Task]] = []
    total = max((rows.stop for rows in run.step.rows.values()), default=0)
    if run.late is not None and not run.step.probing:
        widen, first = run.late
        plan += [(seams[name], widen) for name in placed.blocks[first:]]
    plan += joinings(run, seams)  # before the layers, which are told where the texts stand
    for name, (adapter, layer) in placed.layers.items():
        if adapter is run.adapter:
            asked = [edit.planned(layer, run.step) for plugin, edit in placed.edits[name] if plugin in active]
            edits = [edit for edit in asked if edit is not None]
            if edits:
                plan.append((seams[name], _work(run, layer, edits, kernel, total)))
                run.tally.layers[name] += 1
    around = {plugin: plugin.around(run.step) for plugin in active if plugin.wraps}
    for name, (adapter, _, plugin) in placed.wrapped.items():
        task = around.get(plugin) if adapter is run.adapter else None
        plan += [] if task is None else [(seams[name], task)]
    return plan


def _work(run: Run, layer: AttentionLayer, edits: Sequence[Edit], kernel: Kernel, total: int) -> Work:
    more = [edit for edit in edits if edit.every_call]
    memo = run.memo if any(edit.keeps_text for edit in edits) else None
    columns = _columns(run, edits) if layer.kind == "joint" else ()
    image_only = all(edit.ragged for edit in edits)
    text = None if columns else run.adapter.text_slice(layer, run.inputs, image_only)
    return Work(layer, run.step, edits, more, kernel, text, memo, columns, run.adapter.text_call(layer), total)


def _columns(run: Run, edits: Sequence[Edit]) -> Sequence[Columns]:
    """Where rows of a joint sequence hold what, if further texts are in it, or if their own differ in length."""
    if run.joined is not None:
        return run.joined.columns()
    adapter, takes = run.adapter, all(edit.ragged in ("any", "each") for edit in edits)
    if not isinstance(adapter, DeclaredAdapter) or not takes or not adapter.spec.text_first:
        return ()
    columns = Joined(adapter, (), run.inputs, 1).columns()
    return columns if len(columns) > 1 else ()


def _chosen(adapters: Sequence[Adapter], plugin: Plugin, edit: Edit) -> list[AttentionLayer]:
    layers = [layer for adapter in adapters for layer in adapter.layers]
    chosen = [layer for layer in layers if edit.selects(layer)]
    if not chosen:
        kinds = sorted({layer.kind for layer in layers})
        raise UnsupportedPipelineError(
            f"{type(plugin).__name__} found no layer to edit in {type(adapters[0].denoiser).__name__} "
            f"(it has {len(layers)} attention layers: {', '.join(kinds)}); choose other layers"
        )
    return chosen


def _wrap(placed: Placed, adapters: Sequence[Adapter], plugin: Plugin) -> None:
    """Note the modules that a plugin runs itself."""
    if not plugin.wraps:
        return
    found: dict[str, tuple[Adapter, Any, Plugin]] = {
        name: (adapter, module, plugin)
        for adapter in adapters
        for name, module in adapter.denoiser.named_modules()
        if isinstance(module, plugin.wraps)
    }
    if not found:
        kinds = ", ".join(kind.__name__ for kind in plugin.wraps)
        raise UnsupportedPipelineError(
            f"{type(plugin).__name__} wants {kinds}, of which {type(adapters[0].denoiser).__name__} has none"
        )
    if found.keys() & placed.wrapped.keys():
        raise SettingError("two plugins run the same modules: graft one of them")
    placed.wrapped.update(found)


def _note_join(placed: Placed, group: str, chosen: Sequence[AttentionLayer]) -> None:
    """Remember the first block in which rows of `group` are edited."""
    for layer in chosen:
        block = next((name for name in placed.blocks[1:] if layer.name.startswith(f"{name}.")), "")
        placed.joins[group] = min(placed.joins.get(group, block), block, key=placed.blocks.index)

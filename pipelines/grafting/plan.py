"""What runs where: decided when a graft is attached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ...attention.edit import Edit
from ...attention.errors import UnsupportedPipelineError
from ...attention.layer import AttentionLayer
from ...attention.step import Step
from ...plugins.base import Branch, Plugin
from ..families.base import Adapter


@dataclass(frozen=True)
class Placed:
    """The plugins' edits on the layers of a denoiser.

    Attributes:
        plugins: those whose settings are not neutral.
        edits: by name of the layer, sorted by their order, each with its plugin.
        blocks: where extra rows may join, in execution order; "" is the input.
        joins: of a group of rows the first block in which an edit touches it.
    """

    plugins: tuple[Plugin, ...] = ()
    edits: dict[str, list[tuple[Plugin, Edit]]] = field(default_factory=dict[str, list[tuple[Plugin, Edit]]])
    blocks: tuple[str, ...] = ("",)
    joins: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def brings_rows(self) -> bool:
        """Whether a plugin may ask for extra rows."""
        return any(type(plugin).branches is not Plugin.branches for plugin in self.plugins)

    @property
    def brings_texts(self) -> bool:
        """Whether a plugin may want further texts heard."""
        return any(type(plugin).streams is not Plugin.streams for plugin in self.plugins)

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
    for pairs in placed.edits.values():
        pairs.sort(key=lambda pair: pair[1].order)
    return placed


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


def _note_join(placed: Placed, group: str, chosen: Sequence[AttentionLayer]) -> None:
    """Remember the first block in which rows of `group` are edited."""
    for layer in chosen:
        block = next((name for name in placed.blocks[1:] if layer.name.startswith(f"{name}.")), "")
        placed.joins[group] = min(placed.joins.get(group, block), block, key=placed.blocks.index)

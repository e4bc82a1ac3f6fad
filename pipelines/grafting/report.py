"""What a graft did, in words and in values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...plugins.base import Plugin
from .run import Tally


@dataclass(frozen=True)
class Report:
    """Snapshot of a graft's work since it was attached.

    Attributes:
        pipeline: class name. backend: attention kernel of edited layers.
        calls: denoiser calls that the pipeline made. rows: batch sizes that ran, branches included.
        layers: edited layers and how often each ran edited.
        updates: moved latents. skipped: reasons and counts of updates that were left out.
        displaced: layers whose processor is not the one that was there at attach. Edits do not depend on it.
        plugins: what each plugin says, by class name.
    """

    pipeline: str
    backend: str
    calls: int
    rows: list[int]
    layers: dict[str, int]
    updates: int
    skipped: dict[str, int]
    displaced: list[str]
    plugins: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list[tuple[str, Mapping[str, Any]]])

    def __str__(self) -> str:
        lines = [
            f"{self.pipeline}: {self.calls} denoiser calls, backend {self.backend}, rows {self.rows}",
            f"  {len(self.layers)} layers edited, {sum(self.layers.values())} runs",
        ]
        lines += [f"    {name}: {count}" for name, count in self.layers.items()]
        lines.append(f"  {self.updates} latent updates")
        lines += [f"    skipped {count}: {reason}" for reason, count in self.skipped.items()]
        lines += [f"  displaced processor: {name}" for name in self.displaced]
        for name, values in self.plugins:
            lines.append(f"  {name}")
            lines += [f"    {key}: {value}" for key, value in values.items()]
        return "\n".join(lines)


def make_report(
    pipe: Any, plugins: Sequence[Plugin], tally: Tally, backend: str, layers: Sequence[str], displaced: list[str]
) -> Report:
    """A report of all threads' runs; `layers` are the denoiser's in execution order."""
    return Report(
        pipeline=type(pipe).__name__,
        backend=backend,
        calls=tally.calls,
        rows=sorted(tally.rows),
        layers={name: tally.layers[name] for name in layers if name in tally.layers},
        updates=tally.updates,
        skipped=dict(tally.skipped),
        displaced=displaced,
        plugins=[(type(plugin).__name__, tally.told.get(plugin, plugin.report)()) for plugin in plugins],
    )

"""The tables of `gpu_check`, with what official programs and counted FLOPs say beside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from .gpu_rows import Row

PEERS: Mapping[tuple[str, str], str] = {
    ("SDXL", "guidance"): "counted: 2.00",
    ("FLUX", "guidance"): "counted: 2.00",
    ("Z-Image", "guidance"): "counted: 2.00",
    ("SDXL", "NegativeAway"): "counted: at most 1.04 at the first step, 1.006 later; guidance costs 2",
    ("FLUX", "NegativeAway"): "counted: at most 1.08; official NAG: 1.75 in the single blocks",
    ("SDXL 1024", "AttentionSegregation"): "counted: 1.32 of guided calls, 4284 MiB of activations",
    ("SDXL 1024", "SelfAttentionRedirection"): "counted: 0.779 of the two rows that the official program runs",
}
"""What the documents' FLOP tables say (`negative_cost`, `segregation_cost`, `redirection_cost`), by starts of names."""


def peer(row: Row) -> str:
    """The figure to hold a row against, or nothing."""
    for (shape, what), told in PEERS.items():
        if row.shape.startswith(shape) and row.what.startswith(what):
            return told
    return ""


def markdown(rows: Sequence[Row], where: Mapping[str, str]) -> str:
    """Both tables."""
    return "\n".join([*_head(where), *_costs(rows), "", *_errors(rows), ""])


def _head(where: Mapping[str, str]) -> Iterator[str]:
    yield "# GPU check"
    yield ""
    yield ", ".join(f"{name}: {value}" for name, value in where.items())
    yield ""
    yield "Time is the ratio to the plain call in the same mode, quartiles of pairs taken in turns; memory is the peak"
    yield "of one call beyond weights; graphs are what torch.compile made for the row. Weights are random."
    yield ""


def _costs(rows: Sequence[Row]) -> Iterator[str]:
    head = "model", "mode", "", "steps", "seconds", "time to plain", "MiB", "attention kernels", "graphs, breaks"
    yield f"| {' | '.join(head)} | plain again | beside |"
    yield "|" + "---|" * 11
    for row in rows:
        if row.mode == "exactness":
            continue
        if row.seconds is None:
            yield f"| {row.shape} | {row.mode} | {row.what} |" + " - |" * 7 + f" {row.note} |"
            continue
        beside = "; ".join(filter(None, (peer(row), row.note)))
        cells = [row.shape, row.mode, row.what, str(row.steps), f"{row.seconds:.3f}", *_measured(row), beside]
        yield f"| {' | '.join(cells)} |"


def _measured(row: Row) -> list[str]:
    again = {None: "-", True: "same bytes", False: "other bytes"}[row.restored]
    return [
        " ".join(f"{x:.2f}" for x in row.ratio) if row.ratio else "1",
        "-" if row.memory is None else f"{row.memory / 2**20:.0f}",
        ", ".join(f"{count} {name}" for name, count in (row.kernels or {}).items()) or "-",
        "-" if row.graphs is None else f"{row.graphs}, {row.breaks}",
        again,
    ]


def _errors(rows: Sequence[Row]) -> Iterator[str]:
    yield "| model, one layer of each kind | | bfloat16 against float32, relative | the plain call's | |"
    yield "|---|---|---|---|---|"
    for row in rows:
        if row.mode == "exactness":
            found = ["-" if x is None else f"{x:.4f}" for x in (row.error, row.plain_error)]
            yield f"| {row.shape} | {row.what} | {' | '.join(found)} | {row.note} |"

"""The picture of what strength trades: layout against style."""

from __future__ import annotations

from pathlib import Path


def plot(points: dict[str, tuple[float, float]], path: Path) -> None:
    """Layout accuracy (right is better) against style distance (down is better), a line for each method.

    Args:
        points: "method, strength S" -> (layout accuracy, style distance).
        path: the PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(name.rpartition(", ")[0] for name in points):
        curve = {name.rsplit(" ", 1)[-1]: at for name, at in points.items() if name.rpartition(", ")[0] == method}
        axes.plot(*zip(*curve.values(), strict=True), "o-", label=method)
        for strength, at in curve.items():
            axes.annotate(strength, at, xytext=(5, 5), textcoords="offset points", fontsize=8)
    axes.set(xlabel="layout accuracy", ylabel="style distance / nothing done", title="over strength")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)

"""The picture of what strength trades: layout against style."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw


def plot(points: dict[str, tuple[float, float]], path: Path) -> None:
    """Layout accuracy (right is better) against style distance (down is better), a line for each method."""
    width, height, margin = 640, 420, 60
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    xs, ys = ([p[k] for p in points.values()] for k in (0, 1))
    low, high = (min(xs) - 0.02, min(ys) - 0.05), (max(xs) + 0.02, max(ys) + 0.05)

    def at(p: tuple[float, float]) -> tuple[float, float]:
        x, y = ((p[k] - low[k]) / (high[k] - low[k]) for k in (0, 1))
        return margin + x * (width - 2 * margin), height - margin - y * (height - 2 * margin)

    draw.rectangle((margin, margin, width - margin, height - margin), outline="grey")
    draw.text((width // 2 - 60, height - 35), f"layout accuracy {low[0]:.2f} ... {high[0]:.2f}", fill="black")
    draw.text((8, 30), f"style distance / nothing done {low[1]:.2f} ... {high[1]:.2f}", fill="black")
    names = list(dict.fromkeys(name.split(", ")[0] for name in points))
    for name, colour in zip(names, ("crimson", "royalblue", "seagreen"), strict=False):
        curve = [at(p) for other, p in points.items() if other.split(", ")[0] == name]
        draw.line(curve, fill=colour, width=2)
        for x, y in curve:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
        draw.text((curve[-1][0] + 6, curve[-1][1] - 6), name, fill=colour)
    image.save(path)

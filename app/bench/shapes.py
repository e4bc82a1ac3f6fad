"""The ten kinds of object of the picture-book world, drawn in unit coordinates (x right, y down, about -1.1 to 1.1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

COLOURS: dict[str, Colour] = {
    "red": (220, 48, 54),
    "orange": (244, 138, 32),
    "yellow": (252, 214, 50),
    "green": (48, 164, 82),
    "blue": (42, 98, 216),
    "purple": (138, 70, 190),
    "pink": (250, 136, 180),
    "white": (248, 247, 243),
}
WOOD, CREAM, DARK = (122, 78, 44), (255, 244, 206), (44, 36, 48)


def shade(colour: Colour, factor: float) -> Colour:
    """`colour` darker (factor < 1) or mixed with white (factor > 1; 2 is white)."""
    if factor <= 1:
        return tuple(round(c * factor) for c in colour)  # type: ignore[return-value]
    return tuple(round(c + (255 - c) * (factor - 1)) for c in colour)  # type: ignore[return-value]


@dataclass(frozen=True)
class Pen:
    """Draws at a place and size; `flat` paints everything in one value (that is how masks are made)."""

    canvas: ImageDraw.ImageDraw
    x: float
    y: float
    radius: float
    colour: Colour
    ink: Colour
    mirrored: bool = False
    flat: int | None = None

    def _at(self, points: Sequence[Point]) -> list[Point]:
        side = -1 if self.mirrored else 1
        return [(self.x + side * px * self.radius, self.y + py * self.radius) for px, py in points]

    def _paint(self, colour: Colour) -> Colour | int:
        return colour if self.flat is None else self.flat

    def _width(self, thickness: float) -> int:
        return max(1, round(self.radius * thickness + 1.5))

    def polygon(self, points: Sequence[Point], fill: Colour, line: float = 0.08) -> None:
        """A filled polygon with an ink outline of `line` radii (0: none)."""
        corners = self._at(points)
        self.canvas.polygon(corners, fill=self._paint(fill))
        if line:
            self.canvas.line(
                [*corners, *corners[:2]], fill=self._paint(self.ink), width=self._width(line), joint="curve"
            )

    def circle(self, x: float, y: float, radius: float, fill: Colour, line: float = 0.08, flatten: float = 1.0) -> None:
        """A filled circle, `flatten` times as high as wide."""
        ring = [(x + radius * math.cos(a), y + radius * flatten * math.sin(a)) for a in _angles(40)]
        self.polygon(ring, fill, line)

    def line(self, points: Sequence[Point], fill: Colour, width: float = 0.08) -> None:
        """An open line."""
        self.canvas.line(self._at(points), fill=self._paint(fill), width=self._width(width), joint="curve")

    def face(self, x: float, y: float, size: float) -> None:
        """Two eyes and a smile."""
        for side in (-1, 1):
            self.circle(x + side * 0.42 * size, y, 0.15 * size, DARK, line=0, flatten=1.3)
        smile = [
            (x + 0.3 * size * math.cos(a), y + 0.25 * size + 0.25 * size * math.sin(a)) for a in _angles(9, 0.1, 0.4)
        ]
        self.line(smile, DARK, 0.07)


def _angles(count: int, start: float = 0.0, stop: float = 1.0) -> list[float]:
    """`count` angles in radians from `start` to `stop` turns, the last one left out for a full turn."""
    steps = count if stop - start == 1 else count - 1
    return [2 * math.pi * (start + (stop - start) * i / steps) for i in range(count)]


def ball(pen: Pen) -> None:
    """A beach ball: a pale band and a glint."""
    pen.circle(0, 0, 1, pen.colour)
    band = [(0.97 * math.cos(a), -0.3 + 0.45 * math.sin(a)) for a in _angles(12, 0.03, 0.47)]
    lower = [(0.97 * math.cos(a), 0.0 + 0.45 * math.sin(a)) for a in _angles(12, 0.47, 0.03)]
    pen.polygon(band + lower, shade(pen.colour, 1.55), line=0.04)
    pen.circle(-0.4, -0.5, 0.17, shade(pen.colour, 1.8), line=0)
    pen.line([(math.cos(a), math.sin(a)) for a in [*_angles(40), 0.0]], pen.ink)


def box(pen: Pen) -> None:
    """A present with ribbon and bow."""
    ribbon = shade(pen.colour, 0.62)
    pen.polygon([(-0.8, -0.35), (0.8, -0.35), (0.8, 0.95), (-0.8, 0.95)], pen.colour)
    pen.polygon([(-0.16, -0.35), (0.16, -0.35), (0.16, 0.95), (-0.16, 0.95)], ribbon, line=0)
    pen.polygon([(-0.95, -0.62), (0.95, -0.62), (0.95, -0.2), (-0.95, -0.2)], shade(pen.colour, 1.15))
    for side in (-1, 1):
        pen.polygon([(0, -0.62), (side * 0.3, -1.05), (side * 0.62, -0.95), (side * 0.5, -0.66)], ribbon, line=0.06)


def star(pen: Pen) -> None:
    """A five-pointed star that smiles."""
    spokes = [(1.12 if i % 2 == 0 else 0.54, math.pi * i / 5) for i in range(10)]
    pen.polygon([(r * math.sin(a), 0.05 - r * math.cos(a)) for r, a in spokes], pen.colour)
    pen.face(0, -0.02, 0.55)


def heart(pen: Pen) -> None:
    """A heart with a glint."""
    turn = _angles(44)
    outline = [
        (math.sin(t) ** 3, 0.05 - (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 15)
        for t in turn
    ]
    pen.polygon(outline, pen.colour)
    pen.circle(-0.48, -0.42, 0.17, shade(pen.colour, 1.65), line=0, flatten=1.2)


def moon(pen: Pen) -> None:
    """A crescent, asleep."""
    outer = [(0.1 + math.cos(a), math.sin(a)) for a in _angles(32, 0.16, 0.84)]
    inner = [(0.52 + 0.78 * math.cos(a), 0.78 * math.sin(a)) for a in _angles(28, 0.79, 0.21)]
    pen.polygon(outer + inner, pen.colour)
    pen.line([(-0.62 + 0.14 * math.cos(a), -0.12 + 0.12 * math.sin(a)) for a in _angles(7, 0.0, 0.5)], DARK, 0.07)
    pen.line([(-0.42 + 0.16 * math.cos(a), 0.3 + 0.14 * math.sin(a)) for a in _angles(7, 0.1, 0.45)], DARK, 0.07)


def flower(pen: Pen) -> None:
    """Six petals, a stem and two leaves."""
    pen.line([(0, 0), (0, 1.12)], (58, 128, 62), 0.15)
    for side in (-1, 1):
        pen.polygon([(0, 1.0), (side * 0.3, 0.66), (side * 0.62, 0.62), (side * 0.4, 0.92)], (82, 160, 78), line=0.05)
    for angle in _angles(6):
        pen.circle(0.52 * math.cos(angle), -0.3 + 0.52 * math.sin(angle), 0.36, pen.colour, line=0.06)
    pen.circle(0, -0.3, 0.28, (104, 66, 34), line=0.05)


def tree(pen: Pen) -> None:
    """A fir of three tiers."""
    pen.polygon([(-0.16, 0.5), (0.16, 0.5), (0.16, 1.12), (-0.16, 1.12)], WOOD, line=0.06)
    for width, top, base, tone in ((0.92, -0.2, 0.74, 0.84), (0.74, -0.66, 0.26, 0.92), (0.54, -1.12, -0.22, 1.0)):
        hem = [(width * s, base - 0.1 * (i % 2)) for i, s in enumerate((1, 0.5, 0, -0.5, -1))]
        pen.polygon([(0, top), *hem], shade(pen.colour, tone))


def house(pen: Pen) -> None:
    """Walls, a roof with a chimney, a door and a lit window."""
    pen.polygon([(0.42, -0.95), (0.66, -0.95), (0.66, -0.3), (0.42, -0.3)], shade(pen.colour, 0.5), line=0.05)
    pen.polygon([(-0.78, -0.2), (0.78, -0.2), (0.78, 1.0), (-0.78, 1.0)], pen.colour)
    pen.polygon([(-1.05, -0.12), (0, -1.0), (1.05, -0.12)], shade(pen.colour, 0.62))
    pen.polygon([(-0.5, 0.3), (-0.12, 0.3), (-0.12, 1.0), (-0.5, 1.0)], WOOD, line=0.05)
    pen.polygon([(0.14, 0.16), (0.54, 0.16), (0.54, 0.56), (0.14, 0.56)], CREAM, line=0.06)


def fish(pen: Pen) -> None:
    """A fish with tail, fins and a stripe."""
    pen.polygon([(0.5, 0), (1.15, -0.58), (1.0, 0), (1.15, 0.58)], shade(pen.colour, 0.8), line=0.06)
    pen.polygon([(-0.35, -0.5), (0.1, -0.95), (0.32, -0.4)], shade(pen.colour, 0.8), line=0.06)
    pen.circle(-0.18, 0, 0.88, pen.colour, flatten=0.7)
    pen.line(
        [(-0.3 + 0.2 * math.cos(a), 0.52 * math.sin(a)) for a in _angles(9, -0.22, 0.22)], shade(pen.colour, 0.62), 0.08
    )
    pen.polygon([(0.05, 0.1), (0.45, 0.3), (0.1, 0.38)], shade(pen.colour, 0.7), line=0.04)
    pen.circle(-0.62, -0.14, 0.17, (255, 255, 255), line=0.04)
    pen.circle(-0.65, -0.13, 0.09, DARK, line=0)


def boat(pen: Pen) -> None:
    """A hull, a mast and two sails."""
    pen.line([(0, 0.4), (0, -1.12)], WOOD, 0.11)
    pen.polygon([(0.1, -1.0), (0.92, 0.24), (0.1, 0.24)], pen.colour, line=0.06)
    pen.polygon([(-0.1, -0.78), (-0.76, 0.24), (-0.1, 0.24)], shade(pen.colour, 1.3), line=0.06)
    pen.polygon([(-1.1, 0.38), (1.1, 0.38), (0.68, 0.98), (-0.68, 0.98)], shade(pen.colour, 0.72))
    pen.line([(-0.9, 0.58), (0.9, 0.58)], shade(pen.colour, 1.3), 0.08)


SHAPES: dict[str, Callable[[Pen], None]] = {
    shape.__name__: shape for shape in (ball, box, star, heart, moon, flower, tree, house, fish, boat)
}

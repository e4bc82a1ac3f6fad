"""Whether a layout is followed: the first thing asked for on the left, the second on the right. Needs no judge."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from ... import AttentionSegregation, Plugin, graft
from .rows import Pace, Rows, drawing
from .segregation_rows import USUAL
from .shapes import COLOURS
from .statistics import share
from .training import share_cores

KINDS = ("ball", "box", "star", "heart", "moon", "fish", "house")
PAINTS = ("red", "yellow", "green", "purple", "pink")
PLACES = ("sky", "night", "snow")  # none of these has a colour of PAINTS in it
NEAR, LEAST = 70.0, 0.01
BATCH = 16


def wish(seed: int) -> tuple[list[tuple[str, str]], str]:
    """Two things (kind, colour) and a background."""
    rng = random.Random(f"layout {seed}")
    return list(zip(rng.sample(KINDS, 2), rng.sample(PAINTS, 2), strict=True)), rng.choice(PLACES)


def halves(side: int = 64) -> torch.Tensor:
    """The layout: a box on the left, a box on the right, [2, side, side]."""
    masks = torch.zeros(2, side, side, dtype=torch.bool)
    rows = slice(side * 7 // 32, side * 25 // 32)
    masks[0, rows, side // 16 : side * 7 // 16] = masks[1, rows, side * 9 // 16 : side * 15 // 16] = True
    return masks


def centre(picture: torch.Tensor, colour: str) -> float | None:
    """Mean column, 0 ... 1, of the pixels of a picture [3, H, W] (0 ... 1) that have this colour, None of too few."""
    palette = torch.tensor([COLOURS[name] for name in PAINTS], dtype=torch.float32)
    distance = torch.cdist(picture.flatten(1).T * 255, palette)
    mine = (distance.argmin(1) == PAINTS.index(colour)) & (distance.amin(1) < NEAR)
    columns = torch.linspace(0, 1, picture.shape[2]).repeat(picture.shape[1])
    return float(columns[mine].mean()) if float(mine.float().mean()) > LEAST else None


def followed(picture: torch.Tensor, things: list[tuple[str, str]]) -> bool:
    """Both colours are there, the first one left of the middle and the second right of it."""
    first, second = (centre(picture, colour) for _, colour in things)
    return first is not None and second is not None and first < 0.5 < second


def drawn(pipe: Any, settings: Mapping[str, Any] | None, first: int, count: int, at: Pace = USUAL) -> list[bool]:
    """Whether the layout is followed in each picture of the wishes `first` to `first + count`; None: without any."""
    share_cores()
    wishes = [wish(first + i) for i in range(count)]
    kinds = [[kind for kind, _ in things] for things, _ in wishes]
    plugins: list[Plugin] = [] if settings is None else [AttentionSegregation(kinds, **settings)]
    prompts = [" and ".join(f"a {c} {k}" for k, c in things) + f" , {place}" for things, place in wishes]
    generators = [torch.Generator().manual_seed(900 + first + i) for i in range(count)]
    how = drawing(pipe, *at) | {"output_type": "pt", "generator": generators}
    with graft(pipe, *plugins):
        pictures = pipe(prompts, **how).images.cpu()
    return [followed(picture, things) for picture, (things, _) in zip(pictures, wishes, strict=True)]


def layouts(pipe: Any, count: int, kept: Rows, key: Mapping[str, str], at: Pace = USUAL) -> Iterator[str]:
    """Lines of the table."""
    masks = halves()
    rows: dict[str, dict[str, Any] | None] = {
        "plain pipeline": None,
        "layout, default": {"layout": masks},
        "layout, segregation too": {"layout": masks, "segregation": 1},
        'layout, preset="paper"': {"layout": masks, "preset": "paper"},
    }
    yield "| | both there, first left, second right |"
    yield "|---|---|"
    for name, settings in rows.items():
        found: list[bool] = []
        plugin = None if settings is None else AttentionSegregation(KINDS[:2], **settings).settings()
        for i in range(0, count, BATCH):
            n = min(BATCH, count - i)
            label = {**key, "layout": plugin, "first": i, "count": n, **at._asdict()}
            found += kept.remember(label, partial(drawn, pipe, settings, i, n, at))
        yield f"| {name} | {share(found).percent()} |"

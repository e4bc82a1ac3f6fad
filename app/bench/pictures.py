"""The pictures of the README, made again: `python -m diffgraft.app.bench.pictures`.

Captions and seeds are the first of their kind; none is chosen by what it shows.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from ... import AttentionSegregation, ConceptBlock, NegativeAway, erase, generate, optimise_startpoint, stylize
from .judge import load_judge, look
from .model_card import ASSETS, GUIDANCE
from .rows import subject
from .training import contact_sheet
from .world import FRESH, SIDE, caption, masks, render, scene

SHEET, SEED = FRESH + 2_000_000, 7
LINE = 18


def titled(rows: dict[str, Sequence[Image.Image]]) -> Image.Image:
    """Rows of pictures, each under its title."""
    widest = max(len(pictures) for pictures in rows.values())
    sheet = Image.new("RGB", (widest * SIDE, len(rows) * (SIDE + LINE)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (title, pictures) in enumerate(rows.items()):
        top = number * (SIDE + LINE)
        pen.text((4, top + 3), title, fill=(60, 60, 60))
        for column, picture in enumerate(pictures):
            sheet.paste(picture.convert("RGB"), (column * SIDE, top + LINE))
    return sheet


def sheet_of_captions(pipe: Any) -> Image.Image:
    """24 pictures of the first 24 captions."""
    texts = [caption(scene(SHEET + i, split="any", count=1 + i % 3)) for i in range(24)]
    return contact_sheet([generate(pipe, text, seed=SEED, guidance=GUIDANCE)[0] for text in texts], 6)


def drawn(pipe: Any, texts: Sequence[str], plugins: Sequence[Any] = (), **call: Any) -> list[Image.Image]:
    """A picture of each text, with its plugin if there are any."""
    each = [[plugin] for plugin in plugins] or [[] for _ in texts]
    return [
        generate(pipe, text, seed=SEED + i, plugins=own, **call)[0]
        for i, (text, own) in enumerate(zip(texts, each, strict=True))
    ]


def segregation(pipe: Any) -> Image.Image:
    """Six captions of three things."""
    scenes = [scene(SHEET + 100 + i, split="unseen", count=3, style="plain") for i in range(6)]
    texts, plugins = [caption(s) for s in scenes], [AttentionSegregation([t.kind for t in s.things]) for s in scenes]
    plain, grafted = drawn(pipe, texts, guidance=GUIDANCE), drawn(pipe, texts, plugins, guidance=GUIDANCE)
    return titled({"plain pipeline": plain, "AttentionSegregation": grafted})


def negative(pipe: Any) -> Image.Image:
    """Colours left open by the caption, and kept away: those that the judge sees without."""
    texts = ["a ball , sky", "a house , snow", "a star , night", "a box , desert", "a heart , sky", "a fish , sea"]
    plain = drawn(pipe, texts, steps=1, guidance=0.0)
    shown = [next(iter(seen.colours.values()), "red") for seen in look(load_judge(), plain)]
    grafted = drawn(pipe, texts, [NegativeAway(colour) for colour in shown], steps=1, guidance=0.0)
    return titled({"one step": plain, f"one step, NegativeAway({', '.join(shown)})": grafted})


def blocked(pipe: Any) -> Image.Image:
    """Captions of two things, of which the first one's kind, or its colour, is never drawn."""
    scenes = [scene(SHEET + 500 + i, split="unseen", count=2, style="plain") for i in range(4)]
    texts, first = [caption(s) for s in scenes], [s.things[0] for s in scenes]
    concepts = [thing.colour if i % 2 else thing.kind for i, thing in enumerate(first)]
    plain = drawn(pipe, texts, guidance=GUIDANCE)
    without = drawn(pipe, texts, [ConceptBlock(concept) for concept in concepts], guidance=GUIDANCE)
    return titled({"plain pipeline": plain, f"ConceptBlock: {', '.join(concepts)}": without})


def searched(pipe: Any) -> Image.Image:
    """Captions of three things, from the seeds' own noise and from what was found on the student."""
    scenes, student = [scene(SHEET + 600 + i, count=3, style="plain") for i in range(4)], subject(one_step=True)
    found = [
        optimise_startpoint(
            pipe, caption(s), "a-star", concepts=[t.kind for t in s.things], surrogate=student, iterations=12,
            seed=SEED + i, guidance=GUIDANCE,
        ).picture
        for i, s in enumerate(scenes)
    ]  # fmt: skip
    plain = drawn(pipe, [caption(s) for s in scenes], guidance=GUIDANCE)
    return titled({"plain pipeline": plain, "optimise_startpoint: 12 updates on the student": found})


def erased(pipe: Any) -> Image.Image:
    """Scenes, the first thing's mask, the thing gone, and the truth."""
    scenes = [scene(SHEET + 200 + i, count=2, style="plain") for i in range(6)]
    photos, covers = [render(s) for s in scenes], [Image.fromarray(masks(s)[0]) for s in scenes]
    gone = [erase(pipe, photo, cover, seed=SEED) for photo, cover in zip(photos, covers, strict=True)]
    return titled({
        "photo": photos, "mask": covers, "erased": gone, "the truth": [render(s.without(0)) for s in scenes]
    })  # fmt: skip


def styled(pipe: Any) -> Image.Image:
    """Two contents, each in every style of a picture on its background."""
    manners, rows = ["sketch", "mosaic", "dots", "watercolor"], dict[str, Sequence[Image.Image]]()
    for i in range(2):
        content = scene(SHEET + 300 + i, count=1, style="plain")
        others = [scene(SHEET + 400 + j, count=1, style=manner) for j, manner in enumerate(manners)]
        styles = [render(replace(other, background=content.background)) for other in others]
        white = Image.new("RGB", (SIDE, SIDE), "white")
        rows[f"style {i + 1}"] = [white, *styles]
        made = stylize(pipe, render(content), styles, seed=SEED, steps=20, iterations=0)
        rows[f"stylize(content, styles {i + 1}, steps=20, iterations=0)"] = [render(content), *made]
    return titled(rows)


PICTURES = {
    "sheet": sheet_of_captions, "segregation": segregation, "negative": negative, "concept": blocked,
    "startpoint": searched, "erase": erased, "style": styled,
}  # fmt: skip


def main() -> None:
    """Writes them to `--out`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=PICTURES, metavar="NAME", help=", ".join(PICTURES))
    parser.add_argument("--out", type=Path, default=ASSETS / "readme")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in PICTURES]
    if unknown:
        parser.error(f"no picture {', '.join(unknown)}; there are: {', '.join(PICTURES)}")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names:
        made = PICTURES[name](subject(one_step=name == "negative"))
        small = name in ("concept", "startpoint")
        (made.quantize(200) if small else made).save(args.out / f"{name}.png", optimize=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

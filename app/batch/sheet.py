"""Contact sheets: every picture of a folder small, with its id, seed and state."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..images import DECODER_ERRORS
from ..outputs import write_whole

TILE, CAPTION, GAP, COLUMNS, ROWS = 160, 30, 8, 8, 10
INK, FAULT, PAPER, BLANK = "#222222", "#b00020", "#ffffff", "#e4e4e4"
MOST = 800
"""Pictures on sheets; beyond that a sheet is no overview."""


def write_sheets(folder: Path, records: Iterable[dict[str, Any]], columns: int = COLUMNS) -> list[Path]:
    """Draw contact-sheet.png, contact-sheet-2.png ... and delete sheets that are no longer needed.

    Args:
        records: in the order wanted; failed ones get an empty tile that says so.
        columns: pictures in a line.
    """
    tiles = list(islice(_tiles(records), MOST))
    pages = [tiles[i : i + columns * ROWS] for i in range(0, len(tiles), columns * ROWS)]
    paths = [folder / ("contact-sheet.png" if i == 0 else f"contact-sheet-{i + 1}.png") for i in range(len(pages))]
    for path, page in zip(paths, pages, strict=True):
        write_whole(path, _page(folder, page, columns))
    for old in folder.glob("contact-sheet*.png"):
        if old not in paths:
            old.unlink()
    return paths


Tile = tuple[str | None, str, str]
"""File name (None: failed), id, second line."""


def _tiles(records: Iterable[dict[str, Any]]) -> Iterator[Tile]:
    for record in records:
        for picture in record.get("pictures", ()):
            yield picture["file_name"], record["id"], f"seed {picture['seed']}"
        if record["status"] != "ok":
            yield None, record["id"], f"failed: {record.get('error_type', '')}"


def _page(folder: Path, tiles: Sequence[Tile], columns: int) -> bytes:
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (GAP + columns * (TILE + GAP), GAP + rows * (TILE + CAPTION + GAP)), PAPER)
    canvas, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, (name, first, second) in enumerate(tiles):
        x, y = GAP + i % columns * (TILE + GAP), GAP + i // columns * (TILE + CAPTION + GAP)
        small = _small(folder / name) if name else None
        if small is None:
            canvas.rectangle((x, y, x + TILE, y + TILE), fill=BLANK)
        else:
            sheet.paste(small, (x + (TILE - small.width) // 2, y + (TILE - small.height) // 2))
        for line, text in enumerate((first, second)):
            colour = FAULT if small is None else INK
            canvas.text((x, y + TILE + 2 + 13 * line), _fitted(text, font), fill=colour, font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _small(path: Path) -> Image.Image | None:
    try:
        with Image.open(path, formats=("PNG",)) as image:
            return ImageOps.contain(image.convert("RGB"), (TILE, TILE))
    except DECODER_ERRORS:  # deleted or damaged since
        return None


def _fitted(text: str, font: Any) -> str:
    text = "".join(c if c.isprintable() and not 0xD800 <= ord(c) < 0xE000 else "?" for c in text[:80])
    while font.getlength(text) > TILE:
        text = text[:-2] + "…"
    return text

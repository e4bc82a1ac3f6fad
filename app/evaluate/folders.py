"""Pictures from folders that the user has: things to remove, and contents for styles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..tasks import matching, pictures_of, stem_of
from .cases import Case


def removals(data: Path) -> list[Case]:
    """A case for each picture of `image/` with its mask of the same name in `mask/`.

    `truth/`, where there is one, holds the picture without the thing under the same name; `rows.jsonl`, where there is
    one, says `{"image": "a.png", "gone": "dog", "prompt": "a lawn"}` of some.

    Raises:
        DataError: a folder is missing. ImageError: a picture has no mask.
    """
    images, masks, truths = (data / name for name in ("image", "mask", "truth"))
    _need(data, images, masks)
    known = {stem_of(path): path for path in pictures_of(truths)} if truths.is_dir() else {}
    told = _told(data / "rows.jsonl")
    return [
        Case(
            image.stem, data.name, prompt=told.get(image.name, {}).get("prompt", ""), image=image, mask=mask,
            truth=known.get(stem_of(image)), gone=told.get(image.name, {}).get("gone", ""),
        )
        for image, mask in matching(images, masks, "mask")
    ]  # fmt: skip


def styles(data: Path) -> list[Case]:
    """A case for every picture of `content/` in the style of every picture of `style/`.

    Raises:
        DataError: a folder is missing.
    """
    contents, manners = data / "content", data / "style"
    _need(data, contents, manners)
    return [
        Case(f"{content.stem}-{style.stem}", style.stem, image=content, style=style)
        for content in pictures_of(contents)
        for style in pictures_of(manners)
    ]


def _need(data: Path, *folders: Path) -> None:
    missing = [folder.name for folder in folders if not folder.is_dir()]
    if missing:
        raise DataError(f"{str(data)!r} has no folder {', '.join(missing)}; {', '.join(f.name for f in folders)} it is")


def _told(path: Path) -> dict[str, dict[str, Any]]:
    try:
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        return {row["image"]: row for row in map(json.loads, filter(str.strip, lines))}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f'{path.name}: a line is {{"image": NAME, "gone": ..., "prompt": ...}}: {error}') from None

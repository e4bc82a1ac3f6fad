"""What the single commands do: open the model, load pictures, run one task, write whole files."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

import diffgraft

from ..attention.errors import SettingError
from ..attention.pictures import expanded
from ..pipelines.tasks.generate import resolve_seed
from . import losses
from .errors import ImageError
from .images import load_image, load_mask
from .metadata import encode_png
from .models import open_model, shown_name, suits
from .outputs import output_folder, same_file_key, write_whole
from .techniques import build, check

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp")


@dataclass(frozen=True)
class Wish:
    """What is common to all commands."""

    model: str
    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    quiet: bool = False
    metadata: bool = True
    variant: str | None = None

    def pipe(self) -> Any:
        """The model, with its progress bar as wanted."""
        how = {"dtype": self.dtype, "revision": self.revision, "variant": self.variant}
        pipe = open_model(self.model, device=self.device, **how)
        pipe.set_progress_bar_config(disable=self.quiet)
        return pipe

    def write(self, path: Path, picture: Image.Image, settings: Mapping[str, Any]) -> Path:
        """Write one picture with what it says about itself."""
        complete = {**settings, "model": shown_name(self.model)}
        write_whole(path, encode_png(picture, complete if self.metadata else None))
        return path


def generate(
    wish: Wish, prompt: str, specs: Sequence[Mapping[str, Any]], out: Path, *, seed: int | None, n: int, **settings: Any
) -> list[Path]:
    """`diffgraft generate`: the paths written, in the order of the seeds."""
    for spec in specs:
        check(spec)
    out = _png(expanded(out))
    first = resolve_seed(seed)
    output_folder(out.parent)
    plugins = [build(spec) for spec in specs]
    pipe = wish.pipe()
    chosen = suits(wish.model) | _given(settings)
    paths = _numbered(out, n)
    for i, path in enumerate(paths):  # one by one, so that an interruption leaves what was made
        [picture] = diffgraft.generate(pipe, prompt, plugins=plugins, seed=first + i, **chosen)
        wish.write(path, picture, picture.info["diffgraft"])
    return paths


def optimise(
    wish: Wish, prompt: str, loss: str, specs: Sequence[Mapping[str, Any]], out: Path, *, seed: int | None, n: int,
    one_step: bool, **settings: Any,
) -> list[Path]:  # fmt: skip
    """`diffgraft optimise`: the paths written; the losses of each picture are among its settings."""
    for spec in specs:
        check(spec)
    wanted = losses.build(losses.parse(loss))
    _png(out)
    first = resolve_seed(seed)
    output_folder(out.parent)
    plugins, pipe = [build(spec) for spec in specs], wish.pipe()
    chosen = suits(wish.model) | _given(settings) | wanted
    if one_step:
        chosen["surrogate"] = _student(wish)
    paths = _numbered(out, n)
    for i, path in enumerate(paths):
        found = diffgraft.optimise_startpoint(pipe, prompt, plugins=plugins, seed=first + i, **chosen)
        wish.write(path, found.picture, found.picture.info["diffgraft"])
        if found.interrupted:
            return paths[: i + 1]
    return paths


def _student(wish: Wish) -> Any:
    """The embedded model's one-step student, for the search."""
    if wish.model != "picturebook":
        raise SettingError("--one-step: the student belongs to the embedded model; in Python give surrogate=")
    return diffgraft.picturebook(one_step=True)


def erase(wish: Wish, image: Path, mask: Path, out: Path, *, invert: bool, **options: Any) -> list[Path]:
    """`diffgraft erase`: the paths written."""
    image, mask, out = expanded(image), expanded(mask), expanded(out)

    def opened(source: Path, other: Path) -> tuple[Image.Image, Image.Image]:
        picture = load_image(source)
        return picture, load_mask(other, picture.size, invert=invert)

    return _edit(wish, "erase", matching(image, mask, "mask"), opened, out, image.is_dir(), **options)


def stylize(wish: Wish, content: Path, style: Path, out: Path, **options: Any) -> list[Path]:
    """`diffgraft stylize`: the paths written."""
    content, style, out = expanded(content), expanded(style), expanded(out)

    def opened(source: Path, other: Path) -> tuple[Image.Image, Image.Image]:
        return load_image(source), load_image(other)

    pairs = [(picture, style) for picture in pictures_of(content)] if content.is_dir() else [(content, style)]
    return _edit(wish, "stylize", pairs, opened, out, content.is_dir(), **options)


def _edit(
    wish: Wish,
    task: str,
    pairs: Sequence[tuple[Path, Path]],
    opened: Callable[[Path, Path], tuple[Image.Image, Image.Image]],
    out: Path,
    folder: bool,
    *,
    seed: int | None,
    n: int,
    **settings: Any,
) -> list[Path]:
    first = resolve_seed(seed)
    targets = [_numbered(path, n) for path in (_targets(pairs, out) if folder else [_png(out)])]
    output_folder(out if folder else out.parent)
    for pair in pairs:  # a bad file is told before minutes of work
        opened(*pair)
    pipe = wish.pipe()
    for pair, paths in zip(pairs, targets, strict=True):
        for i, path in enumerate(paths):
            picture = getattr(diffgraft, task)(pipe, *opened(*pair), seed=first + i, **_given(settings))
            wish.write(path, picture, {"task": task, "seed": first + i} | picture.info.get("diffgraft", {}))
    return [path for paths in targets for path in paths]


def matching(images: Path, masks: Path, what: str) -> list[tuple[Path, Path]]:
    """Pictures and masks of the same stem; one mask file serves a whole folder."""
    if not images.is_dir():
        return [(images, masks)]
    pictures = pictures_of(images)
    if not masks.is_dir():
        return [(picture, masks) for picture in pictures]
    by_stem: dict[str, list[Path]] = {}
    for path in pictures_of(masks):
        by_stem.setdefault(stem_of(path), []).append(path)
    missing = [picture.name for picture in pictures if stem_of(picture) not in by_stem]
    if missing:
        raise ImageError(f"no {what} of the same name for {', '.join(missing[:5])} in {str(masks)!r}")
    for picture in pictures:
        found = by_stem[stem_of(picture)]
        if len(found) > 1:
            raise ImageError(f"{found[0].name} or {found[1].name}: which is the {what} of {picture.name}?")
    return [(picture, by_stem[stem_of(picture)][0]) for picture in pictures]


def stem_of(path: Path) -> str:
    """The name by which a picture and its mask belong together: a letter with an accent is written in two ways."""
    return unicodedata.normalize("NFC", path.stem)


def pictures_of(folder: Path) -> list[Path]:
    """The pictures of a folder, by name.

    Raises:
        ImageError: there is none.
    """
    named = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    # what a Mac leaves beside each file (._photo.png), thumbnails and folders are nobody's pictures
    found = sorted(path for path in named if not path.name.startswith(".") and not path.is_dir())
    if not found:
        raise ImageError(f"{str(folder)!r} holds no pictures ({', '.join(SUFFIXES)})")
    return found


def _numbered(path: Path, n: int) -> list[Path]:
    return [path] if n == 1 else [path.with_name(f"{path.stem}-{i}.png") for i in range(n)]


def _targets(pairs: Sequence[tuple[Path, Path]], out: Path) -> Iterator[Path]:
    stems = [same_file_key(source.stem) for source, _ in pairs]
    for source, _ in pairs:  # a.png and A.jpg of one folder must not become one file
        yield out / (f"{source.name}.png" if stems.count(same_file_key(source.stem)) > 1 else f"{source.stem}.png")


def _png(path: Path) -> Path:
    if path.suffix.lower() != ".png" or path.is_dir():
        raise SettingError(f"--out {str(path)!r}: pictures are written as .png")
    return path


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}

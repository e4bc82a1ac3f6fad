"""What holds for every input, however odd. `python tests/fuzz.py MINUTES [PROPERTY ...]` looks for an exception.

tests/test_fuzz.py runs the same for some seconds.
"""

from __future__ import annotations

import collections
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import odd_pictures
import odd_tables
from hypothesis import HealthCheck, Phase, given, seed, settings
from PIL import Image

from diffgraft.app.batch.manifest import read_manifest
from diffgraft.app.errors import ManifestError
from diffgraft.app.images import load_image, load_mask
from diffgraft.attention.errors import GraftError, MaskError
from diffgraft.attention.masks import as_mask
from diffgraft.attention.pictures import BLENDED, HARD, Limits, as_picture, as_rgb

SMALL = Limits(side=1, aspect=1000)
COUNTS: collections.Counter[str] = collections.Counter()


def handed_over(source: Any, folder: Path) -> Any:
    """A path, bytes or an image that is not read yet."""
    if not isinstance(source, tuple):
        return source
    how, data = source
    if how == "bytes":
        return data
    path = folder / "picture.bin"
    path.write_bytes(data)
    return path if how == "path" else Image.open(path)


def a_picture_is_what_it_shows(odd: odd_pictures.Odd) -> None:
    """Both readers give what a viewer shows, whatever the file is like."""
    COUNTS["pictures"] += 1
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = as_rgb(handed_over(odd.source, Path(folder)))
        assert found.mode == "RGB" and found.info == {}, odd.said
        near(found, odd.shows, odd)
        source = handed_over(odd.source, Path(folder))
        if odd.form != "PPM":
            near(load_image(source, limits=SMALL), odd.shows, odd)
        source = handed_over(odd.source, Path(folder))
        try:
            kept = as_picture(source)
        except GraftError:
            assert odd.mode not in BLENDED + HARD or odd.form == "PNG", odd.said
        else:
            assert kept.size == found.size and kept.mode in BLENDED + HARD, odd.said
            near(as_rgb(kept), odd.shows, odd)


def near(found: Image.Image, shows: np.ndarray, odd: odd_pictures.Odd) -> None:
    assert (found.height, found.width) == shows.shape[:2], odd.said
    off = np.abs(np.asarray(found, float) - shows)
    assert (off.mean() if odd.form == "JPEG" else off.max()) <= odd.tolerance, (odd.said, off.max(), off.mean())


def a_damaged_file_is_a_typed_error(data: bytes) -> None:
    COUNTS["damaged files"] += 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for read in (as_rgb, as_picture, lambda d: load_image(d, limits=SMALL), lambda d: load_mask(d, limits=SMALL)):
            try:
                read(data)
            except GraftError as error:
                assert "\n" not in str(error)


def a_mask_is_its_truth(odd: odd_pictures.OddMask) -> None:
    COUNTS["masks"] += 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = as_mask(odd.source)
        except MaskError as error:
            assert odd.is_ is None, (odd.said, str(error))
        else:
            assert odd.is_ is not None and np.array_equal(found, odd.is_), odd.said


FIELDS = ("id", "prompt", "steps", "guidance", "seed", "negative", "width", "model")


def a_table_loses_no_row(odd: odd_tables.OddTable) -> None:
    """Every row comes in as it was meant, or is told as a bad one; or the whole file is refused."""
    COUNTS["tables"] += 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / odd.name
        path.write_bytes(odd.data)
        try:
            manifest = read_manifest(path, {"steps": 5})
        except ManifestError as error:
            assert not odd.whole, (odd.said, str(error))
            return
    found = {row.id: row for _, row in manifest.rows}
    assert len(manifest.rows) + len(manifest.bad) == len(odd.rows), (odd.said, manifest)
    for number, row in enumerate(odd.rows):
        name = f"r{number}"
        if row is None or name not in found:
            assert name not in found and (row is None or not odd.whole), (odd.said, row, manifest.bad)
            continue
        said = {"steps": 5} | {key: value for key, value in row.items() if value is not None}
        assert {key: getattr(found[name], key) for key in FIELDS} == {key: said.get(key) for key in FIELDS}, odd.said


def a_damaged_table_is_a_typed_error(odd: tuple[str, bytes]) -> None:
    COUNTS["damaged tables"] += 1
    name, data = odd
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        try:
            manifest = read_manifest(path, {})
        except ManifestError:
            return
    for _, row in manifest.rows:
        assert row.id and row.prompt is not None


PROPERTIES = [
    (odd_pictures.pictures(), a_picture_is_what_it_shows),
    (odd_pictures.damaged(), a_damaged_file_is_a_typed_error),
    (odd_pictures.masks(), a_mask_is_its_truth),
    (odd_tables.tables(), a_table_loses_no_row),
    (odd_tables.damaged_tables(), a_damaged_table_is_a_typed_error),
]


def check(strategy: Any, holds: Any, examples: int, number: int | None = None) -> None:
    """One property on some examples; the same ones for a number, or none of the same."""

    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=number is None,
        suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink),
    )  # fmt: skip
    @given(strategy)
    def run(odd: Any) -> None:
        holds(odd)

    (run if number is None else seed(number)(run))()


def main(minutes: float) -> None:
    """Look until the time is over; each failure is told once, by where it was raised."""
    end, number, told = time.monotonic() + 60 * minutes, int(time.time()), set[str]()
    wanted = [one for one in PROPERTIES if not sys.argv[2:] or one[1].__name__ in sys.argv[2:]]
    while time.monotonic() < end:
        for strategy, holds in wanted:
            number += 1
            try:
                check(strategy, holds, 400, number)
            except Exception as error:
                for one in getattr(error, "exceptions", [error]):
                    where = traceback.extract_tb(one.__traceback__)[-1]
                    key = f"{holds.__name__} {type(one).__name__} {where.filename}:{where.lineno}"
                    if key not in told:
                        told.add(key)
                        print(time.strftime("%H:%M:%S"), "NEW", key, f"seed {number}:", str(one)[:500], flush=True)
        print(time.strftime("%H:%M:%S"), dict(COUNTS), len(told), "kinds of failure", flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]))

"""The harness: every case with and without the plugin on the same seeds, drawn once, scored once, kept in a folder."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ...attention.errors import GraftError, UnsupportedPipelineError
from ..bench.rows import Rows, weights_digest
from ..images import load_image
from ..metadata import encode_png
from ..outputs import safe_name, write_whole
from .cases import Case, opened
from .scorers import Scorer
from .techniques import Technique

ARMS = ("plain", "grafted")
Told = Callable[[str], None]


@dataclass
class Pair:
    """One case with one seed, both ways.

    Attributes:
        files: of the pictures, by arm. scores: by arm. error: why there is no pair.
    """

    case: Case
    seed: int
    files: dict[str, str] = field(default_factory=dict[str, str])
    scores: dict[str, dict[str, float | bool]] = field(default_factory=dict[str, dict[str, Any]])
    error: str = ""


@dataclass(frozen=True)
class Evaluation:
    """What is drawn, by what and how.

    Attributes:
        settings: of the plugin, or of the task that it belongs to. call: what both arms get (steps, guidance ...).
        folder: of pictures/, rows.jsonl and the sheets; a run that was cut goes on from there.
    """

    technique: Technique
    pipe: Any
    folder: Path
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    call: Mapping[str, Any] = field(default_factory=dict[str, Any])
    model: str = ""
    metadata: bool = True

    def run(self, cases: Sequence[Case], seeds: Sequence[int], scorers: Sequence[Scorer], told: Told) -> list[Pair]:
        """All pairs; a row that fails says why and the others go on.

        Raises:
            UnsupportedPipelineError: the model is none for this technique, whatever the row.
        """
        (self.folder / "pictures").mkdir(parents=True, exist_ok=True)
        rows, weights = Rows(self.folder / "rows.jsonl"), weights_digest(self.pipe, 64)
        pairs = [Pair(case, seed) for case in cases for seed in seeds]
        for number, pair in enumerate(pairs, 1):
            try:
                self._fill(pair, rows, weights, scorers)
            except UnsupportedPipelineError:
                raise
            except GraftError as error:
                pair.error = str(error)
            told(
                f"{number} of {len(pairs)}: {pair.case.id}, seed {pair.seed}{pair.error and ', failed: ' + pair.error}"
            )
        return pairs

    def _fill(self, pair: Pair, rows: Rows, weights: str, scorers: Sequence[Scorer]) -> None:
        for arm in ARMS:
            name = self._name(pair, arm, weights)
            path = self.folder / "pictures" / name
            if not path.exists():
                rows.remember({"drawn": name}, lambda p=path, a=arm: self._draw(pair, a, p))
            if not path.exists():  # known from an earlier run, deleted since
                self._draw(pair, arm, path)
            picture, made = load_image(path), rows.remember({"drawn": name}, dict)
            pair.files[arm] = f"pictures/{name}"
            pair.scores[arm] = {"seconds a picture": made["seconds"]} if "seconds" in made else {}
            for scorer in scorers:
                key = {"picture": name, "scorer": dict(scorer.key), "case": pair.case.label()}
                pair.scores[arm] |= rows.remember(key, lambda s=scorer, p=picture: dict(s.score(pair.case, p)))

    def _name(self, pair: Pair, arm: str, weights: str) -> str:
        """The same for the same picture: everything that it depends on is in it."""
        from ... import __version__

        technique = {"plugin": self.technique.plugin, "settings": self.settings if self._uses_settings(arm) else {}}
        key = [weights, pair.case.label(), pair.seed, arm, technique, dict(self.call), __version__]
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=repr).encode()).hexdigest()[:12]
        return f"{safe_name(pair.case.id)}-{pair.seed}-{arm}-{digest}.png"

    def _uses_settings(self, arm: str) -> bool:
        return arm == "grafted" or self.technique.task

    def _draw(self, pair: Pair, arm: str, path: Path) -> dict[str, float]:
        start = time.monotonic()
        picture = self.technique.draw(
            self.pipe, pair.case, arm == "grafted", self.settings, seed=pair.seed, **self.call
        )  # fmt: skip
        spent = time.monotonic() - start
        own = picture.info.get("diffgraft", {}) | {"model": self.model, "arm": arm}
        write_whole(path, encode_png(picture, own if self.metadata else None))
        return {"seconds": round(spent, 3)}


def records(pairs: Sequence[Pair], folder: Path) -> Iterator[dict[str, Any]]:
    """For the contact sheets: each case's input, if it has one, its plain and its grafted picture."""
    for pair in pairs:
        if pair.error:
            yield {"id": pair.case.id, "status": "failed", "error_type": pair.error}
            continue
        inputs = {"image": pair.case.image, "mask": pair.case.mask, "style": pair.case.style}
        for name, picture in inputs.items():
            if picture is not None:
                yield _tile(f"{pair.case.id}: {name}", _input(folder, pair.case, name, opened(picture)), pair.seed)
        for arm in ARMS:
            yield _tile(f"{arm}: {pair.case.prompt or pair.case.id}", pair.files[arm], pair.seed)


def tiles(case: Case) -> int:
    """Pictures of a case on a sheet."""
    return 2 + sum(picture is not None for picture in (case.image, case.mask, case.style))


def _tile(name: str, file: str, seed: int) -> dict[str, Any]:
    return {"id": name, "status": "ok", "pictures": [{"file_name": file, "seed": seed}]}


def _input(folder: Path, case: Case, name: str, picture: Image.Image) -> str:
    """A copy beside the results: sheets show files of their folder."""
    path = folder / "pictures" / f"{safe_name(case.id)}-{name}-{case.label()[name][:8]}.png"
    write_whole(path, encode_png(picture, None))
    return f"pictures/{path.name}"

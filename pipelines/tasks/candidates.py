"""Pictures on their way through `erase`: what each region begins with, and what is made of it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ...attention.masks import Bools, as_mask
from ..families.latents import decode_latents, encode_image, native_side, side_multiple
from .continuation import Pixels, exemplar, harmonic
from .edges import Edges
from .fill import Job, Sampling, sample
from .ranking import seam, strangeness
from .region import Region, hold, paste, plan_regions


@dataclass
class Candidate:
    """A picture on its way; candidates of one picture share all but `made` and the seed.

    Attributes:
        made: what there is after some of the regions.
        starts: what each region begins with; empty if it begins with itself.
        lost: what the autoencoder takes from each start and is put back.
        seam: how far the model's version was from the picture along the rim, of the worst region, in levels.
    """

    made: Image.Image
    hole: Bools
    opacity: Any
    regions: list[Region]
    prompt: str
    seed: int
    used: dict[str, float]
    starts: Sequence[Image.Image] = ()
    lost: Sequence[Pixels] = ()
    seam: float = 0.0

    def job(self, index: int) -> Job:
        """What is to be made of a region."""
        start = self.starts[index] if self.starts else None
        return Job(self.made, self.hole, self.regions[index], self.prompt, self.seed, start)

    def take(self, index: int, generated: Image.Image) -> None:
        """Lay what was made of a region over the picture."""
        region = self.regions[index]
        left, top, right, bottom = region.box
        opacity = self.opacity[top:bottom, left:right]
        if self.starts:
            generated = _picture(np.asarray(generated, np.float64) + self.lost[index])
        new, before = region.uncut(generated), self.made.convert("RGB").crop(region.box)
        off = seam(np.asarray(before, np.float64), np.asarray(new, np.float64), opacity > 0)
        self.seam = max(self.seam, off)
        if self.starts:
            new = untinted(before, new, opacity > 0)
        self.made = paste(self.made, new, (left, top), opacity)

    def unease(self) -> dict[str, float]:
        """What speaks against it, without knowing what is behind the hole; both in levels, less is better."""
        if not self.regions:
            return {"seam": 0.0, "strangeness": 0.0}
        strange = strangeness(np.asarray(self.made.convert("RGB"), np.float64), self.hole)
        return {"seam": round(self.seam, 3), "strangeness": round(strange, 3)}


def untinted(picture: Image.Image, generated: Image.Image, hole: Bools) -> Image.Image:
    """`generated` with the difference to `picture` along the hole's rim spread into the hole like a membrane.

    The known side of the rim shows what the autoencoder does to colours; both are RGB of one size.
    """
    before, after = (np.asarray(image, np.float64) for image in (picture, generated))
    return _picture(after + harmonic(before - after, hole))


def candidates(
    pipe: Any, picture: Image.Image, mask: Any, prompt: str, seeds: Sequence[int], edges: Edges, crop: bool,
    sampling: Sampling,
) -> list[Candidate]:  # fmt: skip
    """One for each seed, without regions if nothing is to be done."""
    marked = edges.clean(as_mask(mask, (picture.height, picture.width)))
    regions: list[Region] = []
    hole, opacity, used = edges.apply(marked)
    if marked.any():
        size = native_side(pipe), side_multiple(pipe), crop
        regions = plan_regions(hole, *size)
        if not hold(regions, opacity > 0):  # a wide feather would end at a region's border
            regions = plan_regions(opacity > 0, *size)
    else:
        warnings.warn("the mask is empty: the picture comes back unchanged", stacklevel=3)
    starts = [emptied(r.cut(picture), r.cut_mask(hole)) for r in regions if sampling.origin == "clean"]
    lost = [loss(pipe, start, sampling.strength) for start in starts]
    return [Candidate(picture.copy(), hole, opacity, regions, prompt, seed, dict(used), starts, lost) for seed in seeds]


def emptied(part: Image.Image, hole: Bools) -> Image.Image:
    """A region without what its hole covers."""
    return _picture(exemplar(np.asarray(part, np.float64), hole))


def loss(pipe: Any, start: Image.Image, strength: float) -> Pixels:
    """What the autoencoder takes from a start: all of it up to half strength, less beyond, at 1 nothing.

    The more of a start is painted over, the less its details belong to what is there afterwards.
    """
    share = min(1.0, 2 * (1 - strength))
    if not share:
        return np.zeros((start.height, start.width, 3))
    [back] = decode_latents(pipe, encode_image(pipe, start))
    return share * (np.asarray(start, np.float64) - np.asarray(back, np.float64))


def fill_all(pipe: Any, every: Sequence[Candidate], sampling: Sampling, batch_size: int) -> None:
    """All regions of all candidates: the first of each, then the second ones; batches are of one size in pixels."""
    for index in range(max((len(candidate.regions) for candidate in every), default=0)):
        waiting: dict[tuple[int, int], list[Candidate]] = {}
        for candidate in every:
            if index < len(candidate.regions):
                waiting.setdefault(candidate.regions[index].padded, []).append(candidate)
        for alike in waiting.values():
            for start in range(0, len(alike), batch_size):
                batch = alike[start : start + batch_size]
                generated = sample(pipe, [candidate.job(index) for candidate in batch], sampling)
                for candidate, picture in zip(batch, generated, strict=True):
                    candidate.take(index, picture)


def _picture(values: Any) -> Image.Image:
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))

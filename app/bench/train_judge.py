"""Trains the judge on renders, as they are and as the autoencoder gives them back.

    python -m diffgraft.app.bench.train_judge --minutes 12

Needs `.train/vae`; writes `judge.safetensors` beside the judge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file

from .judge import KINDS, MANNERS, PAINTS, PLACES, WEIGHTS, Judge, look
from .latents import grid_masks
from .muon import Pair
from .training import TimeBox, arguments, autocast, log, share_cores, to_tensor
from .world import FRESH, Scene, render, scene

TRAINING_SEEDS = 5_000_000
PEAK, BATCH = 2e-3, 64


def labels(truth: Scene) -> tuple[list[int], int, int]:
    """Colour number of each kind (0: absent), background number, style number."""
    colours = {thing.kind: 1 + PAINTS.index(thing.colour) for thing in truth.things}
    return [colours.get(kind, 0) for kind in KINDS], PLACES.index(truth.background), MANNERS.index(truth.style)


@torch.no_grad()
def through_autoencoder(vae: AutoencoderKL, pictures: Sequence[Image.Image]) -> torch.Tensor:
    """The pictures as the pipeline would show them: encoded, decoded, in 8 bits; uint8 [N, 3, 128, 128]."""
    decoded = []
    for i in range(0, len(pictures), 32):
        with autocast("cpu"):
            back = vae.decode(vae.encode(to_tensor(pictures[i : i + 32])).latent_dist.mean).sample
        decoded.append(((back.float().clamp(-1, 1) + 1) * 127.5).round().byte())
    return torch.cat(decoded)


def lessons(vae: AutoencoderKL, scenes: Sequence[Scene]) -> torch.Tensor:
    """Every scene twice, uint8 [2 N, 3, 128, 128]: as rendered, then through the autoencoder."""
    pictures = [render(s) for s in scenes]
    raw = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])
    return torch.cat([raw, through_autoencoder(vae, pictures)])


def balanced(first: int, count: int) -> list[Scene]:
    """Scenes of one, two and three things of any combination, every style as often."""
    return [scene(first + i, split="any", count=1 + i % 3, style=MANNERS[i % 5]) for i in range(count)]


def kind_maps(truth: Scene) -> torch.Tensor:
    """Which kind owns each cell, [16, 16]; the number of kinds where none does."""
    owner = torch.full((16, 16), len(KINDS))
    for thing, cover in zip(truth.things, grid_masks(truth), strict=False):
        owner[cover > 127] = KINDS.index(thing.kind)
    return owner


def judge_loss(scores: tuple[torch.Tensor, ...], truth: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Cross entropy of the four answers; the maps at 0.3, background and style at 0.2; a kind that is there weighs
    four times as much as one that is not.
    """
    maps, colours, places, manners = (part.float() for part in scores)
    owner, paint, place, manner = truth
    weight = torch.ones(len(PAINTS) + 1).index_fill(0, torch.arange(1, len(PAINTS) + 1), 4.0)
    nothing = torch.zeros_like(maps[:, :1])
    return (
        F.cross_entropy(colours.flatten(0, 1), paint.flatten(), weight)
        + 0.3 * F.cross_entropy(torch.cat([maps, nothing], 1), owner)
        + 0.2 * (F.cross_entropy(places, place) + F.cross_entropy(manners, manner))
    )


def jitter(pictures: torch.Tensor) -> torch.Tensor:
    """A little noise and another contrast, so that the judge does not learn one autoencoder by heart."""
    noise = torch.randn_like(pictures) * 0.06 * torch.rand(len(pictures), 1, 1, 1)
    return pictures * (0.94 + 0.12 * torch.rand(len(pictures), 1, 1, 1)) + noise


def moved(pictures: torch.Tensor, owner: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures [B, 3, 128, 128] and their kind maps [B, 16, 16] mirrored or not, and shifted by up to one cell each
    way, the border repeated.
    """
    flip, down, right = int(torch.randint(2, ())), int(torch.randint(-1, 2, ())), int(torch.randint(-1, 2, ()))

    def cells(side: int, by: int, size: int) -> torch.Tensor:
        return (torch.arange(side) + by * size).clamp(0, side - 1)

    def move(grid: torch.Tensor, size: int) -> torch.Tensor:
        side = grid.shape[-1]
        grid = grid[..., cells(side, down, size), :][..., cells(side, right, size)]
        return grid.flip(-1) if flip else grid

    return move(pictures, 8), move(owner, 1)


def train(minutes: float, work: Path, count: int) -> None:
    """Trains inside the time box, reports on held-out scenes, writes the weights beside this file in float16."""
    vae = AutoencoderKL.from_pretrained(work / "vae").eval()
    cache = work / "judge-data.pt"
    scenes = [s.empty() if i % 12 == 11 else s for i, s in enumerate(balanced(TRAINING_SEEDS, count))]
    if not cache.exists():
        torch.save(lessons(vae, scenes), cache)
    pictures = torch.load(cache, weights_only=True)
    answers = [torch.tensor(column) for column in zip(*map(labels, scenes), strict=True)]
    truth = [part.repeat(2, *[1] * (part.ndim - 1)) for part in (torch.stack([kind_maps(s) for s in scenes]), *answers)]
    judge = Judge().train()
    optimizer, box, step = Pair([judge], PEAK, outside=("paint", "place", "manner", "where")), TimeBox(minutes), 0
    while box.fraction < 1:
        share_cores()
        rows = torch.randint(len(pictures), (BATCH,))
        owner, *answers = (part[rows] for part in truth)
        batch, owner = moved(pictures[rows].float() / 127.5 - 1, owner)
        with autocast("cpu"):
            scores = judge(jitter(batch))
        loss = judge_loss(scores, (owner, *answers))
        loss.backward()
        optimizer.step(box.rate(step))
        step += 1
        if step % 50 == 0:
            log.info("step %d, %.0f s, loss %.4f", step, box.spent, loss.item())
    judge.eval()
    report(judge, vae)
    save_file(
        {name: part.half() if part.is_floating_point() else part for name, part in judge.state_dict().items()}, WEIGHTS
    )


def report(judge: Judge, vae: AutoencoderKL, count: int = 750) -> dict[str, float]:
    """Shares on held-out scenes through the autoencoder: exact by style and by number of things, background, style."""
    scenes = balanced(FRESH, count)
    verdicts = look(judge, through_autoencoder(vae, [render(s) for s in scenes]).float() / 127.5 - 1)
    rows = list(zip(scenes, verdicts, strict=True))
    found = {style: _mean([v.exact(s) for s, v in rows if s.style == style]) for style in MANNERS}
    found |= {f"{n} things": _mean([v.exact(s) for s, v in rows if len(s.things) == n]) for n in (1, 2, 3)}
    found["background"] = _mean([v.background == s.background for s, v in rows])
    found["style"] = _mean([v.style == s.style for s, v in rows])
    log.info("held out: %s", {name: round(value, 3) for name, value in found.items()})
    return found


def _mean(outcomes: list[bool]) -> float:
    return sum(outcomes) / len(outcomes) if outcomes else math.nan


if __name__ == "__main__":
    parser = arguments(__doc__ or "", minutes=12)
    parser.add_argument("--count", type=int, default=6000, help="training scenes")
    args = parser.parse_args()
    train(args.minutes, args.work, args.count)

"""Encodes training scenes once, so that the denoiser's trainer only reads: latents, object masks, captions.

    python -m diffgraft.app.bench.latents --first 0 --count 12000

writes `.train/latents-0.pt`; the trainer reads every such file. Two runs side by side use two cores. `--empty` encodes
the scenes without their things ("meadow , sketch style"): about one in ten, or the model takes every hole for a thing.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import AutoencoderKL

from .styles import STYLES
from .training import autocast, log, to_tensor
from .vocabulary import LENGTH, tokenizer
from .world import COUNT_WEIGHTS, Scene, caption, masks, render, scene

VARIANTS = 4  # captions a scene: the full one, and others that leave something out
MOST = max(COUNT_WEIGHTS)


def grid_masks(drawn: Scene) -> torch.Tensor:
    """Cover of each latent cell by each thing, [3, 16, 16], 0 ... 255; zeros where there is no thing."""
    cover = torch.zeros(MOST, 16, 16, dtype=torch.uint8)
    for i, mask in enumerate(torch.from_numpy(masks(drawn)).float()):
        cover[i] = (F.avg_pool2d(mask[None], 8)[0] * 255).round().byte()
    return cover


def word_columns(drawn: Scene, text: str) -> torch.Tensor:
    """Token columns of each thing's colour and kind in a caption, [3, 2]; 0 where the word is left out."""
    words = text.split()
    columns = torch.zeros(MOST, 2, dtype=torch.uint8)
    for i, thing in enumerate(drawn.things):
        for j, word in enumerate((thing.colour, thing.kind)):
            columns[i, j] = words.index(word) + 1 if word in words else 0
    return columns


@torch.no_grad()
def encode(vae: AutoencoderKL, first: int, count: int, empty: bool = False) -> dict[str, torch.Tensor]:
    """Scenes `first` ... `first + count - 1`, or their backgrounds alone, as tensors with one row a scene."""
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in ("latents", "masks", "columns", "easy", "plain")}
    texts: list[str] = []
    for start in range(first, first + count, 64):
        scenes = [scene(seed) for seed in range(start, min(start + 64, first + count))]
        scenes = [drawn.empty() for drawn in scenes] if empty else scenes
        with autocast("cpu"):
            latent = vae.encode(to_tensor([render(s) for s in scenes])).latent_dist.mean
        rows["latents"].append(latent.half())
        for drawn in scenes:
            written = [caption(drawn)] + [
                caption(drawn, random.Random(f"{drawn.seed} {i}")) for i in range(1, VARIANTS)
            ]
            texts += written
            rows["masks"].append(grid_masks(drawn)[None])
            rows["columns"].append(torch.stack([word_columns(drawn, text) for text in written])[None])
            rows["easy"].append(torch.tensor([len(drawn.things) == 1 and drawn.style == "plain"]))
            rows["plain"].append(torch.tensor([drawn.style == next(iter(STYLES))]))
        if start // 64 % 50 == 0:
            log.info("%d of %d scenes", start - first, count)
    tokens = tokenizer()(texts, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    return {
        **{name: torch.cat(parts) for name, parts in rows.items()},
        "tokens": tokens.byte().view(count, VARIANTS, LENGTH),
    }


def load(work: Path) -> dict[str, torch.Tensor]:
    """Every encoded scene in the folder."""
    files = sorted(work.glob("latents-*.pt"))
    if not files:
        raise FileNotFoundError(f"no latents in {work}: run python -m diffgraft.app.bench.latents first")
    parts = [torch.load(file, weights_only=True) for file in files]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


if __name__ == "__main__":
    import logging

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0, help="seed of the first scene")
    parser.add_argument("--count", type=int, default=12000)
    parser.add_argument("--empty", action="store_true", help="the scenes' backgrounds alone")
    parser.add_argument("--work", type=Path, default=Path(".train"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoencoderKL.from_pretrained(args.work / "vae").eval()
    name = f"latents-{'empty-' if args.empty else ''}{args.first}.pt"
    torch.save(encode(model, args.first, args.count, args.empty), args.work / name)

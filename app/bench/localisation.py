"""Where the words look: for each cross-attention layer and step, whether a kind's map lies on the thing it became.

    python -m diffgraft.app.bench localisation --full

Prints, for two plain things, the share of a noun's attention (mean over heads) that lies on its own thing and on the
other one, as the judge's kind maps find them in the finished picture; the share of the area that the thing takes is
the value of a blind map.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0

from .denoiser import TrainingAttention
from .judge import KINDS, Judge, load_judge
from .model_card import ROWS
from .rows import subject
from .training import share_cores
from .vocabulary import LENGTH
from .world import Scene, caption

Kept = dict[tuple[str, int], list[torch.Tensor]]


def watch_all(pipe: StableDiffusionPipeline) -> dict[str, TrainingAttention]:
    """Attention of the whole denoiser as matrix products; returns the cross-attention's, by layer, which keep their
    maps.
    """
    processors = {name: TrainingAttention("attn2" in name) for name in pipe.unet.attn_processors}
    pipe.unet.set_attn_processor(dict(processors))
    return {name.removesuffix(".processor"): layer for name, layer in processors.items() if layer.keep}


def _note(
    layers: dict[str, TrainingAttention], kept: Kept, _: object, step: int, __: object, given: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The pipeline's callback: the conditional half's maps, heads averaged, on 16 x 16 cells."""
    for name, layer in layers.items():
        maps = layer.maps.chunk(2)[1].mean(1).mT
        side = round(maps.shape[-1] ** 0.5)
        grown = F.interpolate(maps.unflatten(-1, (side, side)), size=(16, 16), mode="nearest")
        kept[name, step].append(grown / grown.sum((-2, -1), keepdim=True))
    return given


@torch.no_grad()
def localisation(
    pipe: StableDiffusionPipeline, judge: Judge, scenes: list[Scene], steps: int = 25
) -> dict[tuple[str, int], tuple[float, float, float]]:
    """Layer and step -> share on the own thing, share on the other thing, area of the own thing; over things found
    in the picture.
    """
    layers, kept, owners = watch_all(pipe), defaultdict(list), []
    for start in range(0, len(scenes), 16):
        share_cores()
        texts = [caption(s) for s in scenes[start : start + 16]]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(texts))]
        pictures = pipe(
            texts,
            num_inference_steps=steps,
            guidance_scale=4.0,
            generator=generators,
            output_type="pt",
            callback_on_step_end=partial(_note, layers, kept),
        ).images
        owners.append(judge(pictures * 2 - 1)[0].softmax(1))
    where = torch.cat(owners) > 0.5
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    return {key: _shares(torch.cat(maps), where, scenes) for key, maps in kept.items()}


def _shares(maps: torch.Tensor, where: torch.Tensor, scenes: list[Scene]) -> tuple[float, float, float]:
    """Means over the things that the judge finds, of maps [N, tokens, 16, 16] by cells [N, kinds, 16, 16]."""
    rows = []
    for found, cells, drawn in zip(maps, where, scenes, strict=True):
        words = caption(drawn).split()[: LENGTH - 2]
        own = [cells[KINDS.index(thing.kind)] for thing in drawn.things]
        if not all(mask.any() for mask in own):
            continue
        for i, thing in enumerate(drawn.things):
            column = found[1 + words.index(thing.kind)]
            rows.append([column[own[i]].sum(), column[own[1 - i]].sum(), own[i].float().mean()])
    return tuple(torch.tensor(rows).mean(0).tolist())


def run(full: bool, model: Path | None = None) -> None:
    """Prints a line a layer: own / other at five moments of the sampling."""
    found = localisation(subject(model), load_judge(), ROWS[2].scenes(256 if full else 32))
    moments = (0, 6, 12, 18, 24)
    sys.stdout.write("| layer | area | " + " | ".join(f"step {m}" for m in moments) + " |\n" + "|---" * 7 + "|\n")
    for layer in dict.fromkeys(name for name, _ in found):
        cells = [f"{100 * found[layer, m][0]:.0f} / {100 * found[layer, m][1]:.0f}%" for m in moments]
        sys.stdout.write(f"| {layer} | {100 * found[layer, 0][2]:.0f}% | " + " | ".join(cells) + " |\n")

"""Trains the transformer edition on scenes encoded by the fine autoencoder.

    python -m diffgraft.app.bench.autoencoder --minutes 13 --fine assets/picturebook/vae --work .train/transformer
    python -m diffgraft.app.bench.latents --first 0 --count 12000 --work .train/transformer
    python -m diffgraft.app.bench.latents --first 0 --count 1200 --empty --work .train/transformer
    python -m diffgraft.app.bench.train_flow --minutes 40 --pooled      # a quarter of the cells, four times as fast
    python -m diffgraft.app.bench.train_flow --minutes 60 --fresh-box   # a new box, from the averaged weights
    python -m diffgraft.app.bench.train_flow --minutes 60 --resume      # a box that was cut goes on where it was
    python -m diffgraft.app.bench.train_flow --minutes 60 --from assets/picturebook-transformer   # from weights alone
    python -m diffgraft.app.bench.train_flow --minutes 8 --device cuda --batch 512 --from assets/picturebook-transformer

Forward and backward run on a bfloat16 copy of float32 weights, where that is fast. Beside the velocity each image token
says, through a head that is thrown away, which thing in which colour covers it: the meaning that the picture book's
world knows is learned first, as REPA (2024) does it with another network's features. `--export DIR` writes the averaged
weights in float16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import AutoencoderKL, ZImagePipeline

from .denoiser import weighted_loss
from .flow import (
    LABELS,
    OUTSIDE,
    Spread,
    TrainingAttention,
    build_text_encoder,
    build_transformer,
    compile_blocks,
    draw_noise_levels,
    encode_words,
    label_loss,
    pipeline,
    processors,
)
from .muon import Pair
from .train import SHOWN
from .trainer import BoxTrainer
from .training import HalfCopy, arguments, contact_sheet, folder, log

PEAK, BATCH, NAMING, NAMED_LAYER = 2e-3, 32, 0.1, 2
CENTRE, CENTRE_POOLED = 0.5, 0.0  # of the noise levels' logits: twice the cells a side hide a thing half as well
SIDE, GUIDANCE = 128, 1.5  # this pipeline counts guidance from 0: others would call it 2.5


class FlowTrainer(BoxTrainer):
    """Transformer, text encoder and naming head; `pooled`: on latents of half the side."""

    def __init__(self, work: Path, device: str, source: Path | None, pooled: bool = False, peak: float = PEAK) -> None:
        self.transformer, self.text = build_transformer(), build_text_encoder()
        if source:
            given = ZImagePipeline.from_pretrained(source, dtype=torch.float32)
            self.transformer, self.text = given.transformer, given.text_encoder
        if pooled:  # not part of what is saved
            self.transformer.rope_embedder = Spread(self.transformer.rope_embedder, 2)
        self.head = torch.nn.Linear(self.transformer.dim, sum(LABELS))
        networks = {"transformer": self.transformer, "text": self.text, "head": self.head}
        for network in networks.values():
            network.to(device).train()
        optimizer = Pair(networks.values(), peak, outside=OUTSIDE)
        super().__init__(work / "flow.pt", networks, optimizer, device)
        self.work, self.pooled = work, pooled
        self.half = HalfCopy(torch.nn.ModuleDict(networks))
        trained = self.half.module["transformer"]
        processors(trained, TrainingAttention())
        trained.layers[NAMED_LAYER].register_forward_hook(self._keep)

    def _keep(self, module: torch.nn.Module, given: Any, found: torch.Tensor) -> None:
        self.middle = found

    def batch(self, size: int, easy: float) -> dict[str, torch.Tensor]:
        """Random scenes (see `Scenes.batch`) with a share of noise each."""
        found = self.scenes.batch(size, easy, self.singles)
        if self.pooled:
            found["latent"], found["masks"] = F.avg_pool2d(found["latent"], 2), F.avg_pool2d(found["masks"], 2)
            found["noise"] = torch.randn_like(found["latent"])
        found["sigma"] = draw_noise_levels(size, CENTRE_POOLED if self.pooled else CENTRE)
        return {name: part.to(self.device, non_blocking=True) for name, part in found.items()}

    def losses(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Error of the velocity, and of the names that the middle layer's tokens give."""
        sigma = batch["sigma"].view(-1, 1, 1, 1)
        noisy = ((1 - sigma) * batch["latent"] + sigma * batch["noise"]).to(self.half.dtype)
        parts = self.half.module
        words = encode_words(parts["text"], batch["tokens"])
        images = list(noisy.unsqueeze(2).unbind())
        guess = torch.stack(parts["transformer"](images, 1 - batch["sigma"], words, return_dict=False)[0]).squeeze(2)
        error = guess.float() - (batch["latent"] - batch["noise"])
        masks = batch["masks"]
        cover = F.interpolate(masks, size=error.shape[-2:]).flatten(-2)
        scores = parts["head"](self.middle[:, : masks.shape[-2] * masks.shape[-1]])
        return weighted_loss(error, cover).mean(), label_loss(scores, masks, batch["things"]).mean()

    def advance(self, size: int, easy: float, rate: float) -> torch.Tensor:
        """One step; returns the velocity's error and the names'."""
        losses = torch.stack(self.losses(self.batch(size, easy)))
        self.descend(losses[0] + NAMING * losses[1], rate)
        return losses.detach().cpu()

    def save_average(self) -> ZImagePipeline:
        """Writes the averaged weights as a pipeline, float32; returns that pipeline, on the averages until the next
        `ema.swap()`.
        """
        self.ema.swap()
        vae = AutoencoderKL.from_pretrained(self.work / "vae").to(self.device)
        pipe = pipeline(vae, self.transformer, self.text)
        pipe.save_pretrained(self.work / "picturebook-transformer")
        return pipe

    @torch.no_grad()
    def show(self) -> None:
        """As the parent says."""
        pipe, side = self.save_average(), SIDE // 2 if self.pooled else SIDE
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        settings: dict[str, Any] = {"num_inference_steps": 25, "guidance_scale": GUIDANCE, "generator": generator}
        pictures = pipe(list(SHOWN), height=side, width=side, **settings).images
        contact_sheet(pictures, 6).save(self.work / f"sheet-{self.step:06d}.png")
        self.ema.swap()
        log.info("contact sheet at step %d", self.step)


def export(work: Path, target: Path) -> None:
    """Writes the averaged weights of `work` in float16, in diffusers format, without the path they came from."""
    pipe = ZImagePipeline.from_pretrained(work / "picturebook-transformer", dtype=torch.float16)
    for part in (pipe, pipe.transformer, pipe.vae):
        part.register_to_config(_name_or_path="picturebook-transformer")
    pipe.save_pretrained(target, max_shard_size="15MB")


def main() -> None:
    """The commands of the module's first lines."""
    parser = arguments(__doc__ or "", minutes=60)
    parser.set_defaults(work=Path(".train/transformer"))
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true", help="go on in the time box that was cut")
    group.add_argument("--fresh-box", action="store_true", help="a new time box from the checkpoint's averaged weights")
    group.add_argument("--from", dest="source", type=folder, help="a new time box from a pipeline's folder")
    parser.add_argument("--batch", type=int, default=BATCH, help="scenes a step; 512 on a GPU")
    parser.add_argument("--pooled", action="store_true", help="on latents of half the side")
    parser.add_argument("--peak", type=float, default=PEAK, help="learning rate; half of it for weights that are good")
    parser.add_argument("--singles", type=float, default=0.0, help="further share of each batch with one thing only")
    parser.add_argument("--export", type=Path, help="write the averaged weights in float16 to this folder and end")
    args = parser.parse_args()
    if args.export:
        export(args.work, args.export)
        return
    trainer = FlowTrainer(args.work, args.device, args.source, args.pooled, args.peak)
    trainer.singles = args.singles
    if args.resume or args.fresh_box:
        trainer.resume(args.fresh_box)
    compile_blocks(trainer.half.module["transformer"], args.device)
    trainer.load_data()
    trainer.run(args.minutes, args.batch)


if __name__ == "__main__":
    main()

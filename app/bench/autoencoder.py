"""Trains the picture book's autoencoder: 128 x 128 pictures to 16 x 16 latents of four whitened channels.

    python -m diffgraft.app.bench.autoencoder --minutes 30
    python -m diffgraft.app.bench.autoencoder --minutes 20 --decoder-only   # later: the latents stay as they are
    python -m diffgraft.app.bench.autoencoder --minutes 15 --fine assets/picturebook/vae --work .train/transformer

The last trains the transformer edition's: 32 x 32 latents, since two by two of them make one token there. It starts
from the layers of the other one. Now and then its latents are pooled and must decode to the pooled picture (EQ-VAE,
2025): smooth latents are learned faster, and pooled ones are training pictures of a quarter of the cells.

Loss on crops of 64 pixels: absolute error, squared error, error of the gradients (edges) and of 8 x 8 means
(colours), object pixels three times as heavy; the latents get noise, so that the decoder forgives a denoiser's small
errors.
"""

from __future__ import annotations

import colorsys
import re
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from diffusers import AutoencoderKL

from .muon import Pair
from .training import (
    SAVE_EVERY,
    TimeBox,
    arguments,
    autocast,
    contact_sheet,
    load_checkpoint,
    log,
    save_checkpoint,
    share_cores,
    to_images,
    to_tensor,
)
from .world import FRESH, STYLE_WEIGHTS, masks, render, scene

PEAK, BATCH, CROP, POOL, NOISE = 3e-3, 16, 64, 3000, 0.06
POOLED = 0.3  # share of the fine autoencoder's steps on pooled latents


def build(fine: bool = False) -> AutoencoderKL:
    """The untrained autoencoder, 3.8 million parameters, no attention (a picture is decoded in 40 ms on two cores);
    `fine`: one halving less, 32 x 32 latents, 2.9 million.
    """
    widths = (32, 64, 128) if fine else (32, 64, 128, 128)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,  # Z-Image's pipeline adds it and takes no null
    )


def adopt(vae: AutoencoderKL, source: AutoencoderKL) -> None:
    """Copies every layer of a coarse autoencoder that a fine one has: in the decoder they stand one block further."""
    given = source.state_dict()
    fitting = {}
    for name, weight in vae.state_dict().items():
        block = re.fullmatch(r"(decoder\.up_blocks\.)(\d)(\..*)", name)
        other = f"{block[1]}{int(block[2]) + 1}{block[3]}" if block else name
        if other in given and given[other].shape == weight.shape:
            fitting[name] = given[other]
    vae.load_state_dict(fitting, strict=False)


class Pool:
    """Rendered pictures in memory, some replaced at every step."""

    def __init__(self, first_seed: int) -> None:
        self.seed = first_seed
        self.pictures = torch.empty(POOL, 4, 128, 128, dtype=torch.uint8)
        for i in range(POOL):
            self._refill(i)

    def _refill(self, i: int) -> None:
        drawn = scene(self.seed)
        self.seed += 1
        self.pictures[i, :3] = torch.from_numpy(np.array(render(drawn))).permute(2, 0, 1)
        self.pictures[i, 3] = torch.from_numpy(masks(drawn).any(0)) * 255

    def batch(self, size: int, crop: int, fresh: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
        """Crops [B, 3, crop, crop] in -1 ... 1 at multiples of 8 (the textures' period), and their object masks [B,
        1, crop, crop].
        """
        for _ in range(fresh):
            self._refill(int(torch.randint(POOL, ())))
        corners = (torch.randint((128 - crop) // 8 + 1, (size, 2)) * 8).tolist()
        chosen = torch.randint(POOL, (size,)).tolist()
        cut = torch.stack(
            [self.pictures[n, :, y : y + crop, x : x + crop] for n, (y, x) in zip(chosen, corners, strict=True)]
        )
        return cut[:, :3].float() / 127.5 - 1, cut[:, 3:].float() / 255


def loss_of(output: torch.Tensor, picture: torch.Tensor, objects: torch.Tensor) -> torch.Tensor:
    """The weighted sum of the module's first lines; all [B, C, H, W]."""
    weight = 1 + 2 * objects
    weight = weight / weight.mean()
    error = output - picture
    edges = (error.diff(dim=-1).abs() * weight[..., 1:]).mean() + (error.diff(dim=-2).abs() * weight[..., 1:, :]).mean()
    colours = F.avg_pool2d(error, 8).abs().mean()
    return (error.abs() * weight).mean() + 3 * (error.square() * weight).mean() + 0.5 * edges + 0.5 * colours


def whiten(vae: AutoencoderKL, pictures: torch.Tensor) -> None:
    """Folds a linear map into the two 1 x 1 convolutions around the latent: its channels become uncorrelated, mean
    0, deviation 1.
    """
    latents = vae.encode(pictures).latent_dist.mean.movedim(1, -1).flatten(0, -2).double()
    mean = latents.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(latents.T))
    forward, back = vectors.T / values.sqrt()[:, None], vectors * values.sqrt()
    before, after = vae.quant_conv, vae.post_quant_conv
    with torch.no_grad():
        weight, bias = before.weight[:4, :, 0, 0].double(), before.bias[:4].double()
        before.weight[:4, :, 0, 0] = (forward @ weight).float()
        before.bias[:4] = (forward @ (bias - mean)).float()
        before.weight[4:], before.bias[4:] = 0, -20.0
        matrix = after.weight[:, :, 0, 0].double()
        after.bias += (matrix @ mean).float()
        after.weight[:, :, 0, 0] = (matrix @ back).float()


def hue_error(before: np.ndarray, after: np.ndarray) -> float:
    """Degrees between the hues of two mean colours (RGB, 0 ... 1); 0 where the first is nearly grey, 180 where the
    second turned grey.
    """
    (h0, s0, _), (h1, s1, _) = colorsys.rgb_to_hsv(*before), colorsys.rgb_to_hsv(*after)
    if s0 < 0.15:
        return 0.0 if s1 < 0.25 else 180.0
    return 360 * min(abs(h0 - h1), 1 - abs(h0 - h1))


@torch.no_grad()
def measure(vae: AutoencoderKL, count: int = 60) -> dict[str, float]:
    """PSNR in dB (peak 255) by style and over all, and the share of held-out objects whose mean hue stays within 15
    degrees.
    """
    squares, hues = {}, []
    for style in STYLE_WEIGHTS:
        scenes = [scene(FRESH + i, split="any", style=style) for i in range(count)]
        pictures = to_tensor([render(s) for s in scenes])
        decoded = torch.cat(
            [vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1) for part in pictures.split(16)]
        )
        squares[style] = ((decoded - pictures) / 2).square().mean().item()
        for drawn, truth, found in zip(scenes, (pictures.numpy() + 1) / 2, (decoded.numpy() + 1) / 2, strict=True):
            hues += [hue_error(truth[:, m].mean(1), found[:, m].mean(1)) for m in masks(drawn)]
    psnr = {style: -10 * float(np.log10(error)) for style, error in squares.items()}
    return {
        **psnr,
        "all": -10 * float(np.log10(np.mean(list(squares.values())))),
        "hue kept": float(np.mean(np.array(hues) < 15)),
    }


class Trainer:
    """The autoencoder, its pool of pictures and its optimizer; with `decoder_only` the finished encoder stays as it
    is; with `fine`, the folder of a coarse autoencoder, the fine one is trained.
    """

    def __init__(self, work: Path, device: str, decoder_only: bool, fine: Path | None = None) -> None:
        self.work, self.device, self.decoder_only = work, device, decoder_only
        self.checkpoint = work / ("decoder.pt" if decoder_only else "autoencoder.pt")
        self.vae = AutoencoderKL.from_pretrained(work / "vae") if decoder_only else build(fine is not None)
        if fine:
            adopt(self.vae, AutoencoderKL.from_pretrained(fine, dtype=torch.float32))
        self.pooled = POOLED if fine else 0.0
        self.vae.to(device, memory_format=torch.channels_last)
        self.optimizer = Pair([self.vae.decoder, self.vae.post_quant_conv] if decoder_only else [self.vae], PEAK)
        self.step, self.spent, seed = 0, 0.0, 0
        state = load_checkpoint(self.checkpoint)
        if state:
            self.vae.load_state_dict(state["vae"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.spent, seed = state["step"], state["spent"], state["seed"]
        self.pool = Pool(seed)

    def save(self, spent: float) -> None:
        """Writes the checkpoint."""
        state = {"vae": self.vae.state_dict(), "optimizer": self.optimizer.state_dict()}
        save_checkpoint(self.checkpoint, {**state, "step": self.step, "seed": self.pool.seed, "spent": spent})

    def advance(self, rate: float) -> tuple[float, float]:
        """One step; returns the loss and the PSNR of its crops in dB."""
        picture, objects = (part.to(self.device) for part in self.pool.batch(BATCH, CROP))
        picture = picture.contiguous(memory_format=torch.channels_last)
        with autocast(self.device):
            with torch.set_grad_enabled(not self.decoder_only):
                latent = self.vae.encode(picture).latent_dist.mean
            if float(torch.rand(())) < self.pooled:
                latent, picture, objects = (F.avg_pool2d(part, 2) for part in (latent, picture, objects))
            noise = torch.randn_like(latent) * NOISE * latent.detach().float().std()
            output = self.vae.decode(latent + noise).sample.float()
        loss = loss_of(output, picture, objects) + 1e-4 * latent.float().square().mean()
        loss.backward()
        self.optimizer.step(rate)
        self.step += 1
        return loss.item(), 10 * torch.log10(4 / (output - picture).square().mean()).item()

    def run(self, minutes: float) -> None:
        """Trains to the end of the time box and leaves `work`/vae, whitened, in diffusers format."""
        box, saved = TimeBox(minutes, self.spent), time.monotonic()
        while box.fraction < 1:
            share_cores()
            loss, psnr = self.advance(box.rate(self.step))
            if self.step % 50 == 0:
                log.info("step %d, %.0f s, loss %.4f, PSNR %.1f dB", self.step, box.spent, loss, psnr)
            if time.monotonic() - saved > SAVE_EVERY or box.fraction >= 1:
                saved = time.monotonic()
                self.save(box.spent)
        vae = self.vae.cpu().eval()
        if not self.decoder_only:
            whiten(vae, to_tensor([render(scene(i)) for i in range(400)]))
        finish(vae, self.work)


@torch.no_grad()
def finish(vae: AutoencoderKL, work: Path) -> None:
    """Measures, draws a contact sheet (renders above, decoded below) and saves."""
    log.info("held out: %s", {name: round(value, 3) for name, value in measure(vae).items()})
    pictures = [render(scene(FRESH + i, style=style)) for style in STYLE_WEIGHTS for i in range(10)]
    decoded = to_images(vae.decode(vae.encode(to_tensor(pictures)).latent_dist.mean).sample)
    rows = [part[i : i + 10] for i in range(0, 50, 10) for part in (pictures, decoded)]
    contact_sheet([image for row in rows for image in row], 10).save(work / "autoencoder.png")
    vae.save_pretrained(work / "vae")


if __name__ == "__main__":
    parser = arguments(__doc__ or "", minutes=30)
    parser.add_argument("--decoder-only", action="store_true", help="better pictures from the latents that exist")
    parser.add_argument("--fine", type=Path, help="train the fine one, from the layers of the one in this folder")
    args = parser.parse_args()
    Trainer(args.work, args.device, args.decoder_only, args.fine).run(args.minutes)

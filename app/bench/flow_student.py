"""Distils the transformer edition into four steps without guidance, the counterpart of Turbo models.

    python -m diffgraft.app.bench.flow_student --collect --minutes 40   # the teacher's guided trajectories
    python -m diffgraft.app.bench.flow_student --minutes 60             # the student learns to cross them in four steps

Collecting adds files `flow-paths-N.pt` (N: first seed) until its time is up; training reads all of them. The teacher
takes 12 steps. Its trajectory is cut at every third, where the student's steps will lie, and the student learns the
straight way from each cut to the next one (segments of progressive distillation, Salimans and Ho, 2022, from whole
trajectories). It is used as `num_inference_steps=4, guidance_scale=0`.
"""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImagePipeline

from .flow import OUTSIDE, TrainingAttention, build_scheduler, encode_words, processors
from .muon import Pair
from .student import distance, read_paths
from .train import SHOWN
from .train_flow import GUIDANCE, SIDE
from .trainer import BoxTrainer
from .training import HalfCopy, TimeBox, arguments, contact_sheet, folder, log, narrow, share_cores
from .world import caption, scene

FIRST_SEED, MOST = 4_000_000, 256  # the most that one file holds
STEPS, CROSSED = 4, 3  # of the student, and of the teacher inside each of them
PEAK, BATCH = 1e-3, 64


def levels() -> torch.Tensor:
    """Shares of noise at the student's cuts, 1 ... 0, as the pipeline sets them."""
    scheduler = build_scheduler()
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / STEPS, STEPS).tolist())
    return scheduler.sigmas


def _keep(
    kept: list[torch.Tensor], _: object, step: int, __: object, given: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    if (step + 1) % CROSSED == 0:
        kept.append(given["latents"].half())
    return given


@torch.no_grad()
def collect(pipe: ZImagePipeline, first: int, count: int, side: int = SIDE) -> dict[str, torch.Tensor]:
    """Trajectories of `count` captions: points [N, 5, 4, h, w] and token ids [N, 20]."""
    share_cores()
    texts = [caption(scene(seed), random.Random(f"student {seed}")) for seed in range(first, first + count)]
    cells = side // pipe.vae_scale_factor
    noise = torch.randn(count, 4, cells, cells, generator=torch.Generator().manual_seed(first))
    kept = [noise.half()]
    pipe(
        list(texts),
        latents=noise,
        height=side,
        width=side,
        num_inference_steps=STEPS * CROSSED,
        guidance_scale=GUIDANCE,
        output_type="latent",
        callback_on_step_end=partial(_keep, kept),
    )
    tokens = pipe.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    return {"points": torch.stack([part.cpu() for part in kept], 1), "tokens": tokens.byte()}


def collect_files(work: Path, teacher: Path, device: str, minutes: float, batch: int) -> None:
    """Adds trajectory files until the time is up."""
    pipe = ZImagePipeline.from_pretrained(teacher, dtype=torch.float32).to(device)
    pipe.transformer.to(narrow(device))  # the pipeline keeps its latents in float32
    pipe.set_progress_bar_config(disable=True)
    box = TimeBox(minutes)
    while box.fraction < 1:
        first = FIRST_SEED + MOST * len(list(work.glob("flow-paths-*.pt")))
        torch.save(collect(pipe, first, batch), work / f"flow-paths-{first}.pt")
        log.info("%d trajectories more, %.0f s", batch, box.spent)


class FlowStudent(BoxTrainer):
    """The transformer in training; text encoder and autoencoder stay the teacher's."""

    def __init__(self, work: Path, teacher: Path, device: str, peak: float = PEAK) -> None:
        self.pipe = ZImagePipeline.from_pretrained(teacher, dtype=torch.float32).to(device)
        self.work, self.levels = work, levels()
        network = self.pipe.transformer.train()
        super().__init__(work / "flow-student.pt", {"transformer": network}, Pair([network], peak, OUTSIDE), device)
        self.half = HalfCopy(network)
        processors(self.half.module, TrainingAttention())

    def load_data(self) -> None:
        """Reads the trajectories; their captions are encoded by the batch."""
        self.data = read_paths(self.work, "flow-paths-*.pt")

    def loss(self, rows: torch.Tensor, cut: torch.Tensor) -> torch.Tensor:
        """Distance between the student's velocity at cut `cut` of trajectory `rows` and the straight way to the next
        cut; half of the draws are the first cut, where all is decided.
        """
        start, end = (self.data["points"][rows, at].float() for at in (cut, cut + 1))
        wanted = (end - start) / (self.levels[cut] - self.levels[cut + 1]).view(-1, 1, 1, 1)
        with torch.no_grad():
            words = encode_words(self.pipe.text_encoder, self.data["tokens"][rows].long().to(self.device))
        words = [row.to(self.half.dtype) for row in words]
        images = list(start.to(self.device, self.half.dtype).unsqueeze(2).unbind())
        times = (1 - self.levels[cut]).to(self.device)
        found = torch.stack(self.half.module(images, times, words, return_dict=False)[0]).squeeze(2)
        return distance(found.float(), wanted.to(self.device)).mean()

    def advance(self, size: int, easy: float, rate: float) -> torch.Tensor:
        """One step; returns the distance."""
        rows = torch.randint(len(self.data["points"]), (size,))
        cut = torch.where(torch.rand(size) < 0.5, 0, torch.randint(1, STEPS, (size,)))
        loss = self.loss(rows, cut)
        self.descend(loss, rate)
        return loss.detach().cpu()[None]

    def show(self) -> None:
        """Saves the averaged weights."""
        self.ema.swap()
        distilled(self.pipe, self.work)
        self.pipe.transformer.float()
        self.ema.swap()


@torch.no_grad()
def distilled(pipe: ZImagePipeline, work: Path) -> None:
    """Saves a trained student's transformer in float16, which it stays in, and a contact sheet."""
    pipe.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": 0.0}
    generator = torch.Generator().manual_seed(3)
    pictures = pipe(list(SHOWN), height=SIDE, width=SIDE, generator=generator, **settings).images
    contact_sheet(pictures, 6).save(work / "few-steps.png")
    pipe.transformer.register_to_config(_name_or_path="picturebook-transformer/few-steps")
    pipe.transformer.half().save_pretrained(work / "few-steps", max_shard_size="15MB")


if __name__ == "__main__":
    parser = arguments(__doc__ or "", minutes=60)
    parser.set_defaults(work=Path(".train/transformer"))
    parser.add_argument("--collect", action="store_true", help="let the teacher draw, instead of training")
    parser.add_argument("--teacher", type=folder, default=Path("assets/picturebook-transformer"))
    parser.add_argument("--resume", action="store_true", help="go on in the time box that was cut")
    parser.add_argument("--batch", type=int, default=BATCH, help="trajectories a step; 512 on a GPU")
    args = parser.parse_args()
    if args.collect:
        collect_files(args.work, args.teacher, args.device, args.minutes, min(args.batch, MOST))
    else:
        student = FlowStudent(args.work, args.teacher, args.device)
        if args.resume:
            student.resume(fresh_box=False)
        student.load_data()
        student.run(args.minutes, args.batch)

"""Distils the picture book into one step, used as sd-turbo is: `num_inference_steps=1, guidance_scale=0`.

    python -m diffgraft.app.bench.student --collect --minutes 40   # the teacher's deterministic trajectories
    python -m diffgraft.app.bench.student --minutes 60             # the student learns where their points end

Collecting adds files `.train/paths-N.pt` (N: first seed) until its time is up; training reads them all but for one
trajectory in 16, which tell how far the student lands where it never was: when that stops falling, collect more. The
student's denoiser starts as a copy of the teacher's and learns the map from any kept point of a trajectory to its end:
mostly from pure noise, where it will be used. Text encoder and autoencoder stay the teacher's. `matching` goes on from
here.
"""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0

from .denoiser import build_scheduler, watch_decoder
from .muon import Pair
from .train import SHOWN
from .trainer import BoxTrainer
from .training import TimeBox, arguments, autocast, contact_sheet, folder, log, share_cores
from .world import caption, scene

FIRST_SEED, PART, STEPS, GUIDANCE = 3_000_000, 256, 10, 2.5
KEPT = (0, 2, 4, 6)  # steps whose noisy latents are kept; the first is pure noise
PEAK, BATCH, SHARE_OF_NOISE = 8e-4, 128, 0.75
APART = 16  # one trajectory in so many is not trained on


def student_scheduler() -> DDIMScheduler:
    """The teacher's, its last step going to no noise at all: one step lands on the picture."""
    return DDIMScheduler.from_config(build_scheduler().config, set_alpha_to_one=True)


def teacher_scheduler() -> DPMSolverMultistepScheduler:
    """DPM-Solver++ of second order: ten steps go where thirty of DDIM's do, and end on the picture itself."""
    return DPMSolverMultistepScheduler.from_config(build_scheduler().config)


@torch.no_grad()
def collect(pipe: StableDiffusionPipeline, first: int, count: int, batch: int = 32) -> dict[str, torch.Tensor]:
    """Trajectories of `count` captions: points [N, 4, 4, 16, 16], their ends [N, 4, 16, 16], token ids [N, 20]."""
    rows: dict[str, list[torch.Tensor]] = {"points": [], "ends": [], "tokens": []}
    for start in range(first, first + count, batch):
        share_cores()
        texts = [caption(scene(seed), random.Random(f"student {seed}")) for seed in range(start, start + batch)]
        generator = torch.Generator().manual_seed(start)
        noise = torch.randn(batch, 4, 16, 16, generator=generator)
        kept = [noise.half()]
        ends = pipe(
            texts,
            latents=noise,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            output_type="latent",
            callback_on_step_end=partial(_keep, kept),
        ).images
        tokens = pipe.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
        rows["points"].append(torch.stack(kept, 1))
        rows["ends"].append(ends.half().cpu())
        rows["tokens"].append(tokens.byte())
    return {name: torch.cat(parts) for name, parts in rows.items()}


def _keep(
    kept: list[torch.Tensor], _: object, step: int, __: object, given: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The pipeline's callback: what comes out of step i is the point before step i + 1."""
    if step + 1 in KEPT:
        kept.append(given["latents"].half().cpu())
    return given


def collect_files(work: Path, teacher: Path, device: str, minutes: float, batch: int = 32) -> None:
    """Adds trajectory files until the time is up."""
    pipe = StableDiffusionPipeline.from_pretrained(teacher, torch_dtype=torch.float32).to(device)
    pipe.scheduler = teacher_scheduler()
    pipe.set_progress_bar_config(disable=True)
    # The denoiser alone in half precision: the solver's numbers are float64, which autocast refuses.
    pipe.unet.forward = autocast(device)(pipe.unet.forward)
    pipe.unet.register_forward_hook(lambda module, given, found: tuple(part.float() for part in found))
    box = TimeBox(minutes)
    while box.fraction < 1:
        first = FIRST_SEED + PART * len(list(work.glob("paths-*.pt")))
        torch.save(collect(pipe, first, PART, batch), work / f"paths-{first}.pt")
        log.info("%d trajectories, %.0f s", first + PART - FIRST_SEED, box.spent)


def times() -> torch.Tensor:
    """The training times of the kept points."""
    scheduler = teacher_scheduler()
    scheduler.set_timesteps(STEPS)
    return scheduler.timesteps[list(KEPT)]


def end_of(velocity: torch.Tensor, noisy: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """The clean latent that a velocity points to (Salimans and Ho, 2022, appendix D)."""
    return alpha.sqrt() * noisy - (1 - alpha).sqrt() * velocity


def distance(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Pseudo-Huber (Song and Dhariwal, 2023): squared near 0, absolute far away, so that ambiguous cells do not
    rule; by picture.
    """
    c = 0.1
    return ((found - wanted).square().mean(1) + c * c).sqrt().mean((1, 2)) - c


def read_paths(work: Path, pattern: str) -> dict[str, torch.Tensor]:
    """The trajectories of all files of a name in `work`.

    Raises:
        FileNotFoundError: there is none.
    """
    parts = [torch.load(file, weights_only=True) for file in sorted(work.glob(pattern))]
    if not parts:
        raise FileNotFoundError(f"no trajectories in {work}: run this with --collect first")
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class Student(BoxTrainer):
    """The one-step network in training."""

    def __init__(self, work: Path, teacher: Path, device: str) -> None:
        self.work = work
        self.pipe = StableDiffusionPipeline.from_pretrained(teacher, torch_dtype=torch.float32).to(device)
        self.pipe.scheduler = student_scheduler()
        self.text = self.pipe.text_encoder.eval().requires_grad_(False)
        self.unet = self.pipe.unet.to(memory_format=torch.channels_last).train()
        watch_decoder(self.unet)
        super().__init__(work / "student.pt", {"unet": self.unet}, Pair([self.unet], PEAK), device)
        self.times, self.alphas = times().to(device), build_scheduler().alphas_cumprod.to(device)

    def load_data(self) -> None:
        """Reads the trajectories; one in 16 is kept apart."""
        data = read_paths(self.work, "paths-*.pt")
        apart = torch.arange(len(data["ends"])) % APART == 0
        self.unseen = {name: values[apart] for name, values in data.items()}
        self.data = {name: values[~apart] for name, values in data.items()}

    def save(self, spent: float) -> None:
        """Writes the checkpoint and tells how far the student lands where it never was."""
        super().save(spent)
        log.info("distance on %d trajectories never seen: %.4f", len(self.unseen["ends"]), self.held_out(self.unseen))

    def loss(self, size: int) -> torch.Tensor:
        """Distance between where the student lands and where the teacher's trajectory ended, on `size` points."""
        data = self.data
        rows = torch.randint(len(data["ends"]), (size,))
        point = torch.where(torch.rand(size) < SHARE_OF_NOISE, 0, torch.randint(1, len(KEPT), (size,)))
        noisy = data["points"][rows, point].float().to(self.device).contiguous(memory_format=torch.channels_last)
        wanted, tokens = data["ends"][rows].float().to(self.device), data["tokens"][rows].long().to(self.device)
        time_of = self.times[point.to(self.device)]
        return distance(self.landing(noisy, time_of, tokens), wanted).mean()

    def landing(self, noisy: torch.Tensor, time_of: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Where the student lands from noisy latents at their times."""
        with autocast(self.device):
            velocity = self.unet(noisy, time_of, encoder_hidden_states=self.text(tokens)[0]).sample
        return end_of(velocity.float(), noisy, self.alphas[time_of].view(-1, 1, 1, 1))

    @torch.no_grad()
    def held_out(self, data: dict[str, torch.Tensor]) -> float:
        """How far the averaged weights land from the ends of trajectories, from pure noise."""
        self.ema.swap()
        found: list[torch.Tensor] = []
        for rows in torch.arange(len(data["ends"])).split(64):
            noise = data["points"][rows, 0].float().to(self.device)
            landed = self.landing(noise, self.times[0], data["tokens"][rows].long().to(self.device))
            found.append(distance(landed, data["ends"][rows].float().to(self.device)))
        self.ema.swap()
        return torch.cat(found).mean().item()

    def advance(self, size: int, easy: float, rate: float) -> torch.Tensor:
        """One step; returns the distance."""
        loss = self.loss(size)
        self.descend(loss, rate)
        return loss.detach().cpu()[None]

    def show(self) -> None:
        """Saves the averaged weights."""
        self.ema.swap()
        self.unet.set_attn_processor(AttnProcessor2_0())
        distilled(self.pipe, self.work)
        self.unet.float()
        watch_decoder(self.unet)
        self.ema.swap()


@torch.no_grad()
def distilled(pipe: StableDiffusionPipeline, work: Path) -> None:
    """Saves a trained student's denoiser in float16 with the scheduler that one step needs, and a contact sheet."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    pictures = pipe(SHOWN, num_inference_steps=1, guidance_scale=0.0, generator=generator).images
    contact_sheet(pictures, 6).save(work / "one-step.png")
    pipe.scheduler.save_pretrained(work / "one-step" / "scheduler")
    pipe.unet.register_to_config(_name_or_path="picturebook/one-step")
    pipe.unet.half().save_pretrained(work / "one-step" / "unet", max_shard_size="15MB")


if __name__ == "__main__":
    parser = arguments(__doc__ or "", minutes=60)
    parser.add_argument("--collect", action="store_true", help="let the teacher draw, instead of training")
    parser.add_argument("--teacher", type=folder, default=Path("assets/picturebook"))
    parser.add_argument("--resume", action="store_true", help="go on in the time box that was cut")
    parser.add_argument("--batch", type=int, default=BATCH, help="points a step; 512 on a GPU")
    args = parser.parse_args()
    if args.collect:
        collect_files(args.work, args.teacher, args.device, args.minutes, max(1, min(args.batch, PART) // 4))
    else:
        student = Student(args.work, args.teacher, args.device)
        if args.resume:
            student.resume(fresh_box=False)
        student.load_data()
        student.run(args.minutes, args.batch)

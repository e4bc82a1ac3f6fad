"""Goes on with the one-step student by distribution matching, which needs no trajectories (Yin and others, 2024,
"Improved distribution matching distillation", without its discriminator).

    python -m diffgraft.app.bench.matching --minutes 60                                    # on one GPU or all cores
    torchrun --nproc_per_node 2 -m diffgraft.app.bench.matching --minutes 60               # one thread a core: faster

The student draws from noise; both the teacher, guided, and a critic look at the drawing under fresh noise. The critic
is a copy of the teacher that learns, all along, to denoise what the student draws. Where the two disagree the student's
drawings are more or less likely than the teacher's, and the student moves there: toward drawings that the teacher
would make, whichever of them is near, instead of toward the one that a trajectory ends at.
"""

from __future__ import annotations

import copy
import random
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from .denoiser import build_scheduler
from .student import GUIDANCE, distilled, end_of, student_scheduler
from .training import SAVE_EVERY, Ema, TimeBox, arguments, autocast, load_checkpoint, log, save_checkpoint
from .world import caption, scene

FIRST_SEED, BATCH = 5_000_000, 32
RATE, CRITIC_RATE, WARM = 1e-4, 2e-4, 150  # AdamW; steps that the critic learns alone
EARLIEST, LATEST = 20, 980  # training times that the two are asked at
COUNTS = {1: 0.36, 2: 0.5, 3: 0.14}  # things a caption; training's scenes seldom have three


def captions(first: int, count: int) -> list[str]:
    """Captions of training's kinds of scenes."""
    found = []
    for seed in range(first, first + count):
        rng = random.Random(f"matching {seed}")
        found.append(caption(scene(seed, count=rng.choices(list(COUNTS), list(COUNTS.values()))[0]), rng))
    return found


def moved(drawn: torch.Tensor, real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """What the student is asked to draw instead (equations 7 and 8 of Yin and others, 2023): as far from the drawing as
    the teacher's clean latents are from the critic's, in units of how far the teacher is from the drawing; all
    [B, 4, h, w].
    """
    unit = (drawn - real).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-6)
    return drawn + (real - fake) / unit


class Matching:
    """Student and critic in training."""

    def __init__(self, work: Path, teacher: Path, start: Path, device: str) -> None:
        self.work, self.device = work, device
        self.pipe = StableDiffusionPipeline.from_pretrained(teacher, torch_dtype=torch.float32).to(device)
        self.pipe.scheduler = student_scheduler()
        self.text = self.pipe.text_encoder.eval().requires_grad_(False)
        self.teacher = self.pipe.unet.to(memory_format=torch.channels_last).eval().requires_grad_(False)
        self.critic = copy.deepcopy(self.teacher).requires_grad_(True)
        self.student = copy.deepcopy(self.critic)
        begun = UNet2DConditionModel.from_pretrained(start / "unet", torch_dtype=torch.float32)
        self.student.load_state_dict(begun.state_dict())
        self.optimizers = {
            "student": torch.optim.AdamW(self.student.parameters(), RATE, betas=(0.5, 0.99), weight_decay=0.0),
            "critic": torch.optim.AdamW(self.critic.parameters(), CRITIC_RATE, betas=(0.5, 0.99), weight_decay=0.0),
        }
        self.ema = Ema(self.student.parameters(), decay=0.997)
        self.alphas = build_scheduler().alphas_cumprod.to(device)
        self.step, self.spent = 0, 0.0
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.resume()

    def resume(self) -> None:
        """Goes on from a checkpoint, if there is one."""
        state = load_checkpoint(self.work / "matching.pt")
        if state:
            self.student.load_state_dict(state["student"])
            self.critic.load_state_dict(state["critic"])
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(state["optimizers"][name])
            self.ema.average, self.ema.steps = [mean.to(self.device) for mean in state["ema"]], state["ema_steps"]
            self.step, self.spent = state["step"], state["spent"]

    def save(self, spent: float) -> None:
        """Writes the checkpoint."""
        state = {"student": self.student.state_dict(), "critic": self.critic.state_dict()}
        state["optimizers"] = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        state |= {"ema": self.ema.average, "ema_steps": self.ema.steps, "step": self.step, "spent": spent}
        save_checkpoint(self.work / "matching.pt", state)

    def words(self, size: int) -> torch.Tensor:
        """Text features of this step's captions and, behind them, of none: [2 * size, 20, 128]."""
        first = FIRST_SEED + (self.step * self.world + self.rank) * size
        texts = captions(first, size) + [""] * size
        tokens = self.pipe.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
        return self.text(tokens.to(self.device))[0]

    def drawn(self, words: torch.Tensor) -> torch.Tensor:
        """What the student draws from fresh noise, [B, 4, 16, 16]."""
        noise = torch.randn(len(words), 4, 16, 16).to(self.device)
        times = torch.full((len(words),), 999, device=self.device)
        return self.clean(self.student, noise, times, words)

    def clean(
        self, network: UNet2DConditionModel, noisy: torch.Tensor, times: torch.Tensor, words: torch.Tensor
    ) -> torch.Tensor:
        """The clean latents that a network sees in noisy ones."""
        return end_of(self.velocity(network, noisy, times, words), noisy, self.alphas[times].view(-1, 1, 1, 1))

    def velocity(
        self, network: UNet2DConditionModel, noisy: torch.Tensor, times: torch.Tensor, words: torch.Tensor
    ) -> torch.Tensor:
        """A network's output in float32."""
        with autocast(self.device):
            given = noisy.contiguous(memory_format=torch.channels_last)
            return network(given, times, encoder_hidden_states=words).sample.float()

    def noised(self, clean: torch.Tensor, earliest: int = 0, latest: int = 1000) -> tuple[torch.Tensor, ...]:
        """Latents under fresh noise of times drawn evenly, those times, and the noise."""
        times = torch.randint(earliest, latest, (len(clean),)).to(self.device)
        noise, alpha = torch.randn(clean.shape).to(self.device), self.alphas[times].view(-1, 1, 1, 1)
        return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, times, noise

    def student_loss(self, drawn: torch.Tensor, words: torch.Tensor, blank: torch.Tensor) -> torch.Tensor:
        """Half the squared distance to `moved`; its gradient is the disagreement itself."""
        with torch.no_grad():
            noisy, times, _ = self.noised(drawn, EARLIEST, LATEST)
            both = self.clean(self.teacher, noisy.repeat(2, 1, 1, 1), times.repeat(2), torch.cat([blank, words]))
            plain, guided = both.chunk(2)
            real = plain + GUIDANCE * (guided - plain)
            target = moved(drawn, real, self.clean(self.critic, noisy, times, words))
        return 0.5 * (drawn - target).square().mean()

    def critic_loss(self, drawn: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """The critic's error on what the student drew, as the teacher was trained."""
        noisy, times, noise = self.noised(drawn)
        alpha = self.alphas[times].view(-1, 1, 1, 1)
        wanted = alpha.sqrt() * noise - (1 - alpha).sqrt() * drawn
        return F.mse_loss(self.velocity(self.critic, noisy, times, words), wanted)

    def descend(self, name: str, loss: torch.Tensor, rate: float) -> None:
        """One step of a network, its gradients averaged over the processes."""
        optimizer = self.optimizers[name]
        loss.backward()
        parameters = optimizer.param_groups[0]["params"]
        if self.world > 1:
            flat = torch.cat([p.grad.flatten() for p in parameters])
            dist.all_reduce(flat)
            for p, mean in zip(parameters, (flat / self.world).split([p.numel() for p in parameters]), strict=True):
                p.grad.copy_(mean.view_as(p))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()

    def advance(self, size: int, rate: float) -> tuple[float, float]:
        """One step of both; the two losses."""
        words, blank = self.words(size).chunk(2)
        alone = self.step < WARM
        with torch.set_grad_enabled(not alone):
            drawn = self.drawn(words)
        loss = torch.zeros(())
        if not alone:
            loss = self.student_loss(drawn, words, blank)
            self.descend("student", loss, RATE * rate)
            self.ema.update()
        critic = self.critic_loss(drawn.detach(), words)
        self.descend("critic", critic, CRITIC_RATE * rate)
        self.step += 1
        return loss.item(), critic.item()

    def run(self, minutes: float, batch: int = BATCH) -> None:
        """Trains to the end of the time box."""
        box, saved, mean = TimeBox(minutes, self.spent), time.monotonic(), None
        torch.manual_seed(self.step * 64 + self.rank)
        over = torch.tensor(0.0)
        while over < 1:
            found = torch.tensor(self.advance(batch // self.world, box.rate(self.step, hold=0.6)))
            mean = found if mean is None else mean.lerp(found, 0.05)
            over = torch.tensor(box.fraction)
            if self.world > 1:
                dist.broadcast(over, 0)
            if self.rank == 0 and self.step % 20 == 0:
                log.info("step %d, %.0f s, student %.4f, critic %.4f", self.step, box.spent, *mean.tolist())
            if self.rank == 0 and (time.monotonic() - saved > SAVE_EVERY or over >= 1):
                saved = time.monotonic()
                self.save(box.spent)
        if self.rank == 0:
            self.ema.swap()
            self.pipe.unet = self.student
            distilled(self.pipe, self.work)


if __name__ == "__main__":
    parser = arguments(__doc__ or "", minutes=60)
    parser.add_argument("--teacher", type=Path, default=Path("assets/picturebook"))
    parser.add_argument("--from", dest="start", type=Path, default=Path("assets/picturebook/one-step"))
    parser.add_argument("--batch", type=int, default=BATCH, help="drawings a step, of all processes; 512 on a GPU")
    args = parser.parse_args()
    if dist.is_torchelastic_launched():
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
    Matching(args.work, args.teacher, args.start, args.device).run(args.minutes, args.batch)

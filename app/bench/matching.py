"""Goes on with a student of few steps by distribution matching, which needs no trajectories (Yin and others, 2024,
"Improved distribution matching distillation", without its discriminator).

    python -m diffgraft.app.bench.matching --minutes 60                        # the UNet's, on one GPU or all cores
    torchrun --nproc_per_node 2 -m diffgraft.app.bench.matching --minutes 60   # one thread a core: faster
    python -m diffgraft.app.bench.matching_flow --minutes 60                   # the transformer's

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
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from .denoiser import build_scheduler
from .student import GUIDANCE, distilled, end_of, student_scheduler
from .training import SAVE_EVERY, Ema, TimeBox, arguments, autocast, folder, load_checkpoint, log, save_checkpoint
from .world import caption, scene

FIRST_SEED, BATCH = 5_000_000, 32
RATE, CRITIC_RATE, WARM = 1e-4, 2e-4, 80  # AdamW; steps that the critic learns alone
EARLIEST, LATEST = 0.02, 0.98  # shares of the noise's times at which the two are asked
COUNTS = {1: 0.36, 2: 0.5, 3: 0.14}  # things a caption; training's scenes seldom have three
Words = list[torch.Tensor]
"""Text features, one tensor a caption."""


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
    """Teacher, critic and student in training. How a model adds noise, sees through it, and draws is its child's.

    Args:
        checkpoint: where the run is kept.
        pipe: of the teacher; it gets the student's denoiser at the end.
        teacher: its denoiser.
        start: the student's weights to go on from.
    """

    def __init__(
        self, checkpoint: Path, pipe: Any, teacher: torch.nn.Module, start: dict[str, torch.Tensor], device: str
    ) -> None:
        self.checkpoint, self.pipe, self.device = checkpoint, pipe, device
        self.text = pipe.text_encoder.eval().requires_grad_(False)
        self.networks = {"teacher": teacher.eval().requires_grad_(False)}
        self.networks |= {name: copy.deepcopy(teacher).requires_grad_(True) for name in ("critic", "student")}
        self.networks["student"].load_state_dict(start)
        self.optimizers = {
            name: torch.optim.AdamW(self.networks[name].parameters(), rate, betas=(0.5, 0.99), weight_decay=0.0)
            for name, rate in (("student", RATE), ("critic", CRITIC_RATE))
        }
        self.ema = Ema(self.networks["student"].parameters(), decay=0.997)
        self.step, self.spent = 0, 0.0
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.blank = self.encode([""])
        self.resume()

    def tokens(self, texts: list[str]) -> torch.Tensor:
        """Token ids, [n, 20]."""
        return self.pipe.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids.to(self.device)

    def encode(self, texts: list[str]) -> Words:
        """Text features."""
        raise NotImplementedError

    def shares(self, times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of picture and noise in noisy latents of times 0 ... 1, where 1 is the noisiest: [B, 1, 1, 1] each."""
        raise NotImplementedError

    def velocity(self, name: str, noisy: torch.Tensor, times: torch.Tensor, words: Words) -> torch.Tensor:
        """A network's output in float32."""
        raise NotImplementedError

    def clean(self, name: str, noisy: torch.Tensor, times: torch.Tensor, words: Words) -> torch.Tensor:
        """The clean latents that a network sees in noisy ones."""
        raise NotImplementedError

    def wanted(self, clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """The velocity that is right."""
        raise NotImplementedError

    def drawn(self, words: Words) -> torch.Tensor:
        """What the student draws from fresh noise, [B, 4, h, w]."""
        raise NotImplementedError

    def show(self) -> None:
        """Saves the averaged weights, which stand in the pipeline then, and a contact sheet."""
        raise NotImplementedError

    def resume(self) -> None:
        """Goes on from a checkpoint, if there is one."""
        state = load_checkpoint(self.checkpoint)
        if state:
            for name, optimizer in self.optimizers.items():
                self.networks[name].load_state_dict(state[name])
                optimizer.load_state_dict(state["optimizers"][name])
            self.ema.average, self.ema.steps = [mean.to(self.device) for mean in state["ema"]], state["ema_steps"]
            self.step, self.spent = state["step"], state["spent"]

    def save(self, spent: float) -> None:
        """Writes the checkpoint."""
        state: dict[str, Any] = {name: self.networks[name].state_dict() for name in self.optimizers}
        state["optimizers"] = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        state |= {"ema": self.ema.average, "ema_steps": self.ema.steps, "step": self.step, "spent": spent}
        save_checkpoint(self.checkpoint, state)

    def noised(self, clean: torch.Tensor, times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents under fresh noise, and the noise."""
        noise, (ours, theirs) = torch.randn(clean.shape).to(self.device), self.shares(times)
        return ours * clean + theirs * noise, noise

    def student_loss(self, drawn: torch.Tensor, words: Words, blank: Words) -> torch.Tensor:
        """Half the squared distance to `moved`; its gradient is the disagreement itself."""
        with torch.no_grad():
            times = EARLIEST + (LATEST - EARLIEST) * torch.rand(len(drawn)).to(self.device)
            noisy, _ = self.noised(drawn, times)
            both = self.clean("teacher", noisy.repeat(2, 1, 1, 1), times.repeat(2), blank + words)
            plain, guided = both.chunk(2)
            real = plain + GUIDANCE * (guided - plain)
            target = moved(drawn, real, self.clean("critic", noisy, times, words))
        return 0.5 * (drawn - target).square().mean()

    def critic_loss(self, drawn: torch.Tensor, words: Words) -> torch.Tensor:
        """The critic's error on what the student drew, as the teacher was trained."""
        times = torch.rand(len(drawn)).to(self.device)
        noisy, noise = self.noised(drawn, times)
        return F.mse_loss(self.velocity("critic", noisy, times, words), self.wanted(drawn, noise, times))

    def descend(self, name: str, loss: torch.Tensor, rate: float) -> None:
        """One step of a network, its gradients averaged over the processes."""
        optimizer = self.optimizers[name]
        loss.backward()
        parameters = [p for p in optimizer.param_groups[0]["params"] if p.grad is not None]
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
        """One step of both on `size` captions; the two losses."""
        first = FIRST_SEED + (self.step * self.world + self.rank) * size
        words, blank = self.encode(captions(first, size)), self.blank * size
        alone, loss = self.step < WARM, torch.zeros(())
        with torch.set_grad_enabled(not alone):
            drawn = self.drawn(words)
        if not alone:
            loss = self.student_loss(drawn, words, blank)
            self.descend("student", loss, RATE * rate)
            self.ema.update()
        critic = self.critic_loss(drawn.detach(), words)
        self.descend("critic", critic, CRITIC_RATE * rate)
        self.step += 1
        return loss.item(), critic.item()

    def run(self, minutes: float, batch: int) -> None:
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
            self.show()


class OneStep(Matching):
    """The UNet's student."""

    def __init__(self, work: Path, teacher: Path, start: Path, device: str) -> None:
        pipe = StableDiffusionPipeline.from_pretrained(teacher, torch_dtype=torch.float32).to(device)
        pipe.scheduler = student_scheduler()
        self.work, self.alphas = work, build_scheduler().alphas_cumprod.to(device)
        begun = UNet2DConditionModel.from_pretrained(start / "unet", torch_dtype=torch.float32).state_dict()
        super().__init__(work / "matching.pt", pipe, pipe.unet.to(memory_format=torch.channels_last), begun, device)

    def encode(self, texts: list[str]) -> Words:
        return list(self.text(self.tokens(texts))[0])

    def alpha(self, times: torch.Tensor) -> torch.Tensor:
        """Squared share of the picture, [B, 1, 1, 1]."""
        return self.alphas[self.counted(times)].view(-1, 1, 1, 1)

    def counted(self, times: torch.Tensor) -> torch.Tensor:
        """Training times 0 ... 999."""
        return (times * len(self.alphas)).long().clamp(max=len(self.alphas) - 1)

    def shares(self, times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alpha = self.alpha(times)
        return alpha.sqrt(), (1 - alpha).sqrt()

    def velocity(self, name: str, noisy: torch.Tensor, times: torch.Tensor, words: Words) -> torch.Tensor:
        with autocast(self.device):
            given = noisy.contiguous(memory_format=torch.channels_last)
            found = self.networks[name](given, self.counted(times), encoder_hidden_states=torch.stack(words))
        return found.sample.float()

    def clean(self, name: str, noisy: torch.Tensor, times: torch.Tensor, words: Words) -> torch.Tensor:
        return end_of(self.velocity(name, noisy, times, words), noisy, self.alpha(times))

    def wanted(self, clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        ours, theirs = self.shares(times)
        return ours * noise - theirs * clean

    def drawn(self, words: Words) -> torch.Tensor:
        noise = torch.randn(len(words), 4, 16, 16).to(self.device)
        return self.clean("student", noise, torch.ones(len(words), device=self.device), words)

    def show(self) -> None:
        self.pipe.unet = self.networks["student"]
        distilled(self.pipe, self.work)


def processes() -> None:
    """Takes part in what `torchrun` started: processes of one thread each, on a CPU."""
    if dist.is_torchelastic_launched():
        torch.set_num_threads(1)
        dist.init_process_group("gloo")


if __name__ == "__main__":
    parser = arguments(__doc__ or "", minutes=60)
    parser.add_argument("--teacher", type=folder, default=Path("assets/picturebook"))
    parser.add_argument("--from", dest="start", type=folder, default=Path("assets/picturebook/one-step"))
    parser.add_argument("--batch", type=int, default=BATCH, help="drawings a step, of all processes; 512 on a GPU")
    args = parser.parse_args()
    processes()
    OneStep(args.work, args.teacher, args.start, args.device).run(args.minutes, args.batch)

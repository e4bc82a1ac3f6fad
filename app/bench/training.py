"""What the trainers share: a time box, a learning rate inside it, averaged weights, checkpoints that survive a cut,
pictures as tensors.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

log = logging.getLogger("diffgraft.bench")
SAVE_EVERY = 240.0  # seconds: a machine may be taken at any time


class TimeBox:
    """`minutes` of wall-clock time, `spent` seconds of it already gone in earlier runs of the same box."""

    def __init__(self, minutes: float, spent: float = 0.0) -> None:
        self.total = minutes * 60
        self._start = time.monotonic() - spent

    @property
    def spent(self) -> float:
        """Seconds gone."""
        return time.monotonic() - self._start

    @property
    def fraction(self) -> float:
        """Share of the box that is gone, 1 or more when it is over."""
        return self.spent / self.total if self.total > 0 else 1.0

    def rate(self, step: int, hold: float = 0.4, warm: int = 100) -> float:
        """Share of the peak learning rate: warm-up over `warm` steps, constant until `hold`, then down to 1% in a
        line.
        """
        decay = 1.0 if self.fraction < hold else max(0.01, (1 - self.fraction) / (1 - hold))
        return min(1.0, (step + 1) / warm) * decay


class Ema:
    """Exponential moving average of parameters, in float32, with a short memory at first."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], decay: float = 0.9985) -> None:
        self.parameters = list(parameters)
        self.average = [p.detach().float().clone() for p in self.parameters]
        self.decay, self.steps = decay, 0

    def update(self) -> None:
        """Takes the present weights in."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_mul_(self.average, decay)
        torch._foreach_add_(self.average, [p.detach() for p in self.parameters], alpha=1 - decay)

    def swap(self) -> None:
        """Exchanges the weights with their average; a second call takes it back."""
        with torch.no_grad():
            for p, mean in zip(self.parameters, self.average, strict=True):
                kept = p.detach().clone()
                p.copy_(mean)
                mean.copy_(kept)


class HalfCopy:
    """A copy of a float32 module for forward and backward passes, in bfloat16 where that is fast (`narrow`; three times
    as fast on CPUs that have bfloat16 products); the float32 weights take its gradients and hand their steps back.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.dtype = narrow(next(module.parameters()).device)
        self.module = copy.deepcopy(module).to(self.dtype)
        ours = dict(self.module.named_parameters())
        self.pairs = [(p, ours[name]) for name, p in module.named_parameters()]

    @torch.no_grad()
    def hand_over(self) -> None:
        """Moves the copy's gradients to the float32 weights."""
        for whole, half in self.pairs:
            whole.grad = None if half.grad is None else half.grad.float()
            half.grad = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Rounds the float32 weights into the copy."""
        for whole, half in self.pairs:
            half.copy_(whole)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` and the random stream; a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**state, "random": torch.get_rng_state()}, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def load_checkpoint(path: Path, device: str = "cpu") -> dict[str, Any] | None:
    """The state that `save_checkpoint` wrote, its random stream restored; None where there is none."""
    if not path.exists():
        return None
    state = torch.load(path, map_location="cpu", weights_only=True)
    torch.set_rng_state(state["random"])
    log.info("resumed from %s", path)
    return state


def narrow(device: str | torch.device) -> torch.dtype:
    """What products are computed in: bfloat16 on a GPU and on CPUs that have units for it; on others it is ten times
    slower than float32, which is what they get.
    """
    there = torch.device(device).type != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.bfloat16 if there else torch.float32


def autocast(device: str | torch.device) -> torch.autocast:
    """Autocast to `narrow`; nothing where that is float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=narrow(device) is torch.bfloat16)


def share_cores() -> None:
    """One torch thread while others want the cores, else two: two busy pairs on two cores are three times slower
    than one thread each. `OMP_NUM_THREADS` says otherwise.
    """
    if os.cpu_count() == 2 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1 if os.getloadavg()[0] > 3.5 else 2)


def arguments(description: str, minutes: float) -> argparse.ArgumentParser:
    """A parser with what every trainer takes; also sets the log up."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--minutes", type=float, default=minutes, help="length of the time box")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=Path, default=Path(".train"), help="folder of checkpoints and contact sheets")
    return parser


def folder(name: str) -> Path:
    """An argument that must be a folder.

    Raises:
        argparse.ArgumentTypeError: there is none.
    """
    if not Path(name).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {name}")
    return Path(name)


def to_tensor(images: Sequence[Image.Image] | NDArray[np.uint8]) -> torch.Tensor:
    """Pictures as float32 [B, 3, H, W] in -1 ... 1."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(tensor: torch.Tensor) -> list[Image.Image]:
    """The inverse of `to_tensor`, values outside -1 ... 1 clipped."""
    pixels = ((tensor.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]


def contact_sheet(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures of one size side by side, row after row."""
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet

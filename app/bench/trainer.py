"""The time box of a denoiser's trainer: resuming, saving, logging; what one step does is the child's business."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .muon import Pair
from .scenes import Scenes
from .training import SAVE_EVERY, Ema, HalfCopy, TimeBox, load_checkpoint, log, save_checkpoint, share_cores

SHEET_EVERY = 900.0


class BoxTrainer:
    """Networks (float32), averaged weights, optimizer and encoded scenes of one run."""

    def __init__(self, checkpoint: Path, networks: Mapping[str, torch.nn.Module], optimizer: Pair, device: str) -> None:
        self.checkpoint, self.networks, self.optimizer, self.device = checkpoint, networks, optimizer, device
        self.ema = Ema(optimizer.parameters)
        self.half: HalfCopy | None = None  # a child that computes on one sets it
        self.step, self.first, self.spent, self.singles = 0, 0, 0.0, 0.0  # first: the step that the time box began at

    def resume(self, fresh_box: bool) -> None:
        """Takes the checkpoint up where there is one; a fresh box starts from its averaged weights with a fresh
        optimizer.
        """
        state = load_checkpoint(self.checkpoint)
        if state is None:
            return
        for name, network in self.networks.items():
            network.load_state_dict(state[name])
        self.step = state["step"]
        self.ema.average = [mean.to(self.device) for mean in state["ema"]]
        if fresh_box:
            self.ema.swap()
            self.ema, self.first = Ema(self.optimizer.parameters), self.step
        else:
            self.optimizer.load_state_dict(state["optimizer"])
            self.ema.steps, self.spent, self.first = state["ema_steps"], state["spent"], state["first"]
        if self.half:
            self.half.refresh()

    def save(self, spent: float) -> None:
        """Writes the checkpoint: everything that the next step depends on."""
        state: dict[str, Any] = {name: network.state_dict() for name, network in self.networks.items()}
        state |= {
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.average,
            "ema_steps": self.ema.steps,
            "step": self.step,
            "first": self.first,
            "spent": spent,
        }
        save_checkpoint(self.checkpoint, state)

    def load_data(self) -> None:
        """Reads the encoded scenes that lie beside the checkpoint."""
        self.scenes = Scenes(self.checkpoint.parent)

    def advance(self, size: int, easy: float, rate: float) -> torch.Tensor:
        """One step on `size` scenes, a share `easy` of them single plain things, at a share `rate` of the peak learning
        rate; returns its losses.
        """
        raise NotImplementedError

    def descend(self, loss: torch.Tensor, rate: float) -> None:
        """Moves the weights, their average and the half copy along the gradient of a loss."""
        loss.backward()
        if self.half:
            self.half.hand_over()
        self.optimizer.step(rate)
        if self.half:
            self.half.refresh()
        self.ema.update()
        self.step += 1

    def show(self) -> None:
        """Saves the averaged weights as a pipeline, and a contact sheet drawn with them."""
        raise NotImplementedError

    def run(self, minutes: float, batch: int) -> None:
        """Trains to the end of the time box."""
        box, resumed, means = TimeBox(minutes, self.spent), self.step, None
        began = saved = shown = time.monotonic()
        while box.fraction < 1:
            share_cores()
            easy = 0.45 - 0.25 * min(1.0, box.fraction / 0.6)
            losses = self.advance(batch, easy, box.rate(self.step - self.first))
            means = losses if means is None else means.lerp(losses, 0.03)
            if self.step % 20 == 0:
                speed = (self.step - resumed) * batch / (time.monotonic() - began)
                told = " and ".join(f"{mean:.4f}" for mean in means.tolist())
                log.info("step %d, %.0f s, losses %s, %.1f samples/s", self.step, box.spent, told, speed)
            if time.monotonic() - saved > SAVE_EVERY or box.fraction >= 1:
                saved = time.monotonic()
                self.save(box.spent)
            if time.monotonic() - shown > SHEET_EVERY or box.fraction >= 1:
                shown = time.monotonic()
                self.show()

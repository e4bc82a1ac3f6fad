"""What inversions cost: counted denoiser passes, shared inversions, and FLOPs on published shapes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from ... import invert, picturebook, stylize
from ...pipelines.tasks import stylize as task
from . import world
from .configs import SD15, SDXL, meta_inputs, meta_unet

STEPS = 10


class Counter:
    """Rows that a denoiser computes, and rows of one call that are equal in latent and text: work done twice."""

    def __init__(self) -> None:
        self.rows = self.calls = self.twice = 0

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample, text = args[0], kwargs["encoder_hidden_states"]
        keys = torch.cat([sample.flatten(1), text.flatten(1)], 1)
        self.rows += len(keys)
        self.calls += 1
        self.twice += len(keys) - len(torch.unique(keys, dim=0))


@contextmanager
def counting(denoiser: Any) -> Generator[Counter]:
    """Counts inside."""
    counter = Counter()
    hook = denoiser.register_forward_pre_hook(counter, with_kwargs=True)
    try:
        yield counter
    finally:
        hook.remove()


def passes(pipe: Any, write: Callable[[str], Any]) -> None:
    """Rows of one inversion against the formula."""
    write(f"| inversion, N = {STEPS} | k | formula | counted | calls | rows of one call that are equal |\n")
    write("|---|---|---|---|---|---|\n")
    content = world.render(world.scene(world.FRESH + 1, style="plain"))
    style = world.render(world.scene(world.FRESH + 2, style="mosaic"))
    kinds = (("no negative", None, 1), ("omega = 1", "a star", 1), ("text", "a star", 2), ("attention", style, 3))
    for name, negative, rows in kinds:
        for k in (0, 1, 3):
            guidance = 1.0 if name == "omega = 1" else 1.5
            with counting(pipe.unet) as counter:
                invert(pipe, content, negative=negative, guidance=guidance, steps=STEPS, iterations=k, tolerance=0)
            formula = f"{rows if rows > 1 else ''}N(k+1) = {rows * STEPS * (k + 1)}"
            equal = "(differ in attention)" if name == "attention" else counter.twice
            write(f"| {name} | {k} | {formula} | {counter.rows} | {counter.calls} | {equal} |\n")


def sharing(pipe: Any, contents: int, styles: int, write: Callable[[str], Any]) -> None:
    """Inversions that `stylize` makes for many contents in many styles."""
    pictures = [world.render(world.scene(world.FRESH + i, style="plain")) for i in range(contents)]
    others = [world.render(world.scene(world.FRESH + 100 + i, style="dots")) for i in range(styles)]
    write("\n| pairs | negative | inversions | official program |\n|---|---|---|---|\n")
    for negative in (None, "style"):
        few = (contents, styles) if negative is None else (2, 3)
        with mock.patch.object(task, "invert", wraps=invert) as made:
            stylize(pipe, pictures[: few[0]], others[: few[1]], seed=0, steps=1, iterations=0, negative=negative)
        write(f"| {few[0]} x {few[1]} | {negative} | {made.call_count} | {few[0] * few[1]} |\n")


def flops(write: Callable[[str], Any]) -> None:
    """TFLOP of a pair by recipe on published denoisers; ControlNets, encoders and decoders apart."""
    write("\n| model | TFLOP a row | official 300 + 98 rows | StyleSSP, k = 1: 200 + 100 | ours, shared: 100 + 150 |\n")
    write("|---|---|---|---|---|\n")
    for name, config, side in (("SD1.5, 512", SD15, 64), ("SDXL, 1024", SDXL, 128)):
        unet = meta_unet(config)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            unet(**meta_inputs(unet, 1, (side, side)))
        one = counter.get_total_flops() / 1e12
        write(f"| {name} | {one:.2f} | {398 * one:.0f} | {300 * one:.0f} | {250 * one:.0f} |\n")


def run(full: bool) -> None:
    """Print the three tables."""
    pipe: Any = picturebook()
    pipe.set_progress_bar_config(disable=True)
    write = sys.stdout.write
    passes(pipe, write)
    sharing(pipe, *((20, 40) if full else (3, 5)), write)
    flops(write)

"""What a blocked concept costs: FLOPs on published shapes. No pass and no text is added."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ... import ConceptBlock, graft
from ...attention.step import Step
from ...plugins.base import Session
from ...plugins.concept_edits import Blocking
from ...plugins.concept_find import Finding, Removal
from ...plugins.concept_words import Rewording
from .configs import SD15, SDXL, meta_inputs, meta_pipe

MODELS = {"SD1.5 512": (SD15, 64), "SDXL 1024": (SDXL, 128)}
STEPS = 25


class Found(ConceptBlock):
    """The plugin in a text that holds each concept at all columns: weights of numbers, which shapes do not have, decide
    nothing here.
    """

    def begin(self, session: Session, step: Step) -> None:
        text, words = session.text, session.words
        weight = text.new_ones(text.shape[1])
        pooled = {name: value[:1].expand(2, -1) for name, value in words.pooled.items()}
        state = Blocking(session, self.groups, [], Finding(self.rule, None, self.strength, self.reach))
        state.found = [[Removal(text[:1].expand(2, -1, -1), weight, [1], 1.0, pooled) for _ in self.groups]]
        state.seen, state.version = words, 1
        step.notes[self] = Rewording(state, self.groups)


def step_flops(pipe: Any, latent: int, *plugins: Any) -> list[int]:
    """FLOPs of the first and of the second step of one picture without guidance, the dearest case."""
    pipe.scheduler.set_timesteps(STEPS)
    inputs, found = meta_inputs(pipe.unet, 1, (latent, latent)), list[int]()
    with graft(pipe, *plugins), torch.no_grad():
        for timestep in pipe.scheduler.timesteps[:2]:
            with FlopCounterMode(display=False) as counter:
                pipe.unet(**inputs | {"timestep": timestep})
            found.append(counter.get_total_flops())
            pipe.scheduler.step(inputs["sample"][:1], timestep, inputs["sample"][:1])
    return found


def cost(pipe: Any, latent: int, concepts: int) -> tuple[float, float]:
    """Per cent more FLOPs: of the first step, where values are projected once, and of a call of `STEPS` steps, in which
    an edited layer projects the text once and not at every step.
    """
    plain, _ = step_flops(pipe, latent)
    first, later = step_flops(pipe, latent, Found([f"concept {i}" for i in range(concepts)]))
    return 100 * (first / plain - 1), 100 * ((first + (STEPS - 1) * later) / (STEPS * plain) - 1)


def run(full: bool) -> None:
    """Print the table."""
    sys.stdout.write(f"| model, without guidance | concepts | first step | {STEPS} steps |\n|---|---|---|---|\n")
    for name, (config, latent) in MODELS.items():
        pipe = meta_pipe(config)
        for concepts in (1, 5):
            first, whole = cost(pipe, latent, concepts)
            sys.stdout.write(f"| {name} | {concepts} | {first:+.3f}% | {whole:+.4f}% |\n")
            sys.stdout.flush()

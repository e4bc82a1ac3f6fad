"""The branch stage: extra rows of plugins join the batch, at its input or at the first block that differs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...attention.errors import SettingError, UnsupportedPipelineError
from ...plugins.base import Branch, Plugin, Session
from ..families.base import Inputs
from .plan import Placed
from .run import Run
from .scheduler_link import model_scale
from .widen import Widen


def add_rows(run: Run, placed: Placed, active: Sequence[Plugin], session: Session, inputs: Inputs) -> Inputs:
    """The denoiser's inputs with the branches' rows, or as they are if the rows join later."""
    branches = [branch for plugin in active for branch in plugin.branches(run.step)]
    if not branches:
        return inputs
    branches.sort(key=lambda branch: branch.shared)  # who counts rows by picture finds them first
    if "perturbed" in run.step.rows:
        raise UnsupportedPipelineError("PAG splits the batch in three itself: use the pipeline without PAG")
    one_for_all = any(branch.shared for branch in branches) and _alike(run, placed, session, inputs)
    index = torch.tensor(_name_rows(run, branches, one_for_all), device=run.adapter.device(inputs))
    block = placed.join_block(branches)
    if block and run.adapter.can_join_late(inputs, block):
        run.late = Widen(index, run.adapter.batch(inputs)), placed.blocks.index(block)
        return inputs
    return _own_inputs(run, run.adapter.take(inputs, index), branches)


def _name_rows(run: Run, branches: Sequence[Branch], one_for_all: bool) -> list[int]:
    """Enter the branches in the step's rows; of each row of the wider batch the row that it copies."""
    rows, likes = run.step.rows, run.step.likes
    index = list(range(max(r.stop for r in rows.values())))
    for branch in branches:
        if branch.name in rows:
            raise SettingError(
                f"two plugins bring rows named {branch.name!r}, as those of one technique do: graft one, or "
                "give them windows, start= and end=, that do not overlap"
            )
        source = range(rows[branch.like].start, rows[branch.like].stop)
        count = branch.rows(len(source), one_for_all)
        rows[branch.name] = slice(len(index), len(index) + count)
        likes[branch.name] = branch.like
        index += source[:count]
    return index


def _alike(run: Run, placed: Placed, session: Session, inputs: Inputs) -> bool:
    """Whether pictures differ by their latents and their text only."""
    adapter = run.adapter
    if not adapter.only_latents(inputs, run.step.size):  # what is to be inpainted
        return False
    others = set(adapter.batched) - {adapter.sample, adapter.text, adapter.timestep}
    told = any(inputs.get(name) is not None for name in others)
    return session.prompt.prompts == 1 or not (told or placed.touches("cond"))


def _own_inputs(run: Run, inputs: Inputs, branches: Sequence[Branch]) -> Inputs:
    """Give the branches that ask for it their own latent and text."""
    key, text = run.adapter.sample, run.adapter.text
    for branch in branches:
        rows = run.step.rows[branch.name]
        if branch.latent is not None:
            sample = inputs[key] if isinstance(inputs[key], torch.Tensor) else inputs[key][0]
            scale = model_scale(run.running.pipe.scheduler, run.step.timestep, sample)
            own = branch.latent(run.step).to(sample.device) * scale
            inputs = run.adapter.without_control(run.adapter.with_rows(inputs, rows, own), rows)
        if branch.text is not None:
            words = inputs[text].clone()
            words[rows] = branch.text.to(words)
            inputs = {**inputs, text: words}
        if branch.words is not None:
            inputs = run.adapter.with_words(inputs, rows, branch.words)
    return inputs

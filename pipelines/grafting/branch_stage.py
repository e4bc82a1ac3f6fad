"""The branch stage: extra rows and texts of plugins join the batch, at its input or at the first block that differs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ...attention.errors import SettingError, UnsupportedPipelineError
from ...plugins.base import Branch, Text
from ..families.base import Inputs
from .scheduler_link import model_scale

if TYPE_CHECKING:
    from .run import Run


class BranchStage:
    """Widens one denoiser call.

    Attributes:
        streams: lengths of the texts of a joint-attention model, the prompt's first; empty without others.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.forget()

    def forget(self) -> None:
        """The call is over."""
        self.streams: list[int] = []
        self._index: torch.Tensor | None = None
        self._block, self._joined, self._rows = "", False, 0

    def arriving(self, block: str) -> tuple[torch.Tensor, int] | None:
        """The rows to take, and how many came in, for a block at or behind the one where branches join."""
        if block == self._block:
            self._joined = True
        if self._index is None or not self._joined or self.run.step.probing:
            return None
        return self._index, self._rows

    def stage(self, inputs: Inputs) -> Inputs:
        """The denoiser's inputs with the branches' rows, or as they are if the rows join later."""
        run = self.run
        branches = [b for plugin in run.graft.active(run.step) for b in plugin.branches(run.step)]
        if not branches:
            return inputs
        branches.sort(key=lambda branch: branch.shared)  # who counts rows by picture finds them first
        if "perturbed" in run.step.rows:
            raise UnsupportedPipelineError("PAG splits the batch in three itself: use the pipeline without PAG")
        index = torch.tensor(self._name_rows(branches, inputs), device=inputs[run.adapter.sample].device)
        block = run.graft.join_block(branches)
        if block and run.adapter.can_join_late(inputs, block):
            self._index, self._block, self._rows = index, block, len(inputs[run.adapter.sample])
            return inputs
        return self._own_inputs(run.adapter.take(inputs, index), branches)

    def text_stage(self, inputs: Inputs) -> Inputs:
        """Append the streams of text that a plugin carries beside the prompt's."""
        step, adapter = self.run.step, self.run.adapter
        wanted = [texts for plugin in self.run.graft.active(step) if (texts := plugin.streams(step))]
        if not wanted:
            return inputs
        if len(wanted) > 1:
            raise SettingError(
                "two plugins steer away from negatives at once on a joint-attention model: give all negatives to one "
                "NegativeAway({'first': 1.0, 'second': 1.0})"
            )
        pictures = step.rows["cond"].stop - step.rows["cond"].start
        rows = [_by_picture(text, len(inputs[adapter.sample]), pictures) for text in wanted[0]]
        self.streams = [adapter.text_length(inputs), *(text.embeddings.shape[1] for text in rows)]
        return adapter.extend_text(inputs, rows)

    def _name_rows(self, branches: Sequence[Branch], inputs: Inputs) -> list[int]:
        """Enter the branches in the step's rows; of each row of the wider batch the row that it copies."""
        rows, likes = self.run.step.rows, self.run.step.likes
        index = list(range(max(r.stop for r in rows.values())))
        for branch in branches:
            if branch.name in rows:
                raise SettingError(
                    f"two plugins bring rows named {branch.name!r}, as those of one technique do: graft one, or "
                    "give them windows, start= and end=, that do not overlap"
                )
            source = range(rows[branch.like].start, rows[branch.like].stop)
            copied = source[:1] if branch.shared and self._alike(inputs) else source
            rows[branch.name] = slice(len(index), len(index) + len(copied))
            likes[branch.name] = branch.like
            index += copied
        return index

    def _alike(self, inputs: Inputs) -> bool:
        """Whether pictures differ by their latents and their text only."""
        run, adapter = self.run, self.run.adapter
        if inputs[adapter.sample].shape[1] != adapter.latent_channels:  # what is to be inpainted
            return False
        others = set(adapter.batched) - {adapter.sample, adapter.text, adapter.timestep}
        told = any(inputs.get(name) is not None for name in others)
        edited = any("cond" in (edit.rows or ()) for placed in run.graft.edits.values() for _, edit in placed)
        return run.session.prompt.prompts == 1 or not (told or edited)

    def _own_inputs(self, inputs: Inputs, branches: Sequence[Branch]) -> Inputs:
        """Give the branches that ask for it their own latent and text."""
        run, key, text = self.run, self.run.adapter.sample, self.run.adapter.text
        for branch in branches:
            rows = run.step.rows[branch.name]
            if branch.latent is not None:
                sample = inputs[key].clone()
                scale = model_scale(run.running.pipe.scheduler, run.step.timestep, sample)
                own = (branch.latent(run.step).to(sample.device) * scale).to(sample.dtype)
                sample[rows, : run.adapter.latent_channels] = own
                inputs = run.adapter.without_control({**inputs, key: sample}, rows)
            if branch.text is not None:
                words = inputs[text].clone()
                words[rows] = branch.text.to(words)
                inputs = {**inputs, text: words}
        return inputs


def _by_picture(text: Text, batch: int, pictures: int) -> Text:
    """Rows of texts, one or one a prompt, for every row of a batch whose groups hold `pictures` rows each."""
    if len(text.embeddings) == 1:
        mask = None if text.mask is None else text.mask.expand(batch, -1)
        return Text(text.embeddings.expand(batch, -1, -1), mask)
    index = torch.arange(batch, device=text.embeddings.device) % pictures // (pictures // len(text.embeddings))
    return Text(text.embeddings[index], None if text.mask is None else text.mask[index])

"""The stream stage: texts that ride beside the prompt's through a joint-attention model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...attention.errors import SettingError
from ...plugins.base import Plugin, Text
from ..families.base import Inputs
from .run import Run


def add_streams(run: Run, active: Sequence[Plugin], inputs: Inputs) -> Inputs:
    """Append the streams of text that a plugin carries beside the prompt's.

    Raises:
        SettingError: two plugins bring some.
    """
    step, adapter = run.step, run.adapter
    wanted = [texts for plugin in active if (texts := plugin.streams(step))]
    if not wanted:
        return inputs
    if len(wanted) > 1:
        raise SettingError(
            "two plugins steer away from negatives at once on a joint-attention model: give all negatives to one "
            "NegativeAway({'first': 1.0, 'second': 1.0})"
        )
    pictures = step.rows["cond"].stop - step.rows["cond"].start
    rows = [_by_picture(text, len(inputs[adapter.sample]), pictures) for text in wanted[0]]
    run.streams = [adapter.text_length(inputs), *(text.embeddings.shape[1] for text in rows)]
    return adapter.extend_text(inputs, rows)


def _by_picture(text: Text, batch: int, pictures: int) -> Text:
    """Rows of texts, one or one a prompt, for every row of a batch whose groups hold `pictures` rows each."""
    if len(text.embeddings) == 1:
        mask = None if text.mask is None else text.mask.expand(batch, -1)
        return Text(text.embeddings.expand(batch, -1, -1), mask)
    index = torch.arange(batch, device=text.embeddings.device) % pictures // (pictures // len(text.embeddings))
    return Text(text.embeddings[index], None if text.mask is None else text.mask[index])

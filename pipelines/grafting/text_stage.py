"""The text stage: plugins change the prompt's own embeddings before anything else of the call sees them."""

from __future__ import annotations

from collections.abc import Sequence

from ...plugins.base import Plugin, Words
from ..families.base import Inputs
from .run import Run


def reword(run: Run, active: Sequence[Plugin], inputs: Inputs) -> Inputs:
    """The denoiser's inputs with the conditional rows' texts as plugins changed them, one after the other.

    What a plugin gave before for the same texts is put in as the same tensors again, so that whatever is kept over
    the steps of a call stays good.
    """
    asked = [plugin for plugin in active if type(plugin).reword is not Plugin.reword]
    for plugin in asked:
        words = run.adapter.words(inputs, run.step.rows["cond"])
        new = plugin.reword(run.step, words)
        if new is not None:
            inputs = inputs | _placed(run, plugin, inputs, words, new)
    return inputs


def _placed(run: Run, plugin: Plugin, inputs: Inputs, words: Words, new: Words) -> Inputs:
    """The arguments that change."""
    before, given, changed = run.notes.get((plugin, "reworded"), (None, None, {}))
    if given is not new or not words.same(before):
        whole = run.adapter.reworded(inputs, run.step.rows["cond"], new)
        changed = {name: value for name, value in whole.items() if value is not inputs.get(name)}
        run.notes[plugin, "reworded"] = words, new, changed
    return changed

"""One pipeline call under a graft: what happens before, during and after each denoiser call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..attention.errors import GraftError, SettingError, UnsupportedPipelineError
from ..attention.layer import AttentionLayer
from ..attention.memo import TextMemo
from ..attention.step import Step
from ..plugins.base import Branch, Plugin, Prompt, Text
from .architectures.base import Inputs
from .latent_stage import LatentStage
from .link import model_scale
from .running import Running, find_running
from .step import Clock

if TYPE_CHECKING:
    from .graft import Graft


class Run:
    """State of the pipeline calls that one thread makes under one graft; the `Session` of its plugins."""

    def __init__(self, graft: Graft) -> None:
        self.graft, self.adapter = graft, graft.adapter
        self.clock, self.step, self.moving = Clock(), Step(), LatentStage(self)
        self.running = Running(graft.pipe, False)
        self.pending: torch.Tensor | None = None
        self.skipped: Counter[str] = Counter()
        self.rows_seen: set[int] = set()
        self.updates = self.calls = 0
        self.inputs: Inputs = {}
        self.joins: torch.Tensor | None = None
        self.join_block: str | None = None
        self.joined, self.base_rows = False, 0
        self.deltas: list[torch.Tensor] = []
        self.streams: list[int] = []
        self.memo = TextMemo()

    # -- Session: what plugins see -----------------------------------------------------------------------------

    @property
    def layers(self) -> Sequence[AttentionLayer]:
        return self.adapter.layers

    @property
    def latent_channels(self) -> int:
        return self.adapter.latent_channels

    @property
    def prompt(self) -> Prompt:
        asked = self.running.arguments.get("prompt")
        rows = self.step.rows.get("cond", slice(0, 1))
        pictures = rows.stop - rows.start
        texts = [asked] if isinstance(asked, str) else list(asked) if asked else None
        if texts:
            texts = [text for text in texts for _ in range(pictures // len(texts))]
        arguments, prompts = self.running.arguments, self.running.arguments.get("batch_size")
        return Prompt(
            texts, pictures, getattr(self.running.pipe, "guidance_scale", None),
            prompts if isinstance(prompts, int) else None,
            "uncond" in self.step.rows or self.adapter.guided_apart(self.running), arguments.get("negative_prompt"),
            "strength" not in arguments,
        )  # fmt: skip

    @property
    def family(self) -> str:
        return self.adapter.family

    @property
    def text_width(self) -> int:
        return self.inputs[self.adapter.text].shape[-1]

    def encode(self, texts: Sequence[str]) -> Text:
        return self.graft.texts.encode(texts, self.running)

    def encode_text(self, texts: Sequence[str]) -> torch.Tensor:
        return self.encode(texts).embeddings

    def layer_text(self, text: Text) -> Text:
        return self.adapter.layer_text(text)

    def tokens(self, text: str) -> list[str]:
        return self.graft.texts.tokens(text)

    def token_spans(self, text: str, phrase: str) -> list[list[int]]:
        return self.graft.texts.spans(text, phrase)

    def token_range(self, text: str) -> range:
        return self.graft.texts.content(text)

    def encode_image(self, image: Any, size: tuple[int, int]) -> torch.Tensor:
        return self.graft.encode_image(image, size)

    def signal(self, step: Step) -> tuple[float, float]:
        return self.graft.signal(self.running.pipe.scheduler, step)

    def skip(self, reason: str) -> None:
        self.skipped[reason] += 1

    # -- the three stages --------------------------------------------------------------------------------------

    def before(self, args: tuple[Any, ...], kwargs: Inputs) -> Inputs:
        """The denoiser's inputs after the latent and the branch stage."""
        self.running = find_running(self.adapter.denoiser, self.graft.pipe)
        inputs = self.adapter.bind(args, kwargs)
        if self.pending is not None and not self._stays_in_step(inputs):
            self.pending = None
            raise GraftError(
                "a plugin moved the latents, but scheduler.step was not called on the pipeline's own scheduler "
                "before the next denoiser call: sample with pipe.scheduler"
            )
        self._begin(inputs)
        if "cond" in self.step.rows:
            for stage in (self.moving.stage, self._branch_stage, self._text_stage):
                inputs = stage(inputs)
        self.inputs = inputs
        self.rows_seen.add(max(rows.stop for rows in self.step.rows.values()))
        self.calls += 1
        return inputs

    def after(self, output: Any) -> Any:
        """The denoiser's output after the combine stage, with the rows that the pipeline sent in."""
        step, adapter, self.inputs, self.streams = self.step, self.adapter, {}, []
        self._forget_joins()
        if "cond" not in step.rows:  # guidance's other call gets what the first one was given
            return self._folded(output, self.deltas, len(adapter.prediction(output)), tuple(step.rows))
        combiners = [p for p in self.graft.active(step) if type(p).combine is not Plugin.combine]
        prediction = adapter.prediction(output)
        kept = max(rows.stop for name, rows in step.rows.items() if name not in step.likes)
        if not combiners and kept == len(prediction):
            return output
        full = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        self.deltas = [d for plugin in combiners if (d := plugin.combine(step, full, step.rows)) is not None]
        return self._folded(output, self.deltas, kept, ("uncond", "cond"))

    def aborted(self) -> None:
        """The denoiser raised: this pipeline call will not step."""
        self.pending, self.inputs, self.streams = None, {}, []
        self._forget_joins()

    def _folded(self, output: Any, deltas: Sequence[torch.Tensor], kept: int, groups: Sequence[str]) -> Any:
        """The first `kept` rows of the output, moved by the deltas.

        u + g (c - u) moves by exactly d when both halves do, whatever g is.
        """
        prediction = self.adapter.prediction(output)
        if not deltas:
            same = kept == len(prediction)
            return output if same else self.adapter.with_prediction(output, prediction[:kept])
        folded = prediction[:kept].to(torch.promote_types(prediction.dtype, torch.float32), copy=True)
        for name in groups:
            if name in self.step.rows:
                for delta in deltas:
                    folded[self.step.rows[name], : delta.shape[1]] += delta
        return self.adapter.with_prediction(output, folded.to(prediction.dtype))

    def sample_for_step(self, sample: torch.Tensor) -> torch.Tensor:
        """What the scheduler's step starts from."""
        self.clock.tick()
        if self.clock.over:
            self.memo.clear()
            for plugin in self.graft.effective:
                plugin.finish()
        moved, self.pending = self.pending, None
        return sample if moved is None else moved.to(sample.dtype)

    def text_slice(self, layer: AttentionLayer) -> slice | None:
        """Columns of the text in a joint layer."""
        return self.adapter.text_slice(layer, self.inputs)

    # -- steps -------------------------------------------------------------------------------------------------

    def _begin(self, inputs: Inputs) -> None:
        scheduler = self.running.pipe.scheduler
        self.graft.link(scheduler)
        timestep = inputs[self.adapter.timestep]
        fresh = self.clock.start(scheduler, timestep)
        index, total = self.clock.read(scheduler, self.running.steps)
        rows = self.adapter.groups(inputs, self.running)
        self.step = Step(index, total, timestep, self.adapter.grid(inputs, self.running), rows)
        self._forget_joins()
        self.streams, self.inputs = [], inputs
        if "cond" in rows:
            self.deltas = []
        if fresh:
            self.memo.clear()
            self.adapter.check()
            for plugin in self.graft.effective:
                plugin.begin(self, self.step)

    def _forget_joins(self) -> None:
        self.joins, self.join_block, self.joined, self.base_rows = None, None, False, 0

    def _branch_stage(self, inputs: Inputs) -> Inputs:
        branches = [b for plugin in self.graft.active(self.step) for b in plugin.branches(self.step)]
        if not branches:
            return inputs
        rows = self.step.rows
        if "perturbed" in rows:
            raise UnsupportedPipelineError("PAG splits the batch in three itself: use the pipeline without PAG")
        indices = list(range(max(r.stop for r in rows.values())))
        for branch in branches:
            source = rows[branch.like]
            rows[branch.name] = slice(len(indices), len(indices) + source.stop - source.start)
            self.step.likes[branch.name] = branch.like
            indices += range(source.start, source.stop)
        index = torch.tensor(indices, device=inputs[self.adapter.sample].device)
        block = self.graft.join_block(branches)
        if block and self.adapter.can_join_late(inputs, block):
            self.joins, self.join_block, self.base_rows = index, block, len(inputs[self.adapter.sample])
            return inputs
        return self._own_inputs(self.adapter.take(inputs, index), branches)

    def _text_stage(self, inputs: Inputs) -> Inputs:
        """Append the streams of text that a plugin carries beside the prompt's."""
        wanted = [texts for plugin in self.graft.active(self.step) if (texts := plugin.streams(self.step))]
        if not wanted:
            return inputs
        if len(wanted) > 1:
            raise SettingError(
                "two plugins steer away from negatives at once on a joint-attention model: give all negatives to one "
                "NegativeAway({'first': 1.0, 'second': 1.0})"
            )
        pictures = self.step.rows["cond"].stop - self.step.rows["cond"].start
        batch = len(inputs[self.adapter.sample])
        rows = [_by_picture(text, batch, pictures) for text in wanted[0]]
        self.streams = [self.adapter.text_length(inputs), *(text.embeddings.shape[1] for text in rows)]
        return self.adapter.extend_text(inputs, rows)

    def _stays_in_step(self, inputs: Inputs) -> bool:
        """Whether this call is guidance's second one at the same step."""
        return "cond" not in self.adapter.groups(inputs, self.running)

    def _own_inputs(self, inputs: Inputs, branches: Sequence[Branch]) -> Inputs:
        """Give the branches that ask for it their own latent and text."""
        key, text = self.adapter.sample, self.adapter.text
        for branch in branches:
            rows = self.step.rows[branch.name]
            if branch.latent is not None:
                sample = inputs[key].clone()
                scale = model_scale(self.running.pipe.scheduler, self.step.timestep, sample)
                own = (branch.latent(self.step).to(sample.device) * scale).to(sample.dtype)
                sample[rows, : self.latent_channels] = own
                inputs = self.adapter.without_control({**inputs, key: sample}, rows)
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

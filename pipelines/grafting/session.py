"""The `Session` of a run: what a graft shows its plugins of the pipeline and of the call that is running."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ...attention.layer import AttentionLayer
from ...attention.step import Step
from ...plugins.base import Made, Plugin, Prompt, Text, Words
from ...plugins.rotary import Rotary
from ..families import latents
from ..families.running import part_for
from .run import Run
from .stream_stage import heard_across
from .text import Texts


class RunSession:
    """A view of a run; see `plugins.base.Session`."""

    def __init__(self, run: Run, texts: Texts) -> None:
        self._run, self._texts = run, texts

    @property
    def layers(self) -> Sequence[AttentionLayer]:
        return self._run.adapter.layers

    @property
    def latent_channels(self) -> int:
        return self._run.adapter.picture_channels

    @property
    def latent_size(self) -> tuple[int, int]:
        run = self._run
        height, width = run.adapter.latent_of(run.inputs[run.adapter.sample], run.step.size).shape[-2:]
        return height, width

    @property
    def prompt(self) -> Prompt:
        run, asked = self._run, self._run.running.arguments
        texts, prompts = run.adapter.prompt(run.running), asked.get("batch_size")
        rows = run.step.rows.get("cond", slice(0, 1))
        pictures = rows.stop - rows.start
        texts = [texts] if isinstance(texts, str) else list(texts) if texts else None
        if texts:
            texts = [text for text in texts for _ in range(pictures // len(texts))]
        return Prompt(
            texts, pictures, run.running.guidance_scale,
            prompts if isinstance(prompts, int) else None,
            "uncond" in run.step.rows or run.adapter.guided_apart(run.running), asked.get("negative_prompt"),
            "strength" not in asked, asked.get("prompt_2") not in (None, asked.get("prompt")),
            part_for(run.running.pipe),
        )  # fmt: skip

    @property
    def rotary(self) -> Rotary | None:
        return self._run.adapter.rotary

    @property
    def family(self) -> str:
        return self._run.adapter.family

    @property
    def rows_only(self) -> bool:
        return self._run.adapter.rows_only

    @property
    def text_width(self) -> int:
        return self._run.adapter.text_shape(self._run.inputs)[-1]

    @property
    def encoders(self) -> int:
        return self._run.adapter.encoders

    @property
    def text_dims(self) -> int:
        return len(self._run.adapter.text_shape(self._run.inputs))

    @property
    def text(self) -> torch.Tensor:
        return self._run.inputs[self._run.adapter.text]

    @property
    def words(self) -> Words:
        return self._run.adapter.words(self._run.inputs, self._run.step.rows["cond"])

    @property
    def rewords(self) -> bool:
        return self._run.adapter.rewords

    def encode(self, texts: Sequence[str], *, keep: bool = True, prompts: bool = False) -> Text:
        running = self._run.running
        texts = self._run.adapter.as_prompts(texts, running.arguments) if prompts else texts
        return self._texts.encode(texts, running, keep=keep)

    def remember(self, key: Any, make: Callable[[], Made]) -> Made:
        return self._texts.remember(key, make, self._run.running)

    def knows(self, text: str) -> bool:
        return self._texts.knows(text)

    def pooled(self, text: str, *, masked: bool = False) -> torch.Tensor:
        return self._texts.pooled(text, masked)

    def encode_text(self, texts: Sequence[str]) -> torch.Tensor:
        return self.encode(texts).embeddings

    def layer_text(self, text: Text) -> Text:
        return Text(heard_across(self._run, text), text.mask)

    def tokens(self, text: str) -> list[str]:
        return self._texts.tokens(text, self._run.running.arguments)

    def token_spans(self, text: str, phrase: str) -> list[list[int]]:
        return self._texts.spans(text, phrase, self._run.running.arguments)

    def token_range(self, text: str) -> range:
        return self._texts.content(text, self._run.running.arguments)

    def encode_image(self, image: Any, size: tuple[int, int]) -> torch.Tensor:
        with torch.inference_mode(False):
            return latents.encode_image(self._run.adapter.pipe, image, size)

    def signal(self, step: Step) -> tuple[float, float]:
        return latents.signal(self._run.running.pipe.scheduler, step)

    def skip(self, reason: str) -> None:
        self._run.tally.skipped[reason] += 1

    def tell(self, plugin: Plugin, values: Callable[[], Mapping[str, Any]]) -> None:
        self._run.tally.told[plugin] = values

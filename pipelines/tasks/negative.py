"""What an inversion steers away from: a text, a picture by way of an IP-Adapter, or a picture by way of attention."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from PIL import Image

from ...attention.edit import Edit
from ...attention.errors import SettingError, SettingTypeError, UnsupportedPipelineError
from ...attention.layer import AttentionLayer
from ...attention.seam import Work, laid_out, seam_on
from ...attention.step import Step
from ...plugins.style_injection import AttendTo, ImagePrompt, block_of
from ..families import latents
from ..families.base import has_ip_adapter
from ..families.loop import Loop
from ..grafting.compiled import choosing, compiled_of
from .schedule import Level

LAYOUT_BLOCK = "down_blocks.2.attentions.1"
"""Where an IP-Adapter passes on layout rather than style (InstantStyle, arXiv 2404.02733)."""


class Negative:
    """Nothing to steer away from: one row. An IP-Adapter on the pipe adds nothing.

    Attributes:
        kind: for the report.
        rows: batch rows for each picture: [towards], [away, towards] or [away, towards, reference].
        pictures: what an IP-Adapter is shown, one a row.
    """

    kind, rows = "none", 1
    pictures: list[Any] | None = None

    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    def texts(self, prompts: Sequence[str]) -> list[str]:
        """The prompt of every row."""
        return list(prompts)

    def batch(self, x: torch.Tensor, level: Level) -> torch.Tensor:
        """Latents of all rows at a step."""
        return x

    def edits(self) -> list[Edit]:
        """What attention does differently."""
        return [ImagePrompt({})]

    @contextmanager
    def edited(self, n: int, timestep: torch.Tensor) -> Generator[None]:
        """Around one denoiser call on n pictures."""
        rows = {name: slice(i * n, i * n + n) for i, name in enumerate(("uncond", "cond", "reference")[: self.rows])}
        with editing(self.loop, self.edits(), Step(timestep=timestep, rows=rows)):
            yield

    def guided(self, rows: torch.Tensor, weight: float) -> torch.Tensor:
        """One prediction a picture, out of those of all rows: e+ + weight * (e+ - e-)."""
        if self.rows == 1:
            return rows
        n = len(rows) // self.rows
        away, towards = rows[:n], rows[n : 2 * n]
        return towards + weight * (towards - away)


class TextNegative(Negative):
    """Steers away from texts."""

    kind, rows = "text", 2

    def __init__(self, loop: Loop, texts: Sequence[str]) -> None:
        super().__init__(loop)
        self.negatives = list(texts)

    def texts(self, prompts: Sequence[str]) -> list[str]:
        """The prompt of every row."""
        away = self.negatives * len(prompts) if len(self.negatives) == 1 else self.negatives
        if len(away) != len(prompts):
            raise SettingError(f"{len(away)} negatives for {len(prompts)} pictures: one for each, or one for all")
        return [*away, *prompts]

    def batch(self, x: torch.Tensor, level: Level) -> torch.Tensor:
        """Latents of all rows at a step."""
        return torch.cat([x, x])


class ImageNegative(Negative):
    """The IP-Adapter shows the negative picture to one row and the content to the other, in the layout block only."""

    kind, rows = "image", 2

    def __init__(self, loop: Loop, away: list[Any], towards: list[Any]) -> None:
        super().__init__(loop)
        self.pictures = [*(away * len(towards) if len(away) == 1 else away), *towards]

    def texts(self, prompts: Sequence[str]) -> list[str]:
        return [*prompts, *prompts]

    def batch(self, x: torch.Tensor, level: Level) -> torch.Tensor:
        return torch.cat([x, x])

    def edits(self) -> list[Edit]:
        return [ImagePrompt({block_of(self.loop.layers, "down", LAYOUT_BLOCK): 1.0})]


class AttentionNegative(Negative):
    """The negative row sees the picture's keys and values in the encoder and the middle: it simulates its leaking.

    After the negative visual query guidance of StyleKeeper, moved into the inversion; a third row holds the picture
    under noise.
    """

    kind, rows = "attention", 3

    def __init__(self, loop: Loop, clean: torch.Tensor, generator: torch.Generator | None) -> None:
        super().__init__(loop)
        if not any(_sees(layer) for layer in loop.layers):
            raise UnsupportedPipelineError(
                f"a picture cannot be a negative on {type(loop.denoiser).__name__}: give the negative as text"
            )
        source = generator or torch.Generator().manual_seed(0)
        shape = clean.shape if generator else clean[:1].shape  # a batch is its pictures
        noise = torch.randn(shape, generator=source, dtype=clean.dtype, device=source.device)
        self.clean, self.noise = clean, noise.to(clean.device)

    def texts(self, prompts: Sequence[str]) -> list[str]:
        return [*prompts, *prompts, *[""] * len(prompts)]

    def batch(self, x: torch.Tensor, level: Level) -> torch.Tensor:
        noised = level.alpha * self.clean + level.sigma * self.noise
        return torch.cat([x, x, noised.expand_as(x)])

    def edits(self) -> list[Edit]:
        return [AttendTo("reference", ("uncond",), _sees), *super().edits()]


def negative_for(
    loop: Loop, clean: torch.Tensor, negative: Any, content: Any, generator: torch.Generator | None
) -> Negative:
    """The best negative that the pipeline has means for.

    Raises:
        SettingTypeError: neither text nor picture. UnsupportedPipelineError: no means for a picture.
    """
    if negative is None:
        return Negative(loop)
    away: list[Any] = list(negative) if isinstance(negative, (list, tuple, torch.Tensor)) else [negative]
    if away and all(isinstance(item, str) for item in away):
        return TextNegative(loop, away)
    if not away or not all(isinstance(item, (Image.Image, torch.Tensor)) for item in away):
        raise SettingTypeError("a negative is a text, a picture, latents, or a list of them")
    if len(away) not in (1, len(clean)):
        raise SettingError(f"{len(away)} negatives for {len(clean)} pictures: one for each, or one for all")
    if isinstance(away[0], Image.Image) and has_image_prompt(loop):
        towards = [content] if isinstance(content, Image.Image) else latents.decode_latents(loop.pipe, clean)
        return ImageNegative(loop, away, towards)
    size = (clean.shape[-2], clean.shape[-1])
    encoded = [
        item[None] if isinstance(item, torch.Tensor) else latents.encode_image(loop.pipe, item, size) for item in away
    ]
    if any(item.shape[1:] != clean.shape[1:] or not item.isfinite().all() for item in encoded):
        shape = ", ".join(map(str, clean.shape[1:]))
        raise SettingError(f"a negative by latents is [1 or {len(clean)}, {shape}] here, of finite values")
    return AttentionNegative(loop, torch.cat(encoded).to(clean), generator)


def has_image_prompt(loop: Loop) -> bool:
    """Whether the pipeline has an IP-Adapter and the encoder that it needs."""
    return has_ip_adapter(loop.denoiser) and getattr(loop.pipe, "image_encoder", None) is not None


def _sees(layer: AttentionLayer) -> bool:
    return layer.kind == "self" and layer.place in ("down", "mid")


@contextmanager
def editing(loop: Loop, edits: Sequence[Edit], step: Step) -> Generator[None]:
    """Inside, the denoiser's layers run with these edits, in this thread; what is compiled of it runs eager there."""
    thread = threading.get_ident()
    with ExitStack() as stack:
        if edits:
            compiled = compiled_of(loop.denoiser.modules())
            stack.enter_context(choosing(loop.pipe, loop.denoiser, compiled, lambda _: threading.get_ident() == thread))
        for layer in loop.layers:
            asked = [edit.planned(layer, step) for edit in edits if edit.selects(layer)]
            chosen = [edit for edit in asked if edit is not None]
            if chosen:
                seam = stack.enter_context(seam_on(layer.module))
                work = Work(layer, step, chosen, [edit for edit in chosen if edit.every_call])
                stack.enter_context(laid_out([(seam, work)]))
        yield

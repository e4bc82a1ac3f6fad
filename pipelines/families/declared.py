"""The adapter of every declared family: reads a `Family`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ...attention.call import TextCall
from ...attention.errors import SettingError, UnsupportedPipelineError
from ...attention.layer import AttentionLayer
from ...attention.step import Rows
from ...plugins.base import Text
from ...plugins.rotary import Rotary
from ...plugins.startpoint import pack, unpack
from .base import NOTHING, Adapter, Inputs, Told, arguments_of
from .family import Family, Meet
from .modular import is_modular, text_block
from .rows import call_of, split
from .running import Running

_NOT_BATCHED = ("return_dict", "img_ids", "txt_ids", "image_ids", "position_ids", "image_rotary_emb")
_TOLD, _SHOWN = "joint_attention_kwargs", "ip_adapter_image_embeds"

_SIGN = "\N{REPLACEMENT CHARACTER}"


class DeclaredAdapter(Adapter):
    """A denoiser as its family describes it."""

    def __init__(self, pipe: Any, denoiser: nn.Module, family: Family) -> None:
        super().__init__(pipe, denoiser)
        self.spec = family
        self.sample, self.timestep, self.text = family.sample, family.timestep, family.text
        self.positional = arguments_of(type(denoiser).forward)
        self.batched = tuple(
            name
            for name in self.positional
            if name not in _NOT_BATCHED and not name.endswith(("kwargs", "_scale", "_pos"))
        )
        self.rows_at, self.rows_only = family.rows_at, family.rows_only
        self._asks = {layer.module: _asks(denoiser, family, layer) for layer in self.layers}
        self.layers = _kinds(self.layers, family)

    @property
    def family(self) -> str:
        return self.spec.name

    def text_call(self, layer: AttentionLayer) -> TextCall:
        return self._asks.get(layer.module, TextCall())

    # -- inputs and outputs ------------------------------------------------------------------------------------

    def take(self, inputs: Inputs, rows: slice | torch.Tensor) -> Inputs:
        sample = inputs[self.sample]
        if isinstance(sample, torch.Tensor):
            return super().take(inputs, rows) | _adapted(inputs, rows, len(sample))
        indices = range(len(sample))[rows] if isinstance(rows, slice) else rows.tolist()

        def pick(value: Any) -> Any:
            many = isinstance(value, (list, torch.Tensor)) and len(cast("Sequence[Any]", value)) == len(sample)
            if not many:
                return value
            return [value[i] for i in indices] if isinstance(value, list) else value[list(indices)]

        return {name: pick(value) if name in self.batched else value for name, value in inputs.items()}

    def prediction(self, output: Any) -> Any:
        if isinstance(output, torch.Tensor):  # Kandinsky 5 returns it bare
            return output
        found = super().prediction(output)
        return torch.stack(cast("list[torch.Tensor]", found))[:, :, 0] if isinstance(found, list) else found

    def with_prediction(self, output: Any, prediction: Any) -> Any:
        if self.spec.latent.layout == "list":
            prediction = list(prediction[:, :, None])
        return prediction if isinstance(output, torch.Tensor) else super().with_prediction(output, prediction)

    # -- latents -----------------------------------------------------------------------------------------------

    @property
    def latent_channels(self) -> int:
        config: Any = self.denoiser.config
        inner: int = config.in_channels
        outer: int = getattr(config, "out_channels", None) or inner
        if self.spec.latent.cells:
            return inner
        return min(inner, outer) if self.spec.latent.layout == "grid" else outer

    @property
    def picture_channels(self) -> int:
        return self.latent_channels // 4 if self.spec.latent.layout == "packed" else self.latent_channels

    def latent_of(self, sample: Any, size: tuple[int, int]) -> torch.Tensor:
        layout = self.spec.latent.layout
        if layout == "grid":
            return super().latent_of(sample, size)
        if layout == "list":
            return torch.stack(list(sample))[:, :, 0]
        if layout == "film":
            raise UnsupportedPipelineError(f"{type(self.pipe).__name__} makes films, whose latents no plugin can move")
        if sample.shape[1] != size[0] * size[1]:
            raise UnsupportedPipelineError(
                f"{type(self.pipe).__name__} puts another picture's tokens behind the latent's, which no plugin can "
                "move: use the text-to-image pipeline"
            )
        latent = sample[..., : self.latent_channels]
        return unpack(latent, size) if layout == "packed" else latent.mT.unflatten(-1, size)

    def as_sample(self, latent: torch.Tensor) -> torch.Tensor:
        layout = self.spec.latent.layout
        return pack(latent) if layout == "packed" else latent.flatten(2).mT if layout == "tokens" else latent

    def with_latent(self, sample: Any, latent: torch.Tensor) -> Any:
        layout = self.spec.latent.layout
        if layout == "list":
            copies = len(sample) // len(latent)
            return list(latent.to(sample[0].dtype).repeat(copies, 1, 1, 1)[:, :, None])
        if layout == "grid":
            return super().with_latent(sample, latent)
        copies = len(sample) // len(latent)
        return torch.cat([latent.to(sample.dtype).repeat(copies, 1, 1), sample[..., self.latent_channels :]], -1)

    def with_rows(self, inputs: Inputs, rows: slice, latent: torch.Tensor) -> Inputs:
        layout, sample = self.spec.latent.layout, inputs[self.sample]
        if layout == "grid":
            return super().with_rows(inputs, rows, latent)
        if layout == "list":
            new = list(latent.to(sample[0].dtype).expand(rows.stop - rows.start, -1, -1, -1)[:, :, None])
            return {**inputs, self.sample: [*sample[: rows.start], *new, *sample[rows.stop :]]}
        tokens, sample = self.as_sample(latent), sample.clone()
        sample[rows, : tokens.shape[1], : tokens.shape[2]] = tokens.to(sample)
        return {**inputs, self.sample: sample}

    def only_latents(self, inputs: Inputs, size: tuple[int, int]) -> bool:
        layout, sample = self.spec.latent.layout, inputs[self.sample]
        if layout in ("packed", "tokens"):
            return sample.shape[1] == size[0] * size[1] and sample.shape[2] == self.latent_channels
        return layout == "list" or super().only_latents(inputs, size)

    @property
    def rotary(self) -> Rotary | None:
        said, config = self.spec.rotary, cast("Any", self.denoiser.config)
        if said is None:
            return None
        axes, theta = said
        return Rotary(tuple(getattr(config, axes)), float(getattr(config, theta) if isinstance(theta, str) else theta))

    def grid(self, inputs: Inputs, running: Running) -> tuple[int, int]:
        sample, latent, config = inputs[self.sample], self.spec.latent, cast("Any", self.denoiser.config)
        if latent.layout in ("packed", "tokens"):
            return _packed_grid(self, inputs, running)
        height, width = (sample[0] if isinstance(sample, list) else sample).shape[-2:]
        patch = getattr(config, "patch_size", None)
        patch = patch if isinstance(patch, int) and latent.layout == "grid" else latent.patch
        return height // patch, width // patch

    @property
    def films(self) -> bool:
        return self.spec.latent.layout == "film"

    # -- what the batch means ----------------------------------------------------------------------------------

    def groups(self, inputs: Inputs, running: Running) -> Rows:
        batch = len(inputs[self.sample])
        if running.group is not None:
            return super().groups(inputs, running)
        if inputs.get("skip_layers") is not None:  # SD3's skip-layer guidance makes a call of its own
            return {"perturbed": slice(0, batch)}
        if self.spec.guidance == "apart":
            return {call_of(self.spec, inputs[self.text], running): slice(0, batch)}
        if self.spec.guidance == "uncond, cond":
            return super().groups(inputs, running)
        return split(self.spec, batch) if self.guided(inputs, running) else {"cond": slice(0, batch)}

    def guided(self, inputs: Inputs, running: Running) -> bool:
        if running.found and self.spec.flag in running.arguments:
            return bool(running.arguments[self.spec.flag])
        return super().guided(inputs, running)

    def guided_apart(self, running: Running) -> bool:
        if self.spec.guidance != "apart" or not running.found or running.group is not None:
            return super().guided_apart(running)
        told = running.arguments
        if self.spec.flag in told:
            return bool(told[self.spec.flag])
        if told.get(self.spec.negative) is None:
            return False
        return bool(getattr(running.pipe, "do_classifier_free_guidance", True))

    # -- the text in the sequence ------------------------------------------------------------------------------

    def lengths(self, inputs: Inputs) -> list[int]:
        """Text tokens of each row, as the joint layers get them."""
        if self.spec.lengths is not None:
            return self.spec.lengths(self, inputs)
        return [inputs[self.text].shape[1] + self.spec.registers] * len(inputs[self.sample])

    def tokens(self, inputs: Inputs) -> int:
        """Image tokens of this call."""
        if self.spec.tokens is not None:
            return self.spec.tokens(self, inputs)
        sample = inputs[self.sample]
        if sample.ndim == 3:
            return sample.shape[1]
        height, width = self.grid(inputs, Running(self.pipe, False))
        return height * width

    def text_slice(self, layer: AttentionLayer, inputs: Inputs, image_only: bool = False) -> slice | None:
        if layer.kind not in ("joint", "keys"):
            return None
        lengths = self.lengths(inputs)
        if image_only and not self.spec.text_first:  # all images stand in front, padding behind the shorter texts
            return slice(-max(lengths), None)
        if len(set(lengths)) > 1:
            raise UnsupportedPipelineError(
                f"{type(self.pipe).__name__} has texts of different lengths in one batch, where words have no common "
                "columns: sample these prompts one by one"
            )
        return slice(0, lengths[0]) if self.spec.text_first else slice(-lengths[0], None)

    def text_settings(self, running: Running) -> dict[str, Any]:
        told = super().text_settings(running)
        for parameter, names in self.spec.settings.items():
            held = [running.arguments[name] for name in names.split("|") if running.arguments.get(name) is not None]
            told |= {parameter: held[0]} if held else {}
        return told

    @property
    def rewords(self) -> bool:
        return self.spec.rewords

    def text_mask(self, inputs: Inputs) -> torch.Tensor | None:
        mask, text = inputs.get(self.spec.mask or ""), inputs[self.text]
        if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or not isinstance(text, torch.Tensor):
            return None
        return mask[:, : text.shape[1]].bool()  # Chroma's goes on over the image

    def with_text(self, inputs: Inputs, text: Text) -> Inputs:
        """The same call with another text, whose rows are those of `inputs`."""
        spec = self.spec
        if spec.place is not None:
            return spec.place(inputs, text)
        changed: Inputs = {**inputs, self.text: text.embeddings, **text.more}
        if spec.mask is not None and (spec.masked or text.mask is not None or inputs.get(spec.mask) is not None):
            mask, like = text.mask, inputs.get(spec.mask)
            mask = text.embeddings.new_ones(text.embeddings.shape[:2], dtype=torch.bool) if mask is None else mask
            changed[spec.mask] = mask if like is None else mask.to(like.dtype)
        elif text.mask is not None and not bool(text.mask.all()):
            self._refuse_padding()
        if spec.ids is not None and inputs.get(spec.ids[0]) is not None:
            changed[spec.ids[0]] = positions(inputs[spec.ids[0]], text.embeddings.shape[1], spec.ids[1])
        return changed

    def with_words(self, inputs: Inputs, rows: slice, text: Text) -> Inputs:
        text = self.to_denoiser(text, inputs)
        spec, embeddings = self.spec, inputs[self.text]
        here, there = (embeddings.shape[1] if isinstance(embeddings, torch.Tensor) else 0), text.embeddings.shape[1]
        if spec.widens and here < there:
            inputs = inputs | {self.text: _padded(embeddings, there)}
        elif spec.mask is not None and spec.place is None and here not in (0, there):  # padded, and masked there
            length, own = max(here, there), inputs.get(spec.mask)
            own = embeddings.new_ones(embeddings.shape[:2], dtype=torch.bool) if own is None else own
            mask = text.embeddings.new_ones(text.embeddings.shape[:2]).bool() if text.mask is None else text.mask
            inputs = {**inputs, self.text: _padded(embeddings, length), spec.mask: _padded(own, length)}
            text = replace(text, embeddings=_padded(text.embeddings, length), mask=_padded(mask, length))
        return super().with_words(inputs, rows, text)

    def _refuse_padding(self) -> None:
        raise SettingError(
            f"{type(self.denoiser).__name__} masks no padding: leave mask= out, and cut the padding off the negative's "
            "embeddings"
        )

    @property
    def text_arguments(self) -> tuple[str, ...]:
        return self.spec.texts if self.spec.mask is None else (*self.spec.texts, self.spec.mask)

    # -- encoding ----------------------------------------------------------------------------------------------

    def encode_text(self, texts: Sequence[str], running: Running) -> Text:
        spec = self.spec
        if spec.encode is not None:
            return spec.encode(self, list(texts), running)
        several = [list(texts)] * spec.prompts
        if spec.as_negative:
            empty, options = [[""] * len(texts)] * spec.prompts, {"do_classifier_free_guidance": True}
            found = self.encode_prompt(running, *empty, negative_prompt=list(texts), **options)
        else:
            found = self.encode_prompt(running, *several)
        found = found if isinstance(found, tuple) else (found,)
        places = dict(spec.encoded) or {self.text: 0}
        parts = {name: found[place] for name, place in places.items() if place < len(found)}
        mask = parts.pop(spec.mask, None) if spec.mask else None
        return Text(parts.pop(self.text), None if mask is None else mask.bool(), parts)

    def tokenizer(self) -> Any:
        return getattr(self.pipe, self.spec.tokenizer, None)

    def prompt(self, running: Running) -> Any:
        told = running.arguments.get(self.spec.prompt) or super().prompt(running)
        known = running.arguments
        return [self._unwrapped(text, known) for text in told] if self.spec.wrap and isinstance(told, list) else told

    def wrapped(self, prompt: str, told: Told = NOTHING) -> str:
        if not self.spec.columns:
            raise UnsupportedPipelineError(
                f"{type(self.denoiser).__name__} puts its text in another order, so that words have no columns "
                "of their own: give no words to a plugin here"
            )
        return prompt if self.spec.wrap is None else self.spec.wrap(self.pipe, prompt, told)

    def as_prompts(self, texts: Sequence[str], told: Told = NOTHING) -> Sequence[str]:
        return [self.wrapped(text, told) for text in texts] if self.spec.as_negative else texts

    @property
    def dropped(self) -> int:
        form: Any = text_block(self.pipe) if is_modular(self.pipe) else self.pipe
        return getattr(form, self.spec.dropped) if self.spec.dropped else 0

    def _unwrapped(self, text: str, told: Told) -> str:
        """A prompt of a list, into which Z-Image's pipeline writes its template."""
        head, _, tail = self.wrapped(_SIGN, told).partition(_SIGN)
        inside = text.startswith(head) and text.endswith(tail) and len(text) >= len(head) + len(tail)
        return text[len(head) : len(text) - len(tail)] if inside else text

    # -- refusals ----------------------------------------------------------------------------------------------

    def check_inputs(self, inputs: Inputs) -> None:
        """Refuse a call that cannot be served.

        Raises:
            UnsupportedPipelineError: with the reason and what to do instead.
        """
        for found, sentence in self.spec.refuse:
            if found(self.pipe, inputs):
                raise UnsupportedPipelineError(f"{type(self.pipe).__name__} {sentence}")

    def check(self) -> None:
        super().check()
        self.check_inputs({})


def _adapted(inputs: Inputs, rows: slice | torch.Tensor, batch: int) -> Inputs:
    """What an IP-Adapter shows to some rows of the batch: the embeddings of one picture each, or of as many."""
    told = inputs.get(_TOLD) or {}
    if _SHOWN not in told:
        return {}

    def pick(one: torch.Tensor) -> torch.Tensor:
        return one if len(one) % batch else one.unflatten(0, (batch, -1))[rows].flatten(0, 1)

    return {_TOLD: told | {_SHOWN: tree_map(pick, told[_SHOWN])}}


def _padded(value: torch.Tensor, length: int) -> torch.Tensor:
    """[n, L, ...] with zeros behind, up to a length."""
    more = value.new_zeros(len(value), length - value.shape[1], *value.shape[2:])
    return torch.cat([value, more], 1)


def positions(like: torch.Tensor, length: int, axes: Sequence[int]) -> torch.Tensor:
    """Position ids of a text of `length` tokens, of the form of another text's: they count on some axes."""
    ids = like[..., :1, :].expand(*like.shape[:-2], length, like.shape[-1]).clone()
    for axis in axes:
        ids[..., axis] = torch.arange(length, device=ids.device).to(ids.dtype)
    return ids


def _packed_grid(adapter: DeclaredAdapter, inputs: Inputs, running: Running) -> tuple[int, int]:
    height, width = running.arguments.get("height"), running.arguments.get("width")
    if isinstance(height, int) and isinstance(width, int):
        factor = adapter.pipe.vae_scale_factor * 2  # two latents to a token
        return height // factor, width // factor
    if "img_shapes" in inputs:
        shape = inputs["img_shapes"][0]
        return tuple((shape[0] if isinstance(shape, list) else shape)[1:])
    ids = inputs.get("img_ids")
    ids = inputs["position_ids"][-inputs[adapter.sample].shape[1] :] if ids is None else ids
    rows, columns = (int(ids[..., axis].max()) + 1 for axis in (1, 2))
    return rows, columns


def _meet(family: Family, name: str) -> Meet | None:
    for meet in family.meets:
        ends = meet.layers or (() if meet.how == "joint" else ("attn2",))
        if name.startswith(f"{meet.path}.") and (not ends or name.endswith(ends)):
            return meet
    return None


def _asks(denoiser: nn.Module, family: Family, layer: AttentionLayer) -> TextCall:
    meet = _meet(family, layer.name)
    if meet is None:
        return TextCall()
    block: Any = denoiser.get_submodule(".".join(layer.name.split(".")[: meet.path.count(".") + 2]))
    own = meet.own(layer.module) if callable(meet.own) else meet.own
    return TextCall(own, meet.whole or meet.how == "keys", getattr(block, meet.through) if meet.through else None)


def _kinds(layers: Sequence[AttentionLayer], family: Family) -> list[AttentionLayer]:
    """The layers with their kinds as declared, counted anew."""
    counts: dict[str, int] = {}
    found: list[AttentionLayer] = []
    for layer in layers:
        alone = next((kind for part, kind in family.alone if layer.name.startswith(part)), None)
        meet = _meet(family, layer.name)
        kind = alone or (meet.how if meet is not None else "self")
        found.append(replace(layer, kind=kind, index=counts.get(kind, 0)))
        counts[kind] = counts.get(kind, 0) + 1
    return found

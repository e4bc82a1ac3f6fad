"""What a model family must tell: the only place that knows how a denoiser is called."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ...attention.call import TextCall
from ...attention.errors import SettingError, UnsupportedPipelineError
from ...attention.layer import AttentionLayer
from ...attention.step import Rows
from ...attention.walk import walk
from ...plugins.base import Text, Words
from ...plugins.rotary import Rotary
from .modular import encoders as modular_encoders
from .modular import is_modular
from .rows import looks_guided
from .running import Running
from .words import own_words

Inputs = dict[str, Any]
"""One denoiser call, every argument by name."""
_ASKS = TextCall()
_POOLED = ("pooled_projections", "pooled_embeds")
_MERGED = "merged tokens (tomesd): call tomesd.remove_patch(pipe)"
_SLICED = ("SlicedAttnProcessor", "SlicedAttnAddedKVProcessor")
Told = Mapping[str, Any]
NOTHING: Told = MappingProxyType({})
"""A call that is not known."""


class Adapter:
    """Base adapter; a family overrides what differs.

    Attributes:
        sample, timestep, text: names of those arguments of the denoiser's `forward`.
        positional: names of its positional arguments in order.
        batched: arguments (tensors, or nests of them) whose tensors have the batch as first dimension.
        modular, rows_at, rows_only: see `Family`.
        modules: the denoiser's, as they were at first: what is switched on later is switched on in these.
    """

    sample = "sample"
    timestep = "timestep"
    text = "encoder_hidden_states"
    positional: tuple[str, ...] = ()
    batched: tuple[str, ...] = ()
    modular: Mapping[str, str] = MappingProxyType({})
    rows_at: Mapping[str, int] = MappingProxyType({})
    rows_only = False

    def __init__(self, pipe: Any, denoiser: nn.Module) -> None:
        self.pipe, self.denoiser = pipe, denoiser
        self.modules, self.layers = walk(denoiser)

    # -- inputs and outputs ------------------------------------------------------------------------------------

    def bind(self, args: tuple[Any, ...], kwargs: Inputs) -> Inputs:
        """All arguments by name."""
        return dict(zip(self.positional, args, strict=False)) | kwargs

    def take(self, inputs: Inputs, rows: slice | torch.Tensor) -> Inputs:
        """The same call for some rows of the batch; a tensor of indices may repeat rows."""
        batch = len(inputs[self.sample])

        def pick(value: Any) -> Any:
            batched = isinstance(value, torch.Tensor) and value.ndim and len(value) == batch
            return value[rows] if batched else value

        taken = {name: tree_map(pick, value) if name in self.batched else value for name, value in inputs.items()}
        moved = {name: inputs[name].movedim(dim, 0) for name, dim in self.rows_at.items() if name in inputs}
        return taken | {name: pick(value).movedim(0, self.rows_at[name]) for name, value in moved.items()}

    def prediction(self, output: Any) -> torch.Tensor:
        """The predicted tensor of a denoiser's output, whichever form it has."""
        return output[0] if isinstance(output, tuple) else output.sample

    def with_prediction(self, output: Any, prediction: torch.Tensor) -> Any:
        """`output` with another prediction."""
        if isinstance(output, tuple):
            return (prediction, *output[1:])
        output.sample = prediction
        return output

    @property
    def films(self) -> bool:
        """Whether the pipeline makes films."""
        return False

    # -- what the batch means ----------------------------------------------------------------------------------

    @property
    def latent_channels(self) -> int:
        """Channels of the latent: inputs may add masks, predictions may add a variance."""
        config: Any = self.denoiser.config
        return min(config.in_channels, config.out_channels)

    @property
    def picture_channels(self) -> int:
        """Channels of a latent [n, C, h, w], where the denoiser's own are those of cells."""
        return self.latent_channels

    def latent_of(self, sample: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """The latent [n, C, h, w] in a denoiser's sample; `size` is that of its token grid."""
        return sample[:, : self.latent_channels]

    def as_sample(self, latent: torch.Tensor) -> torch.Tensor:
        """A latent [n, C, h, w] as the pipeline and its scheduler keep it."""
        return latent

    def with_latent(self, sample: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        """`sample` with its latent, as the pipeline keeps it, replaced in every group."""
        channels, copies = self.latent_channels, len(sample) // len(latent)
        new = latent.to(sample.dtype).repeat(copies, *[1] * (latent.ndim - 1))
        return new if sample.shape[1] == channels else torch.cat([new, sample[:, channels:]], 1)

    def with_rows(self, inputs: Inputs, rows: slice, latent: torch.Tensor) -> Inputs:
        """The same call in which some rows have another latent [n, C, h, w]."""
        sample = inputs[self.sample].clone()
        sample[rows, : self.latent_channels] = latent.to(sample)
        return {**inputs, self.sample: sample}

    def only_latents(self, inputs: Inputs, size: tuple[int, int]) -> bool:
        """Whether the sample holds latents alone, no mask and no other picture; `size` is that of the token grid."""
        return inputs[self.sample].shape[1] == self.latent_channels

    @property
    def rotary(self) -> Rotary | None:
        """How the denoiser turns queries and keys by position, as far as that is said."""
        return None

    def groups(self, inputs: Inputs, running: Running) -> Rows:
        """Row groups of the batch that the pipeline made; without "cond" in a second call of the same step."""
        batch = len(inputs[self.sample])
        if running.group is not None:
            return {running.group: slice(0, batch)}
        names = ["uncond", "cond"] if self.guided(inputs, running) else ["cond"]
        if running.found and getattr(running.pipe, "do_perturbed_attention_guidance", False):
            names.append("perturbed")
        n = batch // len(names)
        return {name: slice(i * n, (i + 1) * n) for i, name in enumerate(names)}

    def guided(self, inputs: Inputs, running: Running) -> bool:
        """Whether this batch holds a guided pair [uncond, cond]."""
        if running.found:  # PixArt keeps it in a local variable
            flag = getattr(running.pipe, "do_classifier_free_guidance", False)
            return bool(running.arguments.get("do_classifier_free_guidance", flag))
        return looks_guided(inputs[self.sample], inputs[self.text])

    def guided_apart(self, running: Running) -> bool:
        """Whether the pipeline runs guidance in a denoiser call of its own."""
        return running.apart

    def grid(self, inputs: Inputs, running: Running) -> tuple[int, int]:
        """(height, width) of the image tokens at full resolution."""
        raise NotImplementedError

    def batch(self, inputs: Inputs) -> int:
        """Rows of this call."""
        return len(inputs[self.sample])

    def device(self, inputs: Inputs) -> torch.device:
        """Where this call runs."""
        sample = inputs[self.sample]
        return (sample if isinstance(sample, torch.Tensor) else sample[0]).device

    def text_shape(self, inputs: Inputs) -> tuple[int, ...]:
        """Shape of the text embeddings of this call, [n, L, D] or [n, L, layers, D]."""
        text = inputs[self.text]
        text = text[0] if isinstance(text, tuple) else text  # the rest is an IP-Adapter's
        return tuple(text.shape) if isinstance(text, torch.Tensor) else (len(text), *text[0].shape)

    # -- text in the sequence ----------------------------------------------------------------------------------

    def text_slice(self, layer: AttentionLayer, inputs: Inputs, image_only: bool = False) -> slice | None:
        """Columns of the text in a joint layer's sequence, None in other layers.

        Args:
            image_only: nobody asks where the texts are: those behind images may be of different lengths.
        """
        return None

    def text_call(self, layer: AttentionLayer) -> TextCall:
        """How a layer asks its text."""
        return _ASKS

    def layer_text(self, text: Text, inputs: Inputs) -> tuple[torch.Tensor, dict[str, Any]]:
        """A text as the cross-attention layers get it, with its mask; for a denoiser that hands it on unchanged."""
        text = self.to_denoiser(text, inputs)
        mask = None if text.mask is None else (1 - text.mask.to(text.embeddings))[:, None] * -10000.0
        return text.embeddings, {"attention_mask": mask}

    def to_denoiser(self, text: Text, inputs: Inputs) -> Text:
        """A text where this call runs, in the dtype of the call's own; models and pipelines take long to say theirs."""
        given, device = inputs[self.text], self.device(inputs)
        like = given if isinstance(given, torch.Tensor) else given[0]

        def moved(value: torch.Tensor) -> torch.Tensor:
            return value.to(device, like.dtype) if value.is_floating_point() else value.to(device)

        more, pooled = ({name: moved(value) for name, value in held.items()} for held in (text.more, text.pooled))
        return Text(moved(text.embeddings), None if text.mask is None else text.mask.to(device), more, pooled)

    def with_text(self, inputs: Inputs, text: Text) -> Inputs:
        """The same call with another text, whose rows are those of `inputs`."""
        return {**inputs, self.text: text.embeddings, **text.more}

    @property
    def rewords(self) -> bool:
        """Whether a plugin may change the prompt's embeddings: a word is columns of the text, and of nothing else."""
        return False

    def text_mask(self, inputs: Inputs) -> torch.Tensor | None:
        """[B, L] boolean, False at padding of the text; None where the call says nothing of it."""
        return None

    def words(self, inputs: Inputs, rows: slice) -> Words:
        """Texts of some rows."""
        text, mask = inputs[self.text], self.text_mask(inputs)
        pooled = {name: value for name in _POOLED if isinstance(value := inputs.get(name), torch.Tensor)}
        given = [*(text if isinstance(text, list) else [text]), *pooled.values()]
        pooled = {name: value[rows] for name, value in pooled.items()}
        return Words([*text[rows]], None if mask is None else mask[rows], pooled, given)

    def reworded(self, inputs: Inputs, rows: slice, words: Words) -> Inputs:
        """The same call in which some rows have other embeddings of the same shape."""
        text = inputs[self.text]
        new = [row.to(like) for row, like in zip(words.rows, text[rows], strict=True)]
        whole = [*text[: rows.start], *new, *text[rows.stop :]]
        changed = {self.text: whole if isinstance(text, list) else torch.stack(whole)}
        for name, value in words.pooled.items():
            changed[name] = torch.cat([inputs[name][: rows.start], value.to(inputs[name]), inputs[name][rows.stop :]])
        return inputs | changed

    def with_words(self, inputs: Inputs, rows: slice, text: Text) -> Inputs:
        """The same call in which some rows have another text, of n = 1 or one for each prompt, with its pooled form.

        Raises:
            SettingError: a text of another length, which this model cannot have in one batch with the prompt's.
        """
        count, text = rows.stop - rows.start, self.to_denoiser(text, inputs)
        own = [i * len(text.embeddings) // count for i in range(count)]
        mine = Text(
            text.embeddings[own], None if text.mask is None else text.mask[own],
            {name: value[own] for name, value in text.more.items()},
        )  # fmt: skip
        index = torch.arange(rows.start, rows.stop, device=self.device(inputs))
        changed = self.with_text(self.take(inputs, index), mine)
        changed |= {name: value[own] for name, value in text.pooled.items()}
        names = {self.text, *text.more, *text.pooled, *self.text_arguments} & {*changed}
        for name in names & {*self.rows_at}:
            dim = self.rows_at[name]
            whole = replaced(inputs[name].movedim(dim, 0), rows, changed[name].movedim(dim, 0), self.batch(inputs))
            changed[name] = whole.movedim(0, dim)
        rest = {n: replaced(inputs.get(n), rows, changed[n], self.batch(inputs)) for n in names - {*self.rows_at}}
        return inputs | rest | {name: changed[name] for name in names & {*self.rows_at}}

    @property
    def text_arguments(self) -> tuple[str, ...]:
        """Arguments with one row a text, besides the text itself."""
        return ()

    # -- branches ----------------------------------------------------------------------------------------------

    def late_blocks(self) -> Sequence[tuple[str, nn.Module]]:
        """Blocks, in order, before which extra rows may join instead of at the input."""
        return ()

    def without_control(self, inputs: Inputs, rows: slice) -> Inputs:
        """The same call with a ControlNet's word on the pipeline's latents kept from `rows`, which have others."""
        return inputs

    def can_join_late(self, inputs: Inputs, block: str) -> bool:
        """Whether rows may join before `block` in this call."""
        return True

    # -- text --------------------------------------------------------------------------------------------------

    @property
    def family(self) -> str:
        """Name of the model family in tables of defaults."""
        return "unknown"

    def encode_text(self, texts: Sequence[str], running: Running) -> Text:
        """Texts as the denoiser takes them, by the pipeline's own encoders."""
        self._refuse_texts()

    def _refuse_texts(self) -> NoReturn:
        raise UnsupportedPipelineError(
            f"{type(self.pipe).__name__} encodes no text that diffgraft knows of: pass embeddings instead of strings"
        )

    def encode_prompt(self, running: Running, *texts: Sequence[str], **options: Any) -> Any:
        """The pipeline's `encode_prompt` with the running call's text settings, as far as it takes them."""
        if not hasattr(self.pipe, "encode_prompt"):
            self._refuse_texts()
        device = running.arguments.get("device") or self.pipe._execution_device  # which takes long to say
        asked = {"device": device, "num_images_per_prompt": 1, "num_videos_per_prompt": 1}
        asked |= {"do_classifier_free_guidance": False, "clip_skip": running.clip_skip}
        given = asked | self.text_settings(running) | options
        taken = inspect.signature(self.pipe.encode_prompt).parameters
        several = [[_of_encoder(text, i) for text in own] for i, own in enumerate(texts)]
        if texts and any(isinstance(text, tuple) for text in texts[0]):  # one for each encoder
            more = range(len(texts), self.encoders)
            given |= {f"prompt_{i + 1}": [_of_encoder(text, i) for text in texts[0]] for i in more}
        with own_words(self.pipe) as pipe:
            return pipe.encode_prompt(*several, **{k: v for k, v in given.items() if k in taken})

    @property
    def encoders(self) -> int:
        """Prompts that `encode_prompt` takes."""
        if is_modular(self.pipe):
            return modular_encoders(self.pipe)
        taken = inspect.signature(self.pipe.encode_prompt).parameters if hasattr(self.pipe, "encode_prompt") else ()
        return 1 + sum(f"prompt_{i}" in taken for i in (2, 3, 4))

    def text_settings(self, running: Running) -> dict[str, Any]:
        """What the running call told its `encode_prompt` beside prompts, by parameter."""
        return {name: value for name, value in running.arguments.items() if name in running.encoding}

    def tokenizer(self) -> Any:
        """The tokenizer whose tokens are the columns of the text embeddings."""
        return getattr(self.pipe, "tokenizer", None)

    def prompt(self, running: Running) -> Any:
        """The running call's prompt whose tokens are those columns."""
        return running.arguments.get("prompt")

    def wrapped(self, prompt: str, told: Told = NOTHING) -> str:
        """What the text encoder really reads for a prompt.

        Args:
            told: the call's arguments, which may name another template.
        Raises:
            UnsupportedPipelineError: a model that puts its text in another order, where words have no columns.
        """
        return prompt

    def as_prompts(self, texts: Sequence[str], told: Told = NOTHING) -> Sequence[str]:
        """What `encode_text` has to be given for what the pipeline makes of these prompts."""
        return texts

    @property
    def dropped(self) -> int:
        """How many tokens of that are no columns, in front."""
        return 0

    # -- refusals ----------------------------------------------------------------------------------------------

    def check_inputs(self, inputs: Inputs) -> None:
        """Refuse a call that cannot be served.

        Raises:
            UnsupportedPipelineError: with the reason and what to do instead.
        """

    def check(self) -> None:
        """Refuse what would skip or change edited layers silently.

        Raises:
            UnsupportedPipelineError: names what was found and how to switch it off.
        """
        found = _obstacle(self.denoiser, self.modules)
        if found:
            raise UnsupportedPipelineError(f"{type(self.denoiser).__name__} has {found}, then attach again")

    def check_gradient(self) -> None:
        """Refuse what makes a gradient with respect to the latent impossible.

        Raises:
            UnsupportedPipelineError: weights that change their dtype between forward and backward.
        """
        hooked = (own for own in map(vars, self.modules) if "_diffusers_hook" in own)
        if any("layerwise_casting" in own["_diffusers_hook"].hooks for own in hooked):
            raise UnsupportedPipelineError(
                f"{type(self.denoiser).__name__} has layerwise casting, under which no gradient reaches the latent: "
                "load it in float16 or bfloat16 instead"
            )


@functools.cache
def arguments_of(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the arguments of a class's `forward`, without `self`: `inspect` is slow, and each graft asks."""
    return tuple(inspect.signature(forward).parameters)[1:]


def replaced(whole: Any, rows: slice, new: Any, batch: int) -> Any:
    """An argument with some of its rows replaced, which may be longer or, where it is masked, shorter.

    Raises:
        SettingError: rows of another length where nothing says so.
    """
    if new is None or (whole is None and not isinstance(new, torch.Tensor)):
        return whole
    if isinstance(whole, list):
        return [*whole[: rows.start], *new, *whole[rows.stop :]]
    if whole is None:  # the prompt alone needed no mask
        whole = new.new_ones(batch, *new.shape[1:])
    if whole.shape[1:] != new.shape[1:]:
        raise SettingError(
            f"form='rows': a negative of shape {list(new.shape[1:])} beside a prompt of {list(whole.shape[1:])}: this "
            "model takes texts of one length in a batch; use form='streams', or pad the negative's embeddings"
        )
    whole = whole.clone()
    whole[rows] = new.to(whole)
    return whole


def _of_encoder(text: Any, i: int) -> str:
    """A text's form for one of several encoders."""
    return text if isinstance(text, str) else text[min(i, len(text) - 1)]


def _obstacle(denoiser: Any, modules: Sequence[nn.Module]) -> str | None:
    """What is on a denoiser that skips or changes layers; looked for before every picture, so it is quick."""
    if getattr(denoiser, "is_cache_enabled", False):
        return "a cache that skips layers: call disable_cache() on it"
    if any(kind.__name__ == "ToMeBlock" for kind in set(map(type, modules))):
        return _MERGED
    for own in map(vars, modules):
        if "processor" in own and type(own["processor"]).__name__ in _SLICED:
            return "sliced attention: call pipe.disable_attention_slicing()"
        hooks = list(own["_diffusers_hook"].hooks) if "_diffusers_hook" in own else ()
        if hooks and any("cache" in name or "pyramid_attention" in name or "layer_skip" in name for name in hooks):
            return f"the hook {hooks[0]!r} that skips layers: disable that cache"
        if "_tome_info" in own:
            return _MERGED
    return None


def has_ip_adapter(denoiser: Any) -> bool:
    """Whether an IP-Adapter is loaded, which wants a picture at every call."""
    return getattr(denoiser.config, "encoder_hid_dim_type", None) == "ip_image_proj"

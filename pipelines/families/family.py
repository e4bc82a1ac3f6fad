"""What a model family is, said in data: how its denoiser is called and where its text meets the image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ...attention.errors import SettingError, SettingTypeError
from .solve import Solve

How = Literal["joint", "cross", "keys"]
Alone = Literal["text", "self"]
Guidance = Literal["uncond, cond", "cond, uncond", "apart"]
HIDDEN, TEXT = "hidden_states", "encoder_hidden_states"


@dataclass(frozen=True)
class Along:
    """An argument of a meeting block that has one entry a token, such as rotary factors or a mask.

    Attributes:
        argument: its name. dim: where the tokens are counted in each of its tensors.
        leaf: which of its tensors, None for all.
        of: "joint" where it covers text and image, "text" where it covers the text alone.
        rope: complex rotary factors of an image whose place depends on the text's length; they are moved to the
            running image's.
    """

    argument: str
    dim: int = 0
    leaf: int | None = None
    of: Literal["joint", "text"] = "joint"
    rope: bool = False


@dataclass(frozen=True)
class Meet:
    """A list of blocks in which text and image meet.

    Attributes:
        path: of the list in the denoiser.
        how: "joint" (text and image attend to each other), "cross" (the image attends to the text), "keys" (image
            queries over keys of both, the text is no query).
        text: the blocks' argument with the text's tokens; None where text and image arrive as one sequence.
        sequence: the blocks' argument with the image's tokens, or with the one sequence.
        layers: endings of the names of the attention layers meant; empty for all in the blocks.
        along: arguments with one entry a token; for "cross" and "keys" those that the layer
            takes with its text; a mask becomes its `attention_mask`.
        through: a module of the block that the text passes before the layer projects it.
        own: which attention call of the layer is the text's, a number or a function of the layer's module.
        whole: the layer rotates its queries, so that all of the image's tokens are needed to project another text.
    """

    path: str
    how: How = "joint"
    text: str | None = TEXT
    sequence: str = HIDDEN
    layers: tuple[str, ...] = ()
    along: tuple[Along, ...] = ()
    through: str | None = None
    own: int | Callable[[Any], int] = 0
    whole: bool = False


@dataclass(frozen=True)
class Latent:
    """How latents lie in the denoiser's sample.

    Attributes:
        layout: "grid" [B, C, h, w]; "packed" [B, h*w/4, 4 C] in cells of 2 x 2; "tokens" [B, h*w, C]; "list" of
            [C, 1, h, w]; "film" for anything with frames, where plugins for pictures are refused.
        patch: what the sides of latents must be multiples of.
        cells: the config's `out_channels` are those of a cell of the latent and not of a token.
        scale: from the autoencoder's latents to the scheduler's: its config's shift and factor, mean and deviation of
            each "channel" of an autoencoder for films, or cells of 2 x 2 in one token by "batch norm" statistics.
    """

    layout: Literal["grid", "packed", "tokens", "list", "film"] = "grid"
    patch: int = 2
    cells: bool = False
    scale: Literal["config", "channel", "batch norm"] = "config"


@dataclass(frozen=True)
class Family:
    """One denoiser class. `declare_family(class_name, Family(...))` makes it known.

    Attributes:
        name: the row in tables of defaults, and in reports.
        meets: where text and image meet, in the order in which the blocks run.
        denoisers: the pipeline's attributes that hold denoisers; all but one may be None.
        sample, timestep, text, mask: names of those arguments of the denoiser's forward; mask is the text's.
        texts: further arguments that belong to the text, one entry a row.
        ids: (argument, axes): text positions [L, k], which count from 0 on these axes.
        encoded: argument -> its place in what `encode_prompt` returns; `encode` for the odd ones.
        prompts: how many prompts `encode_prompt` takes.
        as_negative: a negative is encoded as the pipeline encodes its own; the places are the negative's then.
        modular: argument -> the output of a modular pipeline's text block that it gets, the text first; empty where
            modular pipelines of this denoiser are not served.
        settings: parameter of `encode_prompt` -> locals of the pipeline's call that hold it under other names, with |.
        guidance: rows of the batch, or "apart" where guidance is a call of its own. flag: local of the pipeline's call
            that says whether this step is guided. negative: local whose identity marks guidance's own call.
        text_first: order of text and image in the joint sequence. registers: tokens of the model's own before the text.
        cut: the model counts its text before the blocks, so further texts must leave behind the last one.
        residuals: arguments that are added to the whole sequence behind blocks, as ControlNets do.
        rows_only: a heard text cannot join, so that only `form="rows"` serves.
        rows_at: arguments whose rows are not their first dimension, with the one that they are.
        widens: padding behind a text is masked by its length, so that a batch may be padded for a longer one.
        masked: the model wants its text mask even where it hides nothing.
        alone: (beginning of layer names, kind) for layers that see text or image alone.
        still: the text's way to the blocks depends on no timestep, so it is heard once a call.
        lengths, tokens: (adapter, inputs) -> text tokens of each row, image tokens; for one-sequence models.
        place: (inputs, text) -> inputs with another text, where naming the arguments is not enough.
        wrap: (pipe, prompt, the call's arguments) -> what is really read, where a pipeline puts a prompt into a
            template.
        dropped: attribute of the pipeline, or of its text block, with how many tokens of the template are taken off.
        columns: the tokenizer's columns are the text's; False where texts are put in another order.
        rewords: and nothing else but a pooled vector holds the prompt, so that a plugin may change its embeddings.
        tokenizer: the pipeline's attribute, prompt: the call's argument whose tokens the columns are.
        latent: how latents lie in the sample.
        linear: the image attends to itself linearly, so that there are no logits to edit.
        rotary: (config's name of the features of each axis: a first one, rows, columns; base of the frequencies or its
            name in the config) where neighbouring features of queries and keys are turned by position.
        refuse: (predicate of the pipeline and the inputs, sentence) for what cannot be served.
        adapter: the class that says what no field can, None for none.
        solve: how the pipeline's loop calls the denoiser, for tasks with a loop of their own (`invert`, `erase`,
            `stylize`); None where that is not known.
    """

    name: str
    meets: tuple[Meet, ...] = ()
    denoisers: tuple[str, ...] = ("transformer",)
    sample: str = HIDDEN
    timestep: str = "timestep"
    text: str = TEXT
    mask: str | None = None
    texts: tuple[str, ...] = ()
    ids: tuple[str, tuple[int, ...]] | None = None
    encoded: Mapping[str, int] = field(default_factory=dict[str, int])
    encode: Callable[[Any, list[str], Any], Any] | None = None
    prompts: int = 1
    as_negative: bool = False
    modular: Mapping[str, str] = field(default_factory=dict[str, str])
    settings: Mapping[str, str] = field(default_factory=dict[str, str])
    guidance: Guidance = "uncond, cond"
    flag: str = "do_classifier_free_guidance"
    negative: str = "negative_prompt_embeds"
    text_first: bool = True
    registers: int = 0
    cut: bool = False
    residuals: tuple[str, ...] = ()
    rows_only: bool = False
    rows_at: Mapping[str, int] = field(default_factory=dict[str, int])
    widens: bool = False
    masked: bool = False
    alone: tuple[tuple[str, Alone], ...] = ()
    still: bool = True
    lengths: Callable[[Any, Mapping[str, Any]], list[int]] | None = None
    tokens: Callable[[Any, Mapping[str, Any]], int] | None = None
    place: Callable[[Any, Any], Any] | None = None
    wrap: Callable[[Any, str, Mapping[str, Any]], str] | None = None
    dropped: str = ""
    columns: bool = True
    rewords: bool = False
    tokenizer: str = "tokenizer"
    prompt: str = "prompt"
    latent: Latent = Latent()
    linear: bool = False
    rotary: tuple[str, float | str] | None = None
    refuse: tuple[tuple[Callable[[Any, Mapping[str, Any]], bool], str], ...] = ()
    adapter: Any = None
    solve: Solve | None = None

    def __post_init__(self) -> None:
        if not self.name or not isinstance(self.name, str):
            raise SettingTypeError(f"Family({self.name!r}): a name is needed")
        if len({meet.how == "joint" for meet in self.meets}) > 1:
            raise SettingError(f"Family({self.name!r}): its meets are all 'joint', or none is")

    @property
    def how(self) -> How | None:
        """Where text and image meet; None where an adapter knows."""
        return self.meets[0].how if self.meets else None


@dataclass(frozen=True)
class Refused:
    """A denoiser class that cannot be edited, or not by that way, with the reason and what to do instead."""

    reason: str


def names_of(denoiser: Any) -> list[str]:
    """Class names under which something may be said of a denoiser, the nearest first.

    A subclass that somebody made of a class of diffusers is called as that is; one of diffusers' own, such as
    DreamLite's UNet, may be called in another way.
    """
    names: list[str] = []
    for kind in type(denoiser).__mro__:
        names.append(kind.__name__)
        if kind.__module__.startswith("diffusers."):
            break
    return names

"""What a plugin is: pure data until a graft binds it, and then edits, branches and updates for each step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

import torch

from ..attention.edit import Edit
from ..attention.errors import SettingError, SettingTypeError
from ..attention.layer import AttentionLayer
from ..attention.plain import plain, plainly
from ..attention.seam import Task
from ..attention.step import Rows, Step
from .rotary import Rotary

Made = TypeVar("Made")
Probe = Callable[[torch.Tensor], torch.Tensor | None]
"""probe(z) runs the denoiser on the conditional rows of latent z [n, C, h, w] and returns its prediction,
or None if an edit ended it early."""


@dataclass(frozen=True)
class Branch:
    """Extra batch rows, one for each picture or one for all, that copy a group and may differ by edits, latent or text.

    Attributes:
        name: group name for `step.rows`.
        like: "cond" or "uncond", the group that is copied; edits for that group run on the branch too.
        latent: gives the branch's own latent [n, C, h, w] (in the scheduler's space), or None for the same one.
        text: its own text embeddings [1 or n, L, D], as the denoiser takes them.
        words: another text with all of its arguments, n = 1 or one a prompt.
        shared: its latent and its text are one for all pictures: one row, if nothing else tells the pictures apart.
    """

    name: str
    like: str = "cond"
    latent: Callable[[Step], torch.Tensor] | None = None
    text: torch.Tensor | None = None
    shared: bool = False
    words: Text | None = None

    @property
    def late(self) -> bool:
        """Whether its rows are the same as those that it copies until an edit touches them."""
        return self.latent is None and self.text is None and self.words is None

    def rows(self, pictures: int, alike: bool) -> int:
        """How many rows it takes beside a group of `pictures`; `alike`: nothing else tells the pictures apart."""
        return 1 if self.shared and alike else pictures


@dataclass(frozen=True)
class Prompt:
    """What the running pipeline call was asked for, as far as can be seen from outside.

    Attributes:
        texts: one string a picture (prompts repeated for `num_images_per_prompt`), None for a call with embeddings.
        pictures: pictures in this call.
        guidance_scale: the call's, None where the pipeline has none.
        prompts: how many prompts the pictures come from, None where that cannot be seen.
        guided: whether this call runs classifier-free guidance.
        negative: the call's own `negative_prompt`, as given.
        from_noise: False where the call starts from a picture that it noises, as image-to-image and inpainting do.
        second: whether a further text encoder was given a prompt of its own (`prompt_2`).
        part: where a task makes several calls, which of its prompts are this call's, and how many it has.
    """

    texts: list[str] | None
    pictures: int
    guidance_scale: float | None = None
    prompts: int | None = None
    guided: bool = False
    negative: Any = None
    from_noise: bool = True
    second: bool = False
    part: tuple[Sequence[int], int] | None = None

    def share(self, prompts: int) -> tuple[Sequence[int], int]:
        """Numbers of this call's `prompts` prompts among all that were asked for, and how many those are."""
        return self.part or (range(prompts), prompts)


@dataclass(frozen=True)
class Text:
    """Encoded texts.

    Attributes:
        embeddings: [n, L, D] as the denoiser takes them; [n, L, layers, D] for those that take several layers'.
        mask: [n, L] boolean, False at padding that the model hides from attention; None where it hides none.
        more: the denoiser's other arguments that belong to these texts, by name, [n, ...].
        pooled: those that pool a text into one vector, [n, D]; only rows of their own take them.
    """

    embeddings: torch.Tensor
    mask: torch.Tensor | None = None
    more: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    pooled: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])


@dataclass(frozen=True)
class Words:
    """Texts of the conditional rows as the running call gives them to the denoiser.

    Attributes:
        rows: one a row, [L, D], or [L, layers, D]; some models take rows of different lengths.
        mask: [n, L] boolean, False at padding that the model hides from attention; None where it hides none.
        pooled: those that pool a text into one vector, by argument, [n, P].
        given: the pipeline's own tensors, the same objects as long as the pipeline gives the same.
    """

    rows: Sequence[torch.Tensor]
    mask: torch.Tensor | None = None
    pooled: Mapping[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    given: Sequence[torch.Tensor] = ()

    def same(self, other: Words | None) -> bool:
        """Whether the pipeline gave the very same."""
        return other is not None and len(self.given) == len(other.given) and all(
            a is b for a, b in zip(self.given, other.given, strict=True)
        )  # fmt: skip


class Session(Protocol):
    """What a graft hands to its plugins. Everything but `layers` and `pictures` is only valid while sampling."""

    @property
    def layers(self) -> Sequence[AttentionLayer]:
        """Every attention layer of the denoiser in execution order."""
        ...

    @property
    def latent_channels(self) -> int:
        """Channels of the latent; the prediction may have more (learned variance), the input too (inpainting)."""
        ...

    @property
    def latent_size(self) -> tuple[int, int]:
        """(height, width) of the running call's latents; `Step.size` counts tokens, which may be patches of these."""
        ...

    @property
    def prompt(self) -> Prompt:
        """The running call's prompt."""
        ...

    @property
    def rotary(self) -> Rotary | None:
        """How the model turns queries and keys by position; None where it does not, or nobody said."""
        ...

    @property
    def family(self) -> str:
        """The model family, such as "sd15", "sdxl" or "flux"; "unet" for a UNet of unknown text width."""
        ...

    @property
    def rows_only(self) -> bool:
        """Whether further texts can only be rows of the batch here."""
        ...

    @property
    def text_width(self) -> int:
        """Width of the text embeddings that the running call gives to the denoiser."""
        ...

    @property
    def encoders(self) -> int:
        """Prompts that the pipeline's call takes, one for each of its text encoders."""
        ...

    @property
    def text_dims(self) -> int:
        """Dimensions of the text embeddings, rows included: 3, or 4 where the denoiser takes several layers of them."""
        ...

    @property
    def text(self) -> torch.Tensor:
        """The text embeddings that the running call gives to the denoiser, all rows, [B, L, D]: the same object as
        long as the pipeline gives the same.
        """
        ...

    @property
    def words(self) -> Words:
        """Texts of the conditional rows of the running call, as the pipeline gives them."""
        ...

    @property
    def rewords(self) -> bool:
        """Whether `Plugin.reword` is served: a word of the prompt is columns of the text, and of nothing else."""
        ...

    def encode(self, texts: Sequence[str], *, keep: bool = True, prompts: bool = False) -> Text:
        """The texts by the pipeline's own encoders, as its denoiser takes them; remembered unless `keep` is False.

        Args:
            prompts: as it reads a prompt, where it reads a negative in another way.
        """
        ...

    def remember(self, key: Any, make: Callable[[], Made]) -> Made:
        """What `make` gives, made once for a key as long as the pipeline's text encoders stay what they are, over all
        calls and grafts.
        """
        ...

    def knows(self, text: str) -> bool:
        """Whether the tokenizer reads the text without an unknown token."""
        ...

    def pooled(self, text: str, *, masked: bool = False) -> torch.Tensor:
        """A text as the one vector that the first text encoder pools it into, [1, D].

        Args:
            masked: of each of its n tokens in turn, the text with token 0 in its place, [n, D].
        Raises:
            UnsupportedPipelineError: a text encoder that pools nothing.
        """
        ...

    def encode_text(self, texts: Sequence[str]) -> torch.Tensor:
        """The embeddings of `encode`, [n, L, D]."""
        ...

    def layer_text(self, text: Text) -> Text:
        """`text` as the blocks get it whose layers attend across, behind the denoiser's own projection of captions."""
        ...

    def token_spans(self, text: str, phrase: str) -> list[list[int]]:
        """Columns of each occurrence of `phrase` in the denoiser's text tokens for the prompt `text`.

        Raises:
            ConceptError: the text encoder cuts the prompt off before it.
        """
        ...

    def token_range(self, text: str) -> range:
        """Columns of the prompt's own tokens, without start mark, end mark and padding."""
        ...

    def tokens(self, text: str) -> list[str]:
        """The prompt's tokens as strings, start and end marks included, padding excluded."""
        ...

    def encode_image(self, image: Any, size: tuple[int, int]) -> torch.Tensor:
        """Latent [1, C, h, w] (the posterior's mode, scaled) of a picture brought to `size` = latent (h, w)."""
        ...

    def signal(self, step: Step) -> tuple[float, float]:
        """(alpha, sigma) of the scheduler at this step: a noised latent is alpha * clean + sigma * noise."""
        ...

    def skip(self, reason: str) -> None:
        """Count a skipped update for the report."""
        ...

    def tell(self, plugin: Plugin, values: Callable[[], Mapping[str, Any]]) -> None:
        """What `Graft.report()` asks of the running call for a plugin; use `Plugin.tell`."""
        ...


class Plugin:
    """Base of every technique. A plugin never touches processors, modules or the scheduler.

    One object may be in any number of grafts, and in calls of several threads, at once. What belongs to a model is
    handed from `bind` to `edits`, which are asked one after the other; what belongs to a pipeline call is kept in
    `step.notes` under the plugin, from `begin` on.

    Attributes:
        films: whether it also works on pipelines that make films, whose latents and maps have frames.
        beside_guidance: whether `branches` is asked in the call, too, that guidance makes apart; its rows are "uncond".
        wraps: classes of the denoiser's modules in whose place `around` runs.

    Args:
        start, end: fractions of the run's steps; outside [start, end) nothing of the plugin runs.
    Raises:
        SettingError: not 0 <= start <= end <= 1.
    """

    films: bool = False
    beside_guidance: bool = False
    wraps: tuple[type, ...] = ()

    def __init__(self, *, start: float = 0.0, end: float = 1.0) -> None:
        if not 0.0 <= finite(start, "start") <= finite(end, "end") <= 1.0:
            raise SettingError(f"start={start}, end={end}: fractions of the steps, 0 <= start <= end <= 1")
        self.start, self.end = float(start), float(end)
        self._told: Callable[[], Mapping[str, Any]] = dict

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__init__ = plainly(cls.__init__)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.settings().items())})"

    @property
    def neutral(self) -> bool:
        """True where the settings change nothing; then the graft leaves the pipeline alone."""
        return False

    def moves(self, step: Step) -> bool:
        """Whether `latent` is to be called at this step; needs the pipeline's own scheduler."""
        return type(self).latent is not Plugin.latent

    def bind(self, session: Session) -> None:
        """Called at attach: check the settings against the pipeline, and note what `edits` needs of it."""

    def unbind(self) -> None:
        """Called at detach."""

    def begin(self, session: Session, step: Step) -> None:
        """Called once a pipeline call, before its first step is computed: encode, resize, begin `step.notes[self]`."""

    def finish(self) -> None:
        """Called after the last step of a pipeline call that ran through: drop what was only for it."""

    def within(self, step: Step) -> bool:
        """Whether the plugin's window holds this step."""
        return step.within(self.start, self.end)

    def edits(self) -> Sequence[Edit]:
        """The edits of attention, asked once at attach."""
        return ()

    def unseen(self, step: Step) -> torch.Tensor | None:
        """Indices of the image's tokens that nothing attends to at this step, in no layer; None if there are none.

        Rows that differ in these tokens alone run as one, with `Step.tail`.
        """
        return None

    def around(self, step: Step) -> Task | None:
        """What runs in place of each module of the classes in `wraps` at this step, None for the module itself."""
        return None

    def streams(self, step: Step) -> Sequence[Text]:
        """Texts, n = 1 or one a prompt, that the model is to hear beside the prompt's own at this step.

        Where text and image are one sequence, their tokens stand in front of the prompt's (`AttentionCall.streams`),
        so that the model's own layers see them; the plugin's edits must keep them out of everybody's attention.
        Elsewhere they are in `Step.heard`, as the layers that attend to text get them.
        """
        return ()

    def reword(self, step: Step, words: Words) -> Words | None:
        """Other embeddings in the place of the prompt's, or None to leave them; see `Session.rewords`.

        Args:
            words: of the conditional rows, as the pipeline or an earlier plugin gives them. What is returned has the
                same shapes; the same object at the next step saves the work of putting it in again.
        """
        return None

    def branches(self, step: Step) -> Sequence[Branch]:
        """Extra rows wanted at this step."""
        return ()

    def latent(self, step: Step, latent: torch.Tensor, probe: Probe) -> torch.Tensor | None:
        """A moved latent, or None to leave it.

        Args:
            step: phase "latent".
            latent: [n, C, h, w], at least float32, in the scheduler's space (not yet scaled for the model).
            probe: runs the denoiser on the conditional rows with gradients enabled and its parameters frozen;
                use `torch.autograd.grad`, never `backward`.
        """
        return None

    def combine(self, step: Step, prediction: torch.Tensor, rows: Rows) -> torch.Tensor | None:
        """What to add to the guided prediction, [n, C, h, w]; `prediction` has all rows, at least float32."""
        return None

    def report(self) -> Mapping[str, Any]:
        """Plain values: losses, coverage, chosen tokens; of the last call that told any."""
        return self._told()

    def tell(self, session: Session, values: Callable[[], Mapping[str, Any]]) -> None:
        """Say what `report`, and `Graft.report()` of the running call's graft, are to ask; it must hold no call."""
        self._told = values
        session.tell(self, values)

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments as JSON can hold them, for metadata; nothing of them differs from run to run."""
        named = {name for kind in type(self).__mro__ for name in inspect.signature(kind.__init__).parameters}
        return {name: _plain(value) for name, value in vars(self).items() if name in named}


def _plain(value: Any) -> Any:
    """JSON of a setting; a mask, a tensor or a function is named by its kind, since its address means nothing later."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in cast("Sequence[Any]", value)]
    shape = getattr(value, "shape", None)
    name = getattr(value, "__qualname__", type(value).__name__)
    return name if shape is None else f"{name} {list(shape)}"


def listed(layers: Any) -> list[Any]:
    """A choice of layers as a list; one name is a list of one.

    Raises:
        SettingTypeError: neither a name nor a list.
    """
    if not isinstance(layers, Iterable):
        raise SettingTypeError(f"layers={layers!r}: a name, or a list of names and numbers, is needed")
    return [layers] if isinstance(layers, str) else list(cast("Iterable[Any]", layers))


def finite(value: Any, name: str, low: float = -float("inf"), high: float = float("inf")) -> float:
    """`value` as a float in [low, high].

    Raises:
        SettingTypeError: not a number. SettingError: NaN, infinite or out of range.
    """
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SettingTypeError(f"{name}={value!r}: a number is needed")
    if not (low <= value <= high) or value in (float("inf"), -float("inf")):
        raise SettingError(f"{name}={value}: must be finite and within [{low:g}, {high:g}]")
    return float(value)

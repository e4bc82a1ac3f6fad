"""Where a pipeline looks for the words of a prompt: attention maps while it draws, and masks of what it drew."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoPipelineForImage2Image
from PIL import Image

from ...attention.edit import Edit
from ...attention.errors import SettingError, SettingTypeError, UnsupportedPipelineError
from ...attention.maps import SELF_TOKENS, LayerChoice, MapCapture, concept_maps
from ...attention.pictures import as_rgb
from ...attention.plain import plainly
from ...attention.regions import assign, propagate
from ...attention.step import Rows, Step
from ...plugins.base import Plugin, Session, finite
from ...plugins.concepts import Concept, Found, find_concept
from ...plugins.defaults import measured
from ..families import adapter_for
from ..families.base import has_ip_adapter
from ..grafting.graft import graft
from .generate import check_call, resolve_seed, sample
from .overlay import overlay, sheet, strip

_IMG2IMG_STEPS = 20


class AttentionMaps(Mapping[str, torch.Tensor]):
    """Cross-attention by word of one picture: `maps["ball"]` is [h, w], float32 on the CPU, the mean over the steps.

    Attributes:
        image: the picture that was drawn while looking.
        steps: by word, [T, h, w]: the map of each step, probabilities (0 to 1).
        notes: by word, what to know of its choice, such as a word that occurs twice.
    """

    def __init__(self, image: Image.Image, steps: dict[str, torch.Tensor], notes: dict[str, str]) -> None:
        self.image, self.steps, self.notes = image, steps, notes

    def __getitem__(self, word: str) -> torch.Tensor:
        return self.steps[word].mean(0)

    def __iter__(self) -> Iterator[str]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def overlay(self, word: str) -> Image.Image:
        """The picture with the word's map laid over it."""
        return overlay(self.image, self[word])

    def strip(self, word: str, count: int = 8) -> Image.Image:
        """The word's map at `count` steps, first to last, side by side, each scaled by its own maximum."""
        return strip(self.steps[word], count)

    def picture(self, count: int = 8) -> Image.Image:
        """A sheet: the picture, then for each word its overlay and its strip."""
        return sheet(self.image, {word: (self.overlay(word), self.strip(word, count)) for word in self})


class AttentionMasks(Mapping[str, torch.Tensor]):
    """Disjoint masks by word of one picture: `masks["ball"]` is [h, w], boolean, on the grid of the self-attention.

    Attributes:
        image: the picture.
        scores: by word, [h, w] in 0 ... 1: what was compared.
    """

    def __init__(self, image: Image.Image, masks: dict[str, torch.Tensor], scores: dict[str, torch.Tensor]) -> None:
        self.image, self.scores, self._masks = image, scores, masks

    def __getitem__(self, word: str) -> torch.Tensor:
        return self._masks[word]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def mask(self, word: str) -> Image.Image:
        """The word's mask in the size of the picture: mode L, white inside; `erase` takes it."""
        small = Image.fromarray(self._masks[word].numpy().astype("uint8") * 255)
        return small.resize(self.image.size, Image.Resampling.BICUBIC).point([0] * 128 + [255] * 128)

    def picture(self) -> Image.Image:
        """A sheet: the picture, then for each word its score and its mask laid over it."""
        rows = {w: (overlay(self.image, self.scores[w]), overlay(self.image, self[w].float())) for w in self}
        return sheet(self.image, rows)


class _Watch(Plugin):
    """Keeps what the pipeline's own calls attend to; nothing it computes changes by a bit."""

    def __init__(self, words: Sequence[Concept], layers: LayerChoice, affinity: bool = False) -> None:
        super().__init__()
        self.words, self.affinity = words, affinity
        self.layers: LayerChoice = layers
        self.found: list[Found] = []
        self.maps: list[torch.Tensor] = []
        self.affinities: list[torch.Tensor] = []
        self.marked = False

    def bind(self, session: Session) -> None:
        self.cross = MapCapture(session.layers, "predict", choice=self.layers)
        self.own = MapCapture(session.layers, "predict", kind="self", tokens=SELF_TOKENS) if self.affinity else None

    def edits(self) -> Sequence[Edit]:
        return (self.cross,) if self.own is None else (self.cross, self.own)

    def begin(self, session: Session, step: Step) -> None:
        texts = session.prompt.texts
        self.found = [find_concept(session, texts[0] if texts else None, word) for word in self.words]
        self.marked = bool(texts) and session.token_range(texts[0]).start > 0
        self.maps, self.affinities = [], []

    def combine(self, step: Step, prediction: torch.Tensor, rows: Rows) -> None:
        self.maps.append(self.cross.averaged()[0].cpu())
        self.cross.clear()
        if self.own is not None:
            self.affinities.append(self.own.averaged()[0].flatten(1).T.cpu())
            self.own.clear()

    def columns(self, background: bool = False) -> list[list[int]]:
        """Columns of each word, and of the start mark, whose map is the background's."""
        return [found.columns for found in self.found] + ([[0]] if background and self.marked else [])


@plainly
def attention_maps(
    pipe: Any,
    prompt: str,
    words: Sequence[Concept],
    *,
    plugins: Sequence[Plugin] = (),
    layers: LayerChoice = "auto",
    seed: int | None = 0,
    steps: int = 25,
    guidance: float | None = None,
    **call: Any,
) -> AttentionMaps:
    """Draw a picture and keep where each word looked, at every step.

    Args:
        pipe: a text-to-image pipeline. Where text and image are one sequence, the maps are what the image looks at the
            text, so that they sum to less than 1.
        prompt: one prompt.
        words: words or phrases of it, or token columns, whose maps are named by their list: `maps["[3]"]`.
        plugins: techniques to watch at work.
        layers: whose maps are averaged, see `diffgraft.attention.maps.choose_layers`.
        seed, steps, guidance, call: as for `generate`.
    Raises:
        ConceptError: a word is not in the prompt.
    Example:
        >>> maps = dg.attention_maps(pipe, "a blue ball and a yellow star , night", ["ball", "star"])
        >>> maps.picture().save("maps.png")
    """
    watch = _Watch(_words(words), layers)
    with graft(pipe, *plugins, watch):
        (image,) = sample(pipe, [prompt], [resolve_seed(seed)], steps=steps, guidance=guidance, **call)
    taken = [concept_maps(m, watch.columns(), normalisation="none", smoothing="none") for m in watch.maps]
    stacked = torch.stack(taken, 1)
    names = [found.concept for found in watch.found]
    notes = {found.concept: found.note for found in watch.found if found.note}
    return AttentionMaps(image, dict(zip(names, stacked, strict=True)), notes)


@plainly
def attention_masks(
    pipe: Any,
    prompt: str,
    words: Sequence[Concept],
    *,
    image: Any = None,
    noise: float = 0.2,
    margin: float = 0.1,
    power: int | None = None,
    layers: LayerChoice = "auto",
    seed: int | None = 0,
    steps: int = 25,
    guidance: float | None = None,
    **call: Any,
) -> AttentionMasks:
    """Masks of the words in a picture, without training: AttenCraft's (arXiv 2405.17965), for any number of words.

    The picture is noised a little and denoised again; each word's cross-attention is spread along the
    self-attention, and a cell goes to the word that leads all others, and the background, by `margin`.

    Args:
        pipe: a text-to-image pipeline that diffusers can turn into image-to-image.
        prompt: what is to be seen.
        words: words or phrases of the prompt, or token columns.
        image: the picture (PIL, path, array or tensor); None draws it from the prompt first (`seed`, `steps`,
            `guidance`, `call` as for `generate`).
        noise: share of the schedule to look at, 0.05 ... 1. AttenCraft draws a step below 0.3.
        margin: 0 ... 1; larger ones leave more cells to nobody.
        power: of the self-attention, 1 or more: how far a word spreads within its thing. None is 4, as in AttenCraft,
            and 1 on the picture book, whose self-attention reaches far: 4 finds no cell for 5 of 24 things there.
    Raises:
        ConceptError: a word is not in the prompt. UnsupportedPipelineError: no image-to-image form, or no
            self-attention. SettingError, SettingTypeError: a value out of range, not a picture.
    """
    noise, margin = finite(noise, "noise", 1 / _IMG2IMG_STEPS, 1), finite(margin, "margin", 0, 1)
    if power is None:
        power = int(measured("attention_masks: power", adapter_for(pipe).family))
    if isinstance(power, bool) or not isinstance(power, int) or power < 1:
        raise SettingError(f"power={power!r}: a whole number, 1 or more, is needed")
    watch, number = _Watch(_words(words), layers, affinity=True), resolve_seed(seed)
    check_call(pipe, call)
    if not isinstance(prompt, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise SettingTypeError(f"a prompt is a text, not {type(prompt).__name__}")
    if image is None:
        (image,) = sample(pipe, [prompt], [number], steps=steps, guidance=guidance, **call)
    image = as_rgb(image)
    if min(image.size) < pipe.vae_scale_factor:
        raise SettingError(f"a picture of {image.width}x{image.height}: at least {pipe.vae_scale_factor} pixels a side")
    _look_again(pipe, watch, prompt, image, noise, number)
    cross = torch.stack(watch.maps).mean(0)
    concepts = concept_maps(cross, watch.columns(background=True), normalisation="none", smoothing="none")
    scores = propagate(concepts, torch.stack(watch.affinities).mean(0), power)
    masks = assign(scores, margin)
    names = [found.concept for found in watch.found]
    for name, mask in zip(names, masks, strict=False):
        if not mask.any():
            warnings.warn(f"nowhere in the picture does {name!r} lead by {margin}: lower margin=", stacklevel=2)
    return AttentionMasks(image, dict(zip(names, masks, strict=False)), dict(zip(names, scores, strict=False)))


def _look_again(pipe: Any, watch: _Watch, prompt: str, image: Image.Image, noise: float, seed: int) -> None:
    """Denoise a slightly noised picture without guidance, watched."""
    adapter = adapter_for(pipe)
    if has_ip_adapter(adapter.denoiser):
        raise UnsupportedPipelineError(
            "the loaded IP-Adapter wants a picture of its own, which is not given here: call pipe.unload_ip_adapter() "
            "first, and give the picture that was drawn as image="
        )
    config: Any = adapter.denoiser.config
    if config.in_channels > adapter.latent_channels:
        raise UnsupportedPipelineError(
            f"{type(pipe).__name__} holds an inpainting model, which wants more than the picture: use a plain one"
        )
    try:  # what a ControlNet would add is not in the picture
        again: Any = AutoPipelineForImage2Image.from_pipe(pipe, controlnet=None)
    except (ValueError, TypeError) as error:
        raise UnsupportedPipelineError(
            f"diffusers has no image-to-image form of {type(pipe).__name__}: use attention_maps"
        ) from error
    again.set_progress_bar_config(disable=True)
    with graft(again, watch):
        again(
            prompt=prompt, image=image, strength=noise, num_inference_steps=_IMG2IMG_STEPS,
            guidance_scale=1.0, generator=torch.Generator().manual_seed(seed), output_type="latent",
        )  # fmt: skip


def _words(words: Any) -> list[Concept]:
    if isinstance(words, str) or not isinstance(words, Sequence) or not words:
        raise SettingError(f"words={words!r}: a list of words is needed, such as ['ball', 'star']")
    return list(words)

"""Style from a reference row: StyleID (arXiv 2312.09008), StyleAligned (2312.02133), or an IP-Adapter's style block.

The reference is one more batch row that is sampled along, for all pictures that share it, so no keys or values are
stored: its latent at each step is the noised style picture, or a point of its inverted trajectory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch

from ..attention.call import AttentionCall
from ..attention.edit import Edit
from ..attention.errors import SettingError, SettingTypeError, UnsupportedPipelineError
from ..attention.layer import AttentionLayer, Place
from ..attention.seam import Task
from ..attention.step import Rows, Step
from .base import Branch, Plugin, Probe, Session, Text, finite, listed
from .reference import Reference, Sight
from .rotary import Rotary
from .style_forms import UNPROMPTED, Operands, adain, preserved_query, reference_of, shared_attention
from .style_joint import JointStyle, Manner
from .style_norms import SharedNorms

Method = Literal["styleid", "stylealigned", "ip_adapter"]
Layers = Literal["decoder", "up", "all"] | Sequence[int]
STYLE_BLOCK = "up_blocks.0.attentions.1"
"""Where an IP-Adapter passes on style (InstantStyle, arXiv 2404.02733)."""
# -- the edits -----------------------------------------------------------------------------------------------------


class AttendTo(Edit):
    """Rows of `targets` attend to the keys and values of `source` instead of their own."""

    traced = True

    def __init__(self, source: str, targets: tuple[str, ...], where: Callable[[AttentionLayer], bool]) -> None:
        self.source, self.targets, self.where = source, targets, where

    def selects(self, layer: AttentionLayer) -> bool:
        return self.where(layer)

    def qkv(self, call: AttentionCall) -> None:
        k, v, source = call.k.clone(), call.v.clone(), call.rows[self.source]
        for name in self.targets:
            k[call.rows[name]], v[call.rows[name]] = call.k[source], call.v[source]
        call.k, call.v = k, v


class ImagePrompt(Edit):
    """Scales what an IP-Adapter adds, by block, "" for all; in blocks that are not named it adds nothing."""

    every_call, traced = True, True

    def __init__(self, scales: Mapping[str, float]) -> None:
        self.scales, self.factor = scales, 0.0

    def selects(self, layer: AttentionLayer) -> bool:
        return hasattr(getattr(layer.module, "processor", None), "to_k_ip")

    def active(self, layer: AttentionLayer, step: Step) -> bool:
        return True  # where another plugin looks at attention, it is to see what the model will do

    def planned(self, layer: AttentionLayer, step: Step) -> Edit:
        here = ImagePrompt(self.scales)
        named = (s for block, s in self.scales.items() if not block or layer.name.startswith(f"{block}."))
        here.factor = next(named, 0.0)
        return here

    def out(self, call: AttentionCall, out: torch.Tensor) -> torch.Tensor:
        return out if call.number == 0 else out * self.factor


@dataclass(frozen=True, eq=False)
class _Rows:
    """Of a batch with reference rows, as tensors, so that a layer takes what it needs in one operation.

    Attributes:
        style, content: of each row the row of its style and of its content; content is None where there is none.
        keys: the same as style, but a reference's row is its own.
        references: [n, 1, 1, 1], which rows are references.
    """

    style: torch.Tensor
    keys: torch.Tensor
    content: torch.Tensor | None
    references: torch.Tensor

    @classmethod
    def of(cls, rows: Rows, device: torch.device | None) -> _Rows:
        """Of groups of rows; where a group has several rows, its i-th goes with the i-th of others."""
        ordered = sorted(rows.items(), key=lambda pair: pair[1].start)
        each = [(name, i) for name, own in ordered for i in range(own.stop - own.start)]

        def partners(groups: Sequence[str]) -> torch.Tensor:
            found = [(rows[group], i) for group, (_, i) in zip(groups, each, strict=True)]
            return torch.tensor([own.start + i % (own.stop - own.start) for own, i in found], device=device)

        own = torch.tensor([name in ("style", "content", UNPROMPTED) for name, _ in each], device=device)
        style = partners([name if name == UNPROMPTED else reference_of(name, rows) for name, _ in each])
        content = partners(["content"] * len(each)) if "content" in rows else None
        keys = torch.where(own, torch.arange(len(each), device=device), style)
        return cls(style, keys, content, own[:, None, None, None])

    @classmethod
    def leading(cls, rows: Rows, device: torch.device | None) -> _Rows:
        """Of groups in which the first row is the reference of all."""
        ordered = sorted(rows.values(), key=lambda own: own.start)
        first = torch.tensor([own.start for own in ordered for _ in range(own.start, own.stop)], device=device)
        return cls(first, first, None, torch.zeros_like(first)[:, None, None, None])


class _Restyle(Edit):
    """The edit of StyleID and StyleAligned: `styled` says what the rows attend with."""

    traced = True
    batch: _Rows | None = None

    def __init__(self, plugin: StyleInjection) -> None:
        self.plugin = plugin

    def selects(self, layer: AttentionLayer) -> bool:
        return layer.kind == "self" and layer.name in self.plugin.chosen

    def active(self, layer: AttentionLayer, step: Step) -> bool:
        return self.styles(step)

    def styles(self, step: Step) -> bool:
        """Whether this call has a reference."""
        if not self.plugin.leads:
            return step.phase == "predict" and not step.rows.keys().isdisjoint(("style", UNPROMPTED))
        return step.phase == "predict" and any(rows.stop - rows.start > 1 for rows in step.rows.values())

    def planned(self, layer: AttentionLayer, step: Step) -> Edit | None:
        if not self.active(layer, step):
            return None
        made: dict[Any, _Restyle] = step.notes.setdefault((self.plugin, "planned"), {})
        key = tuple((name, rows.start, rows.stop) for name, rows in step.rows.items())
        if key not in made:  # one for all layers
            made[key] = type(self)(self.plugin)
            made[key].batch = self.rows_in(step.rows, step.device)
        return made[key]

    def qkv(self, call: AttentionCall) -> None:
        if self.plugin.strength == 1:
            call.q, call.k, call.v, call.mask = self.styled(call)

    def out(self, call: AttentionCall, out: torch.Tensor) -> torch.Tensor:
        if self.plugin.strength == 1:
            return out
        return torch.lerp(out, call.attend(*self.styled(call)), self.plugin.strength)

    def styled(self, call: AttentionCall) -> Operands:
        raise NotImplementedError

    def rows_of(self, call: AttentionCall) -> _Rows:
        """Which row goes with which; known beforehand where the edit was planned."""
        return self.rows_in(call.rows, call.q.device) if self.batch is None else self.batch

    def rows_in(self, rows: Rows, device: torch.device | None) -> _Rows:
        """The same for groups of rows."""
        return _Rows.leading(rows, device) if self.plugin.leads else _Rows.of(rows, device)


class _StyleID(_Restyle):
    def styled(self, call: AttentionCall) -> Operands:
        rows, query = self.rows_of(call), call.q
        if rows.content is not None:
            query = preserved_query(query, query.index_select(0, rows.content), self.plugin.gamma)
        query = torch.where(rows.references, call.q, query * self.plugin.temperature)
        own = rows.keys
        return query, call.k.index_select(0, own), call.v.index_select(0, own), call.mask


class _StyleAligned(_Restyle):
    def styled(self, call: AttentionCall) -> Operands:
        # The reference row shares with itself: keys twice, which leaves its attention what it is.
        q, k, v, rows = call.q, call.k, call.v, self.rows_of(call)
        q_ref, k_ref, v_ref = (each.index_select(0, rows.style) for each in (q, k, v))
        return shared_attention(q, k, v, q_ref, k_ref, v_ref, self.plugin.shift)


@dataclass(frozen=True)
class Call:
    """The references in one pipeline call, the text of their rows, and whether guidance has one text for all."""

    style: Sight
    content: Sight | None
    text: Text
    alike: bool


# -- the plugin ----------------------------------------------------------------------------------------------------


class StyleInjection(Plugin):
    """Gives pictures the style of another one while they are sampled.

    Args:
        style: a picture or its path, latents [1 or n, C, h, w], or an `Inversion` with its trajectory, on the timesteps
            that will be sampled. A picture needs no inversion: its row is the picture under noise (`generator`). None
            with "stylealigned": the call's pictures are a set in one style, and the first one leads.
        method: "styleid" (keys and values of the style), "stylealigned" (shared with it) or "ip_adapter" (what the
            pipeline's IP-Adapter adds is kept in its style block only; pass `ip_adapter_image=style` to the call).
        content: an `Inversion` with trajectory whose queries keep the layout (styleid), or like `style` a picture or
            latents; None keeps the current queries.
        strength: 0 ... 1 between own and styled attention; 0 is neutral.
        gamma: share of the content's query, 0 ... 1 (styleid). Larger keeps more of the content.
        temperature: factor on the logits (styleid), above 0.
        shift: added to the logits of the reference (stylealigned); None is log 2 for a picture, 0 for a set, as the
            paper's program has it.
        scale: of the IP-Adapter in its style block; where text and image are one sequence (FLUX, SD3) no block is known
            for style, and it is of all that the adapter adds.
        start_adain: the initial latents get the style's mean and deviation in each channel; None: for styleid only.
        layers: "decoder" (without its coarsest level where there are three), "up", "all", or numbers of self-attention
            layers. On a transformer those two are its later half. None is "decoder", and "all" for "stylealigned", as
            published, and where text and image are one sequence.
        apart: widths of the picture by which the reference is moved aside, 0 for none: where positions are rotary, a
            reference's token attracts the one at the same place, and its content leaks (AlignedGen, arXiv 2509.17088).
        key_weights: factors of the reference's keys at the highest and the lowest rotary frequencies, such as
            (0.5, 1.2), None for none (arXiv 2602.05013). Both need rotary positions.
        share_norms: group norms take their statistics over a row and its reference together ("stylealigned" on UNets),
            which is the published program's default.
        prompt: the text of the reference row. Under guidance "stylealigned" has a second one, with the negative's text,
            for guidance's own rows, as published.
        generator: draws the noise of a style or a content that is a picture; without it that is always the same.
        start, end: fractions of the steps.

    Raises:
        SettingError, SettingTypeError: a setting out of range.
    """

    beside_guidance = True

    def __init__(
        self, style: Any = None, *, method: Method = "styleid", content: Any = None,
        strength: float = 1.0, gamma: float = 0.75, temperature: float = 1.5, shift: float | None = None,
        scale: float = 1.0, start_adain: bool | None = None, layers: Layers | None = None, prompt: str = "",
        apart: float = 0.0, key_weights: tuple[float, float] | None = None, share_norms: bool = False,
        generator: torch.Generator | None = None, start: float = 0.0, end: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(start=start, end=end)
        if method not in ("styleid", "stylealigned", "ip_adapter"):
            raise SettingError(f"method={method!r}: choose styleid, stylealigned or ip_adapter")
        if style is None and (method == "styleid" or start_adain or content is not None):
            raise SettingError(f"method={method!r}{' with start_adain' * bool(start_adain)} needs a style picture")
        if not isinstance(prompt, str):
            raise SettingTypeError(f"prompt={prompt!r}: a text is needed")
        self.method, self.prompt = method, prompt
        self.layers: Layers | None = layers if layers is None or isinstance(layers, str) else listed(layers)
        self.strength, self.gamma = finite(strength, "strength", 0, 1), finite(gamma, "gamma", 0, 1)
        self.leads = style is None and method == "stylealigned"
        usual = 0.0 if self.leads else math.log(2)
        self.temperature = finite(temperature, "temperature", 1e-3)
        self.shift = usual if shift is None else finite(shift, "shift")
        self.apart = finite(apart, "apart")
        self.key_weights = None if key_weights is None else _pair(key_weights)
        self.scale = finite(scale, "scale")
        if share_norms and method != "stylealigned":
            raise SettingError(f"share_norms=True belongs to method='stylealigned', not to {method!r}")
        self.share_norms = bool(share_norms)
        self.wraps = (torch.nn.GroupNorm,) if share_norms else ()
        self.start_adain = method == "styleid" if start_adain is None else bool(start_adain)
        self._style = None if style is None else Reference(style, generator)
        self._content = None if content is None else Reference(content, generator, "content")
        self._block = ""
        self.chosen: set[str] = set()
        self._joint = False
        self._rotary: Rotary | None = None

    @property
    def neutral(self) -> bool:
        return self.strength == 0

    def bind(self, session: Session) -> None:
        if self.method == "ip_adapter":
            if not any(ImagePrompt({}).selects(layer) for layer in session.layers):
                raise UnsupportedPipelineError("no IP-Adapter: pipe.load_ip_adapter(...), or use method='styleid'")
            joint = any(layer.kind == "joint" for layer in session.layers)
            self._block = "" if joint else block_of(session.layers, "up", STYLE_BLOCK)
            return
        self._joint = any(layer.kind == "joint" for layer in session.layers)
        self._rotary = session.rotary
        if (self.apart or self.key_weights) and not (self._joint and self._rotary):
            raise UnsupportedPipelineError(
                "apart= and key_weights= move a reference's rotary positions, which this model has not: leave them out"
            )
        layers = self.layers or ("all" if self._joint or self.method == "stylealigned" else "decoder")
        self.chosen = choose_layers(session.layers, layers)

    def begin(self, session: Session, step: Step) -> None:
        if self._style is not None:
            content = None if self._content is None else self._content.begin(session)
            prompt = session.prompt
            alike = prompt.texts is not None and isinstance(prompt.negative, str | None)
            step.notes[self] = Call(self._style.begin(session), content, session.encode([self.prompt]), alike)

    def call(self, step: Step) -> Call:
        """What the pipeline call of this step holds; only where there is a style picture."""
        return step.notes[self]

    def edits(self) -> Sequence[Edit]:
        if self.method == "ip_adapter":
            return (ImagePrompt({self._block: self.scale * self.strength}),)
        if self._joint:
            return self._joint_edits()
        return (_StyleID(self) if self.method == "styleid" else _StyleAligned(self),)

    def _joint_edits(self) -> Sequence[Edit]:
        manner = Manner(
            self.method, self.strength, self.gamma, self.temperature, self.shift, self.apart, self.key_weights,
            self._rotary,
        )  # fmt: skip
        return [JointStyle(group, self.chosen, manner, self.leads) for group in ("cond", "uncond")]

    def branches(self, step: Step) -> Sequence[Branch]:
        if self.method == "ip_adapter" or self.leads:
            return ()
        call, aligned = self.call(step), self.method == "stylealigned"
        style, group = call.style.at(step), "cond" if "cond" in step.rows else "uncond"
        told: dict[str, Any] = {"words": call.text} if self._joint else {"text": call.text.embeddings}
        own = [_branch("style", group, style, told)]
        if aligned and "uncond" in step.rows:  # with the text that it copies
            bare = _branch(UNPROMPTED, "uncond", style, {}, call.alike)
            own = [*own, bare] if group == "cond" else [bare]
        if call.content is not None and self.method == "styleid" and self.gamma > 0:
            own.append(_branch("content", group, call.content.at(step), told))
        return own

    def around(self, step: Step) -> Task | None:
        edit = _StyleAligned(self)
        if not edit.styles(step):
            return None
        return SharedNorms(edit.rows_in(step.rows, step.device).style, self.strength)

    def moves(self, step: Step) -> bool:
        return self.start_adain and step.index == 0

    def latent(self, step: Step, latent: torch.Tensor, probe: Probe) -> torch.Tensor | None:
        return torch.lerp(latent, adain(latent, self.call(step).style.at(step).to(latent)), self.strength)


def choose_layers(layers: Sequence[AttentionLayer], which: Layers) -> set[str]:
    """Names of the self-attention layers that carry style.

    Raises:
        SettingError: unknown word or number.
    """
    joint = any(layer.kind == "joint" for layer in layers)
    kinds = ("joint", "self") if joint else ("self",)
    own = [layer for layer in layers if layer.kind in kinds and not (joint and "refiner" in layer.name)]
    if not own or any("Linear" in type(getattr(layer.module, "processor", None)).__name__ for layer in own):
        raise UnsupportedPipelineError("the model has no self-attention layer of its own, where style is injected")
    if not isinstance(which, str):
        if not set(which) <= set(range(len(own))):
            raise SettingError(f"layers={which!r}: there are self-attention layers 0 ... {len(own) - 1}")
        return {layer.name for number, layer in enumerate(own) if number in which}
    if which not in ("decoder", "up", "all"):
        raise SettingError(f"layers={which!r}: choose decoder, up, all, or numbers")
    up = [layer for layer in own if layer.place == "up"] or own[len(own) // 2 :]  # a transformer has no decoder
    blocks = list(dict.fromkeys(_block(layer) for layer in up))
    if which == "decoder" and len(blocks) > 2 and up[0].place == "up":
        up = [layer for layer in up if _block(layer) != blocks[0]]
    return {layer.name for layer in (own if which == "all" else up)}


def block_of(layers: Sequence[AttentionLayer], place: Place, preferred: str) -> str:
    """The preferred block (SDXL's and SD1.5's) if the model has it, else the middle one at that place."""
    names = [layer.name for layer in layers if layer.kind == "cross" and layer.place == place]
    blocks = list(dict.fromkeys(".".join(name.split(".")[:4]) for name in names))
    if not blocks:
        raise UnsupportedPipelineError(f"the model has no cross-attention in its {place} blocks")
    return preferred if preferred in blocks else blocks[len(blocks) // 2]


def _branch(name: str, like: str, latent: torch.Tensor, told: dict[str, Any], alike: bool = True) -> Branch:
    """Rows of a reference's latents, one for all pictures where their texts are alike too."""
    return Branch(name, like, latent=lambda _: latent, shared=len(latent) == 1 and alike, **told)


def _block(layer: AttentionLayer) -> str:
    return ".".join(layer.name.split(".")[:2])


def _pair(given: Any) -> tuple[float, float]:
    if not isinstance(given, (list, tuple)) or len(cast("Sequence[Any]", given)) != 2:
        raise SettingTypeError(f"key_weights={given!r}: two numbers are needed, or None")
    high, low = (finite(one, "key_weights", 0) for one in cast("Sequence[Any]", given))
    return high, low

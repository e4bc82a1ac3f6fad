"""Style from a reference row: StyleID (arXiv 2312.09008), StyleAligned (2312.02133), or an IP-Adapter's style block.

The reference is one more batch row that is sampled along, for all pictures that share it, so no keys or values are
stored: its latent at each step is the noised style picture, or a point of its inverted trajectory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..attention.call import AttentionCall
from ..attention.edit import Edit
from ..attention.errors import SettingError, SettingTypeError, UnsupportedPipelineError
from ..attention.layer import AttentionLayer, Place
from ..attention.step import Rows, Step
from .base import Branch, Plugin, Probe, Session, finite, listed
from .reference import Reference, Sight

Method = Literal["styleid", "stylealigned", "ip_adapter"]
Layers = Literal["decoder", "up", "all"] | Sequence[int]
STYLE_BLOCK = "up_blocks.0.attentions.1"
"""Where an IP-Adapter passes on style (InstantStyle, arXiv 2404.02733)."""
Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Query, keys, values and mask of one attention."""

# -- the equations -------------------------------------------------------------------------------------------------


def adain(x: torch.Tensor, reference: torch.Tensor, dims: tuple[int, ...] = (-2, -1)) -> torch.Tensor:
    """(x - mean) / std * std_ref + mean_ref over `dims`: latents by channel (StyleID, eq. 8), tokens by feature."""
    z, ref = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, reference))
    mean, mean_ref = z.mean(dims, keepdim=True), ref.mean(dims, keepdim=True)
    std, std_ref = (t.std(dims, keepdim=True, correction=0) for t in (z, ref))
    return ((z - mean) * (std_ref / std.clamp(min=1e-12)) + mean_ref).to(x.dtype)


def preserved_query(q: torch.Tensor, content: torch.Tensor, gamma: float) -> torch.Tensor:
    """gamma * q_content + (1 - gamma) * q, equation 6 of StyleID; gamma = 1 keeps the content's query alone."""
    return content if gamma == 1 else torch.lerp(q, content, gamma)


def shared_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    q_ref: torch.Tensor, k_ref: torch.Tensor, v_ref: torch.Tensor, shift: float,
) -> Operands:  # fmt: skip
    """Query, keys, values and additive mask of StyleAligned (equations 3 and 4), all [B, H, L, D].

    Args:
        shift: added to the logits of the reference's keys; the paper's code adds log 2 for real pictures.
    """
    if not k_ref.shape[-2]:
        return q, k, v, None
    q, k = adain(q, q_ref, (-2,)), adain(k, k_ref, (-2,))
    mask = torch.zeros(k.shape[-2] + k_ref.shape[-2], dtype=q.dtype, device=q.device)
    mask[k.shape[-2] :] = shift
    return q, torch.cat([k, k_ref], -2), torch.cat([v, v_ref], -2), mask.expand(1, 1, q.shape[-2], -1)


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
    """Scales what an IP-Adapter adds, by block; in blocks that are not named it adds nothing."""

    every_call, traced = True, True

    def __init__(self, scales: Mapping[str, float]) -> None:
        self.scales, self.factor = scales, 0.0

    def selects(self, layer: AttentionLayer) -> bool:
        return hasattr(getattr(layer.module, "processor", None), "to_k_ip")

    def active(self, layer: AttentionLayer, step: Step) -> bool:
        return True  # where another plugin looks at attention, it is to see what the model will do

    def planned(self, layer: AttentionLayer, step: Step) -> Edit:
        here = ImagePrompt(self.scales)
        here.factor = next((s for block, s in self.scales.items() if layer.name.startswith(f"{block}.")), 0.0)
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

        def partners(group: str) -> torch.Tensor:
            start, stop = rows[group].start, rows[group].stop
            return torch.tensor([start + i % (stop - start) for _, i in each], device=device)

        own = torch.tensor([name in ("style", "content") for name, _ in each], device=device)
        style, content = partners("style"), partners("content") if "content" in rows else None
        keys = torch.where(own, torch.arange(len(each), device=device), style)
        return cls(style, keys, content, own[:, None, None, None])


class _Restyle(Edit):
    """The edit of StyleID and StyleAligned: `styled` says what the rows attend with."""

    traced = True
    batch: _Rows | None = None

    def __init__(self, plugin: StyleInjection) -> None:
        self.plugin = plugin

    def selects(self, layer: AttentionLayer) -> bool:
        return layer.kind == "self" and layer.name in self.plugin.chosen

    def planned(self, layer: AttentionLayer, step: Step) -> Edit | None:
        if not self.active(layer, step):
            return None
        made: dict[Any, _Restyle] = step.notes.setdefault((self.plugin, "planned"), {})
        key = tuple((name, rows.start, rows.stop) for name, rows in step.rows.items())
        if key not in made:  # one for all layers
            made[key] = type(self)(self.plugin)
            made[key].batch = _Rows.of(step.rows, step.device)
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
        return _Rows.of(call.rows, call.q.device) if self.batch is None else self.batch


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
    """The references in one pipeline call, and the text of their rows [1, L, D]."""

    style: Sight
    content: Sight | None
    text: torch.Tensor


# -- the plugin ----------------------------------------------------------------------------------------------------


class StyleInjection(Plugin):
    """Gives pictures the style of another one while they are sampled.

    Args:
        style: a picture or its path, latents [1 or n, C, h, w], or an `Inversion` with its trajectory, on the timesteps
            that will be sampled. A picture needs no inversion: its row is the picture under noise (`generator`).
        method: "styleid" (keys and values of the style), "stylealigned" (shared with it) or "ip_adapter" (what the
            pipeline's IP-Adapter adds is kept in its style block only; pass `ip_adapter_image=style` to the call).
        content: an `Inversion` with trajectory whose queries keep the layout (styleid), or like `style` a picture or
            latents; None keeps the current queries.
        strength: 0 ... 1 between own and styled attention; 0 is neutral.
        gamma: share of the content's query, 0 ... 1 (styleid). Larger keeps more of the content.
        temperature: factor on the logits (styleid), above 0.
        shift: added to the logits of the reference (stylealigned).
        scale: of the IP-Adapter in its style block.
        start_adain: the initial latents get the style's mean and deviation in each channel; None: for styleid only.
        layers: "decoder" (without its coarsest level where there are three), "up", "all", or numbers of self-attention
            layers.
        prompt: the text of the reference row.
        generator: draws the noise of a style or a content that is a picture; without it that is always the same.
        start, end: fractions of the steps.

    Raises:
        SettingError, SettingTypeError: a setting out of range.
    """

    def __init__(
        self, style: Any = None, *, method: Method = "styleid", content: Any = None,
        strength: float = 1.0, gamma: float = 0.75, temperature: float = 1.5, shift: float = math.log(2),
        scale: float = 1.0, start_adain: bool | None = None, layers: Layers = "decoder", prompt: str = "",
        generator: torch.Generator | None = None, start: float = 0.0, end: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(start=start, end=end)
        if method not in ("styleid", "stylealigned", "ip_adapter"):
            raise SettingError(f"method={method!r}: choose styleid, stylealigned or ip_adapter")
        if style is None and (method != "ip_adapter" or start_adain):
            raise SettingError(f"method={method!r}{' with start_adain' * bool(start_adain)} needs a style picture")
        if not isinstance(prompt, str):
            raise SettingTypeError(f"prompt={prompt!r}: a text is needed")
        self.method, self.prompt = method, prompt
        self.layers: Layers = layers if isinstance(layers, str) else listed(layers)
        self.strength, self.gamma = finite(strength, "strength", 0, 1), finite(gamma, "gamma", 0, 1)
        self.temperature, self.shift = finite(temperature, "temperature", 1e-3), finite(shift, "shift")
        self.scale = finite(scale, "scale")
        self.start_adain = method == "styleid" if start_adain is None else bool(start_adain)
        self._style = None if style is None else Reference(style, generator)
        self._content = None if content is None else Reference(content, generator, "content")
        self._block = ""
        self.chosen: set[str] = set()

    @property
    def neutral(self) -> bool:
        return self.strength == 0

    def bind(self, session: Session) -> None:
        if self.method == "ip_adapter":
            if not any(ImagePrompt({}).selects(layer) for layer in session.layers):
                raise UnsupportedPipelineError("no IP-Adapter: pipe.load_ip_adapter(...), or use method='styleid'")
            self._block = block_of(session.layers, "up", STYLE_BLOCK)
        else:
            self.chosen = choose_layers(session.layers, self.layers)

    def begin(self, session: Session, step: Step) -> None:
        if self._style is not None:
            content = None if self._content is None else self._content.begin(session)
            step.notes[self] = Call(self._style.begin(session), content, session.encode_text([self.prompt]))

    def call(self, step: Step) -> Call:
        """What the pipeline call of this step holds; only where there is a style picture."""
        return step.notes[self]

    def edits(self) -> Sequence[Edit]:
        if self.method == "ip_adapter":
            return (ImagePrompt({self._block: self.scale * self.strength}),)
        return (_StyleID(self) if self.method == "styleid" else _StyleAligned(self),)

    def branches(self, step: Step) -> Sequence[Branch]:
        if self.method == "ip_adapter":
            return ()
        call = self.call(step)
        own = {"style": call.style.at(step)}
        if call.content is not None and self.method == "styleid" and self.gamma > 0:
            own["content"] = call.content.at(step)
        return [
            Branch(name, latent=lambda _, latent=latent: latent, text=call.text, shared=len(latent) == 1)
            for name, latent in own.items()
        ]

    def moves(self, step: Step) -> bool:
        return self.start_adain and step.index == 0

    def latent(self, step: Step, latent: torch.Tensor, probe: Probe) -> torch.Tensor | None:
        return torch.lerp(latent, adain(latent, self.call(step).style.at(step).to(latent)), self.strength)


def choose_layers(layers: Sequence[AttentionLayer], which: Layers) -> set[str]:
    """Names of the self-attention layers that carry style.

    Raises:
        SettingError: unknown word or number.
    """
    own = [layer for layer in layers if layer.kind == "self"]
    if not own:
        raise UnsupportedPipelineError("the model has no self-attention layer of its own, where style is injected")
    if not isinstance(which, str):
        if not set(which) <= {layer.index for layer in own}:
            raise SettingError(f"layers={which!r}: there are self-attention layers 0 ... {len(own) - 1}")
        return {layer.name for layer in own if layer.index in which}
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


def _block(layer: AttentionLayer) -> str:
    return ".".join(layer.name.split(".")[:2])

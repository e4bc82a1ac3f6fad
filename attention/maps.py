"""Cross-attention maps: which layers, how they are recorded, and how tokens become one map a concept.

Maps are [n, L, h, w]: n pictures, L text tokens, (h, w) the token grid of the layers, any aspect. Concept maps are
[C, h, w], C concepts of one picture. All in at least float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F

from .call import AttentionCall
from .edit import Edit, masked_scores
from .errors import AttentionNotReachedError, ConceptError, SettingError, UnsupportedPipelineError
from .layer import AttentionLayer, Kind
from .partial import log_sum_exp
from .seam import stop_probe
from .step import Phase, Step

CROSS_TOKENS = 256
SELF_TOKENS = 1024
LayerChoice = Literal["auto", "decoder", "all"] | Callable[[AttentionLayer], bool]
Normalisation = Literal["ae", "eot", "max", "minmax", "sum1", "none"]
Smoothing = Literal["gaussian", "mean", "none"]
_SHARPEN = 100.0  # Attend-and-Excite's factor before its softmax over tokens


# -- which layers --------------------------------------------------------------------------------------------------


def grid_of(level: int, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) after halving `size` `level` times, rounding up as a UNet does."""
    return -(-size[0] // 2**level), -(-size[1] // 2**level)


def choose_layers(
    layers: Sequence[AttentionLayer],
    size: tuple[int, int],
    *,
    kind: Kind = "cross",
    tokens: int = CROSS_TOKENS,
    choice: LayerChoice = "auto",
) -> list[AttentionLayer]:
    """The layers whose maps are averaged: one level, the one nearest to `tokens` that the decoder attends at.

    For 512 pixels that is 16x16 in SD1 and SD2 (5 layers), for 1024 pixels 32x32 in SDXL (60 layers).

    Args:
        layers: every layer of the denoiser in execution order.
        size: (height, width) of the full token grid.
        kind: "cross" or "self"; a model without cross-attention has its joint layers in its place.
        tokens: grid size looked for; nearness is a ratio, so half as many is as far as twice as many.
        choice: "auto": every layer of the level, but the decoder's alone where the level is the full latent grid,
            since the first encoder layers of a model have not seen enough to say where anything is. "decoder": those
            alone. "all": every layer of the level. A function picks layers itself; they must share one grid.
    Raises:
        UnsupportedPipelineError: no layer is left. SettingError: an unknown word, or the function's
            layers have several grids.
    """
    if not callable(choice) and choice not in ("auto", "decoder", "all"):
        raise SettingError(f"layers={choice!r}: choose auto, decoder, all, or give a function of a layer")
    kind = kind_of_maps(layers, kind)
    pool = [layer for layer in layers if layer.kind == kind and (not callable(choice) or choice(layer))]
    decoder = [layer for layer in pool if layer.place in ("up", "block")]
    if not pool or not (decoder or callable(choice)):
        raise UnsupportedPipelineError(
            f"no {kind}-attention layer to take maps from among {len(layers)} attention layers: choose other layers"
        )
    if callable(choice):
        if len({grid_of(layer.level, size) for layer in pool}) > 1:
            raise SettingError("layers= picked layers of several grids: pick layers of one level")
        return pool
    level = min((layer.level for layer in decoder), key=lambda x: abs(math.log(math.prod(grid_of(x, size)) / tokens)))
    alone = choice == "decoder" or (choice == "auto" and level == 0)
    return [layer for layer in (decoder if alone else pool) if layer.level == level]


def kind_of_maps(layers: Sequence[AttentionLayer], kind: Kind) -> Kind:
    """`kind`, or "joint" in the place of "cross" for a model that attends to image and text in one sequence only.

    Raises:
        UnsupportedPipelineError: self-attention asked for, of a model without.
    """
    present = {layer.kind for layer in layers}
    if kind == "self" and kind not in present:
        raise UnsupportedPipelineError(
            "no layer attends to the image alone, so words cannot be spread along self-attention: use attention_maps, "
            "or another threshold than 'attencraft'"
        )
    return "joint" if kind == "cross" and "joint" in present and kind not in present else kind


# -- recording -----------------------------------------------------------------------------------------------------


class MapCapture(Edit):
    """Records the conditional rows' attention probabilities beside the layer's own attention, which stays as it is.

    Nothing the pipeline computes changes by a bit. Recording costs one small q k^T in each chosen layer. A probe is
    ended as soon as the last chosen layer is recorded; layers that gradient checkpointing runs again are not recorded
    twice.

    Args:
        layers: every layer of the denoiser.
        phase: "latent" records while a plugin probes, with gradients; "predict" in the pipeline's own calls, without.
        kind, tokens, choice: see `choose_layers`.

    Attributes:
        maps: averaged over heads, by layer name: [n, h*w, L].
        grid: (height, width) of the maps.
        dtype: what the layers computed in.
    """

    order = 1000  # the last one sees what really is attended to

    def __init__(
        self,
        layers: Sequence[AttentionLayer],
        phase: Phase,
        *,
        kind: Kind = "cross",
        tokens: int = CROSS_TOKENS,
        choice: LayerChoice = "auto",
    ) -> None:
        self.layers = layers
        self.phase: Phase = phase
        self.traced = phase == "latent"  # probes run eager anyway
        self.kind: Kind = kind_of_maps(layers, kind)
        self.tokens = tokens
        self.choice: LayerChoice = choice
        self.maps: dict[str, torch.Tensor] = {}
        self.grid = (0, 0)
        self.dtype = torch.float32
        self._names: dict[tuple[int, int], frozenset[str]] = {}

    def selects(self, layer: AttentionLayer) -> bool:
        return layer.kind == self.kind and (not callable(self.choice) or self.choice(layer))

    def active(self, layer: AttentionLayer, step: Step) -> bool:
        return step.phase == self.phase and layer.name in self.names(step.size)

    def names(self, size: tuple[int, int]) -> frozenset[str]:
        """Names of the chosen layers for a full token grid of `size`."""
        if size not in self._names:
            chosen = choose_layers(self.layers, size, kind=self.kind, tokens=self.tokens, choice=self.choice)
            self._names[size] = frozenset(layer.name for layer in chosen)
        return self._names[size]

    def qkv(self, call: AttentionCall) -> None:
        step = call.step
        if "cond" not in call.rows:
            return
        maps = probabilities(call.narrow(call.rows["cond"])).mean(1)
        if self.phase == "latent" and not step.probing:  # checkpointing runs the layer again, and must meet the same
            return
        self.maps[call.layer.name] = maps if self.phase == "latent" else maps.detach()
        self.grid, self.dtype = call.grid, call.q.dtype
        if len(self.maps) == len(self.names(step.size)):
            stop_probe(step)

    def clear(self) -> None:
        """Forget what was recorded, and with it the graph that it holds."""
        self.maps = {}

    def fresh(self) -> MapCapture:
        """Another one of the same settings, for a pipeline call of its own."""
        return MapCapture(self.layers, self.phase, kind=self.kind, tokens=self.tokens, choice=self.choice)

    def averaged(self) -> torch.Tensor:
        """Mean over layers and heads: [n, L, h, w] for cross-attention.

        Raises:
            AttentionNotReachedError: nothing was recorded.
        """
        if not self.maps:
            raise AttentionNotReachedError(
                "no attention map was recorded: none of the chosen layers ran on conditional rows; choose other layers"
            )
        mean = sum(self.maps.values(), torch.zeros(())) / len(self.maps)
        return mean.transpose(1, 2).unflatten(2, self.grid)


class ByCall(Edit):
    """Records into the capture of the pipeline call that runs, so that calls at once do not mix.

    Args:
        like: a capture of the same settings, which selects the layers.
        of: the call's capture, by its step.
    """

    order = MapCapture.order

    def __init__(self, like: MapCapture, of: Callable[[Step], MapCapture]) -> None:
        self.like, self.of, self.traced = like, of, like.traced

    def selects(self, layer: AttentionLayer) -> bool:
        return self.like.selects(layer)

    def active(self, layer: AttentionLayer, step: Step) -> bool:
        return self.like.active(layer, step)

    def qkv(self, call: AttentionCall) -> None:
        self.of(call.step).qkv(call)


class ValuesOnly(Edit):
    """Lets a probe's gradient pass through the values of attention, not through where it looks, outside of a capture.

    Deep layers of small models look at nearly one token and flip to another at tiny changes of the latent, so that
    the exact gradient turns with its last digits; this one is smooth, and not the gradient of the loss.
    """

    traced = True

    def __init__(self, capture: MapCapture) -> None:
        self.capture = capture

    def selects(self, layer: AttentionLayer) -> bool:
        return True

    def active(self, layer: AttentionLayer, step: Step) -> bool:
        return step.phase == "latent" and layer.name not in self.capture.names(step.size)

    def qkv(self, call: AttentionCall) -> None:
        call.q, call.k = call.q.detach(), call.k.detach()


def probabilities(call: AttentionCall) -> torch.Tensor:
    """Attention probabilities [B, H, Lq, Lk] of a call, from its queries and keys in at least float32.

    In a joint sequence: of the image tokens at the text tokens, as the layer has them, so that they sum to what the
    image looks at text at all. A softmax over the text alone says of a token that hardly looks at text as much as of
    one that does, and finds things less well (`app/bench`, table `localisation`).
    """
    dtype = torch.promote_types(call.q.dtype, torch.float32)
    call.q, call.k = call.q.to(dtype), call.k.to(dtype)
    if call.text is None:
        return masked_scores(call).softmax(-1)
    image = [i for i in range(call.q.shape[-2]) if not call.text.start <= i < call.text.stop]
    call.q = call.q[..., image, :]
    if call.mask is not None and call.mask.shape[-2] > 1:
        call.mask = call.mask[..., image, :]
    total = log_sum_exp(call.q, call.k, call.mask, call.scale)
    call.k = call.k[..., call.text, :]
    if call.mask is not None:  # padding of a shorter prompt
        call.mask = call.mask[..., call.text]
    return (masked_scores(call) - total[..., None]).exp()


# -- tokens to concepts --------------------------------------------------------------------------------------------


def gaussian_kernel(like: torch.Tensor) -> torch.Tensor:
    """Attend-and-Excite's 3x3 kernel, [3, 3]: centre 0.3319, edge 0.1221, corner 0.0449.

    Its published code says sigma 0.5 and divides by 2 sigma inside the square, which makes it 0.7071.
    """
    x = torch.arange(-1, 2, dtype=like.dtype, device=like.device)
    line = torch.exp(-(x**2))
    kernel = line[:, None] * line
    return kernel / kernel.sum()


def smooth(maps: torch.Tensor, how: Smoothing = "gaussian") -> torch.Tensor:
    """Maps [C, h, w] filtered 3x3 with reflected borders: "gaussian" as published, "mean" of nine, or "none"."""
    if how == "none":
        return maps
    kernel = gaussian_kernel(maps) if how == "gaussian" else torch.full_like(maps[0, :1, :1], 1 / 9).expand(3, 3)
    padded = F.pad(maps[:, None], (1, 1, 1, 1), mode="reflect" if min(maps.shape[1:]) > 1 else "replicate")
    return F.conv2d(padded, kernel[None, None])[:, 0]


def sharpen(maps: torch.Tensor, first: int, stop: int) -> torch.Tensor:
    """softmax(100 * A) over the token columns first ... stop-1 of [L, h, w]; the other columns become zero.

    Attend-and-Excite drops the start mark (first=1) and the last column (stop=L-1), end mark and padding stay; for
    SD2.1 it stops at the real end mark.
    """
    inner = (_SHARPEN * maps[first:stop]).softmax(0)
    return torch.cat([torch.zeros_like(maps[:first]), inner, torch.zeros_like(maps[stop:])])


def rescale(maps: torch.Tensor, how: Normalisation) -> torch.Tensor:
    """Each map [C, h, w] by its own maximum ("max"), to [0, 1] ("minmax"), to sum 1 ("sum1"), or as it is."""
    tiny = torch.finfo(maps.dtype).tiny
    flat = maps.flatten(1)
    if how == "max":
        return maps / flat.amax(1).clamp_min(tiny)[:, None, None]
    if how == "minmax":
        low = flat.amin(1)[:, None, None]
        return (maps - low) / (flat.amax(1)[:, None, None] - low).clamp_min(tiny)
    if how == "sum1":
        return maps / flat.sum(1).clamp_min(tiny)[:, None, None]
    return maps


def concept_maps(
    maps: torch.Tensor,
    columns: Sequence[Sequence[int]],
    *,
    normalisation: Normalisation = "max",
    smoothing: Smoothing = "mean",
    tokens: range | None = None,
) -> torch.Tensor:
    """Maps of concepts [C, h, w] from one picture's token maps [L, h, w]; a concept is the mean of its columns.

    Args:
        maps: probabilities by token.
        columns: the token columns of each concept.
        normalisation: "ae" and "eot" sharpen over tokens (`sharpen`; "eot" stops at the end mark), before smoothing;
            "max", "minmax" and "sum1" scale each concept's map after it; "none".
        smoothing: see `smooth`.
        tokens: columns of the prompt's own tokens, needed to tell marks from words by "ae" and "eot".
    Raises:
        ConceptError: a column that the text does not have.
    """
    wrong = [column for group in columns for column in group if not 0 <= column < len(maps)]
    if wrong:
        raise ConceptError(f"token column {wrong[0]} does not exist: the text has {len(maps)} tokens")
    if normalisation in ("ae", "eot"):
        shown = maps.detach().flatten(1).any(1).tolist()  # a model that masks padding looks nowhere there
        seen = len(shown) - [*reversed(shown), True].index(True)
        tokens = tokens if tokens is not None else range(1, seen - 1)
        maps = sharpen(maps, tokens.start, tokens.stop if normalisation == "eot" else max(tokens.stop, seen - 1))
    chosen = torch.stack([maps[list(group)].mean(0) for group in columns])
    return rescale(smooth(chosen, smoothing), normalisation)

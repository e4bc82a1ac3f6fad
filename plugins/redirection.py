"""Self-attention redirection: what nothing attends to disappears (Attentive Eraser, arXiv 2412.12974).

On transformers the same happens in the sequence that the image shares with the text, see `redirection_joint`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from ..attention.call import AttentionCall
from ..attention.edit import Edit
from ..attention.errors import MaskError, SettingTypeError
from ..attention.layer import AttentionLayer
from ..attention.masks import Bools, as_masks, halved, level_mask
from ..attention.step import Rows, Step
from .base import Branch, Plugin, Session, finite, listed
from .redirection_joint import choose_layers, redirected

BRANCH = "redirected"
SCARCE = 0.02


def suppress(q: torch.Tensor, masked: torch.Tensor, factor: float) -> torch.Tensor:
    """Similarity suppression: logits of masked queries times `factor`, as a scale of q [..., N, D]; masked is [N]."""
    return torch.where(masked[:, None], q * factor, q)


def background(tokens: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Keys or values [..., N, D] of the tokens `kept` (indices): what a logit of minus infinity leaves to attend to.

    In the paper masked columns of the logits become minus infinity, for all queries. That is attention over the
    shorter sequence, whatever the masked tokens hold.
    """
    return tokens.index_select(-2, kept)


def guide(plain: torch.Tensor, redirected: torch.Tensor, scale: float) -> torch.Tensor:
    """What is added to the prediction, scale * (redirected - plain): the paper's redirection guidance less eps."""
    return scale * (redirected - plain)


class SelfAttentionRedirection(Plugin):
    """Removes what a mask covers: the decoder's self-attention sees the background only, and guidance goes there.

    It steers what is generated and pastes nothing: `diffgraft.erase` does the whole task.

    Args:
        mask: what is to go, for all pictures, or a list with a mask for each (in it, a list is a union); anything
            `diffgraft.attention.masks.as_mask` takes, at the picture's aspect. It is not grown. A picture with an empty
            mask is left alone.
        scale: guidance away from the plain prediction, 0 is neutral, 1 is the redirected prediction itself. The paper
            uses 9.
        suppression: factor of the logits of masked queries, so that they do not copy one look-alike; 1 is neutral.
            The paper uses 0.3.
        suppression_steps: how many of the first steps it holds for. The paper uses 10 of 50.
        layers: "up" (as published), "mid", "down", "all", or a list of layer names, prefixes of names or positions in
            execution order. Everything before the first one is computed once for both branches. A transformer has no
            decoder: there "up" is all layers, "early" and "late" are its halves.
        start, end: fractions of the steps; outside them nothing is computed twice.

    Raises:
        MaskError: not a mask, full, of another aspect, one mask too many, or no background token at some level.
        SettingError: a setting outside its range, or layers that the model does not have.
    """

    def __init__(
        self, mask: Any, *, scale: float = 9.0, suppression: float = 0.3, suppression_steps: int = 10,
        layers: str | Sequence[str | int] = "up", start: float = 0.0, end: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(start=start, end=end)
        self.scale = finite(scale, "scale", low=0)
        self.suppression = finite(suppression, "suppression", low=0)
        if isinstance(suppression_steps, bool) or not isinstance(suppression_steps, int) or suppression_steps < 0:
            raise SettingTypeError(f"suppression_steps={suppression_steps!r}: a count of steps is needed, 0 or more")
        self.suppression_steps = suppression_steps
        self.layers: str | list[str | int] = layers if isinstance(layers, str) else listed(layers)
        self._masks = as_masks(mask)
        for number, one in enumerate(self._masks):
            if one.all():
                which = f" of picture {number}" if len(self._masks) > 1 else ""
                raise MaskError(f"the mask{which} covers everything: no background is left; mask the object only")
        if not any(one.any() for one in self._masks):
            warnings.warn("the mask is empty: nothing is redirected", stacklevel=2)
        self._chosen: set[str] = set()
        self._everywhere = False

    @property
    def neutral(self) -> bool:
        return self.scale == 0 or self.start == self.end or not any(one.any() for one in self._masks)

    def bind(self, session: Session) -> None:
        self._chosen = {layer.name for layer in choose_layers(session.layers, self.layers)}
        joint = any(layer.kind == "joint" for layer in session.layers)
        seeing = {layer.name for layer in session.layers if layer.kind in ("joint", "self", "keys")}
        self._everywhere = joint and seeing <= self._chosen

    def begin(self, session: Session, step: Step) -> None:
        pictures = step.rows["cond"].stop - step.rows["cond"].start
        if pictures % len(self._masks):
            raise MaskError(
                f"{len(self._masks)} masks for {pictures} pictures: give one mask, or one for each picture "
                "(several masks of one picture are a list of their own, [[a, b]])"
            )
        levels = self.coverage(session.layers, step.size)
        masked = [round(float(one.mean()), 4) for one in self._masks]
        told = {"masked pixels": masked, "masked tokens (largest share)": levels}
        step.notes[self] = session
        self.tell(session, lambda: told)

    def coverage(self, layers: Sequence[AttentionLayer], size: tuple[int, int]) -> dict[str, float]:
        """The largest masked share of the tokens at each level of these layers, by grid, for latents of `size`.

        Raises:
            MaskError: no background token is left at a level.
        """
        levels = sorted({layer.level for layer in choose_layers(layers, self.layers)})
        shares = [level_shares(mask, size, levels) for mask in self._masks]
        return {grid: max(share[grid] for share in shares) for grid in shares[0]}

    def edits(self) -> Sequence[Edit]:
        return (_Redirect(self, BRANCH), _Redirect(self, "cond"))

    def branches(self, step: Step) -> Sequence[Branch]:
        return () if self.alone(step) else (Branch(BRANCH),)

    def combine(self, step: Step, prediction: torch.Tensor, rows: Rows) -> torch.Tensor | None:
        if BRANCH not in rows:
            return None
        if prediction.ndim == 4:  # a learned variance may follow; tokens have none
            prediction = prediction[:, : step.notes[self].latent_channels]
        delta = guide(prediction[rows["cond"]], prediction[rows[BRANCH]], self.scale)
        for row, mask in enumerate(spread(self._masks, len(delta))):
            if not mask.any():
                delta[row] = 0
        return delta

    def unseen(self, step: Step) -> torch.Tensor | None:
        if not self._everywhere or len(self._masks) > 1 or not self.alone(step):
            return None
        return self.tokens(step.size, step, step.device)[0][1]

    def alone(self, step: Step) -> bool:
        """Whether the redirected prediction is all that is wanted: at scale 1 without a second guidance."""
        if self.scale != 1 or "uncond" in step.rows:
            return False
        return not (self in step.notes and step.notes[self].prompt.guided)

    def tokens(self, grid: tuple[int, int], step: Step, device: torch.device | None) -> Tokens:
        """(indices of background tokens, of masked ones, masked [N]) of each picture on a grid of tokens."""
        kept: dict[Any, Tokens] = step.notes.setdefault((self, "tokens"), {})
        key = step.size, grid, device
        if key not in kept:
            masks = [level_mask(mask, step.size, grid).flatten() for mask in self._masks]
            # counted on the CPU: a GPU would wait
            parts = [((~mask).nonzero()[:, 0], mask.nonzero()[:, 0], mask) for mask in masks]
            kept[key] = [(a.to(device), b.to(device), c.to(device)) for a, b, c in parts]
        return kept[key]

    def selects(self, layer: AttentionLayer) -> bool:
        """Whether a layer was chosen."""
        return layer.name in self._chosen


Tokens = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


class _Redirect(Edit):
    """Computes the attention of its group; only one of the two groups is active at a step."""

    traced, ragged = True, "any"

    def __init__(self, plugin: SelfAttentionRedirection, group: str) -> None:
        self.plugin, self.owns = plugin, group

    def selects(self, layer: AttentionLayer) -> bool:
        return self.plugin.selects(layer)

    def active(self, layer: AttentionLayer, step: Step) -> bool:
        return step.phase == "predict" and (self.owns == "cond") == self.plugin.alone(step)

    def planned(self, layer: AttentionLayer, step: Step) -> Edit | None:
        if not self.active(layer, step):
            return None
        return self._on(_grid_at(layer.level, step.size), step, step.device)

    def attention(self, call: AttentionCall) -> torch.Tensor:
        return self._on(_grid_at(call.layer.level, call.step.size), call.step, call.q.device).attention(call)

    def _on(self, grid: tuple[int, int], step: Step, device: torch.device | None) -> _Redirected:
        early = step.index < self.plugin.suppression_steps and self.plugin.suppression != 1
        tokens = self.plugin.tokens(grid, step, device)
        group = str(self.owns)
        rows = step.rows.get(group, slice(0, 0))
        return _Redirected(group, tokens, self.plugin.suppression if early else None, rows.stop - rows.start)


class _Redirected(Edit):
    """The redirected attention of a group in one layer at one step.

    Args:
        tokens: see `SelfAttentionRedirection.tokens`. suppression: factor of masked queries' logits, None for none.
        pictures: rows of the group.
    """

    traced, ragged = True, "any"

    def __init__(self, group: str, tokens: Tokens, suppression: float | None, pictures: int) -> None:
        self.owns, self.tokens, self.suppression, self.pictures = group, tokens, suppression, pictures

    def attention(self, call: AttentionCall) -> torch.Tensor:
        # One picture after the other: a padded batch needs a mask, which keeps the flash kernel away.
        if len(self.tokens) == 1:
            return self._redirected(call, *self.tokens[0])
        if call.picture is not None:
            of_one = self.pictures // len(self.tokens)
            return self._redirected(call, *self.tokens[call.picture // of_one])
        size = len(call.q) // len(self.tokens)
        groups = (call.narrow(slice(i * size, (i + 1) * size)) for i in range(len(self.tokens)))
        outs = [self._redirected(group, *picture) for group, picture in zip(groups, self.tokens, strict=True)]
        return torch.cat(outs)

    def _redirected(
        self, call: AttentionCall, kept: torch.Tensor, hidden: torch.Tensor, masked: torch.Tensor
    ) -> torch.Tensor:
        if not len(hidden):
            return call.attend(call.q, call.k, call.v, call.mask)
        if call.layer.place == "block":
            return redirected(call, kept, hidden, self.suppression)
        q = call.q if self.suppression is None else suppress(call.q, masked, self.suppression)
        mask = None if call.mask is None else call.mask.index_select(-1, kept)
        return call.attend(q, background(call.k, kept), background(call.v, kept), mask)


def spread(masks: Sequence[Bools], pictures: int) -> list[Bools]:
    """The mask of each picture; prompts' pictures lie together, as diffusers orders them."""
    return [mask for mask in masks for _ in range(pictures // len(masks))]


def _grid_at(level: int, size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the tokens where a latent of `size` was halved `level` times."""
    for _ in range(level):
        size = halved(size)
    return size


def level_shares(mask: Bools, size: tuple[int, int], levels: Sequence[int]) -> dict[str, float]:
    """Masked share of the tokens at each level of a latent of `size`, by grid ("64x64").

    Raises:
        MaskError: no background token is left at a level.
    """
    shares: dict[str, float] = {}
    for level in levels:
        grid = _grid_at(level, size)
        name, tokens = f"{grid[0]}x{grid[1]}", level_mask(mask, size, grid)
        left = 1 - float(tokens.double().mean())
        if bool(tokens.all()):
            raise MaskError(
                f"no background is left at the level of {name} tokens (the mask covers {mask.mean():.0%} of it all): "
                "use a smaller mask, a larger picture, or layers of a finer level"
            )
        if left < SCARCE:
            warnings.warn(f"only {left:.1%} of the {name} tokens are background; expect a poor fill", stacklevel=2)
        shares[name] = round(1 - left, 4)
    return shares

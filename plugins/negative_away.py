"""Negative-away steering: NASA (SNOOPI, arXiv 2412.02687), NAG (arXiv 2505.21179) and VSF (arXiv 2508.10931).

All three combine the same four tensors inside an attention layer: the attention Z+ over the prompt, the attention Z-
over the negative prompt, and the log-sum-exp of each one's logits.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..attention.edit import Edit
from ..attention.errors import SettingError, SettingTypeError, UnsupportedPipelineError
from ..attention.layer import AttentionLayer
from ..attention.step import Step
from .base import Branch, Plugin, Prompt, Session, Text, finite, listed
from .defaults import Default, default
from .negative_edits import Call, CrossAway, CutStreams, JointAway, KeysAway, Steering
from .negative_rows import ROW, RowsAway

Negative = str | Sequence[str] | Mapping[str, float] | torch.Tensor | None

_TINY = 1e-3
_TEXT_KINDS = ("cross", "joint", "keys")


def nasa(
    z_pos: torch.Tensor, lse_pos: torch.Tensor | None, z_neg: torch.Tensor, lse_neg: torch.Tensor | None,
    *, scale: float,
) -> torch.Tensor:  # fmt: skip
    """Z = Z+ - scale * Z-, equation 9 of NASA, on attention outputs before the output projection.

    Args:
        z_pos, z_neg: [B, H, L, D]. lse_pos, lse_neg: not used. scale: NASA's alpha, 0 is neutral.
    """
    return torch.sub(_wide(z_pos), _wide(z_neg), alpha=scale)


def nag(
    z_pos: torch.Tensor, lse_pos: torch.Tensor | None, z_neg: torch.Tensor, lse_neg: torch.Tensor | None,
    *, scale: float, tau: float, alpha: float,
) -> torch.Tensor:  # fmt: skip
    """Normalised attention guidance, equations 7 to 10 of NAG; finite also where Z+ is zero.

    Args:
        z_pos, z_neg: [B, H, L, D]. lse_pos, lse_neg: not used.
        scale: phi, 0 is neutral; the official `nag_scale` is phi + 1.
        tau: cap on the growth of a token's L1 norm, taken over all heads together.
        alpha: blend in [0, 1], 0 is neutral.
    """
    z_pos, z_neg = _wide(z_pos), _wide(z_neg)
    away = torch.lerp(z_neg, z_pos, 1 + scale)
    size, grown = (z.abs().sum((-3, -1), keepdim=True) for z in (z_pos, away))
    cap = (tau * size / grown.clamp_min(torch.finfo(grown.dtype).tiny)).clamp_max(1.0)
    return torch.lerp(z_pos, away * cap, alpha)


def vsf(
    z_pos: torch.Tensor, lse_pos: torch.Tensor | None, z_neg: torch.Tensor, lse_neg: torch.Tensor | None,
    *, scale: float, offset: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    """Value sign flip: one softmax over the keys of both texts, the negative's values multiplied by -scale.

    Z = W Z+ - scale (1 - W) Z-, with W = sigmoid(lse+ - lse- + offset).

    Args:
        z_pos, z_neg: [B, H, L, D]. lse_pos, lse_neg: [B, H, L], at least float32; -inf where nothing is visible.
        scale: strength; 0 still gives attention to the negative, so there is no neutral scale.
        offset: taken from the negative's logits.
    """
    assert lse_pos is not None and lse_neg is not None
    lead = (lse_pos - lse_neg).nan_to_num(torch.inf, torch.inf, -torch.inf)  # neither sees a key: the prompt's, zero
    positive, weight = _wide(z_pos), (lead + offset if offset else lead).sigmoid()[..., None]
    return torch.lerp(_wide(z_neg) * -scale, positive, weight.to(positive.dtype))


def ong(
    z_pos: torch.Tensor, lse_pos: torch.Tensor | None, z_neg: torch.Tensor, lse_neg: torch.Tensor | None,
    *, scale: float,
) -> torch.Tensor:  # fmt: skip
    """Orthogonal negative guidance (arXiv 2605.29390): Z = Z+ - scale * (Z- less its projection onto Z+).

    Args:
        z_pos, z_neg: [B, H, L, D]. lse_pos, lse_neg: not used.
        scale: 0 is neutral. The projection is a token's over all heads together; a token whose Z+ is zero is left.
    """
    z_pos, z_neg = _wide(z_pos), _wide(z_neg)
    along = (z_neg * z_pos).sum((-3, -1), keepdim=True)
    size = z_pos.square().sum((-3, -1), keepdim=True)
    part = along / size.clamp_min(torch.finfo(size.dtype).tiny)
    return z_pos - torch.where(size > 0, scale * (z_neg - part * z_pos), torch.zeros_like(z_pos))


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


RULES: Mapping[str, Callable[..., torch.Tensor]] = {"nasa": nasa, "nag": nag, "vsf": vsf, "ong": ong}


class NegativeAway(Plugin):
    """Steers away from a negative prompt inside the text attention: no second pass, also at one step.

    Works on UNet, PixArt and Sana pipelines (cross-attention) and on FLUX.1, SD3 and Qwen-Image pipelines (joint
    attention, the image computed once). Under guidance only the conditional half is steered.

    Args:
        negative: what to steer away from. A string for all pictures, a list with one string for each prompt, a
            mapping text -> weight (0 to 100) for several at once, or embeddings [L, D], [1, L, D] or
            [prompts, L, D] as the denoiser takes them. None is neutral; "" is not, it is a prompt like others.
        negative_2, negative_3: another text for the second and third text encoder of a pipeline with several prompts,
            in the form of `negative`; None gives them the same.
        rule: "nasa", "nag", "vsf" or "ong", see the functions of these names.
        scale: strength in [0, 100]; 0 is neutral except for "vsf". None: the family's default for this rule, with or
            without guidance, see `defaults`; families that nobody measured say so in `Graft.report()`.
        tau: NAG's cap, > 0.
        alpha: NAG's blend in [0, 1], 0 is neutral; None: the family's default.
        offset: VSF's beta.
        joint: what NASA subtracts in a joint sequence. "text": the negative words' share of the attention over
            [negative text, image]. "full": the whole of it, image included, which shrinks the image by 1 - scale.
            The paper does not say; on the transformer picture book's four-step student "full" costs more of what was
            asked for, at 20 steps the two are not told apart.
        layers: a place ("down", "mid", "up", "block"), name or index of the text-attention layers to steer in, or a
            list of these; None is all, [] is neutral.
        mask: for embeddings, [n, L] boolean, True where the token is not padding.
        start, end: fractions of the steps.
        until: steer while the scheduler's time t is at least (1 - until) * 1000; with `end` too, whichever comes first.
            It is what NAG's code calls `nag_end`; a `nag_sigma_end` of s is `until=1 - s` on flow-matching models.
            A schedule that is shifted towards noise spends most of its steps there: FLUX dev with 28 steps steers 15 of
            them with until=0.25 and 7 with end=0.25.
        form: "streams" computes the image once. "rows" is the doubled form: one more row a picture with the negative as
            its text, and with the negative's own pooled vector where the model has one, as official NAG has it on
            joint models; twice the cost, one negative only.
    Raises:
        UnsupportedPipelineError: at attach, a UNet whose layers attend to text and image at once.
        SettingError, SettingTypeError: an argument out of range; at sampling: a count of negatives that is not the
            count of prompts, embeddings of another width.
    Example:
        >>> with graft(pipe, NegativeAway("red")):
        ...     image = pipe("a ball , sky", num_inference_steps=1, guidance_scale=0).images[0]
    """

    films = True

    def __init__(
        self, negative: Negative, *, rule: str = "nasa", scale: float | None = None, tau: float = 2.5,
        alpha: float | None = None, offset: float = 0.0, joint: str = "text",
        layers: str | Sequence[int | str] | None = None, mask: torch.Tensor | None = None,
        start: float = 0.0, end: float = 1.0, until: float | None = None, form: str = "streams",
        negative_2: str | Sequence[str] | None = None, negative_3: str | Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(start=start, end=end)
        if rule not in RULES:
            raise SettingError(f"rule={rule!r}: choose one of {', '.join(RULES)}")
        if form not in ("streams", "rows"):
            raise SettingError(f"form={form!r}: choose 'streams' or 'rows'")
        if joint not in ("text", "full"):
            raise SettingError(f"joint={joint!r}: choose 'text' or 'full'")
        self.negative, self.mask = _checked(negative), _checked_mask(mask, negative)
        self.rule, self.joint, self.form = rule, joint, form
        self.scale = None if scale is None else finite(scale, "scale", 0.0, 100.0)
        self.tau = finite(tau, "tau", 1e-6)
        self.alpha = None if alpha is None else finite(alpha, "alpha", 0.0, 1.0)
        self.offset = finite(offset, "offset")
        self.until = None if until is None else finite(until, "until", 0.0, 1.0)
        self.negative_2 = _checked_other(negative_2, "negative_2", self.negative)
        self.negative_3 = _checked_other(negative_3, "negative_3", self.negative)
        self.layers = None if layers is None else listed(layers)
        self._kinds: frozenset[str] = frozenset()

    @property
    def neutral(self) -> bool:
        silent = isinstance(self.negative, dict) and not any(self.negative.values())
        off = self.rule != "vsf" and self.scale == 0 or self.rule == "nag" and self.alpha == 0
        return self.negative is None or silent or off or self.layers == [] or self.until == 0

    def within(self, step: Step) -> bool:
        early = self.until is None or step.time is None or step.time >= (1 - self.until) * 1000 - _TINY
        return early and super().within(step)

    def bind(self, session: Session) -> None:
        self._kinds = frozenset(layer.kind for layer in session.layers)
        if "joint" in self._kinds and not self.neutral and any(layer.place != "block" for layer in session.layers):
            raise UnsupportedPipelineError(
                "NegativeAway cannot steer a UNet whose layers attend to text and image at once, as those of "
                "DeepFloyd IF and Kandinsky do: use a pipeline of Stable Diffusion or a transformer's"
            )
        if self.form == "streams" and session.rows_only and not self.neutral:
            raise UnsupportedPipelineError(
                f"a negative cannot join {session.family}'s own call, since its text changes on the way: give "
                "NegativeAway(..., form='rows'), the doubled form"
            )
        for wanted in self.layers or ():
            if not any(_named(layer, wanted) for layer in session.layers if layer.kind in _TEXT_KINDS):
                raise SettingError(f"layers: no text-attention layer is called {wanted!r} here")

    def begin(self, session: Session, step: Step) -> None:
        prompt = session.prompt
        self._warn_of_ignored(prompt)
        texts, weights = self._texts(session)
        if self.form == "rows" and len(texts) > 1:
            raise SettingError("form='rows' takes one negative for a picture: use form='streams' for several")
        _check_width(texts, session.text_width)
        known = default(self.rule, session.family, prompt.guided)
        scale = known.scale if self.scale is None else self.scale
        strength = scale if self.rule == "vsf" else scale * sum(weights)
        step.notes[self] = Call(texts, weights, self.rule, self._combine(known, strength), self.joint)
        given = self.scale is not None
        used = {"rule": self.rule, "scale": scale, "scale_from": "given" if given else known.source}
        self.tell(session, lambda: used)

    def streams(self, step: Step) -> Sequence[Text]:
        call: Call = step.notes[self]
        return call.texts if self.form == "streams" else ()

    def branches(self, step: Step) -> Sequence[Branch]:
        call: Call = step.notes[self]
        return (Branch(ROW, words=call.texts[0]),) if self.form == "rows" else ()

    def edits(self) -> Sequence[Edit]:
        steering = Steering(self, self.rule, self._chooses)
        if self.form == "rows":
            kinds = [kind for kind in _TEXT_KINDS if kind in self._kinds] or ["cross"]
            return tuple(RowsAway(steering, kind) for kind in kinds)
        if "joint" in self._kinds:
            return CutStreams(steering), JointAway(steering)
        return (KeysAway(steering) if "keys" in self._kinds else CrossAway(steering),)

    def _chooses(self, layer: AttentionLayer) -> bool:
        return self.layers is None or any(_named(layer, wanted) for wanted in self.layers)

    # -- the negative ------------------------------------------------------------------------------------------

    def _combine(self, known: Default, scale: float) -> Callable[..., torch.Tensor]:
        more: dict[str, float] = {
            "nasa": {},
            "nag": {"tau": self.tau, "alpha": known.alpha if self.alpha is None else self.alpha},
            "vsf": {"offset": self.offset},
            "ong": {},
        }[self.rule]
        return functools.partial(RULES[self.rule], scale=scale, **more)

    def _texts(self, session: Session) -> tuple[list[Text], list[float]]:
        """One text a negative, its rows one or one a prompt, with its weight."""
        negative, prompt = self.negative, session.prompt
        if isinstance(negative, torch.Tensor):
            embeddings = negative[None] if negative.ndim == session.text_dims - 1 else negative
            own = _own(len(embeddings), prompt)
            mask = None if self.mask is None else self.mask.expand(len(embeddings), -1)[own]
            return [Text(embeddings[own], mask)], [1.0]
        if isinstance(negative, dict):
            kept = {text: weight for text, weight in negative.items() if weight}
            return [session.encode([text]) for text in kept], list(kept.values())
        assert negative is not None
        texts = [negative] if isinstance(negative, str) else negative
        own = _own(len(texts), prompt)
        return [session.encode([self._encoders(texts[i], i, session) for i in own])], [1.0]

    def _encoders(self, text: str, i: int, session: Session) -> Any:
        """A text, or one for each of the pipeline's text encoders."""
        others = [self.negative_2, self.negative_3]
        if others == [None, None]:
            return text
        given = 1 + max(place + 1 for place, other in enumerate(others) if other is not None)
        if given > session.encoders:
            raise SettingError(f"negative_{given}: this pipeline takes {session.encoders} prompts")
        return (text, *(text if other is None else other if isinstance(other, str) else other[i] for other in others))

    def _warn_of_ignored(self, prompt: Prompt) -> None:
        asked = [prompt.negative] if isinstance(prompt.negative, str) else prompt.negative or []
        if any(asked) and not prompt.guided:
            warnings.warn(
                f"the call's negative_prompt={prompt.negative!r} does nothing: the pipeline makes no guidance pass "
                f"(guidance_scale={prompt.guidance_scale}). NegativeAway steers away from {self.negative!r} only; "
                "give it that text too",
                stacklevel=2,
            )


def _checked(negative: Any) -> str | list[str] | dict[str, float] | torch.Tensor | None:
    """The negative in its plain form, or a typed error."""
    if negative is None or isinstance(negative, str):
        return negative
    if isinstance(negative, torch.Tensor):
        if negative.ndim not in (2, 3, 4) or not negative.is_floating_point() or not negative.numel():
            raise SettingError(f"negative embeddings {list(negative.shape)}: give floats [L, D] or [prompts, L, D]")
        if not bool(negative.isfinite().all()):
            raise SettingError("the negative embeddings hold NaN or infinity")
        return negative.detach()
    if isinstance(negative, Mapping):
        found = {text: finite(weight, f"weight of {text!r}", 0.0, 100.0) for text, weight in negative.items()}
    else:
        found = list(negative) if isinstance(negative, Sequence) else [negative]
    if not found:
        raise SettingError("negative is empty: give a text, or None to steer away from nothing")
    for text in found:
        if not isinstance(text, str):
            raise SettingTypeError(f"a negative is a text, not {type(text).__name__}")
    return found


def _checked_other(other: Any, name: str, negative: Any) -> str | list[str] | None:
    """Another encoder's negative, in the form of the first's, or a typed error."""
    if other is None:
        return None
    if not isinstance(negative, (str, list)):
        raise SettingTypeError(f"{name}= goes with a text or a list of texts as the negative")
    found: Any = [other] if isinstance(other, str) else list(other)
    if not all(isinstance(text, str) for text in found):
        raise SettingTypeError(f"{name}: a negative is a text")
    if len(found) not in (1, 1 if isinstance(negative, str) else len(negative)):
        raise SettingError(f"{name}: {len(found)} texts; give one, or as many as negative has")
    return found[0] if len(found) == 1 else found


def _checked_mask(mask: Any, negative: Any) -> torch.Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or not isinstance(negative, torch.Tensor):
        raise SettingTypeError("mask= is a tensor for negative embeddings; texts bring their own")
    rows = mask.bool() if mask.ndim == 2 else mask.bool()[None]
    if rows.shape[1] != negative.shape[1 if negative.ndim == 4 else -2] or len(rows) not in (1, len(negative)):
        raise SettingError(f"mask {list(mask.shape)} does not fit the embeddings {list(negative.shape)}")
    if not bool(rows.any(1).all()):
        raise SettingError("mask: a negative is all padding; leave it out instead")
    return rows


def _own(count: int, prompt: Prompt) -> list[int]:
    """Which of `count` negatives, one for all or one for each prompt, are this call's."""
    prompts = prompt.prompts or prompt.pictures
    numbers, total = prompt.share(prompts)
    if count != 1 and (count != total or prompt.pictures % prompts):
        raise SettingError(f"{count} negatives for {total} prompts: give one for all, or one for each prompt")
    return list(numbers) if count > 1 else [0]


def _check_width(texts: Sequence[Text], width: int) -> None:
    """Refuse embeddings that the denoiser would not take."""
    for text in texts:
        found = text.embeddings.shape[-1]
        if found != width:
            raise SettingError(f"negative embeddings of width {found}: this model takes {width}")


def _named(layer: AttentionLayer, wanted: int | str) -> bool:
    return wanted in (layer.index, layer.place, layer.name)

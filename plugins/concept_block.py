"""ConceptBlock: a concept that the model must not draw, without training, in prompts that ask for it and in no others.

"contrast" is of this project; "adavd" is AdaVD (arXiv 2412.06143), "nasa" is `NegativeAway` behind the same gate. The
idea to decide first whether a prompt holds the concept at all is of "Interpret then Deactivate" (arXiv 2503.09446).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from ..attention.edit import Edit
from ..attention.errors import SettingError, SettingTypeError, UnsupportedPipelineError
from ..attention.layer import AttentionLayer
from ..attention.step import Step
from .base import Plugin, Session, Text, finite
from .concept_bank import Bank, make_bank
from .concept_edits import Blocking, SteeredWhere, Taken
from .concept_find import Finding
from .negative_away import NegativeAway
from .negative_edits import Call, CrossAway, Steering

Rule = Literal["contrast", "adavd", "nasa"]
Concepts = str | Sequence[str] | Mapping[str, Sequence[str]]
RULES = ("contrast", "adavd", "nasa")
STRENGTHS = {"contrast": 1.2}
"""Strengths by rule, 1 for the others. On the picture book 1 leaves 8% of the colours, 1.15 to 2 none; from 1.5 on
other things suffer."""


class ConceptBlock(Plugin):
    """The model does not draw these concepts. Prompts that do not hold them give the plain pipeline's bytes.

    Everything is geometry of the text embeddings that reach the denoiser, so how a prompt is written, weighted or
    encoded makes no difference, and embeddings in its place are looked at alike. It is decided once a pipeline call;
    nothing is added to a step but one subtraction in each cross-attention layer. The first call with a concept
    encodes a few hundred short texts, which are kept as long as the text encoders stay what they are.

    Args:
        concepts: a word or short phrase, a list of them, or a mapping phrase -> what means the same.
        rule: "contrast": the concept's part of a text's values is taken out at the columns that hold it, at the
            `reach` columns behind it and at the text's end. "adavd": as published, at every column. "nasa": steered
            away from inside attention.
        threshold: from which score on a prompt holds a concept, -2 ... 2, see `nearness`; -2 is always. None:
            between the scores of short texts with and without it, measured by the pipeline's own encoder.
        strength: 0 ... 10, 0 is neutral; 1 takes the concept's part out. None: 1.2 for "contrast", as the column next
            to a word holds some of it that no bank has, and 1 for the others. NASA's scale for "nasa" is the family's
            default times this.
        replace: what is put in the concept's place; None: the mean of a few words of its kind ("contrast" only).
        reach: columns behind the concept that are cleaned of it too, as "red" in "red ball" colours "ball".
        start, end: fractions of the steps.
    Raises:
        SettingError, SettingTypeError: a value out of range. ConceptError: while sampling, a concept that is no word
            of the text encoder. UnsupportedPipelineError: at attach, a model without cross-attention.
    Example:
        >>> with dg.graft(pipe, dg.ConceptBlock("star")) as g:
        ...     image = pipe("a red star and a blue ball , sky").images[0]
        >>> print(g.report())
    """

    def __init__(
        self, concepts: Concepts, *, rule: Rule = "contrast", threshold: float | None = None,
        strength: float | None = None, replace: str | None = None, reach: int = 2, start: float = 0.0, end: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(start=start, end=end)
        if rule not in RULES:
            raise SettingError(f"rule={rule!r}: choose one of {', '.join(RULES)}")
        if isinstance(reach, bool) or not isinstance(reach, int) or reach < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SettingError(f"reach={reach!r}: a whole number of columns, 0 or more, is needed")
        if replace is not None and (rule != "contrast" or not isinstance(replace, str) or not replace.strip()):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SettingError(f"replace={replace!r}: a phrase, for rule='contrast'")
        self.concepts: Concepts = concepts
        self.groups = check_groups(concepts)
        self.rule: Rule = rule
        self.threshold = None if threshold is None else finite(threshold, "threshold", -2, 2)
        self.strength = finite(STRENGTHS.get(rule, 1.0) if strength is None else strength, "strength", 0, 10)
        self.replace, self.reach = replace, reach
        weights = {phrase: self.strength for group in self.groups for phrase in group}
        self.away = NegativeAway(weights) if rule == "nasa" and weights else None

    @property
    def neutral(self) -> bool:
        return not self.groups or self.strength == 0

    def bind(self, session: Session) -> None:
        if not self.neutral and not any(layer.kind == "cross" for layer in session.layers):
            raise UnsupportedPipelineError(
                "ConceptBlock works in cross-attention, which this model does not have: use NegativeAway, which steers "
                "away from a text in joint attention too"
            )

    def edits(self) -> Sequence[Edit]:
        return (BlockValues(self),) if self.away is None else (BlockAway(self, self.away),)

    def begin(self, session: Session, step: Step) -> None:
        blocked = [phrase for group in self.groups for phrase in group]

        def bank(group: Sequence[str]) -> Bank:
            key = ("concept", tuple(group), tuple(blocked), self.replace)
            return session.remember(key, lambda: make_bank(session, group, blocked, self.replace))

        finding = Finding(self.rule, self.threshold, self.strength, self.reach)
        state = Blocking(session, [group[0] for group in self.groups], [bank(group) for group in self.groups], finding)
        state.look(step)
        step.notes[self] = state
        texts = session.prompt.texts
        told = state.told(None if texts is None else [session.tokens(text) for text in texts])
        self.tell(session, lambda: told)
        if self.away is not None:
            self.away.begin(session, step)

    def streams(self, step: Step) -> Sequence[Text]:
        return () if self.away is None else self.away.streams(step)

    def call(self, step: Step) -> Blocking:
        """What the pipeline call of this step holds."""
        return step.notes[self]


class BlockValues(Edit):
    """Takes the concept's part out of the values of the conditional rows."""

    rows, keeps_text = ("cond",), True

    def __init__(self, plugin: ConceptBlock) -> None:
        self.plugin = plugin

    def selects(self, layer: AttentionLayer) -> bool:
        return layer.kind == "cross"

    def active(self, layer: AttentionLayer, step: Step) -> bool:
        return is_open(self.plugin, step)

    def planned(self, layer: AttentionLayer, step: Step) -> Edit | None:
        if not self.active(layer, step):
            return None
        state = self.plugin.call(step)
        return Taken(state, state.known(layer))


class BlockAway(CrossAway):
    """Steers away from the concept, in the rows whose text holds it."""

    def __init__(self, plugin: ConceptBlock, away: NegativeAway) -> None:
        super().__init__(Steering(away, away.rule, lambda layer: layer.kind == "cross"))
        self.block = plugin

    def active(self, layer: AttentionLayer, step: Step) -> bool:
        return is_open(self.block, step)

    def planned(self, layer: AttentionLayer, step: Step) -> Edit | None:
        edit = super().planned(layer, step)
        if isinstance(edit, SteeredWhere):
            edit.gate = self.block.call(step).gate
        return edit

    def made(self, layer: AttentionLayer, call: Call, rows: slice) -> Edit:
        return SteeredWhere(layer.module, call, rows)


def is_open(plugin: ConceptBlock, step: Step) -> bool:
    """Whether a text of this call holds a concept; a text that was changed on the way is looked at again."""
    if step.phase != "predict" or "cond" not in step.rows:
        return False
    state = plugin.call(step)
    state.look(step)
    return state.open


def check_groups(concepts: Any) -> list[list[str]]:
    """Each concept as the list of its phrases.

    Raises:
        SettingTypeError: something that is no text. SettingError: an empty text, or more than 50 phrases.
    """
    if isinstance(concepts, Mapping):
        named = cast("Mapping[Any, Any]", concepts)
        groups: list[list[Any]] = [[key, *([more] if isinstance(more, str) else more)] for key, more in named.items()]
    elif isinstance(concepts, Sequence) and not isinstance(concepts, (str, bytes)):
        groups = [[phrase] for phrase in cast("Sequence[Any]", concepts)]
    else:
        groups = [[concepts]]
    for phrase in (phrase for group in groups for phrase in group):
        if not isinstance(phrase, str):
            raise SettingTypeError(f"a concept is a word or a short phrase, not {type(phrase).__name__}")
        if not phrase.strip():
            raise SettingError("a concept is empty: give a word, or [] to block nothing")
    if sum(map(len, groups)) > 50:
        raise SettingError("more than 50 phrases: block in several grafts, or choose the words that matter")
    return groups

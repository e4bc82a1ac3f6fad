"""ConceptBlock: a concept that the model must not draw, without training, in prompts that ask for it and in no others.

"contrast" is of this project; "adavd" is AdaVD (arXiv 2412.06143), "safree" is SAFREE (arXiv 2410.12761), "nasa" is
`NegativeAway`, all behind the same gate. The idea to decide first whether a prompt holds the concept at all is of
"Interpret then Deactivate" (arXiv 2503.09446).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from ..attention.edit import Edit
from ..attention.errors import SettingError, SettingTypeError, UnsupportedPipelineError
from ..attention.layer import AttentionLayer
from ..attention.step import Step
from .base import Plugin, Session, Text, Words, finite
from .concept_bank import Bank, make_bank
from .concept_edits import Blocking, SteeredWhere, Taken
from .concept_find import Finding
from .concept_words import Rewording
from .negative_away import NegativeAway
from .negative_edits import Call, CrossAway, Steering

Rule = Literal["contrast", "adavd", "nasa", "safree"]
Space = Literal["values", "embeddings"]
Concepts = str | Sequence[str] | Mapping[str, Sequence[str]]
RULES = ("contrast", "adavd", "nasa", "safree")
STRENGTHS = {"contrast": 1.2}
"""Strengths by rule, 1 for the others. On the picture book 1 leaves 8% of the colours, 1.15 to 2 none; from 1.5 on
other things suffer."""


class ConceptBlock(Plugin):
    """The model does not draw these concepts. Prompts that do not hold them give the plain pipeline's bytes.

    Everything is geometry of the text embeddings that reach the denoiser, so how a prompt is written, weighted or
    encoded makes no difference, and embeddings in its place are looked at alike. It is decided once a pipeline call;
    nothing is added to a step but one subtraction in each cross-attention layer, and nothing at all where the concept
    is taken out of the embeddings themselves. The first call with a concept
    encodes a few hundred short texts, which are kept as long as the text encoders stay what they are.

    Args:
        concepts: a word or short phrase, a list of them, or a mapping phrase -> what means the same.
        rule: "contrast": the concept's part of a text's values is taken out at the columns that hold it, at the
            `reach` columns behind it and at the text's end. "adavd": as published, at every column. "nasa": steered
            away from inside attention. "safree": as published, in the text's embeddings, for as many steps as its own
            filter says (0 ... 10); for pipelines with one CLIP.
        space: "values": in the values of each cross-attention layer. "embeddings": in the text's embeddings, before
            the model. None: values where there is cross-attention, embeddings elsewhere. A pooled text (SDXL, FLUX.1)
            is cleaned in both by "contrast". Before the model, a prompt's own words say what is of the concept.
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
            of the text encoder. UnsupportedPipelineError: a model whose text the rule cannot reach.
    Example:
        >>> with dg.graft(pipe, dg.ConceptBlock("star")) as g:
        ...     image = pipe("a red star and a blue ball , sky").images[0]
        >>> print(g.report())
    """

    def __init__(
        self, concepts: Concepts, *, rule: Rule = "contrast", threshold: float | None = None,
        strength: float | None = None, replace: str | None = None, reach: int = 2, space: Space | None = None,
        start: float = 0.0, end: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(start=start, end=end)
        if rule not in RULES:
            raise SettingError(f"rule={rule!r}: choose one of {', '.join(RULES)}")
        self.space: Space | None = check_space(space, rule)
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
        self._inside = inside = self.in_values(session)
        if not inside and not self.neutral and not session.rewords:
            raise UnsupportedPipelineError(
                f"ConceptBlock does not reach the text of {session.family}, where a word of the prompt is more than "
                "columns of one text: use NegativeAway, which steers away from a text in joint attention too"
            )

    def in_values(self, session: Session) -> bool:
        """Whether it works in cross-attention, or else on the text itself.

        Raises:
            UnsupportedPipelineError: it has to, and there is none.
        """
        across = any(layer.kind == "cross" for layer in session.layers)
        space = "embeddings" if self.rule == "safree" else self.space
        needed = space == "values" or self.rule in ("adavd", "nasa")
        if needed and not across and not self.neutral:
            raise UnsupportedPipelineError(
                f"ConceptBlock(rule={self.rule!r}, space={self.space!r}) works in cross-attention, which this model "
                "does not have: use rule='contrast' with space='embeddings', or NegativeAway"
            )
        return across and space != "embeddings"

    def edits(self) -> Sequence[Edit]:
        if not self._inside:
            return ()
        return (BlockValues(self),) if self.away is None else (BlockAway(self, self.away),)

    def begin(self, session: Session, step: Step) -> None:
        if session.prompt.second and session.words.pooled:
            raise UnsupportedPipelineError(
                "ConceptBlock looks for a concept in the text, and the pooled text is of another prompt here: leave "
                "prompt_2= out"
            )
        blocked = [phrase for group in self.groups for phrase in group]

        def bank(group: Sequence[str]) -> Bank:
            key = ("concept", tuple(group), tuple(blocked), self.replace)
            return session.remember(key, lambda: make_bank(session, group, blocked, self.replace))

        finding = Finding(self.rule, self.threshold, self.strength, self.reach)
        names, inside = [group[0] for group in self.groups], self.in_values(session)
        state = Blocking(session, names, [bank(group) for group in self.groups], finding, inside)
        state.look(session.words)
        step.notes[self] = Rewording(state, self.groups)
        texts = session.prompt.texts
        told = state.told(None if texts is None else [session.tokens(text) for text in texts])
        self.tell(session, lambda: told)
        if self.away is not None:
            self.away.begin(session, step)

    def streams(self, step: Step) -> Sequence[Text]:
        return () if self.away is None else self.away.streams(step)

    def reword(self, step: Step, words: Words) -> Words | None:
        return step.notes[self].words(step, words)

    def call(self, step: Step) -> Blocking:
        """What was found in the texts of this pipeline call."""
        return step.notes[self].state


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
    """Whether a text of this call holds a concept; `reword` has looked at it again where it changed on the way."""
    return step.phase == "predict" and "cond" in step.rows and plugin.call(step).open


def check_space(space: Any, rule: str) -> Any:
    """`space`, where the rule works there.

    Raises:
        SettingError: another word, or a rule of another space.
    """
    if space not in (None, "values", "embeddings"):
        raise SettingError(f"space={space!r}: 'values' or 'embeddings' is needed")
    if space == ("values" if rule == "safree" else "embeddings") and rule != "contrast":
        raise SettingError(f"space={space!r}: rule={rule!r} works elsewhere; leave space= out")
    return space


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

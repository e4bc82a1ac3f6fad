"""Concepts of a prompt, given as words, phrases or token columns, resolved to columns of the text embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch

from ..attention.errors import ConceptError, SettingTypeError
from .base import Session

Concept = str | int | Sequence[int]
"""A word or phrase of the prompt, a token column (the start mark is 0), or several columns (a list or a range)."""
Concepts = Sequence[Concept]
T = TypeVar("T")
_UNKNOWN = 4096  # columns of prompt embeddings whose text is not known


@dataclass(frozen=True)
class Found:
    """A concept in one prompt: its columns, and what a user should know of the choice ("" mostly)."""

    concept: str
    columns: list[int]
    note: str = ""


@dataclass
class Picture:
    """What belongs to one picture of a call.

    Attributes:
        concepts: in the order given. attributes: by number of the concept.
        tokens: columns of the prompt's own tokens, None for a call with embeddings.
        losses: of each update, 0-dimensional.
    """

    concepts: list[Found]
    attributes: dict[int, Found]
    tokens: range | None
    losses: list[torch.Tensor] = field(default_factory=list[torch.Tensor])


Split = Callable[[torch.Tensor, Sequence[Picture]], list[tuple[torch.Tensor, dict[int, torch.Tensor]]]]
"""Maps of each picture's concepts [C, h, w] and of their attributes by concept, from token maps [n, L, h, w]."""


def check_concepts(concepts: Concepts | Sequence[Concepts]) -> list[list[Concept]]:
    """One list of concepts for every prompt, or one for each: a list of lists that hold words is the latter.

    Raises:
        SettingTypeError: not a sequence of concepts, or a single string.
    """
    if isinstance(concepts, str) or not isinstance(concepts, Sequence):
        raise SettingTypeError(f"concepts={concepts!r}: a list of words is needed, such as ['ball', 'star']")
    inner = [c for c in concepts if isinstance(c, (list, tuple)) and any(isinstance(x, (str, list, tuple)) for x in c)]
    empty = [c for c in concepts if isinstance(c, (list, tuple)) and not c]
    nested = (inner or empty) and len(inner) + len(empty) == len(concepts)
    lists = cast("list[Sequence[Concept]]", list(concepts) if nested else [concepts])
    return [[_checked(concept) for concept in group] for group in lists]


def attributes_by_prompt(attributes: Any) -> list[Mapping[str, str]]:
    """Attributes of all prompts, or one mapping for each; None is none.

    Raises:
        SettingTypeError: not a mapping of texts, nor a list of such.
    """
    groups: list[Any] = list(attributes) if isinstance(attributes, (list, tuple)) else [attributes or {}]
    for group in groups:
        words = cast("Mapping[Any, Any]", group).items() if isinstance(group, Mapping) else [(None, None)]
        if not all(isinstance(word, str) for pair in words for word in pair):
            raise SettingTypeError(f"attributes={attributes!r}: give the word of a concept, such as {{'ball': 'blue'}}")
    return groups or [{}]


def _checked(concept: Concept) -> Concept:
    numbers = [concept] if isinstance(concept, int) else concept
    if isinstance(concept, str) and concept.strip():
        return concept
    if isinstance(concept, (str, bool)) or not isinstance(numbers, Sequence) or not numbers:
        raise SettingTypeError(f"concept {concept!r}: a word of the prompt or its token columns are needed")
    if not all(isinstance(x, int) and not isinstance(x, bool) for x in numbers):
        raise SettingTypeError(f"concept {concept!r}: token columns are whole numbers")
    return concept


def for_pictures(lists: Sequence[T], session: Session, name: str) -> list[T]:
    """What belongs to each picture of this call, of one for all prompts or one for each.

    Raises:
        ConceptError: several, but not one for each prompt.
    """
    pictures = session.prompt.pictures
    prompts = session.prompt.prompts or (len(lists) if pictures % len(lists) == 0 else pictures)
    numbers, total = session.prompt.share(prompts)
    if len(lists) not in (1, total):
        raise ConceptError(f"{name}= has {len(lists)} lists for {total} prompts: give one list for each prompt")
    own = [lists[i] for i in numbers] if len(lists) > 1 else lists
    return [group for group in own for _ in range(pictures // len(own))]


def find_picture(
    session: Session, text: str | None, group: Sequence[Concept], attributes: Mapping[str, str]
) -> Picture:
    """The concepts of one picture and the attributes that are given for them."""
    found = [find_concept(session, text, concept) for concept in group]
    words = {i: attributes[str(concept)] for i, concept in enumerate(group) if str(concept) in attributes}
    bound = {i: find_concept(session, text, word, found[i].columns[0]) for i, word in words.items()}
    return Picture(found, bound, None if text is None else session.token_range(text))


def find_concept(session: Session, text: str | None, concept: Concept, near: int = 0) -> Found:
    """Columns of a concept in a prompt; a repeated phrase is its first occurrence, with a note.

    Args:
        session: of the running call.
        text: the prompt, None where the call was given embeddings.
        concept: see `Concept`.
        near: the occurrence nearest to this column is meant; the first one for 0.
    Raises:
        ConceptError: not in the prompt, cut off, a column outside of it, or words without a prompt.
    """
    if not isinstance(concept, str):
        return _columns(session, text, [concept] if isinstance(concept, int) else list(concept))
    if text is None:
        raise ConceptError(f"{concept!r} cannot be found in prompt embeddings: give token columns instead of words")
    spans = session.token_spans(text, concept)
    if not spans:
        tokens = session.tokens(text)
        words = ", ".join(f"{i} {tokens[i]}" for i in session.token_range(text))
        raise ConceptError(f"{concept!r} is not in the prompt {text!r}; its tokens are: {words}")
    note = f"occurs {len(spans)} times, the {'nearest' if near else 'first'} is meant" if len(spans) > 1 else ""
    return Found(concept, min(spans, key=lambda span: abs(span[0] - near)), note)


def _columns(session: Session, text: str | None, columns: list[int]) -> Found:
    allowed = range(_UNKNOWN) if text is None else session.token_range(text)
    wrong = [column for column in columns if column not in allowed]
    if wrong:
        raise ConceptError(
            f"token column {wrong[0]} is outside of the prompt: words are columns {allowed.start} to {allowed.stop - 1}"
        )
    return Found(str(columns), columns)

"""What a concept's words give at each position of a text, and what other words give there: encoded once a concept.

A text "a a a star" says what "star" is behind three words; one such text for each position, for the concept and for a
dozen other words, is the bank. Long contexts take some positions only: between them a word moves as "a" does. Where the
pipeline puts a prompt into a template, its columns stand before and behind, and those behind hold the concept too.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..attention.errors import ConceptError
from .base import Session, Text
from .concept_geometry import calibrated, phrase_nearness
from .neutral_words import FUNCTION_WORDS, MANNERS, NEUTRAL_WORDS

FILLER = "a"
_NEAR, _KIN, _EXACT, _BATCH = 16, 8, 16, 64
_LONGEST_TAIL, _TAIL = 128, 16
_LONGEST_TEXT = 4096


@dataclass(frozen=True)
class Places:
    """One phrase at every position, columns as the denoiser takes them.

    Attributes:
        own: [m, L, D], token j of the phrase where that token stands at the column; zero where it never stands.
        behind: [L, D], the column behind the phrase, over a few words that may follow.
        ends: columns, rising. tails: [P, T, D], row k holds the columns behind the phrase that ends at `ends[k]` and
            is the end of its text; zero where nothing is.
        pooled: that text as one vector, by the denoiser's argument, [P, ...].
        fixed: a column behind the end is what it is by its own place, not by how far behind it is.
    """

    own: torch.Tensor
    behind: torch.Tensor
    ends: list[int]
    tails: torch.Tensor
    pooled: Mapping[str, torch.Tensor]
    fixed: bool

    def tail(self, end: int) -> torch.Tensor:
        """Columns `end` and on of a text whose last column is the phrase's, [T, D]."""
        number = self._number(end - 1)
        return self.tails[number, max(0, end - 1 - self.ends[number]) if self.fixed else 0 :]

    def pooled_at(self, name: str, column: int) -> torch.Tensor:
        """One vector of a text that ends with the phrase, about there."""
        return self.pooled[name][self._number(column)]

    def _number(self, column: int) -> int:
        return max(0, bisect_right(self.ends, column) - 1)


@dataclass(frozen=True)
class Bank:
    """One concept.

    Attributes:
        phrases: the concept's phrases. stand_ins: words that may stand in their place.
        others: words that the concept is told apart from, marks and padding too, [N, L, D].
        last: [P, D], embedding of each phrase's last word where it is the whole prompt.
        threshold: of `phrase_nearness`.
        names: what stands in where a prompt's words are known: one word, the nearest, so that a colour gives way to a
            colour; a mean of several can be the concept again, as red and yellow are orange.
    """

    phrases: list[Places]
    stand_ins: list[Places]
    others: torch.Tensor
    last: torch.Tensor
    threshold: float
    names: list[str]


def make_bank(session: Session, phrases: Sequence[str], blocked: Sequence[str], replace: str | None) -> Bank:
    """The bank of one concept.

    Args:
        phrases: the concept, and what means the same.
        blocked: every phrase that is blocked; none of their words stands in for another.
        replace: the one phrase to stand in, None for words of a list.
    Raises:
        ConceptError: a phrase without tokens, or with more than the text encoder reads.
    """
    encoder = _Encoder(session)
    for phrase in phrases:
        encoder.length_of(phrase)
    words = encoder.single(NEUTRAL_WORDS, blocked)
    near = _nearest(encoder, phrases[0], words)
    kin = [word for word in near if word not in MANNERS]  # in the place of a colour they would repaint the picture
    chosen = [replace] if replace else kin[min(_KIN, len(kin)) // 2 : _KIN]
    followers = [*encoder.single(FUNCTION_WORDS[1:3], blocked), words[0]]
    own = [encoder.places(phrase, followers) for phrase in phrases]
    function = encoder.single(FUNCTION_WORDS, blocked)
    others = torch.stack([*(encoder.series(word)[-1] for word in (*near, *function)), *encoder.marks()])
    threshold = _threshold(encoder, phrases, own, words, near, others)
    last = torch.stack([encoder.encode([text])[0, session.token_range(text).stop - 1] for text in phrases])
    stand_ins = [encoder.places(word, followers) for word in chosen]
    return Bank(own, stand_ins, others, last, threshold, [replace] if replace else kin[:1])


class _Encoder:
    """Texts of fillers and words by the session's encoder, whose rows are not kept."""

    def __init__(self, session: Session) -> None:
        self.session = session
        own = session.token_range(FILLER)
        self.start, self.end_marks = own.start, len(session.tokens(FILLER)) - own.stop
        first, second = (self._asked([text]) for text in (FILLER, f"{FILLER} {FILLER}"))
        even = first.embeddings.shape[1] == second.embeddings.shape[1]
        longest = first if even else self._asked([self.text(_LONGEST_TEXT)])
        self.length, self.masked = longest.embeddings.shape[1], longest.mask is not None
        stop = self.length - 1
        exact = range(self.start, min(stop, self.start + _EXACT))
        coarse = 8 if self.length <= _LONGEST_TAIL else max(64, self.length // 8)
        self.columns = [*exact, *range(exact.stop - 1 + coarse, stop, coarse)]
        self._kept: dict[tuple[str, str], Text] = {}
        self._sizes: dict[str, int] = {}
        self.fillers = self.encode([self.text(stop - self.start)])[0]

    def text(self, count: int, *words: str) -> str:
        return " ".join([FILLER] * count + list(words))

    def _asked(self, texts: Sequence[str]) -> Text:
        return self.session.encode(texts, keep=False, prompts=True)

    def whole(self, texts: Sequence[str]) -> Text:
        """Embeddings [n, L, D], several layers of them side by side, shorter ones padded with zeros."""
        parts = [self._asked(texts[i : i + _BATCH]) for i in range(0, len(texts), _BATCH)]
        rows = [part.embeddings[:, : self.length].flatten(2) for part in parts]
        padded = [F.pad(row, (0, 0, 0, self.length - row.shape[1])) for row in rows]
        pooled = {name: torch.cat([part.pooled[name] for part in parts]) for name in parts[0].pooled}
        return Text(torch.cat(padded), pooled=pooled)

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """[n, L, D]."""
        return self.whole(texts).embeddings

    def size(self, phrase: str) -> int:
        """Its tokens behind another word; at a text's beginning some tokenizers read others."""
        if phrase not in self._sizes:
            one = len(self.session.token_range(FILLER))
            self._sizes[phrase] = len(self.session.token_range(f"{FILLER} {phrase}")) - one
        return self._sizes[phrase]

    def length_of(self, phrase: str) -> int:
        found = self.size(phrase)
        if not 0 < found <= len(self.columns) // 2:
            raise ConceptError(f"concept {phrase!r} is {found} tokens: a word or a short phrase is needed")
        return found

    def single(self, words: Sequence[str], blocked: Sequence[str]) -> list[str]:
        """Those that are one known token and no part of what is blocked."""
        parts = {part for phrase in blocked for part in phrase.lower().split()}
        kept = [word for word in words if word not in parts]
        return [word for word in kept if self.session.knows(word) and self.size(word) == 1]

    def series(self, phrase: str, follower: str = "") -> torch.Tensor:
        """[m, L, D]: token j of the phrase, and of the follower, where it stands at each column."""
        rows = self._rows(phrase, follower).embeddings
        return self._columns(rows, self.length_of(phrase) + bool(follower))

    def _rows(self, phrase: str, follower: str = "") -> Text:
        """Texts that end at each of `columns` that they reach, [P, L, D]."""
        if (phrase, follower) not in self._kept:
            size = self.length_of(phrase) + bool(follower)
            counts = [column - self.start + 1 - size for column in self.columns]
            words = [phrase, follower] if follower else [phrase]
            self._kept[phrase, follower] = self.whole([self.text(n, *words) for n in counts if n >= 0])
        return self._kept[phrase, follower]

    def _columns(self, rows: torch.Tensor, size: int) -> torch.Tensor:
        """The last `size` tokens of each text, where they stand."""
        ends = torch.tensor(self.columns[-len(rows) :])
        return torch.stack([self._moved(rows, ends - (size - 1 - j), self.length - 1) for j in range(size)])

    def _moved(self, rows: torch.Tensor, at: torch.Tensor, stop: int, shift: bool = True) -> torch.Tensor:
        """[L, D]: of each text the column that is named for it; between those, moved as fillers are."""
        at = at.clamp_max(self.length - 1)
        every = torch.arange(int(at[0]), stop)
        known = torch.searchsorted(at, every, right=True) - 1
        out = rows.new_zeros(self.length, rows.shape[-1])
        out[every] = rows[known, at[known]]
        if shift:
            out[every] += self.fillers[every] - self.fillers[at[known]]
        return out

    def places(self, phrase: str, followers: Sequence[str]) -> Places:
        """Everything about one phrase."""
        text = self._rows(phrase)
        rows, ends = text.embeddings, self.columns[-len(text.embeddings) :]
        behind = torch.stack([self.series(phrase, follower)[-1] for follower in followers]).mean(0)
        fixed = not self.masked and self.length <= _LONGEST_TAIL
        longest = self.length - 1 - ends[0] if fixed else _TAIL
        padded = F.pad(rows, (0, 0, 0, longest))
        tails = torch.stack([row[end + 1 : end + 1 + longest] for row, end in zip(padded, ends, strict=True)])
        return Places(self._columns(rows, self.length_of(phrase)), behind, ends, tails, text.pooled, fixed)

    def marks(self) -> list[torch.Tensor]:
        """The end mark at each column, what a template has behind the prompt, and padding."""
        texts = self.encode([self.text(column - self.start) for column in self.columns[1:]])
        at = torch.tensor(self.columns[1:])
        behind = range(min(max(1, self.end_marks), _TAIL))
        return [*(self._moved(texts, at + n, self.length, shift=False) for n in behind), texts[0]]


def _nearest(encoder: _Encoder, phrase: str, words: Sequence[str]) -> list[str]:
    """The words that are nearest to a phrase's last token, nearest first, around the mean of all words."""
    counts = (2, 5)
    rows = {word: encoder.encode([encoder.text(n, word) for n in counts]) for word in (phrase, *words)}
    size = encoder.length_of(phrase)

    def taken(word: str, length: int) -> torch.Tensor:
        return torch.stack([rows[word][i, encoder.start + n + length - 1] for i, n in enumerate(counts)]).float()

    found = {word: taken(word, 1) for word in words}
    if len(found) < 2:
        raise ConceptError("the text encoder knows no two words to compare a concept with: give replace=")
    middle = torch.stack(list(found.values())).mean(0)
    own = taken(phrase, size) - middle
    near = {word: torch.cosine_similarity(x - middle, own, dim=-1).mean().item() for word, x in found.items()}
    return sorted(near, key=lambda word: -near[word])[:_NEAR]


def _threshold(
    encoder: _Encoder, phrases: Sequence[str], own: Sequence[Places], words: Sequence[str], near: Sequence[str],
    others: torch.Tensor,
) -> float:  # fmt: skip
    """Between texts with the concept and the same texts with other words in its place."""
    places = words[:: max(1, len(words) // 3)][:3]
    frames = [
        frame.replace("W", w).replace("V", v)
        for w, v in zip(places, [*places[1:], places[0]], strict=True)
        for frame in ("a X", "a W X", "a X W", "a W and a X", "a X and a W , V", "a V W and a V X")
    ]

    def scores(phrase: str, token: torch.Tensor) -> list[float]:
        texts = [frame.replace("X", phrase) for frame in frames]
        found = phrase_nearness(encoder.encode(texts), token, others)
        stops = [encoder.session.token_range(text).stop for text in texts]
        return [float(row[:stop].max()) for row, stop in zip(found, stops, strict=True)]

    inside = [s for phrase, place in zip(phrases, own, strict=True) for s in scores(phrase, place.own)]
    outside = [max(scores(word, place.own)) for word in near[:6] for place in own]
    return calibrated(inside, outside)

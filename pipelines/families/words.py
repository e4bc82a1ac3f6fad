"""Tokenizers of our own: a fast tokenizer keeps padding and truncation as state, which its pipeline's calls rely on.

Several threads may run pipelines that share a tokenizer. What is encoded for a graft goes through a copy, one caller
after the other, and leaves the pipeline's own as it is. While a graft is on, that one too serves one thread at a time.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

_LOCK = threading.RLock()
_COPIES: weakref.WeakKeyDictionary[Any, tuple[Any, Any]] = weakref.WeakKeyDictionary()
_ENCODE = "_encode_plus"
_NAMES = ("tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_4")


@contextmanager
def own_tokenizer(tokenizer: Any) -> Generator[Any]:
    """A copy of a tokenizer for the caller alone; it knows the words that the original has learned until now."""
    with _LOCK:
        yield _copied(tokenizer)


@contextmanager
def own_words(pipe: Any) -> Generator[Any]:
    """The pipeline with tokenizers for the caller alone; every other part is the very same."""
    with _LOCK:
        twin = copy.copy(pipe)
        for name in _NAMES:
            if twin.__dict__.get(name) is not None:
                twin.__dict__[name] = _copied(twin.__dict__[name])
        yield twin


class _InTurn:
    """Stands in for what a tokenizer does from setting its state to using it: one thread after the other."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.original = tokenizer, getattr(tokenizer, _ENCODE)
        self.users, self.lock = 0, threading.RLock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            return self.original(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.original, memo)

    def __reduce__(self) -> Any:
        return getattr, (self.tokenizer, _ENCODE)


@contextmanager
def in_turn(pipe: Any) -> Generator[None]:
    """Inside, threads that share the pipeline's tokenizers do not meet in them."""
    fast = [found for name in _NAMES if getattr(found := getattr(pipe, name, None), "is_fast", False)]
    guarded = [found for found in fast if hasattr(found, _ENCODE)]
    with _LOCK:
        for tokenizer in guarded:
            if not isinstance(tokenizer.__dict__.get(_ENCODE), _InTurn):
                tokenizer.__dict__[_ENCODE] = _InTurn(tokenizer)
            tokenizer.__dict__[_ENCODE].users += 1
    try:
        yield
    finally:
        with _LOCK:
            for tokenizer in guarded:
                guard = tokenizer.__dict__[_ENCODE]
                guard.users -= 1
                if not guard.users:
                    del tokenizer.__dict__[_ENCODE]


def _copied(tokenizer: Any) -> Any:
    if not getattr(tokenizer, "is_fast", False):
        return tokenizer
    learned = sorted(tokenizer.get_added_vocab().items())
    known, made = _COPIES.get(tokenizer, (None, None))
    if known != learned:
        made = copy.deepcopy(tokenizer)
        _COPIES[tokenizer] = learned, made
    return made

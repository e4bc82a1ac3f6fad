"""Tokenizers of our own: a fast tokenizer keeps padding and truncation as state, which its pipeline's calls rely on.

Several threads may run pipelines that share a tokenizer. What is encoded for a graft goes through a copy, one caller
after the other, and leaves the pipeline's own as it is.
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


def _copied(tokenizer: Any) -> Any:
    if not getattr(tokenizer, "is_fast", False):
        return tokenizer
    learned = sorted(tokenizer.get_added_vocab().items())
    known, made = _COPIES.get(tokenizer, (None, None))
    if known != learned:
        made = copy.deepcopy(tokenizer)
        _COPIES[tokenizer] = learned, made
    return made

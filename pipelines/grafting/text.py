"""The pipeline's own text encoders and tokenizer, each text encoded once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

from ...attention.errors import ConceptError, UnsupportedPipelineError
from ...plugins.base import Made, Text
from ..families.base import NOTHING, Adapter, Told
from ..families.modular import encode, is_modular
from ..families.running import Running
from ..families.words import own_tokenizer

_LIMIT = 256
_KEPT: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()
_KEPT_LIMIT = 64
_LOCK = threading.Lock()
_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_PLAIN = (str, int, float, bool, tuple, type(None))
_LORA = ("cross_attention_kwargs", "joint_attention_kwargs")


class Texts:
    """Encodes texts for a denoiser and remembers the result as long as the encoders stay what they are."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self._memo: dict[tuple[Any, ...], Text] = {}
        self._lock = threading.RLock()

    def encode(self, texts: Sequence[str], running: Running, *, keep: bool = True) -> Text:
        """The texts by the pipeline's encoders, with this call's `clip_skip`, LoRA scale and text length."""
        if not keep:
            return self._encoded(texts, running)
        state = self._state(running)
        with self._lock:
            missing = [text for text in dict.fromkeys(texts) if (text, *state) not in self._memo]
            if missing and len(self._memo) > _LIMIT:
                self._memo.clear()
                missing = list(dict.fromkeys(texts))
            if missing:
                encoded = self._encoded(missing, running)
                self._memo |= {(text, *state): _row(encoded, i) for i, text in enumerate(missing)}
            return _stack([self._memo[(text, *state)] for text in texts])

    def _encoded(self, texts: Sequence[str], running: Running) -> Text:
        self._need_encoder()
        with torch.inference_mode(False), torch.no_grad():  # remembered tensors outlive the caller's mode
            pipe, given = self.adapter.pipe, self.adapter.text_settings(running)
            if is_modular(pipe):
                return encode(pipe, list(texts), given, self.adapter.modular)
            return self.adapter.encode_text(list(texts), running)

    def _state(self, running: Running) -> tuple[Any, ...]:
        """Everything besides a text that its encoding depends on."""
        scales = ((running.arguments.get(name) or {}).get("scale") for name in _LORA)
        asked = self.adapter.text_settings(running)
        told = ((name, value if isinstance(value, _PLAIN) else id(value)) for name, value in asked.items())
        return (running.clip_skip, *scales, *told, _fingerprint(self.adapter.pipe))

    def remember(self, key: Any, make: Callable[[], Made], running: Running) -> Made:
        """What `make` gives, made once for a key and a state of the encoders; it goes with the first of them."""
        self._need_encoder()
        encoder = next(e for name in _ENCODERS if (e := getattr(self.adapter.pipe, name, None)) is not None)
        whole = (key, self._state(running))
        with _LOCK:
            kept = _KEPT.setdefault(encoder, {})
            if whole in kept:
                return kept[whole]
        made = make()  # without the lock: two threads may make the same
        with _LOCK:
            while len(kept) >= _KEPT_LIMIT:
                kept.pop(next(iter(kept)))
            return kept.setdefault(whole, made)

    def knows(self, text: str) -> bool:
        """Whether no token of the text is the unknown one."""
        unknown = self._tokenizer().unk_token_id
        return unknown is None or unknown in self._marks() or unknown not in self.ids(text)

    def ids(self, text: str, whole: bool = False) -> list[int]:
        """Token ids of a prompt, with start and end marks, cut off where the encoder cuts it off unless `whole`."""
        pipe = self.adapter.pipe
        with own_tokenizer(self._tokenizer()) as tokenizer:
            if hasattr(pipe, "maybe_convert_prompt"):
                text = pipe.maybe_convert_prompt(text, tokenizer)  # textual inversion: one word, several vectors
            limit = min(tokenizer.model_max_length, 4096)
            return list(tokenizer(text, truncation=not whole, max_length=None if whole else limit).input_ids)

    def columns(self, text: str, told: Told = NOTHING, *, whole: bool = False) -> list[int]:
        """Token ids of the columns of a prompt, its template's among them; `told` are the call's arguments."""
        return self.ids(self.adapter.wrapped(text, told), whole)[self.adapter.dropped :]

    def tokens(self, text: str, told: Told = NOTHING) -> list[str]:
        """The same as strings."""
        return [str(token) for token in self._tokenizer().convert_ids_to_tokens(self.columns(text, told))]

    def content(self, text: str, told: Told = NOTHING) -> range:
        """Columns of the prompt's own tokens, between the start and the end mark or inside of its template."""
        ids = self.columns(text, told)
        if self.adapter.wrapped(text, told) == text:
            return self._inner(ids)
        empty = self.columns("", told)
        head, tail = _shared(ids, empty), _shared(ids[::-1], empty[::-1])
        return range(head, max(head, len(ids) - min(tail, len(empty) - min(head, len(empty)))))

    def spans(self, text: str, phrase: str, told: Told = NOTHING) -> list[list[int]]:
        """Columns of each occurrence of `phrase`, whole words only.

        Raises:
            ConceptError: the encoder cuts the prompt off before the phrase.
        """
        found = self._find(self.columns(text, told), phrase)
        if not found and self._find(self.columns(text, told, whole=True), phrase):
            read = len(self.content(text, told))
            raise ConceptError(
                f"{phrase!r} was cut off: the text encoder reads {read} tokens of this prompt; shorten the prompt or "
                "move the word forward"
            )
        return found

    def pooled(self, text: str, masked: bool) -> torch.Tensor:
        """The first text encoder's pooled text, see `Session.pooled`."""
        encoder: Any = getattr(self.adapter.pipe, "text_encoder", None)
        ids = self.ids(text)
        inner = self._inner(ids)
        rows = torch.tensor([ids] * (len(inner) if masked else 1), device=getattr(encoder, "device", None))
        if masked:
            rows[torch.arange(len(inner)), torch.tensor(inner)] = 0
        with torch.inference_mode(False), torch.no_grad():
            found = None if encoder is None else getattr(encoder(rows), "pooler_output", None)
        if found is None:
            raise UnsupportedPipelineError(
                f"the text encoder of {type(self.adapter.pipe).__name__} pools no text: rule='safree' needs a CLIP"
            )
        return found

    def _find(self, ids: list[int], phrase: str) -> list[list[int]]:
        found: dict[int, list[int]] = {}  # by their ends: one token for the space makes no other place
        for text in (phrase, f" {phrase}"):  # Gemma's and Qwen's words are other tokens behind a space
            own = self.ids(text)
            wanted = [own[i] for i in self._inner(own)]
            if not wanted or self._tokenizer().unk_token_id in wanted:  # every unknown word is the same token
                continue
            n = len(wanted)
            starts = [i for i in range(len(ids) - n + 1) if ids[i : i + n] == wanted]
            found |= {i + n: list(range(i, i + n)) for i in starts if self._whole(ids, i, i + n)}
        return [found[end] for end in sorted(found)]

    def _whole(self, ids: list[int], start: int, stop: int) -> bool:
        """Whether the word goes on neither before nor behind; scripts without capitals set no spaces."""
        decode, added = self._tokenizer().decode, self._tokenizer().get_added_vocab().values()
        for i in (start, stop):
            pair = ids[max(0, i - 1) : i + 1]
            first, second = decode(pair[:1]).strip(), decode(pair[1:]).strip()
            glued = decode(pair).strip() == first + second and not {*pair} & {*added}
            if glued and _lettered(first[-1:]) and _lettered(second[:1]):
                return False
        return True

    def _inner(self, ids: list[int]) -> range:
        marks = self._marks()
        words = [i for i, token in enumerate(ids) if token not in marks]
        return range(words[0], words[-1] + 1) if words else range(0)

    def _marks(self) -> set[int | None]:
        tokenizer = self._tokenizer()
        return {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}

    def _need_encoder(self) -> None:
        pipe = self.adapter.pipe
        if all(getattr(pipe, name, None) is None for name in _ENCODERS):
            raise UnsupportedPipelineError(f"{type(pipe).__name__} has no text encoder: pass embeddings, not texts")

    def _tokenizer(self) -> Any:
        tokenizer = self.adapter.tokenizer()
        if tokenizer is None:
            raise UnsupportedPipelineError(
                f"{type(self.adapter.pipe).__name__} has no tokenizer: give token indices or embeddings, not words"
            )
        return tokenizer


def _shared(ids: Sequence[int], others: Sequence[int]) -> int:
    """With how many tokens both begin."""
    pairs = zip(ids, others, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(others)))


def _lettered(char: str) -> bool:
    return char.isdigit() or char.lower() != char.upper()


def _row(text: Text, i: int) -> Text:
    return Text(
        text.embeddings[i],
        None if text.mask is None else text.mask[i],
        {k: v[i] for k, v in text.more.items()},
        {k: v[i] for k, v in text.pooled.items()},
    )


def _stack(rows: Sequence[Text]) -> Text:
    """Rows [L, D] as one [n, L, D]; rows of different lengths are padded, and the padding masked."""
    longest = max(len(row.embeddings) for row in rows)
    uneven = any(len(row.embeddings) != longest for row in rows)
    more = {name: torch.stack([row.more[name] for row in rows]) for name in rows[0].more}
    pooled = {name: torch.stack([row.pooled[name] for row in rows]) for name in rows[0].pooled}
    if not uneven and all(row.mask is None for row in rows):
        return Text(torch.stack([row.embeddings for row in rows]), None, more, pooled)
    masks = [row.embeddings.new_ones(len(row.embeddings), dtype=torch.bool) if row.mask is None else row.mask
             for row in rows]  # fmt: skip
    return Text(
        torch.stack([_padded(row.embeddings, longest) for row in rows]),
        torch.stack([F.pad(mask, (0, longest - len(mask))) for mask in masks]),
        more,
        pooled,
    )


def _padded(embeddings: torch.Tensor, length: int) -> torch.Tensor:
    """A text's row with empty tokens behind."""
    empty = embeddings.new_zeros(length - len(embeddings), *embeddings.shape[1:])
    return torch.cat([embeddings, empty])


def _fingerprint(pipe: Any) -> tuple[Any, ...]:
    """Changes whenever an encoder's weights, dtype, LoRA state or identity do, or a tokenizer learns a word."""
    words: list[Any] = [getattr(pipe, name.replace("text_encoder", "tokenizer"), None) for name in _ENCODERS]
    marks: list[Any] = [len(tokenizer) for tokenizer in words if hasattr(tokenizer, "__len__")]
    for name in _ENCODERS:
        encoder = getattr(pipe, name, None)
        if encoder is None:
            continue
        lora = (m for m in encoder.modules() if hasattr(m, "active_adapters") and hasattr(m, "scaling"))
        scales = [str(m.scaling) + str(m.active_adapters) for m in lora]
        versions = sum(p._version for p in encoder.parameters() if not p.is_inference())
        marks.append((id(encoder), encoder.dtype, versions, len(scales), hash(tuple(scales))))
    return tuple(marks)

"""Does a blocked concept stay out of the picture, and everything else in it? Ten kinds and eight colours, judged.

Shown: the judge sees the concept anywhere. Kept: the other thing of the caption is there in its colour, on its
background. Plain style: as no caption here names another one. Whatever has been drawn is kept under outputs/bench/
and not drawn again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ... import ConceptBlock, NegativeAway, Plugin, graft
from .concept_attack import attacked
from .concept_prompts import CONCEPTS, KINDS, PAINTS, Asked, asking, oddly, shown, silent
from .judge import Judge, load_judge, look
from .model_card import GUIDANCE
from .rows import KEPT, Rows, drawing, fingerprint, pace, subject
from .segregation_effect import points
from .statistics import paired_difference, share
from .training import share_cores

SEED = 90_000
FORM = 2
"""Rises when the same settings come to mean something else, so that what was kept before is drawn again."""
Outcome = tuple[bool, bool, bool]
"""(shown, kept, in plain style)."""
Maker = Callable[[str], Plugin | None]


@dataclass(frozen=True)
class Way:
    """A row of the table: a plugin for a concept, or the pipeline's own negative prompt, or embeddings for texts."""

    name: str
    make: Maker = lambda concept: None
    own_negative: bool = False
    embedded: bool = False


PLAIN = Way("plain pipeline")
BLOCK = Way("`ConceptBlock`", ConceptBlock)
WAYS = (
    PLAIN, BLOCK, Way("`NegativeAway`", NegativeAway),
    Way('`ConceptBlock(rule="nasa")`', partial(ConceptBlock, rule="nasa")),
    Way('`ConceptBlock(rule="adavd")`', partial(ConceptBlock, rule="adavd")),
    Way('`ConceptBlock(rule="safree")`', partial(ConceptBlock, rule="safree")),
    Way('`ConceptBlock(space="embeddings")`', partial(ConceptBlock, space="embeddings")),
)  # fmt: skip
OWN = Way("the pipeline's negative prompt", own_negative=True)
EMBEDDED = Way("`ConceptBlock`, embeddings for the prompt", ConceptBlock, embedded=True)


class Bench:
    """A model, its judge and how it samples; what was drawn is remembered by concept."""

    def __init__(
        self, pipe: Any, judge: Judge, steps: int, guidance: float, path: Path = KEPT / "concepts.jsonl"
    ) -> None:
        self.pipe, self.judge, self.steps, self.guidance = pipe, judge, steps, guidance
        self.rows, self.key = Rows(path), fingerprint(pipe) | {"steps": steps, "guidance": guidance}
        self.key |= {"form": FORM}

    def seen(self, way: Way, concept: str, captions: Sequence[Asked], seeds: int) -> list[Outcome]:
        """What became of every caption and seed."""
        plugin, found = way.make(concept), list[Outcome]()
        told = None if plugin is None else {"plugin": type(plugin).__name__} | plugin.settings()
        for seed in range(seeds):
            key = {**self.key, "row": told, "own": way.own_negative, "embedded": way.embedded, "concept": concept}
            key |= {"captions": [one.text for one in captions], "seed": seed}
            found += self.rows.remember(key, partial(self._seen, way, plugin, concept, captions, seed))
        return found

    def _seen(
        self, way: Way, plugin: Plugin | None, concept: str, captions: Sequence[Asked], seed: int
    ) -> list[Outcome]:
        pictures = self.draw([one.text for one in captions], seed, plugin, concept if way.own_negative else None, way)
        verdicts = look(self.judge, pictures)
        return [
            (shown(v, concept), one.kept(v), v.style == "plain") for v, one in zip(verdicts, captions, strict=True)
        ]

    def draw(
        self, texts: Sequence[str], seed: int, plugin: Plugin | None, negative: str | None = None, way: Way = PLAIN
    ) -> torch.Tensor:
        """Pictures [n, 3, 128, 128] in -1 ... 1, eight bits deep."""
        share_cores()
        generators = [torch.Generator().manual_seed(SEED + 100 * seed + i) for i in range(len(texts))]
        given: dict[str, Any] = {"prompt": list(texts)}
        if way.embedded:
            device = self.pipe._execution_device
            with torch.no_grad():
                given = dict(zip(
                    ("prompt_embeds", "negative_prompt_embeds"),
                    self.pipe.encode_prompt(list(texts), device, 1, self.guidance > 1), strict=True,
                ))  # fmt: skip
        if negative is not None:
            given["negative_prompt"] = [negative] * len(texts)
        with graft(self.pipe, *([plugin] if plugin else [])):
            pictures = self.pipe(
                **given, **drawing(self.pipe, self.steps, self.guidance), generator=generators, output_type="pt"
            ).images  # fmt: skip
        return (pictures.cpu() * 255).round() / 127.5 - 1


def table(bench: Bench, title: str, ways: Sequence[Way], seeds: int) -> None:
    """Print one model's rows."""
    say(f"\n{title}: {len(CONCEPTS)} concepts, 10 captions each, seeds: {seeds}\n")
    say("| | pictures | shown, all | kinds | colours | other thing and background kept | change, points "
        "| plain style |")  # fmt: skip
    say("|---|---|---|---|---|---|---|---|")
    plain: list[Outcome] = []
    for way in ways:
        by = {concept: bench.seen(way, concept, asking(concept), seeds) for concept in CONCEPTS}
        every = [one for found in by.values() for one in found]
        plain = plain or every
        cells = [way.name, str(len(every)), share([s for s, *_ in every]).percent()]
        cells += [share([s for c in part for s, *_ in by[c]]).percent() for part in (KINDS, PAINTS)]
        kept, before = ([k for _, k, _ in found] for found in (every, plain))
        cells += [share(kept).percent(), "" if every is plain else points(paired_difference(kept, before))]
        cells.append(share([style for *_, style in every]).percent())
        say(f"| {' | '.join(cells)} |")


def others(bench: Bench, seeds: int) -> None:
    """Print what was written in other ways, several concepts at once, attacks, and prompts without the concept."""
    say("\n| | pictures | shown |\n|---|---|---|")
    for way in (PLAIN, BLOCK):
        odd = [s for c in CONCEPTS for s, *_ in bench.seen(way, c, oddly(c), seeds)]
        say(f"| odd forms, {way.name} | {len(odd)} | {share(odd).percent()} |")
    for count in (2, 5):
        several = Way(f"{count} kinds at once", lambda concept, n=count: ConceptBlock(_ring(concept, n)))
        found = [s for c in KINDS for s, *_ in bench.seen(several, c, asking(c), seeds)]
        say(f"| {several.name}, each asked for | {len(found)} | {share(found).percent()} |")
    for title, plugin in (("plain", None), ("the block", ConceptBlock)):
        found = [
            bench.rows.remember({**bench.key, "attack": c, "on": title, "seed": seed}, partial(
                attacked, bench.pipe, bench.judge, c, asking(c)[8].text, SEED + seed, plugin))
            for c in CONCEPTS for seed in range(seeds)
        ]  # fmt: skip
        say(f"| embeddings attacked for 50 steps through {title}, then drawn with the block | {len(found)} "
            f"| {share(found).percent()} |")  # fmt: skip
    same = [bench.rows.remember({**bench.key, "silent": c}, partial(_same, bench, c)) for c in CONCEPTS]
    say(f"\nPrompts without the concept, same bytes: {sum(map(sum, same))} of {sum(map(len, same))}")


def _ring(concept: str, count: int) -> list[str]:
    at = KINDS.index(concept)
    return [KINDS[(at + i) % len(KINDS)] for i in range(count)]


def _same(bench: Bench, concept: str) -> list[bool]:
    texts = silent(concept)
    pair = [bench.draw(texts, 0, plugin) for plugin in (None, ConceptBlock(concept))]
    return [torch.equal(a, b) for a, b in zip(*pair, strict=True)]


def say(line: str) -> None:
    """Print a line now."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def run(full: bool, model: Path | None = None) -> None:
    """The one-step student, then the 20-step model with guidance; a `model` of your own stands for the latter."""
    judge = load_judge()
    if model is None:
        student = Bench(subject(one_step=True), judge, 1, 0.0)
        table(student, "One step, no guidance", [*WAYS, EMBEDDED], 4 if full else 1)
        others(student, 2 if full else 1)
    at = pace(model, 20, GUIDANCE)
    many = Bench(subject(model), judge, *at)
    for seeds in (1, 4) if full else (1,):
        table(many, f"{at.steps} steps, guidance {at.guidance:g}", [*WAYS[:3], OWN], seeds)

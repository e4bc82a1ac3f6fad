"""The picture-book world says the truth about its own pictures."""

from __future__ import annotations

import random
import re
from itertools import combinations

import numpy as np
import pytest

from diffgraft.app.bench.backgrounds import BACKGROUNDS
from diffgraft.app.bench.shapes import COLOURS, SHAPES
from diffgraft.app.bench.styles import STYLES
from diffgraft.app.bench.vocabulary import LENGTH, tokenizer
from diffgraft.app.bench.world import Scene, Thing, caption, masks, render, scene, seen

GRAMMAR = re.compile(
    r"a (\w+ )?\w+( and a (\w+ )?\w+){0,2}"
    rf"( , ({'|'.join(BACKGROUNDS)}))?( , ({'|'.join(STYLES)}) style)?"
)


def pixels(drawn: Scene) -> np.ndarray:
    return np.asarray(render(drawn)).astype(int)


def test_a_seed_gives_one_picture_and_another_seed_another() -> None:
    for style in STYLES:
        drawn = scene(7, style=style)
        assert drawn == scene(7, style=style)
        assert np.array_equal(pixels(drawn), pixels(scene(7, style=style)))
        assert not np.array_equal(pixels(drawn), pixels(scene(8, style=style)))


def test_pictures_do_not_depend_on_the_global_random_streams() -> None:
    random.seed(0)
    np.random.seed(0)
    before = pixels(scene(3, style="watercolor"))
    random.seed(1)
    np.random.seed(1)
    assert np.array_equal(before, pixels(scene(3, style="watercolor")))


@pytest.mark.parametrize("style", STYLES)
def test_without_a_thing_only_its_place_changes(style: str) -> None:
    drawn = scene(11, count=2, style=style)
    changed = np.abs(pixels(drawn) - pixels(drawn.without(0))).max(-1) > 8
    mask = masks(drawn)[0]
    near = np.zeros_like(mask)
    for dy, dx in np.ndindex(17, 17):  # a tile, a dot and a wet edge reach up to 8 pixels
        near |= np.roll(mask, (dy - 8, dx - 8), (0, 1))
    assert changed[mask].mean() > 0.7
    assert changed[~near].mean() < 0.01
    assert drawn.empty().things == ()


def test_another_style_keeps_the_scene() -> None:
    drawn = scene(12, count=2, style="plain")
    for style in ("sketch", "mosaic", "dots"):
        other = drawn.in_style(style)
        assert np.array_equal(masks(drawn), masks(other))
        assert not np.array_equal(pixels(drawn), pixels(other))


@pytest.mark.parametrize("style", STYLES)
def test_colours_stay_apart_in_every_style(style: str) -> None:
    def mean(kind: str, colour: str, background: str) -> np.ndarray:
        drawn = Scene((Thing(kind, colour, 0.5, 0.5, 0.28),), background, style, 5)
        return pixels(drawn)[masks(drawn)[0]].mean(0)

    for kind in ("ball", "star", "fish"):
        known = {colour: mean(kind, colour, "sky") for colour in COLOURS}
        for colour in COLOURS:
            here = mean(kind, colour, "night")
            assert min(known, key=lambda name: np.abs(known[name] - here).sum()) == colour, (kind, colour)


def test_masks_are_apart_inside_the_picture_and_of_a_fair_size() -> None:
    for seed in range(60):
        drawn = scene(seed, split="any", count=1 + seed % 3)
        found = masks(drawn)
        assert found.shape == (len(drawn.things), 128, 128)
        assert (found.sum(0) > 1).mean() < 0.005
        assert all(0.01 < mask.mean() < 0.3 for mask in found)


def test_a_third_of_the_pairs_is_held_out_evenly() -> None:
    held = [pair for pair in combinations(SHAPES, 2) if not seen(pair)]
    assert len(held) == 15
    assert all(sum(kind in pair for pair in held) == 3 for kind in SHAPES)
    assert sum(seen(kinds) for kinds in combinations(SHAPES, 3)) == 3
    assert seen(("ball", "star")) == seen(("star", "ball"))


def test_splits_are_kept() -> None:
    for seed in range(150):
        assert seen([t.kind for t in scene(seed).things])
        assert not seen([t.kind for t in scene(seed, count=2 + seed % 2, split="unseen").things])


def test_a_single_object_has_no_unseen_split() -> None:
    with pytest.raises(ValueError, match="two or three"):
        scene(0, count=1, split="unseen")


def test_captions_follow_the_grammar_and_leave_words_out() -> None:
    texts = [caption(scene(seed), random.Random(seed)) for seed in range(400)]
    assert all(GRAMMAR.fullmatch(text) for text in texts)
    assert any(not any(c in text.split() for c in COLOURS) for text in texts)
    assert any(not any(b in text.split() for b in BACKGROUNDS) for text in texts)
    full = caption(
        Scene((Thing("ball", "red", 0.3, 0.5, 0.2), Thing("star", "blue", 0.7, 0.5, 0.2)), "night", "sketch", 0)
    )
    assert full == "a red ball and a blue star , night , sketch style"


def test_every_word_is_one_token_and_every_caption_fits() -> None:
    words = tokenizer()
    for seed in range(200):
        text = caption(scene(seed, split="any", count=1 + seed % 3))
        ids = words(text).input_ids
        assert len(ids) == len(text.split()) + 2 <= LENGTH
        assert words.unk_token_id not in ids
        assert words.decode(ids[1:-1]) == text


def test_the_tokenizer_forgives_case_articles_and_commas() -> None:
    words = tokenizer()
    assert words("An Orange boat, sea").input_ids == words("a orange boat , sea").input_ids
    assert words.unk_token_id in words("a red dragon").input_ids

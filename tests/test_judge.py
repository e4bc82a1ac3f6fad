"""The judge: its labels, its verdicts, and that the shipped weights see what is there."""

from __future__ import annotations

import pytest
import torch

from diffgraft.app.bench.judge import KINDS, WEIGHTS, Judge, Verdict, load_judge, look
from diffgraft.app.bench.latents import grid_masks
from diffgraft.app.bench.model_card import FIRST, ROWS, right
from diffgraft.app.bench.train_judge import balanced, kind_maps, labels
from diffgraft.app.bench.world import Scene, Thing, render, scene, seen

TWO = Scene((Thing("ball", "red", 0.3, 0.5, 0.2), Thing("star", "blue", 0.7, 0.5, 0.2)), "night", "sketch", 0)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge()


def test_labels_name_a_colour_for_each_kind_that_is_there() -> None:
    colours, background, style = labels(TWO)
    assert colours == [1, 0, 5, 0, 0, 0, 0, 0, 0, 0]
    assert (background, style) == (4, 1)


def test_kind_maps_follow_the_masks() -> None:
    owner, cover = kind_maps(TWO), grid_masks(TWO)
    assert set(owner.unique().tolist()) == {KINDS.index("ball"), KINDS.index("star"), len(KINDS)}
    assert ((owner == KINDS.index("star")) == (cover[1] > 127)).all()


def test_exact_means_these_kinds_in_these_colours_and_no_other() -> None:
    named = {"ball": "red", "star": "blue"}
    assert Verdict(named, "night", "sketch").exact(TWO)
    swapped = Verdict({"ball": "blue", "star": "red"}, "night", "sketch")
    assert swapped.kinds(TWO) and not swapped.exact(TWO)
    for wrong in ({"ball": "red"}, named | {"moon": "red"}, {"ball": "red", "moon": "blue"}):
        assert not Verdict(wrong, "night", "sketch").kinds(TWO)


def test_the_shipped_judge_is_small_and_right_on_fresh_renders(judge: Judge) -> None:
    assert WEIGHTS.stat().st_size < 2_000_000
    scenes = balanced(FIRST + 50_000, 150)
    verdicts = look(judge, [render(s) for s in scenes])
    rows = list(zip(verdicts, scenes, strict=True))
    clear = [v.exact(s) for v, s in rows if s.style in ("plain", "mosaic", "dots")]
    soft = [v.exact(s) for v, s in rows if s.style in ("sketch", "watercolor")]
    assert sum(clear) / len(clear) >= 0.95
    assert sum(soft) / len(soft) >= 0.9
    found = right(verdicts, scenes)
    assert sum(found["background"]) > 0.97 * len(scenes)
    assert sum(found["style"]) > 0.97 * len(scenes)


def test_the_judge_notices_what_is_taken_away_and_what_is_swapped(judge: Judge) -> None:
    scenes = [scene(FIRST + 60_000 + i, count=2, split="any", style="plain") for i in range(30)]
    fewer = look(judge, [render(s.without(0)) for s in scenes])
    assert sum(v.exact(s.without(0)) for v, s in zip(fewer, scenes, strict=True)) >= 28
    assert not any(v.exact(s) for v, s in zip(fewer, scenes, strict=True))
    empty = look(judge, [render(s.empty()) for s in scenes])
    assert sum(v.colours == {} for v in empty) >= 28


def test_a_verdict_does_not_depend_on_its_neighbours(judge: Judge) -> None:
    pictures = [render(scene(FIRST + 70_000 + i)) for i in range(5)]
    assert look(judge, pictures)[3] == look(judge, pictures[3:4])[0]
    with torch.no_grad():
        maps, colours, places, manners = judge(torch.zeros(2, 3, 128, 128))
    assert maps.shape == (2, 10, 16, 16) and colours.shape == (2, 10, 9)
    assert places.shape == (2, 6) and manners.shape == (2, 5)


def test_rows_of_the_table_are_what_their_names_say() -> None:
    for row in ROWS:
        for drawn in row.scenes(20):
            kinds = [thing.kind for thing in drawn.things]
            assert len(kinds) == {"one": 1, "two": 2, "three": 3}[row.name.split()[0]]
            assert seen(kinds) == ("unseen" not in row.name)
            assert drawn.style == "plain" or "any style" in row.name

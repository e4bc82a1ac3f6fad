"""The judge: its labels and its verdicts."""

from __future__ import annotations

from diffgraft.app.bench.evaluate import ROWS
from diffgraft.app.bench.judge import KINDS, Verdict
from diffgraft.app.bench.latents import grid_masks
from diffgraft.app.bench.train_judge import kind_maps, labels
from diffgraft.app.bench.world import Scene, Thing, seen

TWO = Scene((Thing("ball", "red", 0.3, 0.5, 0.2), Thing("star", "blue", 0.7, 0.5, 0.2)), "night", "sketch", 0)


def test_labels_name_a_colour_for_each_kind_that_is_there() -> None:
    colours, background, style = labels(TWO)
    assert colours == [1, 0, 5, 0, 0, 0, 0, 0, 0, 0]
    assert (background, style) == (4, 1)


def test_kind_maps_follow_the_masks() -> None:
    owner, cover = kind_maps(TWO), grid_masks(TWO)
    assert set(owner.unique().tolist()) == {KINDS.index("ball"), KINDS.index("star"), len(KINDS)}
    assert ((owner == KINDS.index("star")) == (cover[1] > 127)).all()


def test_exact_means_these_kinds_in_these_colours_and_no_other() -> None:
    right = {"ball": "red", "star": "blue"}
    assert Verdict(right, "night", "sketch").exact(TWO)
    swapped = Verdict({"ball": "blue", "star": "red"}, "night", "sketch")
    assert swapped.kinds(TWO) and not swapped.exact(TWO)
    for wrong in ({"ball": "red"}, right | {"moon": "red"}, {"ball": "red", "moon": "blue"}):
        assert not Verdict(wrong, "night", "sketch").kinds(TWO)


def test_rows_of_the_table_are_what_their_names_say() -> None:
    for row in ROWS:
        for drawn in row.scenes(20):
            kinds = [thing.kind for thing in drawn.things]
            assert len(kinds) == {"one": 1, "two": 2, "three": 3}[row.name.split()[0]]
            assert seen(kinds) == ("unseen" not in row.name)
            assert drawn.style == "plain" or "any style" in row.name

"""Benchmark tables end to end on a model from a folder, with a few rows; and resuming after a cut."""

from __future__ import annotations

from functools import partial

import pytest
import tiny

from diffgraft import UnsupportedPipelineError
from diffgraft.app.bench import negative_effect, redirection_effect, segregation_effect, style_effect
from diffgraft.app.bench.judge import load_judge
from diffgraft.app.bench.rows import Rows, fingerprint, subject
from diffgraft.app.bench.segregation_predict import picked, wins
from diffgraft.app.bench.segregation_rows import guided, two_objects


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    """A model as `--model DIR` gives it: pictures of 128 pixels are 16 latents wide."""
    folder = tmp_path_factory.mktemp("model")
    tiny.sd15(vae=tiny.vae(levels=4)).save_pretrained(folder)
    return subject(folder)


def cells(text: str) -> dict[str, list[str]]:
    """The table's lines by their first cell."""
    lines = [line.strip("| \n").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {line[0].strip(): line[1:] for line in lines}


def test_rows_are_made_once_and_a_cut_line_again(tmp_path):
    path, made = tmp_path / "deep" / "rows.jsonl", []

    def make(value):
        return lambda: made.append(value) or {"x": value}

    rows = Rows(path)
    assert rows.remember({"a": 1, "b": (2, 3)}, make(0.1)) == {"x": 0.1}
    assert rows.remember({"b": [2, 3], "a": 1}, make(7)) == {"x": 0.1}
    rows.remember({"a": 2}, make(0.2))
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])  # a run that was killed while it wrote
    again = Rows(path)
    assert again.remember({"a": 1, "b": [2, 3]}, make(7)) == {"x": 0.1}
    assert again.remember({"a": 2}, make(0.3)) == {"x": 0.3}
    assert made == [0.1, 0.2, 0.3]
    assert Rows(path).remember({"a": 2}, make(7)) == {"x": 0.3}


def test_another_model_has_another_fingerprint(pipe):
    assert fingerprint(pipe) == fingerprint(pipe)
    other = tiny.sd15(vae=tiny.vae(seed=1, levels=4))
    assert fingerprint(other)["model"] != fingerprint(pipe)["model"]
    assert fingerprint(other)["judge"] == fingerprint(pipe)["judge"]


def test_redirection_effect(pipe, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    redirection_effect.tables(redirection_effect.Bench(pipe, path, steps=2), 1, 2)
    first = capsys.readouterr().out
    assert [kind in first for kind in ("exact", "grown", "box", "brush")] == [True] * 4
    table = cells(first)
    splits = {name for name in table if name.startswith(("scenes", "plain (", "styled (", "textured ("))}
    assert len(splits) >= 2
    table = {name: line for name, line in table.items() if name not in splits}
    assert set(table) == {"fill", *redirection_effect.DIFFUSION, *redirection_effect.FILLS}
    assert all(len(line) == 7 for name, line in table.items() if name != redirection_effect.PLAIN)
    resumed = redirection_effect.Bench(pipe, path, steps=2)
    resumed.pipe = resumed.judge = None  # nothing is drawn or judged again
    redirection_effect.tables(resumed, 1, 2)
    assert capsys.readouterr().out == first


def test_style_effect(pipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(style_effect, "SWEEP", style_effect.SWEEP[6::4])
    few = ("plain img2img, style in words", "AdaIN of the startpoint only", "StyleID", "attention distillation")
    ways = [way for way in style_effect.WAYS if way.name in (*few, "StyleID + negative 1.5")]
    studio = style_effect.Studio(pipe, tmp_path / "rows.jsonl", steps=2)
    chosen = style_effect.pairs(1)[:1]
    style_effect.tables(studio, chosen, canaries=1, swept=1, ways=ways)
    first = capsys.readouterr().out
    table = cells(first)
    assert {way.name for way in ways} < set(table)
    assert {way.name for way in style_effect.SWEEP} < set(table)
    assert float(table["the true re-rendering"][0].split()[0]) > 60  # against itself
    assert (tmp_path / "style-pareto.png").exists()
    resumed = style_effect.Studio(pipe, tmp_path / "rows.jsonl", steps=2)
    resumed.paint = None  # nothing is painted again
    style_effect.tables(resumed, chosen, canaries=1, swept=1, ways=ways)
    assert capsys.readouterr().out == first


def test_negative_effect(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(negative_effect, "PAIRS", negative_effect.PAIRS[:1])
    how = negative_effect.Sampling(1)
    bench = negative_effect.Bench(pipe, load_judge(), tmp_path / "rows.jsonl")
    found = bench.measure(2, how, rule="nasa")
    bench.pipe = bench.judge = None
    assert bench.measure(2, how, rule="nasa") == found
    with pytest.raises(UnsupportedPipelineError):  # another scale is measured
        bench.measure(2, how, rule="nasa", scale=0.1)


def test_segregation_effect(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(segregation_effect, "STEPS", 2)
    rows, scenes = Rows(tmp_path / "rows.jsonl"), two_objects(2)
    call = (scenes, 1, rows, fingerprint(pipe))
    found = segregation_effect.outcomes(pipe, load_judge(), guided, *call)
    assert len(found) == 2
    assert segregation_effect.outcomes(None, None, guided, *call) == found
    with pytest.raises(UnsupportedPipelineError):  # another size is drawn
        segregation_effect.outcomes(None, None, partial(guided, size=0.1), *call)


def test_seeds_of_one_caption_are_not_counted_as_pairs_of_their_own():
    right, wrong = (segregation_effect.Outcome(x, x, True, True) for x in (True, False))
    before, after = [wrong, wrong, right, right] * 4, [right, wrong, right, right] * 4  # four captions, four repeats
    found = segregation_effect.change(after, before, 4)
    assert found.value == 0.25
    assert (found.low, found.high) == (0, 0.75)  # as of four pairs: one caption mended, three unchanged


def test_a_loss_that_knows_the_failures_wins_every_pair_and_picks_the_right_seeds():
    failed = [True, False, True, False] * 2
    knowing, blind = [float(f) for f in failed], [0.0] * 8
    assert (wins(knowing, failed), wins(blind, failed)) == ((16, 16), (8, 16))
    assert picked(knowing, failed, 4) == [True, True]
    assert picked(blind, failed, 4) == [False, False]  # the first of each four, which fails

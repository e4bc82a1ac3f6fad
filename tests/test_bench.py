"""Benchmark tables end to end on a model from a folder, with a few rows; and resuming after a cut."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import ZImageTransformer2DModel

from diffgraft import UnsupportedPipelineError
from diffgraft.app.bench import __main__ as bench
from diffgraft.app.bench import (
    flow,
    inversion_effect,
    localisation,
    model_card,
    negative_effect,
    redirection_effect,
    segregation_effect,
    style_choice,
    style_effect,
)
from diffgraft.app.bench import segregation_layout as layout
from diffgraft.app.bench.judge import load_judge
from diffgraft.app.bench.rows import Pace, Rows, fingerprint, pace, subject
from diffgraft.app.bench.segregation_predict import picked, wins
from diffgraft.app.bench.segregation_rows import guided, two_objects


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    """A model as `--model DIR` gives it: pictures of 128 pixels are 16 latents wide."""
    folder = tmp_path_factory.mktemp("model")
    tiny.sd15(vae=tiny.vae(levels=4)).save_pretrained(folder)
    return subject(folder)


@pytest.fixture(scope="module")
def flowing(tmp_path_factory):
    """The transformer edition, less deep and untrained."""
    folder = tmp_path_factory.mktemp("flow")
    torch.manual_seed(0)
    small = {"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    sizes = {"cap_feat_dim": flow.TEXT_WIDTH, "axes_dims": [4, 6, 6], "axes_lens": [256, 64, 64]}
    vae = tiny.vae(levels=3)
    vae.register_to_config(sample_size=128, shift_factor=0.0)
    made = flow.pipeline(vae, ZImageTransformer2DModel(**small, **sizes), flow.build_text_encoder())
    made.save_pretrained(folder)
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


def test_the_readme_names_every_table():
    lines = (Path(bench.__file__).parent / "README.md").read_text().splitlines()
    first = [line.split("|")[1] for line in lines if line.startswith("| `") and line.count("|") == 4]
    assert {name for cell in first for name in re.findall("`(\\w+)`", cell)} >= set(bench.TABLES)


def test_model_card(pipe, tmp_path, capsys, monkeypatch):
    made = model_card.ROWS[:1], 1, 1, 1.0, tmp_path / "rows.jsonl"
    model_card.table(pipe, *made)
    first = capsys.readouterr().out
    assert len(cells(first)[model_card.ROWS[0].name]) == 4
    monkeypatch.setattr(model_card, "draw", None)  # nothing is drawn again
    model_card.table(pipe, *made)
    assert capsys.readouterr().out == first
    seen = {"all right": [False], "kinds right": [True], "background": [False], "style": [True]}
    monkeypatch.setattr(model_card, "evaluate", lambda *_, **__: seen)
    model_card.table(pipe, *made[:-1], tmp_path / "others.jsonl")
    found = cells(capsys.readouterr().out)[made[0][0].name]
    assert [cell.split("%")[0] for cell in found] == ["0.0", "100.0", "0.0", "100.0"]


def test_a_row_of_the_card_goes_on_where_it_was_cut(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(model_card, "PART", 2)
    judge, row, path, how = load_judge(), model_card.ROWS[0], tmp_path / "rows.jsonl", {"steps": 1, "guidance": 1.0}
    begun = model_card.kept_row(pipe, judge, row, 2, Rows(path), {}, **how)
    draw, drawn = model_card.draw, list[int]()

    def watched(*given, seed, **settings):
        drawn.append(seed)
        return draw(*given, seed=seed, **settings)

    monkeypatch.setattr(model_card, "draw", watched)
    found = model_card.kept_row(pipe, judge, row, 3, Rows(path), {}, **how)
    assert drawn == [2] and begun == {name: values[:2] for name, values in found.items()}
    assert found == model_card.evaluate(pipe, judge, row, count=3, **how)


@pytest.mark.parametrize("words", [["--rows", "99"], ["--model", "no/such/folder"]])
def test_what_is_mistyped_ends_in_one_sentence(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["model_card", *words])
    with pytest.raises(SystemExit):
        model_card.main()
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("model_card: error: ") and words[1] in last


def test_redirection_effect(pipe, tmp_path, capsys, monkeypatch):
    path = tmp_path / "rows.jsonl"
    monkeypatch.setattr(redirection_effect, "KINDS", ("exact", "brush"))
    redirection_effect.tables(redirection_effect.Bench(pipe, path, steps=2), 1, 2)
    first = capsys.readouterr().out
    assert "Masks: exact" in first and "Masks: brush" in first
    table = cells(first)
    splits = {name for name in table if name.startswith(("scenes", "plain (", "styled (", "textured ("))}
    assert len(splits) >= 2
    table = {name: line for name, line in table.items() if name not in splits}
    assert set(table) == {"fill", *redirection_effect.DIFFUSION, redirection_effect.CAP, *redirection_effect.FILLS}
    assert all(len(line) == 7 for name, line in table.items() if name != redirection_effect.PLAIN)
    resumed = redirection_effect.Bench(pipe, path, steps=2)
    resumed.pipe = resumed.judge = None  # nothing is drawn or judged again
    redirection_effect.tables(resumed, 1, 2)
    assert capsys.readouterr().out == first


def test_style_effect(pipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(style_effect, "SWEEP", style_effect.SWEEP[6::8])
    few = ("plain img2img, style in words", "AdaIN of the startpoint only", "StyleID", "attention distillation")
    ways = [way for way in style_effect.WAYS if way.name in (*few, "StyleID + negative 1.5")]
    studio = style_effect.Studio(pipe, tmp_path / "rows.jsonl", steps=2)
    chosen = style_effect.pairs(1)[:1]
    style_effect.tables(studio, chosen, canaries=1, swept=1, ways=ways)
    first = capsys.readouterr().out
    table = cells(first)
    assert {way.name for way in ways} < set(table)
    assert {way.name for way in style_effect.SWEEP} < set(table)
    assert float(table["the true re-rendering"][1].split()[0]) > 60  # against itself
    assert (tmp_path / "style-pareto.png").exists()
    resumed = style_effect.Studio(pipe, tmp_path / "rows.jsonl", steps=2)
    resumed.paint = None  # nothing is painted again
    style_effect.tables(resumed, chosen, canaries=1, swept=1, ways=ways)
    assert capsys.readouterr().out == first


def test_moving_the_reference_aside_is_compared_pair_by_pair(capsys):
    near = style_effect.Scores(psnr=[14.0, 15.0], right=[True, True], kept=[False, False], intruder=[True, True])
    far = style_effect.Scores(psnr=[16.0], right=[True], kept=[True], intruder=[True])
    found = {"StyleAligned": near, "StyleAligned, moved aside": far}
    style_effect._against("StyleAligned", [*found][1:], found, style_effect.JUDGED)
    line = cells(capsys.readouterr().out)["moved aside"]
    assert [cell.split()[0] for cell in line] == ["+2.000", "-", "-", "-", "+0.000", "+1.000", "+0.000"]


def test_style_choice(pipe, tmp_path, capsys):
    assert all(p.style.background != p.content.background for p in style_effect.pairs(6, elsewhere=True))
    how = {"path": tmp_path / "rows.jsonl", "steps": 2}
    ways = [replace(style_choice.STYLEID, name=str(s), strength=s) for s in (1.0, 0.5)]
    style_choice.tables(pipe, ways, 1, 1, **how)
    first = capsys.readouterr().out
    table = cells(first)
    assert len(table["1.0"]) == len(table["doing nothing"]) == 9
    assert table["the true re-rendering"][-1].startswith("100.0%")
    assert len(table["against 0.5"]) == len(table["5 instead of 0"]) == len(style_choice.KINDS)
    assert table["5 instead of 0"][0] != "+0.000 (+0.000 to +0.000)"
    kept = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [sum(f'"{kind}"' in row for row in kept) for kind in ("way", "given")] == [4, 4]
    style_choice.tables(pipe, ways, 1, 1, **how)
    assert capsys.readouterr().out == first


def test_negative_effect(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(negative_effect, "PAIRS", negative_effect.PAIRS[:1])
    how = negative_effect.Sampling(1)
    bench = negative_effect.Bench(pipe, load_judge(), tmp_path / "rows.jsonl")
    assert list(negative_effect.steered(pipe)) == ["nasa", "nag", "vsf", "ong"]
    found = bench.measure(2, how, rule="nasa")
    bench.pipe = bench.judge = None
    assert bench.measure(2, how, rule="nasa") == found
    with pytest.raises(UnsupportedPipelineError):  # another scale is measured
        bench.measure(2, how, rule="nasa", scale=0.1)


def test_segregation_effect(pipe, tmp_path):
    rows, scenes = Rows(tmp_path / "rows.jsonl"), two_objects(2)
    call = (scenes, 1, rows, fingerprint(pipe), Pace(2, 2.5))
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


def test_every_effect_runs_on_the_transformer_edition(flowing, tmp_path, monkeypatch):
    """Of 128 pixels, which its pipeline has to be told; its guidance counts from 0."""
    once, judge, rows = Pace(1, 2.5), load_judge(), Rows(tmp_path / "rows.jsonl")
    negative = negative_effect.Bench(flowing, judge, tmp_path / "negative.jsonl")
    monkeypatch.setattr(negative_effect, "PAIRS", negative_effect.PAIRS[:1])
    negative.measure(1, negative_effect.Sampling(1, 2.5), rule="nasa")
    assert list(negative_effect.steered(flowing))[-1] == 'nasa, joint="full"'
    removal = redirection_effect.Bench(flowing, tmp_path / "redirection.jsonl", steps=2)
    assert len(removal.measure(redirection_effect.PUBLISHED, "brush", 1, 1)) == 1
    by_block = redirection_effect.blocks(flowing)
    assert [*by_block][7:] == [f"{name}.attention alone" for name in ("noise_refiner.0", "layers.0", "layers.1")]
    assert len(removal.measure("layers.1.attention alone", "exact", 1, 1)) == 1
    scenes = two_objects(1)
    assert segregation_effect.draw(flowing, scenes, 0, guided(scenes, 0), once).shape == (1, 3, 128, 128)
    assert len(layout.drawn(flowing, None, 0, 1, once)) == 1
    studio, pair = style_effect.Studio(flowing, tmp_path / "style.jsonl", steps=2), style_effect.pairs(1)[:1]
    for way in (style_effect.JOINT_WAYS[0], style_effect.JOINT_WAYS[3], style_effect.JOINT_WAYS[-2]):
        assert len(style_effect.measure(studio, way, pair, 0).psnr) == 1
    scenes, key = two_objects(2), fingerprint(flowing)
    found = localisation.localisation(flowing, judge, scenes, rows, key, Pace(2, 2.5))
    named = [f"layers.{i}.attention{word}" for i in range(2) for word in ("", ", colour")]
    assert sorted(found) == [f"{layer} at {step}" for layer in named for step in range(2)]
    assert localisation.localisation(None, None, scenes, rows, key, Pace(2, 2.5)) == found
    assert len(localisation.lines(found, 2)) == 6


def test_a_round_trip_that_is_solved_gives_the_picture_again(flowing, tmp_path, monkeypatch):
    monkeypatch.setattr(inversion_effect, "STEPS", 3)
    bench = inversion_effect.Bench(flowing, tmp_path / "inversion.jsonl")
    rough, solved = (bench.trips(iterations, 1)[0] for iterations in (0, 5))
    assert solved["psnr"] > rough["psnr"] + 10 and rough["passes"] == 3 < solved["passes"]  # three steps: coarse
    bench.pipe = None
    assert bench.trips(5, 1) == [solved]


def test_a_student_is_drawn_at_its_own_pace():
    assert pace(None, 25, 2.5) == pace(Path("picturebook-transformer"), 25, 2.5) == Pace(25, 2.5)
    assert pace(Path("picturebook-one-step"), 25, 2.5) == Pace(1, 0)
    assert pace(Path("picturebook-transformer-few-steps"), 25, 2.5) == Pace(4, 0)
    assert localisation.moments(5) == [0, 1, 2, 3, 4] and localisation.moments(25) == [0, 6, 12, 18, 24]


def test_a_map_on_its_own_thing():
    scenes, where = two_objects(1), torch.zeros(1, len(localisation.KINDS), 16, 16, dtype=torch.bool)
    first, second = (localisation.KINDS.index(thing.kind) for thing in scenes[0].things)
    where[0, first, :, :4], where[0, second, :, 12:] = True, True
    maps = torch.zeros(2, 8, 8)
    maps[0, :, :2], maps[1, :, :4] = 1, 1  # the first noun looks at its thing, the second half at the other's
    found = localisation.shares([[localisation.cells(one.flatten()) for one in maps]], where, scenes)
    assert found == [pytest.approx((1, 0, 0.25)), pytest.approx((0, 0.5, 0.25))]


def test_a_mistyped_model_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench", "negative_effect", "--model", "picturbook"])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    told = capsys.readouterr().err
    assert "there is no model 'picturbook'; did you mean picturebook?" in told
    assert ended.value.code == 2 and "Traceback" not in told

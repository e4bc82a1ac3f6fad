"""The demo without a browser: its handlers as functions, its limits, and its server with several clients at once."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import html
import inspect
import io
import json
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import gradio as gr
import numpy as np
import pages
import psutil
import pytest
import tiny
import tiny_transformers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from gradio_client.utils import QueueError
from PIL import Image

import diffgraft as dg
from diffgraft.app.demo import (
    checks,
    drawing,
    forms,
    improve,
    looks,
    make_examples,
    make_shown,
    menu,
    preview,
    server,
    visit,
)
from diffgraft.app.demo.arguments import arguments
from diffgraft.app.demo.improve import ImprovePart, curve
from diffgraft.app.demo.painting import asked, telling_words
from diffgraft.app.demo.restore import restored
from diffgraft.app.demo.seeds import SeedsPart, picked
from diffgraft.app.demo.shown import replaced, shown
from diffgraft.app.demo.specs import read_specs, rewritten, starting_specs
from diffgraft.app.demo.studio import Stopped, Studio, private
from diffgraft.app.demo.tab_compose import ComposeTab
from diffgraft.app.demo.tab_erase import EraseTab, chosen
from diffgraft.app.demo.tab_generate import GenerateTab
from diffgraft.app.demo.tab_one_step import OneStepTab
from diffgraft.app.demo.tab_style import StyleTab
from diffgraft.app.demo.told import told
from diffgraft.app.demo.uploads import drawn
from diffgraft.app.metadata import encode_png, read_settings
from diffgraft.app.techniques import build, techniques
from diffgraft.pipelines.families.table import FAMILIES
from diffgraft.plugins import startpoint

PROMPT = "a red ball and a blue star"
QUICK = {"steps": 2, "width": 64, "height": 64}
BOMB = Image.new("L", (6000, 6000))


def opener(name, device="auto"):
    if name not in ("picturebook", "picturebook-one-step", "turbo", "other"):
        raise dg.ModelLoadError(f"{name!r} does not exist")
    return tiny.sd15()


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        yield


@pytest.fixture(scope="module")
def studio():
    return Studio(opener=opener)


@pytest.fixture(scope="module")
def page(studio):
    blocks = server.serve(studio, prevent_thread_lock=True)
    yield blocks
    pages.close(blocks)


def client(page):
    return Client(page.local_url, verbose=False, httpx_kwargs={"timeout": 120})


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


@pytest.fixture
def mask(tmp_path):
    image = Image.new("L", (64, 64))
    image.paste(255, (16, 16, 40, 40))
    image.save(tmp_path / "mask.png")
    return str(tmp_path / "mask.png")


def png(image):
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def pixels(file):
    return np.asarray(Image.open(file).convert("RGB"))


def plain(seed, **plugins):
    [made] = dg.generate(tiny.sd15(), PROMPT, seed=seed, guidance=2.5, **QUICK, **plugins)
    return np.asarray(made)


# -- handlers as functions -----------------------------------------------------------------------------------------


def test_generate_gives_pictures_maps_the_seed_and_settings_that_make_them_again(studio):
    shown, seen, seed, settings = GenerateTab(studio).generate(
        PROMPT, "ball, star", "cat", True, seed=5, count=2, **QUICK
    )
    assert [caption for _, caption in shown] == [
        "concepts + negative, seed 5", "plain, seed 5", "concepts + negative, seed 6", "plain, seed 6",
    ]  # fmt: skip
    assert [word for _, word in seen] == ["ball", "star"] and seed == "5"
    both = [dg.AttentionSegregation(["ball", "star"]), dg.NegativeAway("cat")]
    for index, (number, plugins) in enumerate([(5, both), (5, []), (6, both), (6, [])]):
        assert np.array_equal(pixels(shown[index][0]), plain(number, plugins=plugins))
    inside = read_settings(shown[0][0])
    assert inside["seed"] == 5 and inside["model"] == "picturebook"
    assert [spec["plugin"] for spec in inside["plugins"]] == ["AttentionSegregation", "NegativeAway"]
    assert json.loads(settings)["plugins"] == inside["plugins"]


def test_a_drawn_seed_is_told_and_makes_the_picture_again(studio):
    tab = GenerateTab(studio)
    first, _, seed, _ = tab.generate(PROMPT, seed=None, **QUICK)
    again, *_ = tab.generate(PROMPT, seed=int(seed), **QUICK)
    assert np.array_equal(pixels(first[0][0]), pixels(again[0][0]))


def test_a_prompt_without_telling_words_has_a_picture_and_no_maps(studio):
    shown, seen, *_ = GenerateTab(studio).generate("7 , 8", seed=1, **QUICK)
    assert len(shown) == 1 and seen == []
    assert telling_words("A red ball, and the red star!") == ["red", "ball", "star"]


def test_one_step_compares_without_and_with(studio):
    (without, steered), seed, settings = OneStepTab(studio).one_step(PROMPT, "cat", scale=0.5, seed=3, model="turbo")
    assert seed == "3" and not np.array_equal(pixels(without), pixels(steered))
    assert json.loads(settings)["plugins"][0]["scale"] == 0.5
    (without, same), *_ = OneStepTab(studio).one_step(PROMPT, "", seed=3, model="turbo")
    assert np.array_equal(pixels(without), pixels(same))


def test_one_step_is_painted_by_a_student_at_its_own_steps(studio):
    tab = OneStepTab(studio)
    assert [tab.student(name) for name in ("", "picturebook", "turbo")] == ["picturebook-one-step"] * 2 + ["turbo"]
    assert [tab.own_steps(name) for name in ("", "turbo", "picturebook-transformer-few-steps")] == [1, 1, 4]


def test_erase_leaves_everything_far_from_the_paint_as_it_was(studio, picture, mask):
    candidates, (before, after), seed, settings = EraseTab(studio).erase(
        picture, mask, grow=1, feather=1, steps=4, count=2, seed=8
    )
    assert sorted(caption for _, caption in candidates) == ["seed 8", "seed 9"]
    said = [read_settings(file) for file, _ in candidates]
    assert candidates[0][1] == f"seed {seed}" and candidates[0][0] == after
    assert said[0]["seam"] + said[0]["strangeness"] <= said[1]["seam"] + said[1]["strangeness"]
    far = np.ones((64, 64), bool)
    far[12:44, 12:44] = False
    assert np.array_equal(pixels(after)[far], pixels(picture)[far])
    assert not np.array_equal(pixels(after), pixels(before))
    assert json.loads(settings)["masked"] == round(24 * 24 / 64**2, 4)


def test_choosing_a_candidate_shows_it_against_the_same_before():
    event = type("Event", (), {"index": 1})()
    assert chosen(event, ("before", "a"), [("a", "seed 8"), ("b", "seed 9")]) == (("before", "b"), "9")
    for slider, candidates in ((None, None), (("before", "a"), [("a", "seed 8")]), (("before", "a"), [])):
        with pytest.raises(gr.Error, match="no such candidate"):
            told(chosen)(event, slider, candidates)


def test_stylize_repaints_at_the_contents_size(studio, picture, mask):
    (before, after), seed, settings = StyleTab(studio).stylize(picture, mask, 0.7, 0.4, steps=3, seed=2)
    assert pixels(after).shape == pixels(before).shape == (64, 64, 3) and seed == "2"
    assert json.loads(settings)["strength"] == 0.7 and read_settings(after)["structure"] == 0.4
    kept = read_settings(StyleTab(studio).stylize(picture, mask, steps=1, seed=2, method="stylealigned")[0][1])
    assert kept["method"] == kept["page"]["method"] == "stylealigned"


def test_an_examples_mask_is_what_stands_out_near_a_rough_one():
    pixels, rough = np.full((64, 64, 3), 200, np.uint8), np.zeros((64, 64), bool)
    pixels[20:40, 20:40], pixels[20:40, 56:60] = (200, 0, 0), (0, 0, 200)
    rough[24:34, 24:34] = True
    found = make_examples.outlined(Image.fromarray(pixels), rough)
    assert found[20:40, 20:40].all() and found.sum() < 28 * 28 and not found[:, 56:].any()


def test_compose_runs_any_plugins_and_shows_their_order_and_report(studio, mask):
    specs = json.dumps(
        [{"plugin": "AttentionSegregation", "concepts": ["ball", "star"]},
         {"plugin": "NegativeAway", "negative": "cat"}, {"plugin": "SelfAttentionRedirection", "mask": "upload"}]
    )  # fmt: skip
    shown, order, report, seed, settings = ComposeTab(studio).compose(PROMPT, specs, mask, steps=2, seed=4)
    assert [row[1] for row in order] == ["NegativeAway", "SelfAttentionRedirection", "AttentionSegregation"]
    assert [row[0] for row in order] == [1, 2, 3] and all(row[3] for row in order)
    assert "latent updates" in report and "NegativeAway" in report and seed == "4" and len(shown) == 2
    assert [spec["plugin"] for spec in json.loads(settings)["plugins"]] == [s["plugin"] for s in json.loads(specs)]


def test_a_mask_for_compose_is_read_as_a_mask(studio, mask, tmp_path):
    """Alpha decides where it varies; a picture would lay it over white, and everything would be masked."""
    hole = Image.open(mask)
    cut_out = Image.new("RGBA", hole.size)
    cut_out.paste((0, 0, 0, 255), mask=hole)
    cut_out.save(tmp_path / "cut-out.png")
    specs = '[{"plugin": "SelfAttentionRedirection", "mask": "upload"}]'
    made = [
        ComposeTab(studio).compose(PROMPT, specs, file, steps=2, seed=4)[0][0][0]
        for file in (mask, str(tmp_path / "cut-out.png"))
    ]
    assert np.array_equal(pixels(made[0]), pixels(made[1]))
    with pytest.raises(dg.GraftError, match="mask is missing"):
        ComposeTab(studio).compose(PROMPT, specs, None, steps=2)


def test_choosing_techniques_keeps_what_was_written_for_the_others():
    written = '[{"plugin": "NegativeAway", "negative": "mine", "scale": 2}]'
    specs = read_specs(rewritten(["StartpointFilter", "NegativeAway"], written))
    assert [spec["plugin"] for spec in specs] == ["StartpointFilter", "NegativeAway"]
    assert specs[1]["negative"] == "mine" and read_specs(starting_specs([])) == []


def test_what_is_never_drawn_is_the_same_in_a_field_and_in_a_spec():
    """Words with commas on the page; the spec is that of `--plugin` and of a batch's row."""
    spec = {"plugin": "ConceptBlock", "concepts": {"star": ["sun"], "red": []}, "space": "embeddings"}
    made, sizes = build(spec), {"steps": 4, "guidance": 2, "width": None, "height": None}
    typed = asked(PROMPT, "", "", "star, red", "", None, 1, **sizes).plugins
    assert made.groups == [["star", "sun"], ["red"]] and made.space == "embeddings"
    assert [(type(one), one.groups) for one in typed] == [(dg.ConceptBlock, [["star"], ["red"]])]
    with pytest.raises(dg.GraftError, match="'threshold'"):
        build(spec | {"treshold": 0})


def test_a_technique_that_the_model_cannot_do_is_listed_with_its_reason_and_does_not_come_in():
    lacks = {"ConceptBlock": "it works in cross-attention", "NegativeAway": "no"}
    labels = {name: label for label, name in menu.offered(lacks)}
    assert set(labels) == set(techniques()) and labels["ConceptBlock"].endswith(looks.ABSENT)
    assert labels["StyleInjection"] == "StyleInjection" and f'[aria-label$="{looks.ABSENT}"]' in looks.CSS
    written = starting_specs(["NegativeAway"])  # chosen on another model: it stays until the visitor takes it out
    with pytest.warns(UserWarning, match="works in cross-attention"):
        specs = read_specs(rewritten(["NegativeAway", "ConceptBlock", "StyleInjection"], written, lacks))
    assert [spec["plugin"] for spec in specs] == ["NegativeAway", "StyleInjection"]


# -- what the page opens with ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", server.TABS.values(), ids=server.TABS)
def test_a_tab_opens_with_its_first_example_made(studio, kind):
    """What is shipped is what the handler gives for those settings, so a tab's change is noticed here."""
    tab = kind(studio)
    outputs, settings = shown(tab.name), json.loads(shown(tab.name)[-1])
    pictures: list[str] = []
    replaced(outputs, lambda value: pictures.append(value) if str(value).endswith(".png") else None)
    assert len(pictures) >= 2 and all(Path(file).stat().st_size < 40_000 for file in pictures)
    made = [read_settings(file) for file in pictures if "diffgraft" in Image.open(file).info]
    assert any(inside["seed"] == settings["seed"] for inside in made)
    for name in {*tab.first} & {*settings} - {"seed", "plugins"}:
        assert settings[name] == tab.first[name], name
    assert outputs[-2] == str(settings["seed"])


def test_shown_results_are_written_and_read_back(tmp_path, monkeypatch, picture):
    make_shown.write("tab", ([(picture, "seed 1")], (picture, picture), "1", "{}"), tmp_path)
    monkeypatch.setattr("diffgraft.app.demo.shown.FOLDER", tmp_path)
    [[[file, caption]], both, seed, _] = shown("tab")
    assert both == [file, file] and (caption, seed) == ("seed 1", "1") and np.array_equal(pixels(file), pixels(picture))


# -- places, seeds, the strip, settings that come back --------------------------------------------------------------


def painting(*blobs):
    """A canvas with a square (left, top, colour) for each blob."""
    layer = Image.new("RGBA", (drawing.SIDE, drawing.SIDE))
    for left, top, colour in blobs:
        layer.paste(colour, (left, top, left + 60, top + 60))
    return {"background": None, "layers": [png(layer)], "composite": None}


RED, BLUE = drawing.COLOURS["red"], drawing.COLOURS["blue"]


def test_a_painting_is_a_mask_for_each_concept():
    masks = drawing.layout_of(painting((20, 20, RED), (150, 90, BLUE)), "ignored, too", ["ball", "star"])
    found = [np.argwhere(np.asarray(mask)) for mask in masks]
    assert [(*cells.min(0), *cells.max(0)) for cells in found] == [(20, 20, 79, 79), (90, 150, 149, 209)]
    ring = Image.new("RGBA", (drawing.SIDE, drawing.SIDE))
    ring.paste(RED, (20, 20, 80, 80))
    ring.paste((0, 0, 0, 0), (30, 30, 70, 70))
    [filled] = drawing.layout_of({"layers": [png(ring)]}, "", ["ball"])
    assert (np.asarray(filled) > 0).sum() == 60 * 60
    assert drawing.layout_of(None, "", ["ball"]) is None
    assert drawing.layout_of({"background": None, "layers": []}, "", ["ball"]) is None


def test_places_in_words_do_the_same_without_a_mouse(studio):
    left, corner = drawing.layout_of(None, "left, Top Right", ["ball", "star"])
    centres = [np.argwhere(np.asarray(mask)).mean(0) / drawing.SIDE for mask in (left, corner)]
    assert np.allclose(centres, [(0.5, 0.25), (0.27, 0.75)], atol=0.02)
    wish = {"seed": 5, "concepts": "ball, star", **QUICK}
    [(file, _)], *_ = GenerateTab(studio).generate(PROMPT, places="left, right", **wish)
    masks = drawing.layout_of(None, "left, right", ["ball", "star"])
    assert np.array_equal(pixels(file), plain(5, plugins=[dg.AttentionSegregation(["ball", "star"], layout=masks)]))


@pytest.mark.parametrize(
    ("canvas", "places", "said"),
    [
        (painting((20, 20, RED)), "", "'star' has no place"), (None, "left", "1 places for 2"),
        (painting((0, 0, RED), (90, 0, BLUE), (180, 0, drawing.COLOURS["green"])), "", "painted in green"),
        (None, "left, up", "'up' is no place"), (None, "left,", "no place"), ({"layers": "x"}, "", "layers"),
        ({"layers": [b"GIF89a"]}, "", "image"), ({"layers": [png(BOMB)]}, "", "megapixels"),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_places_that_do_not_fit_the_concepts_are_told(canvas, places, said):
    with pytest.raises(dg.GraftError, match=said):
        drawing.layout_of(canvas, places, ["ball", "star"])


def test_eight_seeds_are_ranked_as_the_library_does_and_one_is_chosen(studio):
    shown = SeedsPart(studio).seeds(PROMPT, "ball, star", seed=4, **(QUICK | {"steps": 4})).value
    order = [int(entry["caption"].split()[-1]) for entry in shown]
    ranks = dg.rank_seeds(
        tiny.sd15(), PROMPT, ["ball", "star"], range(4, 12), at=1, **(QUICK | {"steps": 4}), guidance=2.5
    )
    assert order == [one.seed for one in ranks]
    event = type("Event", (), {"index": 2})()
    assert picked(event, [(None, entry["caption"]) for entry in shown]) == order[2]
    with pytest.raises(gr.Error, match="no such seed"):
        told(picked)(event, [])


def test_improve_shows_the_picture_before_and_after_and_the_losses_that_the_library_finds(studio, monkeypatch):
    monkeypatch.setattr(improve, "UPDATES", 2)
    both, line, seed, settings = ImprovePart(studio).improve(PROMPT, "ball, star", "cat", seed=4, **QUICK)
    told_of = {"plugins": [dg.NegativeAway("cat")], "seed": 4, **QUICK}
    found = dg.optimise_startpoint(
        tiny.sd15(), PROMPT, "a-star", concepts=["ball", "star"], surrogate=tiny.sd15(), iterations=2,
        guidance=2.5, **told_of,
    )  # fmt: skip
    before, after = (pixels(one["path"] if isinstance(one, dict) else one) for one in both.value)
    assert np.array_equal(before, plain(4, plugins=told_of["plugins"]))
    assert np.array_equal(after, np.asarray(found.picture)) and seed == "4"
    losses = json.loads(settings)["losses"]
    assert len(losses) == 3 and min(losses) <= losses[0]
    assert line.value == curve(found.losses[0]) and f"{losses[0]:.3f}" in line.value
    with pytest.raises(dg.SettingError, match="two concepts"):
        ImprovePart(studio).improve("a ball", **QUICK)


def test_the_curve_goes_down_where_the_loss_does():
    flat, falling = curve([1.0]), curve([3.0, 1.0, 2.0])
    assert "after 0 of 0" in flat and "after 1 of 2" in falling
    heights = [float(point.split(",")[1]) for point in falling.split('points="')[1].split('"')[0].split()]
    assert heights[0] < heights[2] < heights[1]  # downwards on the page


def test_the_strip_keeps_the_newest_first_and_hands_a_picture_on():
    kept, index, what, *_ = visit.remember([("old", "seed 1")], [("new", "seed 2"), ("plain", "plain, seed 2")])
    assert [file for file, _ in kept] == ["new", "plain", "old"] and index == 0 and "seed 2" in what
    assert visit.remember(None, ("before", "after"))[0] == [("after", "made")]
    assert len(visit.remember(kept * 20, kept)[0]) == visit.MOST
    assert visit.to_erase(kept, 2)[0]["background"] == "old" and visit.to_style(kept, 0)[0] == "new"
    for nothing in (None, []):
        with pytest.raises(dg.SettingError, match="no such picture"):
            visit.to_style(nothing, 0)


def fields(page):
    """The fields of each tab of a page, found by their labels."""
    found = {"Prompt": "prompt", "Concepts that must all appear": "concepts", "Keep away": "negative", "Seed": "seed"}
    blocks = [block for block in page.blocks.values() if getattr(block, "label", None) in found]
    canvas = next(block for block in page.blocks.values() if getattr(block, "label", "") == "Places")
    return {"generate": {found[block.label]: block for block in reversed(blocks)} | {"drawing": canvas}}


def test_what_was_typed_comes_back_out_of_the_png(studio, page, tmp_path):
    drawn_places = painting((20, 20, RED), (150, 90, BLUE))
    given = {"concepts": "ball, star", "negative": "cat", "seed": -1, **QUICK}
    [(file, _)], _, seed, _ = GenerateTab(studio).generate(PROMPT, drawing=drawn_places, **given)
    name, values = restored(file, fields(page))
    assert name == "generate" and values["prompt"] == PROMPT and values["concepts"] == "ball, star"
    assert values["negative"] == "cat" and values["seed"] == int(seed)
    again = drawing.layout_of(values["drawing"], "", ["ball", "star"])
    for before, after in zip(drawing.layout_of(drawn_places, "", ["ball", "star"]), again, strict=True):
        assert (np.asarray(before) != np.asarray(after)).mean() < 0.02
    assert str(Path(file).parent) not in Path(file).read_bytes().decode("latin-1")


def test_composes_forms_come_back_out_of_the_png(studio, page, tmp_path):
    """Through the page's own handler: the JSON and the prompt, then the names and the forms that follow from it."""
    specs = [{"plugin": "StartpointFilter", "alpha": 0.5}, {"plugin": "NegativeAway", "negative": "cat"}]
    [(file, _), _], _, _, seed, _ = ComposeTab(studio).compose(PROMPT, json.dumps(specs), steps=2, seed=4)
    events = [event for event in page.fns.values() if event.name in ("restore", "redrawn")]
    restore = next(event for event in events if event.name == "restore")
    after = next(event for event in events if event.name == "redrawn" and event.trigger_after == restore._id)
    filled = restore.fn(file)
    values = {part.label: value for part, value in filled.items() if getattr(part, "label", None)}
    assert values["Prompt"] == PROMPT and read_specs(values["Their settings, as in a batch row"]) == specs
    assert values["Seed"] == int(seed) == 4 and next(v for p, v in filled.items() if isinstance(p, gr.Tabs))
    names, drawn = after.fn(values["Their settings, as in a batch row"], 7)
    assert names == ["StartpointFilter", "NegativeAway"] and drawn == 8


@pytest.mark.parametrize(
    "settings",
    [
        {"page": {"tab": "generate", "prompt": ["a"]}}, {"page": {"tab": "generate", "seed": "x"}},
        {"page": {"tab": "generate", "drawing": "%%%"}}, {"page": {"tab": "generate", "drawing": "AAAA"}},
        {"page": {"tab": ["a"]}}, {"page": {"tab": "nowhere"}}, {"task": "optimise"},
        {"task": "generate", "prompt": "x" * 9000}, {"page": {"tab": "generate", "seed": float("inf")}},
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_settings_that_no_page_wrote_are_told(page, tmp_path, settings):
    file = tmp_path / "forged.png"
    file.write_bytes(encode_png(Image.new("RGB", (8, 8)), settings))
    with pytest.raises(dg.GraftError):
        restored(str(file), fields(page))


def test_a_picture_made_elsewhere_fills_what_it_says(page, tmp_path):
    [made] = dg.generate(tiny.sd15(), PROMPT, plugins=[dg.AttentionSegregation(["ball", "star"])], seed=3, **QUICK)
    file = tmp_path / "made.png"
    file.write_bytes(encode_png(made, made.info["diffgraft"]))
    name, values = restored(str(file), fields(page))
    assert (name, values["prompt"], values["concepts"], values["seed"]) == ("generate", PROMPT, "ball, star", 3)


# -- the model menu and what is seen meanwhile ----------------------------------------------------------------------


def test_the_menu_says_what_a_family_cannot_do():
    from diffgraft.app.demo.parts import Laid

    part = gr.Button()
    tab = Laid("erase", None, [], {}, [(part, "erase")], gr.HTML())
    said = menu.said(tab, {"erase": "it <needs> a UNet", "stylize": "no"})
    assert said["visible"] and "it &lt;needs&gt; a UNet" in said["value"] and "stylize" not in said["value"]
    assert not menu.said(tab, {})["visible"]
    both = Laid("t", None, [], {}, [(part, "erase"), (part, "stylize")], gr.HTML())
    assert menu.said(both, dict.fromkeys(("erase", "stylize"), "no"))["value"].count("<li>") == 1


def test_a_model_in_the_menu_is_known_by_its_folder_or_by_opening_it(tmp_path):
    (tmp_path / "model_index.json").write_text('{"transformer": ["diffusers", "FluxTransformer2DModel"]}')
    studio = Studio(opener=opener)
    assert studio.denoiser(str(tmp_path), "me", quiet) == "FluxTransformer2DModel"
    assert studio._name is None and studio.denoiser("other", "me", quiet) == "UNet2DConditionModel"
    assert studio._name == "other"


def test_a_rough_look_shows_the_picture_before_it_is_decoded(studio):
    """On a real autoencoder the guess has the colours of what is decoded."""
    pipe, seen = dg.picturebook(), []
    guess = preview.learn(pipe)
    with Studio(opener=lambda name, device: pipe).job("", "me", quiet) as job:
        job.expect("a picture", 4)
        pipe.unet.register_forward_hook(lambda *_: seen.append(job.rough))
        [made] = dg.generate(job.pipe, "a red ball , snow", seed=1, steps=4, guidance=2.5)
    look = np.asarray(seen[-1], float) / 255
    assert guess is not None and np.corrcoef(look.ravel(), np.asarray(made, float).ravel())[0, 1] > 0.8
    assert preview.learn(type("Pipe", (), {"vae": None})()) is None
    assert "data:image/png" in preview.as_html("<b>", seen[-1]) and "<b>" not in preview.as_html("<b>", None)


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_a_rough_look_comes_from_transformers_too(kind):
    """Packed in tokens, or a grid under the name that transformers give it."""
    pipe, seen = getattr(tiny_transformers, kind)(), []
    guess = preview.learn(pipe)
    assert guess is not None
    with Studio(opener=lambda name, device: pipe).job("", "me", quiet) as job:
        job.expect("a picture", 2)
        pipe.transformer.register_forward_hook(lambda *_: seen.append(job.rough))
        dg.generate(job.pipe, PROMPT, seed=1, steps=2, width=64, height=32)
    assert all(isinstance(look, Image.Image) for look in seen) and len(seen) == 2


def test_packed_latents_lie_as_their_positions_say_and_a_flow_counts_as_its_family():
    latent, ids = torch.randn(1, 4, 4, 6), torch.zeros(6, 3)
    ids[:, 1], ids[:, 2] = torch.arange(6) // 3, torch.arange(6) % 3
    packed = startpoint.pack(latent)
    for given in ({"img_ids": ids}, {"img_shapes": [[(1, 2, 3)]]}):
        assert torch.equal(preview.spread(torch.cat([packed, packed], 1), given, 4), latent)
    assert torch.equal(preview.spread(packed, {"img_ids": ids}, 16), packed.mT.unflatten(-1, (2, 3)))
    assert preview.spread(packed, {}, 4) is None and preview.spread(packed, {"img_ids": ids}, 5) is None
    flow, noise = FlowMatchEulerDiscreteScheduler(), torch.randn(1, 4, 4, 6)
    for name, told_time in (("FluxTransformer2DModel", 0.4), ("SD3Transformer2DModel", 400.0)):
        sample = 0.6 * latent + 0.4 * noise
        found = preview.clean(flow, sample, noise - latent, told_time, FAMILIES[name].solve)
        assert (found - latent).abs().max() < 1e-5
    sample = 0.6 * latent + 0.4 * noise
    found = preview.clean(flow, sample, latent - noise, 0.6, FAMILIES["ZImageTransformer2DModel"].solve)
    assert (found - latent).abs().max() < 1e-5


# -- Compose's forms ------------------------------------------------------------------------------------------------


def test_every_documented_argument_of_every_technique_has_a_field_or_is_for_json():
    for name, kind in techniques().items():
        found = {one.name: one for one in arguments(name)}
        assert all(one.about for one in found.values()), name
        left = {*inspect.signature(kind).parameters} - {*found}
        assert left <= {
            "mask", "style", "layout", "content", "generator", "attributes", "refine", "layers", "negative_2",
            "negative_3", "key_weights",
        }, (name, left)  # fmt: skip
    rule = next(one for one in arguments("NegativeAway") if one.name == "rule")
    assert (rule.kind, rule.default, rule.choices[:2]) == ("choice", "nasa", ("nasa", "nag"))
    kinds = {one.name: one.kind for one in arguments("AttentionSegregation")}
    assert kinds["concepts"] == "words" and kinds["every"] == "whole" and kinds["size"] == "number"
    assert arguments("SelfAttentionRedirection")[0].about.startswith("guidance away from the plain prediction")


def test_a_field_writes_what_it_says_and_its_default_says_nothing():
    text = '[{"plugin": "AttentionSegregation", "concepts": ["a"]}, {"plugin": "NegativeAway", "negative": "blue"}]'
    by_name = {one.name: one for name in ("AttentionSegregation", "NegativeAway") for one in arguments(name)}

    def put(name, place, value, text=text):
        return read_specs(forms._writing(place, by_name[name])(text, value))

    assert put("concepts", 0, "ball, star ,")[0]["concepts"] == ["ball", "star"]
    assert put("every", 0, 2.0)[0]["every"] == 2 and "every" not in put("every", 0, 1)[0]
    assert put("size", 0, 0.1)[0]["size"] == 0.1 and "size" not in put("size", 0, None)[0]
    assert put("rule", 1, "vsf")[1]["rule"] == "vsf" and "rule" not in put("rule", 1, "")[1]
    assert put("negative", 1, "")[1]["negative"] == "" and put("negative", 7, "x") == read_specs(text)
    with pytest.raises(gr.Error, match="whole number"):
        put("every", 0, 1.5)
    listed, names, drawn = forms._changing(lambda specs: forms._swapped(specs, 0, 1))(text, 3)
    assert names == ["NegativeAway", "AttentionSegregation"] and drawn == 4
    assert [spec["plugin"] for spec in read_specs(listed)] == names == forms.redrawn(listed, 0)[0]


# -- limits hold without the page ----------------------------------------------------------------------------------

BAD = [
    ("steps", 0), ("steps", 101), ("steps", 2.5), ("steps", float("nan")), ("steps", "9"), ("steps", None),
    ("steps", True), ("guidance", float("inf")), ("guidance", -1), ("count", 0), ("count", 7), ("seed", -2),
    ("seed", 2**63), ("seed", 3.7), ("seed", "abc"), ("width", 8), ("width", 1032), ("width", 100), ("width", "wide"),
    ("prompt", ""), ("prompt", "  "), ("prompt", None), ("prompt", "x" * 1001), ("prompt", ["a"]),
    ("concepts", "porcupine"), ("concepts", 3), ("negative", "x" * 1001), ("model", "nowhere/else"),
    ("model", 3), ("model", ["picturebook"]), ("model", "x" * 1001),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{n}={str(v)[:12]}" for n, v in BAD])
def test_a_setting_out_of_range_is_a_message_a_person_can_act_on(studio, name, value):
    with pytest.raises(gr.Error) as caught:
        told(GenerateTab(studio).generate)(**({"prompt": PROMPT, **QUICK} | {name: value}))
    assert 15 < len(caught.value.message) < 400 and "Traceback" not in caught.value.message
    assert not caught.value.print_exception


@pytest.mark.parametrize(
    "forged",
    [
        None, {}, [], "x", {"background": None, "layers": []}, {"background": 3, "layers": []},
        {"background": "/etc/passwd", "layers": []}, {"background": "OK", "layers": None},
        {"background": "OK", "layers": "x"}, {"background": "OK", "layers": [3]},
        {"background": "OK", "layers": [{"path": "/etc/passwd"}]}, {"background": "OK", "layers": ["/etc/passwd"]},
        {"background": "OK", "layers": [png(Image.new("RGBA", (64, 64)))] * 9},
        {"background": "OK", "layers": [png(Image.new("RGBA", (64, 64)))]},
        {"background": "OK", "layers": [png(Image.new("RGBA", (64, 64), "red"))]},
        {"background": "OK", "layers": [png(Image.new("RGBA", (20, 64)))]},
        {"background": png(BOMB), "layers": []}, {"background": b"", "layers": []},
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_a_forged_drawing_is_refused(studio, picture, forged):
    if isinstance(forged, dict) and forged.get("background") == "OK":
        forged = forged | {"background": picture}
    with pytest.raises(gr.Error) as caught:
        told(EraseTab(studio).erase)(forged)
    assert "root:" not in caught.value.message and "unexpected" not in caught.value.message


def test_paint_counts_before_an_uploaded_mask_and_any_layer_size_is_brought_to_the_picture(picture, mask):
    stroke = Image.new("RGBA", (128, 128))
    stroke.paste((255, 90, 95, 255), (0, 0, 20, 20))
    _, hole = drawn({"background": picture, "layers": [png(stroke), None]}, mask)
    assert np.argwhere(np.asarray(hole)).max() == 9
    _, hole = drawn({"background": picture, "layers": [png(Image.new("RGBA", (64, 64)))]}, mask)
    assert (np.asarray(hole) > 0).sum() == 24 * 24
    _, hole = drawn({"background": picture}, mask, invert=True)
    assert (np.asarray(hole) > 0).sum() == 64 * 64 - 24 * 24


@pytest.mark.parametrize(
    "specs",
    [
        "{}", "[", "3", "x" * 9000, "[" * 4000, '[{"plugin": "Nothing"}]', '[{"plugin": "NegativeAway"}]', "[7]",
        '[{"plugin": "NegativeAway", "negative": "a", "scale": NaN}]',
        '[{"plugin": "SelfAttentionRedirection", "mask": "/etc/passwd"}]',
        '[{"plugin": "SelfAttentionRedirection", "mask": ["/etc/passwd"]}]',
        '[{"plugin": "SelfAttentionRedirection", "mask": "upload"}]',
        '[{"plugin": "StyleInjection", "style": "https://example.org/a.png"}]',
        '[{"plugin": "StyleInjection", "style": "upload", "content": "/etc/passwd"}]',
        '[{"plugin": "AttentionSegregation", "concepts": ["ball"], "layout": ["/etc/passwd"]}]',
        json.dumps([{"plugin": "NegativeAway", "negative": "a"}] * 7),
    ],
    ids=lambda text: text[:60],
)  # fmt: skip
def test_techniques_come_as_known_plugins_and_never_as_paths(studio, specs):
    with pytest.raises(gr.Error) as caught:
        told(ComposeTab(studio).compose)(PROMPT, specs, None, None, 2)
    assert "unexpected" not in caught.value.message and "root:" not in caught.value.message


def test_messages_show_a_prompt_as_text(studio):
    with pytest.raises(gr.Error) as caught:
        told(GenerateTab(studio).generate)(PROMPT, "<img src=x onerror=alert(1)>", **QUICK)
    assert "<img" not in caught.value.message and html.escape("<img") in caught.value.message


def test_an_unexpected_error_is_a_number_here_and_a_traceback_in_the_log(caplog):
    def broken():
        raise RuntimeError("secret/path")

    with pytest.raises(gr.Error) as caught:
        told(broken)()
    number = caught.value.message.split()[-1]
    assert "secret" not in caught.value.message and number in caplog.text and "secret/path" in caplog.text


def test_out_of_memory_says_what_to_do():
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(gr.Error, match="smaller size"):
        told(full)()


def test_whole_numbers_may_arrive_as_floats():
    assert checks.whole(3.0, "steps", 1, 9) == 3 and checks.seed(7.0) == 7 and checks.side(64.0, "width") == 64
    assert 0 <= checks.seed(-1) < 10**6 and checks.side(None, "width") is None


# -- one model, many visitors --------------------------------------------------------------------------------------


def quiet(done, what):
    return None


def test_a_request_has_a_scheduler_of_its_own():
    shared = tiny.sd15()
    mine = private(shared)
    before = shared.scheduler.timesteps.clone()
    mine(PROMPT, num_inference_steps=2, height=32, width=32, output_type="latent")
    assert mine.unet is shared.unet and torch.equal(shared.scheduler.timesteps, before)
    assert mine.components["scheduler"] is mine.scheduler is not shared.scheduler
    assert type(mine) is type(shared) and mine.config["scheduler"] == shared.config["scheduler"]


def test_one_model_is_kept_and_another_replaces_it():
    loaded = []

    def counting(name, device):
        loaded.append(name)
        return opener(name)

    studio = Studio(opener=counting)
    for name in ("", "picturebook", " other ", "other", None):
        with studio.job(name, "me", quiet):
            pass
    with pytest.raises(dg.ModelLoadError), studio.job("missing", "me", quiet):
        pass
    with studio.job("", "me", quiet):
        pass
    assert loaded == ["picturebook", "other", "picturebook", "missing", "picturebook"]


def test_a_page_for_others_runs_its_own_model_only():
    studio = Studio(opener=opener, fixed=True)
    with pytest.raises(dg.SettingError, match="this page runs"):
        studio.check("/some/path")
    assert studio.check("") == studio.check("picturebook") == "picturebook"


def test_stop_takes_effect_within_one_call_of_the_denoiser_and_only_for_its_visitor():
    studio, calls = Studio(opener=opener), []
    with studio.job("", "me", quiet) as job:
        job.pipe.unet.register_forward_pre_hook(lambda *_: calls.append(studio.stop("me") if len(calls) == 3 else 0))
        job.expect("a picture", 20)
        with pytest.raises(Stopped, match="step 4 of 20"):
            dg.generate(job.pipe, PROMPT, steps=20, width=64, height=64, plugins=[dg.NegativeAway("cat")])
        assert len(calls) == 4 and not studio.stop("somebody else")
    with studio.job("", "me", quiet) as job:
        dg.generate(job.pipe, PROMPT, **QUICK)
    assert len(calls) == 6 and not studio.stop("me")


def test_stop_reaches_a_request_that_waits_for_the_model():
    studio, told_of = Studio(opener=opener), []
    with studio.job("", "first", quiet), ThreadPoolExecutor() as pool:
        waiting = pool.submit(lambda: studio.job("", "second", lambda _, what: told_of.append(what)).__enter__())
        while not told_of:
            time.sleep(0.01)
        assert studio.stop("second")
        with pytest.raises(Stopped):
            waiting.result(5)
    assert told_of[0] == "waiting for the model"


def test_progress_counts_the_steps_that_were_taken(studio):
    heard = []
    with studio.job("", "me", lambda done, what: heard.append((done, what))) as job:
        job.expect("a picture", 3)
        dg.generate(job.pipe, PROMPT, **(QUICK | {"steps": 3}), plugins=[dg.AttentionSegregation(["ball", "star"])])
    assert [done for done, _ in heard if done] == [(0, 3), (1, 3), (2, 3), (3, 3)]


# -- the server ----------------------------------------------------------------------------------------------------


def test_the_api_has_plain_names_and_says_what_each_argument_is(page):
    api = client(page).view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(api) == {"/generate", "/seeds", "/improve", "/one_step", "/erase", "/stylize", "/compose", "/stop"}
    names = [parameter["parameter_name"] for parameter in api["/erase"]["parameters"]]
    assert names[:3] == ["picture", "mask", "prompt"] and "request" not in names and "progress" not in names


def test_two_clients_at_once_get_what_each_would_get_alone(page):
    first, second = client(page), client(page)
    with ThreadPoolExecutor() as pool:
        jobs = []
        for seed in range(4):
            common = {"prompt": PROMPT, "seed": seed, "api_name": "/generate", **QUICK}
            jobs.append((seed, "cat", pool.submit(first.predict, negative="cat", concepts="", compare=False, **common)))
            jobs.append((seed, "", pool.submit(second.predict, negative="", concepts="", compare=False, **common)))
        for seed, negative, job in jobs:
            file = job.result(60)[0][0]["image"]
            plugins = [dg.NegativeAway(negative)] if negative else []
            assert np.array_equal(pixels(file), plain(seed, plugins=plugins))


def test_a_client_erases_with_a_picture_and_a_mask(page, picture, mask):
    candidates, (before, after), seed, settings = client(page).predict(
        handle_file(picture), handle_file(mask), steps=3, count=1, seed=5, api_name="/erase"
    )
    assert np.array_equal(pixels(before), pixels(picture)) and seed == "5"
    assert read_settings(after)["task"] == "erase" and json.loads(settings)["seed"] == 5 and len(candidates) == 1


def test_a_forged_request_over_the_wire_is_a_message(page, picture):
    sender, rest = client(page), (None, "", 2, 2, 9, 2, 1, 1, None, "", False)
    for forged in ({"background": handle_file(picture), "layers": [], "composite": None}, None):
        with pytest.raises(AppError, match="mask is empty|picture is missing"):
            sender.predict(forged, *rest, api_name="/erase_drawn")
    with pytest.raises(AppError, match="0|100"):
        sender.predict(PROMPT, "", steps=10**6, api_name="/generate")


def test_a_client_can_stop_its_own_run_and_nobody_elses(page, studio):
    mine, other = client(page), client(page)
    job = mine.submit(PROMPT, "", steps=100, count=6, width=64, height=64, api_name="/generate")
    while not studio._stops:
        time.sleep(0.02)
    assert other.predict(api_name="/stop").startswith("nothing") and not job.done()
    assert mine.predict(api_name="/stop") == "stopped"
    start = time.perf_counter()
    with pytest.raises(AppError, match="Stopped at step"):
        job.result(30)
    assert time.perf_counter() - start < 5
    assert mine.predict(PROMPT, "", seed=1, api_name="/generate", **QUICK)[2] == "1"


def test_files_of_this_machine_stay_here(page, tmp_path):
    assert page.local_url.startswith("http://127.0.0.1:") and page.share_url is None
    assert not page.analytics_enabled and page.mcp_server_obj is None
    secret = Path(tmp_path / "secret.txt")
    secret.write_text("x")
    for path in ("/etc/passwd", str(Path(dg.__file__).resolve()), str(secret)):
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(f"{page.local_url}gradio_api/file={path}", timeout=10)
        assert caught.value.code in (403, 404)


def post(page, endpoint, data):
    """A call without the client: what it is answered, or the status that refuses it."""
    asked = urllib.request.Request(
        f"{page.local_url}gradio_api/call/{endpoint}", json.dumps({"data": data}).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    try:
        with urllib.request.urlopen(asked, timeout=30) as answer:
            event = json.loads(answer.read())["event_id"]
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    return 200, event


@pytest.mark.parametrize(
    "forged",
    [
        {"path": "/etc/passwd"}, {"path": "/etc/passwd", "url": "file:///etc/passwd"},
        {"path": "x", "url": "http://127.0.0.1:1/x.png"}, {"path": "../../etc/passwd"},
    ],
    ids=str,
)  # fmt: skip
def test_a_path_of_this_machine_or_a_private_address_is_not_read(page, forged):
    file = {**forged, "meta": {"_type": "gradio.FileData"}}
    status, event = post(page, "erase", [file, file, "", 2, 2, 9, 2, 1, 1, None, "", False])
    assert status == 200
    with urllib.request.urlopen(f"{page.local_url}gradio_api/call/erase/{event}", timeout=30) as answer:
        said = answer.read().decode()
    assert "event: error" in said and "root:" not in said


def test_the_queue_has_an_end_and_a_caller_without_a_session_stops_nobody(page, studio):
    mine, last = client(page), {}
    job = mine.submit(PROMPT, "", steps=100, count=6, width=64, height=64, api_name="/generate")
    while not studio._stops:
        time.sleep(0.02)
    waiting = [mine.submit(PROMPT, "", seed=1, api_name="/generate", **QUICK) for _ in range(server.WAITING)]
    deadline = time.monotonic() + 30
    while last.get("status") != 503 and time.monotonic() < deadline:
        last["status"], last["said"] = post(page, "generate", [PROMPT, "", "", False, 2, 1, 1, 1, 64, 64, ""])
        time.sleep(0.1)
    assert last["status"] == 503 and f"Max size is {server.WAITING}" in last["said"]
    for caller, said in (({}, "nothing of yours"), ({"session_hash": mine.session_hash}, "stopped")):
        assert not job.done()
        asked = urllib.request.Request(
            f"{page.local_url}gradio_api/run/stop", json.dumps({"data": []} | caller).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(asked, timeout=30) as answer:
            assert said in answer.read().decode()
    with pytest.raises(AppError, match="Stopped"):
        job.result(60)
    for other in waiting:
        with suppress(QueueError):  # the last one's, that came when the other caller had taken the place
            assert other.result(60)[2] == "1"
    assert mine.predict(PROMPT, "", seed=1, api_name="/generate", **QUICK)[2] == "1"


def test_a_model_or_device_that_is_not_there_is_told_before_the_page_opens():
    with pytest.raises(dg.ModelLoadError, match="does not exist"):
        server.launch(model="/no/such/model")
    with pytest.raises(dg.SettingError, match="device 'abacus'"):
        server.launch(device="abacus")


def test_a_taken_port_is_said(page):
    with pytest.raises(dg.SettingError, match="--port"):
        server.launch(port=page.server_port)


def test_mcp_tools_are_the_same_functions(studio):
    from mcp import ClientSession
    from mcp.client.streamable_http import streamable_http_client

    blocks = server.serve(studio, prevent_thread_lock=True, mcp_server=True)

    async def ask():
        async with (
            streamable_http_client(f"{blocks.local_url}gradio_api/mcp/") as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            tools = {tool.name: tool for tool in (await session.list_tools()).tools}
            answer = await session.call_tool("generate", {"prompt": PROMPT, "seed": 3, **QUICK})
            return tools, answer

    try:
        tools, answer = asyncio.run(ask())
    finally:
        pages.close(blocks)
    assert {"generate", "seeds", "improve", "one_step", "erase", "stylize", "compose", "stop"} == set(tools)
    assert "every concept appears" in tools["generate"].description
    assert tools["generate"].inputSchema["properties"]["negative"]["description"].startswith("What to keep away")
    assert not answer.isError and any('"seed": 3' in getattr(part, "text", "") for part in answer.content)


# -- it can stay open ----------------------------------------------------------------------------------------------


def state(studio):
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # what was freed goes back: the heap's slack is no leak
    process = psutil.Process()
    unet = studio._pipe.unet
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules())
    patched = sum("forward" in vars(m) for m in unet.modules())
    return {
        "memory": process.memory_info().rss / 2**20, "files": process.num_fds(), "threads": threading.active_count(),
        "hooks": hooks + patched + len(studio._stops),
    }  # fmt: skip


@pytest.mark.timeout(900)
def test_three_hundred_generations_leave_the_process_as_it_was():
    small = {"block_out_channels": (32,), "down_block_types": ("CrossAttnDownBlock2D",), "layers_per_block": 1}
    unet = tiny.unet(**small, up_block_types=("CrossAttnUpBlock2D",))
    studio = Studio(opener=lambda name, device: tiny.sd15(unet=unet))
    page = server.serve(studio, prevent_thread_lock=True)
    quick, visitors = told(OneStepTab(studio).one_step), [client(page) for _ in range(2)]

    def one(i):  # two generations
        if i % 10:
            quick(PROMPT, "cat", seed=i, model="turbo")
            return
        wish = {"prompt": PROMPT, "negative": "cat", "concepts": "ball, star", "compare": True, "seed": i, "steps": 1}
        visitors[i // 10 % 2].predict(**wish, width=64, height=64, model="turbo", api_name="/generate")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, range(40)))
        before = state(studio)
        list(pool.map(one, range(40, 150)))
        after = state(studio)
    pages.close(page)
    print(before, after)
    assert after["hooks"] == before["hooks"] == 0
    assert after["threads"] <= before["threads"] + 2 and after["files"] <= before["files"] + 4, (before, after)
    assert after["memory"] < before["memory"] + 25, (before, after)

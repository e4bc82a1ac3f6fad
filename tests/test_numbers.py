"""numpy's numbers are numbers everywhere, and plain in what is written down."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import diffgraft as dg
from diffgraft.app.metadata import encode_png, read_settings
from diffgraft.attention.plain import plain

SMALL = {"width": np.int64(32), "height": np.int32(32)}


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd15()


def picture():
    return Image.effect_mandelbrot((32, 32), (-2, -1, 1, 1), 20).convert("RGB")


def box():
    mask = np.zeros((32, 32), bool)
    mask[8:16, 8:16] = True
    return mask


def same(first, second):
    """The same pixels, and the same settings in JSON's own numbers."""
    told = [json.loads(json.dumps(one.info["diffgraft"])) for one in (first, second)]
    assert np.array_equal(first, second) and told[0] == told[1]
    assert read_settings(encode_png(first, first.info["diffgraft"])) == read_settings(encode_png(second, told[1]))


def test_generate(pipe):
    given = {"seed": np.int64(3), "n": np.int32(2), "steps": np.int64(2), "guidance": np.float32(2.0)}
    plugins = [dg.NegativeAway("red", scale=np.float64(0.5), tau=np.float32(2.5), start=np.float64(0.5))]
    made = dg.generate(pipe, "a ball", plugins=plugins, batch_size=np.int8(1), **given, **SMALL)
    usual = [dg.NegativeAway("red", scale=0.5, start=0.5)]
    expected = dg.generate(pipe, "a ball", plugins=usual, seed=3, n=2, steps=2, guidance=2.0, width=32, height=32)
    for first, second in zip(made, expected, strict=True):
        same(first, second)


def test_erase(pipe):
    whole = {"seed": 4, "n": 2, "steps": 2, "grow": 1, "feather": 1, "min_area": 2, "batch_size": 1}
    parts = {"strength": 1.0, "guidance": 1.5, "scale": 3.0, "suppression": 0.5, "start": 0.0, "end": 1.0}
    odd = {name: np.int64(value) for name, value in (whole | {"suppression_steps": 1}).items()}
    odd |= {name: np.float64(value) for name, value in parts.items()}
    made = dg.erase(pipe, picture(), box(), **odd)
    expected = dg.erase(pipe, picture(), box(), suppression_steps=1, **whole, **parts)
    for first, second in zip(made, expected, strict=True):
        same(first, second)


def test_stylize_and_invert(pipe):
    odd = {"seed": np.int64(4), "steps": np.int64(2), "iterations": np.int64(0), "strength": np.float32(0.5)}
    made = dg.stylize(pipe, picture(), picture(), structure=np.float64(0.5), **odd)
    same(made, dg.stylize(pipe, picture(), picture(), seed=4, steps=2, iterations=0, strength=0.5, structure=0.5))
    inverted = dg.invert(pipe, picture(), steps=np.int64(2), iterations=np.int64(1), tolerance=np.float64(0))
    assert torch.equal(inverted.latents, dg.invert(pipe, picture(), steps=2, iterations=1, tolerance=0).latents)


def test_maps_and_seeds(pipe):
    call, two = {"guidance": 1.0, "width": 32, "height": 32}, np.int64(2)
    ranked = dg.rank_seeds(pipe, "a ball", ["ball"], [np.int64(1), two], steps=two, at=np.int64(0), **call)
    assert ranked == dg.rank_seeds(pipe, "a ball", ["ball"], [1, 2], steps=2, **call)
    assert type(ranked[0].seed) is int
    dg.attention_masks(pipe, "a ball", ["ball"], power=np.int64(1), seed=np.int64(1), steps=np.int64(2), **call)


@pytest.mark.parametrize(
    "make",
    [
        lambda i, f: dg.AttentionSegregation([i(2), [i(3), i(4)]], segregation=f(0.5), end=f(0.5)),
        lambda i, f: dg.AttentionSegregation(["ball"], refine={i(0): f(0.25)}, every=i(2)),
        lambda i, f: dg.SelfAttentionRedirection(box(), scale=f(2), suppression_steps=i(3), layers=[i(1)]),
        lambda i, f: dg.StartpointFilter(f(0.5), f(0.25)),
        lambda i, f: dg.AttentionDistillation(picture(), updates=i(2), rate=f(0.25)),
        lambda i, f: dg.ConceptBlock(["ball"], reach=i(1), strength=f(0.5)),
        lambda i, f: dg.NegativeAway({"red": f(0.5)}, alpha=f(0.25), rule="nag"),
    ],
)
def test_plugins(make):
    odd, usual = make(np.int64, np.float32), make(int, float)
    assert json.dumps(odd.settings()) == json.dumps(usual.settings())


def test_what_is_no_number_is_still_none(pipe):
    for wrong in (np.True_, "3", np.float64(2.5)):
        with pytest.raises(dg.GraftError, match="steps"):
            dg.generate(pipe, "a ball", steps=wrong)
    with pytest.raises(dg.SettingError, match="seed"):
        dg.generate(pipe, "a ball", seed=np.int64(-3))
    given = [1, "a", {"b": 2}]
    assert plain(given) is given and type(plain((np.int64(1), 2))[0]) is int

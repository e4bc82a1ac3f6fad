"""generate(): settings that make a picture again, and answers to settings that cannot."""

from __future__ import annotations

import json

import diffusers
import numpy as np
import pytest
import tiny
import torch

import diffgraft as dg

PROMPT = "a red ball"


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd15()


def pixels(pictures):
    return [np.asarray(picture) for picture in pictures]


def make(pipe, **options):
    return dg.generate(pipe, options.pop("prompt", PROMPT), **({"steps": 2, "guidance": 1.0} | options))


def test_picture_i_has_seed_plus_i_alone_or_together(pipe):
    together = make(pipe, seed=7, n=3)
    alone = [make(pipe, seed=7 + i)[0] for i in range(3)]
    assert [picture.info["diffgraft"]["seed"] for picture in together] == [7, 8, 9]
    assert all(np.array_equal(a, b) for a, b in zip(pixels(together), pixels(alone), strict=True))
    batched = make(pipe, seed=7, n=3, batch_size=3)
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(pixels(together), pixels(batched), strict=True))


def test_the_plain_pipeline_gives_the_same_picture(pipe):
    plain = pipe(PROMPT, num_inference_steps=2, guidance_scale=3.0, generator=torch.Generator().manual_seed(5)).images[
        0
    ]
    assert np.array_equal(plain, make(pipe, seed=5, guidance=3.0)[0])


@pytest.mark.parametrize("seed", [None, -1])
def test_a_random_seed_is_recorded(pipe, seed):
    first, second = make(pipe, seed=seed)[0], make(pipe, seed=seed)[0]
    assert first.info["diffgraft"]["seed"] != second.info["diffgraft"]["seed"]
    again = make(pipe, seed=first.info["diffgraft"]["seed"])[0]
    assert np.array_equal(first, again)


def test_no_global_random_numbers(pipe):
    before = torch.get_rng_state()
    make(pipe, seed=None)
    assert torch.equal(before, torch.get_rng_state())


def test_settings_are_json_and_hold_the_plugins(pipe):
    away = dg.NegativeAway("blue", scale=0.5)
    picture = make(pipe, seed=1, plugins=[away], width=64, height=32, negative_prompt="x", guidance=2.0)[0]
    said = json.loads(json.dumps(picture.info["diffgraft"]))
    assert said["plugins"][0]["plugin"] == "NegativeAway" and said["plugins"][0]["scale"] == 0.5
    assert (said["width"], said["height"], said["negative_prompt"], said["steps"]) == (64, 32, "x", 2)
    assert picture.size == (64, 32)
    assert not np.array_equal(picture, make(pipe, seed=1, width=64, height=32, negative_prompt="x", guidance=2.0)[0])


def test_settings_of_plugins_are_what_they_were_given(pipe):
    layout = [np.ones((8, 8), bool)]
    plugin = dg.AttentionSegregation(["red ball"], layout=layout, loss=lambda maps: maps.concepts.sum())
    first, second = plugin.settings(), dg.AttentionSegregation([["red ball"], ["cat"]]).settings()
    assert first["concepts"] == ["red ball"] and second["concepts"] == [["red ball"], ["cat"]]
    assert first["layout"] == ["ndarray [8, 8]"] and "lambda" in first["loss"] and "0x" not in json.dumps(first)


def test_several_prompts(pipe):
    pictures = make(pipe, prompt=["a cat", "a star"], seed=3, n=2)
    assert [p.info["diffgraft"]["prompt"] for p in pictures] == ["a cat", "a cat", "a star", "a star"]
    assert [p.info["diffgraft"]["seed"] for p in pictures] == [3, 4, 5, 6]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_what_is_one_for_each_prompt_stays_with_its_prompt(pipe, batch_size):
    prompts, concepts, words = ["a blue cat", "a red star"], [["blue", "cat"], ["red", "star"]], ["ball", "blue"]
    embeds = pipe.encode_prompt(words, "cpu", 1, False)[0]

    def plugins(concepts, negative):
        return [dg.AttentionSegregation(concepts, end=1.0), dg.NegativeAway(negative, scale=0.5)]

    alone = [
        make(pipe, prompt=prompts[i // 2], seed=3 + i, plugins=plugins(concepts[i // 2], words[i // 2]))[0]
        for i in range(4)
    ]
    for negative in (words, embeds):
        given = {"seed": 3, "n": 2, "batch_size": batch_size, "plugins": plugins(concepts, negative)}
        found = make(pipe, prompt=prompts, **given)
        assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(pixels(found), pixels(alone), strict=True))
    with dg.graft(pipe, *plugins(concepts, words)):
        found = make(pipe, prompt=prompts, seed=3, n=2, batch_size=batch_size)
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(pixels(found), pixels(alone), strict=True))
    with pytest.raises(dg.SettingError, match="2 negatives for 4 prompts"):
        make(pipe, prompt=prompts * 2, batch_size=batch_size, plugins=[dg.NegativeAway(words)])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seed": 2**63}, dg.SettingError, "2\\^63-1"),
        ({"seed": -2}, dg.SettingError, "2\\^63-1"),
        ({"seed": 3.7}, dg.SettingTypeError, "whole number"),
        ({"seed": "abc"}, dg.SettingTypeError, "whole number"),
        ({"seed": True}, dg.SettingTypeError, "whole number"),
        ({"steps": 0}, dg.SettingError, "1 ... 1000"),
        ({"steps": 10_000}, dg.SettingError, "1 ... 1000"),
        ({"steps": 2.5}, dg.SettingTypeError, "whole number"),
        ({"n": 0}, dg.SettingError, "n=0"),
        ({"batch_size": 0}, dg.SettingError, "batch_size"),
        ({"guidance": float("nan")}, dg.SettingError, "finite"),
        ({"guidance": "4"}, dg.SettingTypeError, "number"),
        ({"prompt": 5}, dg.SettingTypeError, "text"),
        ({"plugins": 5}, dg.SettingTypeError, "not a plugin"),
        ({"gidance": 4.0}, dg.SettingTypeError, "gidance="),
        ({"num_inference_steps": 2}, dg.SettingTypeError, "steps="),
        ({"width": 0}, dg.SettingError, "width=0"),
        ({"width": 33}, dg.SettingError, "multiples of 8"),
        ({"prompt": "x" * 10_001}, dg.SettingError, "10000"),
        ({"prompt": ["a", 3]}, dg.SettingTypeError, "is a text"),
        ({"prompt": "\ud800"}, dg.SettingError, "no text"),
    ],
)
def test_settings_out_of_range(pipe, options, error, message):
    with pytest.raises(error, match=message) as caught:
        make(pipe, **options)
    assert isinstance(caught.value, dg.GraftError)


def test_non_finite_latents_stop_at_their_step():
    pipe = tiny.sd15()
    calls = []

    def spoil(module, args, output):
        calls.append(1)
        output[0][:] = float("nan") if len(calls) == 2 else output[0]
        return output

    pipe.unet.register_forward_hook(spoil)
    with pytest.raises(dg.NonFiniteError, match="step 2 of 4 .* float32"):
        make(pipe, steps=4, seed=1)
    assert len(calls) == 2


def test_non_finite_pixels_are_told(pipe):
    hook = pipe.vae.decoder.register_forward_hook(lambda module, args, output: output * float("nan"))
    with pytest.raises(dg.NonFiniteError, match="VAE"):
        make(pipe, seed=1)
    hook.remove()
    make(pipe, seed=1)


def test_the_users_own_callback_is_called_too(pipe):
    seen = []

    def mine(pipe, step, timestep, tensors):
        seen.append((step, sorted(tensors)))
        return tensors

    make(pipe, seed=1, callback_on_step_end=mine, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert seen == [(0, ["latents", "prompt_embeds"]), (1, ["latents", "prompt_embeds"])]


def test_what_is_no_pipeline_is_told_so():
    with pytest.raises(dg.UnsupportedPipelineError, match="int"):
        dg.generate(5, PROMPT)


def test_what_the_pipeline_would_drop_is_told():
    model = tiny.unet(time_cond_proj_dim=8)
    lcm = tiny.sd15(cls=diffusers.LatentConsistencyModelPipeline, unet=model, scheduler=diffusers.LCMScheduler())
    assert make(lcm, steps=1)
    with pytest.raises(dg.SettingTypeError, match="negative_prompt=.*NegativeAway"):
        make(lcm, negative_prompt="x")

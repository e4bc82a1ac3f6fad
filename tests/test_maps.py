"""Attention maps: which layers, what is recorded, how tokens become concepts, and regions of them."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import tiny
import tiny_transformers
import torch
import torch.nn.functional as F
from diffusers import (
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
)
from test_matrix import load_ip_adapter

import diffgraft as dg
from diffgraft.attention.layer import find_layers
from diffgraft.attention.maps import MapCapture, choose_layers, concept_maps, gaussian_kernel, rescale, sharpen, smooth
from diffgraft.attention.regions import assign, binarise, places, propagate, to_grid
from diffgraft.plugins.base import Plugin

SDXL = {
    "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10), "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), "sample_size": 128,
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
}  # fmt: skip


def meta(**config):
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


@pytest.fixture(scope="module")
def sd15_layers():
    return find_layers(meta(cross_attention_dim=768, attention_head_dim=8, sample_size=64))


class Watch(Plugin):
    """Records maps while the pipeline runs; changes nothing."""

    def __init__(self, **options):
        super().__init__()
        self.options, self.steps = options, []

    def bind(self, session):
        self.capture = MapCapture(session.layers, "predict", **self.options)

    def edits(self):
        return [self.capture]

    def combine(self, step, prediction, rows):
        self.steps.append(self.capture.averaged())
        self.capture.clear()


# -- layers (T5) ---------------------------------------------------------------------------------------------------


def test_sd15_at_512_takes_the_five_published_layers(sd15_layers):
    chosen = choose_layers(sd15_layers, (64, 64))
    assert [layer.name.split(".transformer")[0] for layer in chosen] == [
        "down_blocks.2.attentions.0", "down_blocks.2.attentions.1",
        "up_blocks.1.attentions.0", "up_blocks.1.attentions.1", "up_blocks.1.attentions.2",
    ]  # fmt: skip
    assert sum(layer.module.heads for layer in chosen) == 40


def test_sdxl_at_1024_takes_sixty_layers():
    chosen = choose_layers(find_layers(meta(**SDXL)), (128, 128))
    assert [sum(layer.place == place for layer in chosen) for place in ("down", "mid", "up")] == [20, 10, 30]


@pytest.mark.parametrize("size", [(64, 96), (96, 96), (128, 128), (65, 97)])
def test_the_level_is_a_thirty_second_of_the_pixels_in_any_aspect(sd15_layers, size):
    assert {layer.level for layer in choose_layers(sd15_layers, size)} == {2}


def test_decoder_alone_at_the_full_grid_and_self_attention_at_its_own_level(sd15_layers):
    places = {layer.place for layer in choose_layers(sd15_layers, (16, 16))}
    assert places == {"up"}
    assert {layer.place for layer in choose_layers(sd15_layers, (16, 16), choice="all")} == {"down", "up"}
    assert {layer.place for layer in choose_layers(sd15_layers, (64, 64), choice="decoder")} == {"up"}
    assert len(choose_layers(sd15_layers, (64, 64), kind="self", tokens=1024)) == 5


def test_unusable_choices_are_typed_errors(sd15_layers):
    with pytest.raises(dg.UnsupportedPipelineError, match="choose other layers"):
        choose_layers(sd15_layers, (64, 64), choice=lambda layer: False)
    with pytest.raises(dg.SettingError, match="encoder"):
        choose_layers(sd15_layers, (64, 64), choice="encoder")
    with pytest.raises(dg.SettingError, match="one level"):
        choose_layers(sd15_layers, (64, 64), choice=lambda layer: layer.place == "up")


# -- recording -----------------------------------------------------------------------------------------------------


def test_recording_changes_no_bit_and_maps_are_distributions(family):
    plain = tiny.sample(family, height=32, width=48)
    watch = Watch()
    with dg.graft(family, watch):
        assert torch.equal(tiny.sample(family, height=32, width=48), plain)
    assert [tuple(maps.shape) for maps in watch.steps] == [(1, 77, *watch.steps[0].shape[2:])] * 3
    rows, columns = watch.steps[0].shape[2:]
    assert columns * 2 == rows * 3
    assert torch.allclose(watch.steps[0].sum(1), torch.ones(1, rows, columns), atol=1e-5)


def test_recorded_maps_are_the_layers_own_probabilities(sd15):
    """Against diffusers' explicit `get_attention_scores` in the same layers."""
    watch, seen = Watch(choice=lambda layer: layer.name.startswith("up_blocks.0") and layer.kind == "cross"), []

    class Explicit:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, **kwargs):
            q = attn.head_to_batch_dim(attn.to_q(hidden_states))
            k, v = (attn.head_to_batch_dim(p(encoder_hidden_states)) for p in (attn.to_k, attn.to_v))
            probs = attn.get_attention_scores(q, k)
            seen.append(probs.unflatten(0, (-1, attn.heads))[1].mean(0))
            return attn.to_out[0](attn.batch_to_head_dim(probs @ v))

    with dg.graft(sd15, watch):
        tiny.sample(sd15, num_inference_steps=1)
    for layer in find_layers(sd15.unet):
        if layer.kind == "cross" and layer.name.startswith("up_blocks.0"):
            layer.module.set_processor(Explicit())
    tiny.sample(sd15, num_inference_steps=1)
    expected = torch.stack(seen).mean(0).T.unflatten(1, watch.steps[0].shape[2:])
    assert torch.allclose(watch.steps[0][0], expected, atol=1e-6)


def test_recorded_maps_of_joint_layers_are_what_the_image_looks_at_text(monkeypatch):
    """Against the explicit softmax over text and image, in every layer of FLUX, where the text stands in front."""
    pipe, watch, seen = tiny_transformers.flux(), Watch(), []
    call = {"num_inference_steps": 1, "height": 32, "width": 48, "output_type": "latent"}
    with dg.graft(pipe, watch):
        pipe("a ball and a star", generator=torch.Generator().manual_seed(0), **call)
    attend, text = F.scaled_dot_product_attention, watch.steps[0].shape[1]

    def explicit(query, key, value, **kwargs):
        if query.shape[-2] == key.shape[-2] > text and query.ndim == 4:  # not the text encoders' own
            probs = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
            seen.append(probs[0, :, text:, :text].mean(0))
        return attend(query, key, value, **kwargs)

    patch = partial(monkeypatch.setattr, F, "scaled_dot_product_attention", explicit)
    pipe.transformer.register_forward_pre_hook(lambda module, args: patch())
    pipe("a ball and a star", generator=torch.Generator().manual_seed(0), **call)
    assert len(seen) == len(find_layers(pipe.transformer))
    expected = torch.stack(seen).mean(0).T.unflatten(1, watch.steps[0].shape[2:])
    assert torch.allclose(watch.steps[0][0], expected, atol=1e-6)
    assert 0 < watch.steps[0].sum(1).max() < 1  # the rest is what the image looks at itself


def test_nothing_recorded_is_an_error(sd15):
    with pytest.raises(dg.AttentionNotReachedError, match="choose other layers"):
        MapCapture(find_layers(sd15.unet), "predict").averaged()


# -- tokens to concepts (T14) --------------------------------------------------------------------------------------


def reference(maps, column):
    """Attend-and-Excite's map of one token from [h, w, 77], written out again."""
    text = torch.softmax(maps[:, :, 1:-1] * 100, -1)[:, :, column - 1]
    x = torch.arange(3.0, dtype=maps.dtype)
    line = torch.exp(-(((x - 1) / (2 * 0.5)) ** 2))
    kernel = line[:, None] * line[None]
    padded = F.pad(text[None, None], (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, (kernel / kernel.sum())[None, None])[0, 0]


def test_ae_mode_is_attend_and_excite():
    maps = torch.rand(77, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(0)
    before = maps.clone()
    found = concept_maps(maps, [[2], [5]], normalisation="ae", smoothing="gaussian", tokens=range(1, 7))
    for i, column in enumerate((2, 5)):
        assert torch.allclose(found[i], reference(maps.permute(1, 2, 0), column), atol=1e-6, rtol=0)
    assert torch.equal(maps, before)
    kernel = gaussian_kernel(maps)
    for value, published in ((kernel[1, 1], 0.3319), (kernel[0, 1], 0.1221), (kernel[0, 0], 0.0449)):
        assert abs(float(value) - published) < 5e-5


def test_eot_mode_leaves_end_mark_and_padding_out():
    maps = torch.rand(77, 4, 4, dtype=torch.float64)
    found = sharpen(maps, 1, 7)
    assert torch.allclose(found[1:7], torch.softmax(100 * maps[1:7], 0)) and found[7:].sum() == found[0].sum() == 0
    eot = concept_maps(maps, [[2]], normalisation="eot", smoothing="none", tokens=range(1, 7))
    assert torch.equal(eot[0], found[2])


def test_padding_that_the_model_masks_is_no_token():
    maps = torch.rand(9, 4, 4, dtype=torch.float64)
    padded = torch.cat([maps, torch.zeros(5, 4, 4, dtype=torch.float64)])
    for how in ("ae", "eot"):
        for tokens in (None, range(7), range(9)):
            pair = [concept_maps(x, [[2], [6]], normalisation=how, tokens=tokens) for x in (maps, padded)]
            assert torch.equal(*pair) and pair[0].flatten(1).any(1).all()
    assert not concept_maps(torch.zeros(9, 4, 4), [[0]], normalisation="ae").any()


def test_a_phrase_is_the_mean_of_its_tokens_and_columns_must_exist():
    maps = torch.rand(9, 4, 6, dtype=torch.float64)
    options = {"normalisation": "none", "smoothing": "none"}
    assert torch.allclose(concept_maps(maps, [[2, 3]], **options)[0], (maps[2] + maps[3]) / 2)
    with pytest.raises(dg.ConceptError, match="9 tokens"):
        concept_maps(maps, [[9]], **options)


@pytest.mark.parametrize("how", ["max", "minmax", "sum1", "none"])
def test_rescaling(how):
    maps = torch.rand(2, 5, 7, dtype=torch.float64) + 0.5
    found = rescale(maps, how)
    flat = found.flatten(1)
    if how in ("max", "minmax"):
        assert torch.allclose(flat.amax(1), torch.ones(2, dtype=torch.float64))
    if how == "minmax":
        assert torch.equal(flat.amin(1), torch.zeros(2, dtype=torch.float64))
    if how == "sum1":
        assert torch.allclose(flat.sum(1), torch.ones(2, dtype=torch.float64))
    if how == "none":
        assert found is maps
    assert torch.isfinite(rescale(torch.zeros(1, 3, 3), how)).all()


def test_smoothing_keeps_flat_maps_flat():
    flat = torch.full((1, 5, 7), 0.3, dtype=torch.float64)
    for how in ("mean", "gaussian", "none"):
        assert torch.allclose(smooth(flat, how), flat)
    spot = torch.zeros(1, 5, 5, dtype=torch.float64)
    spot[0, 2, 2] = 9
    assert torch.allclose(smooth(spot, "mean")[0, 1:4, 1:4], torch.ones(3, 3, dtype=torch.float64))


# -- regions (T9, T16) ---------------------------------------------------------------------------------------------


def test_regions_are_binary_detached_and_follow_their_rule():
    maps = torch.rand(3, 8, 8, dtype=torch.float64, requires_grad=True)
    for rule, level in (("max", 0.5), ("std", 1.0), ("quantile", 0.75), ("otsu", 0.5)):
        found = binarise(maps, rule, level)
        assert not found.requires_grad and set(found.unique().tolist()) == {0.0, 1.0}
    peak = maps.detach().amax((1, 2), keepdim=True)
    assert torch.equal(binarise(maps), (maps.detach() >= 0.5 * peak).double())
    assert torch.equal(binarise(maps, "quantile", 0.75).sum((1, 2)), torch.full((3,), 16.0, dtype=torch.float64))


def test_otsu_splits_two_plateaus():
    maps = torch.full((1, 8, 8), 0.2, dtype=torch.float64)
    maps[0, :3] = 0.9
    maps = maps + 0.01 * torch.rand(1, 8, 8, dtype=torch.float64)
    assert torch.equal(binarise(maps, "otsu")[0].bool(), maps[0] > 0.5)


def blobs(side=32):
    """Two blobs and the background of a 32x32 grid; cells of one attend to each other only."""
    labels = torch.zeros(side, side, dtype=torch.long)
    labels[4:16, 3:14], labels[14:28, 18:30] = 1, 2
    same = labels.flatten()[:, None] == labels.flatten()[None]
    affinity = same.double() / same.sum(1, keepdim=True)
    return labels, affinity


def test_attencraft_masks_find_the_blobs_and_a_margin_only_shrinks_them():
    labels, affinity = blobs()
    noise = torch.rand(3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    truth = torch.stack([labels == i for i in range(3)])
    cross = to_grids(truth.double()) * (0.4 + 0.6 * noise) + 0.05 * noise
    spread = propagate(cross, affinity)
    masks = {margin: assign(spread, margin) for margin in (0.05, 0.1, 0.2, 0.4)}
    for i in (1, 2):
        found = masks[0.1][i]
        assert (found & truth[i]).sum() / (found | truth[i]).sum() >= 0.95
    assert all(int(found.sum(0).amax()) <= 1 for found in masks.values())
    for low, high in ((0.05, 0.1), (0.1, 0.2), (0.2, 0.4)):
        assert not (masks[high] & ~masks[low]).any()


def to_grids(maps):
    return F.adaptive_avg_pool2d(maps[None], (16, 16))[0]


def test_propagation_at_another_aspect_and_of_flat_maps():
    affinity = torch.eye(24 * 16, dtype=torch.float64)
    maps = torch.rand(2, 12, 8, dtype=torch.float64)
    assert propagate(maps, affinity).shape == (2, 24, 16)
    flat = propagate(torch.full((2, 12, 8), 0.3), affinity.float())
    assert torch.isfinite(flat).all() and not assign(flat).any()


def test_a_layout_keeps_small_masks():
    like = torch.zeros(2, 4, 4, dtype=torch.float64)
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[:32, :16] = True
    assert torch.equal(to_grid(mask, like).sum(), torch.tensor(2.0, dtype=torch.float64))
    dot = torch.zeros(64, 64, dtype=torch.bool)
    dot[5, 5] = True
    assert to_grid(dot, like)[0, 0] == 1 and math.isclose(float(to_grid(dot, like).sum()), 1)


# -- tasks ---------------------------------------------------------------------------------------------------------

CAPTION = "a blue ball and a yellow star , night"


@pytest.fixture(scope="module")
def book():
    pipe = dg.picturebook()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_maps_by_word_lie_where_the_picture_has_their_colours(book):
    plain = dg.generate(book, CAPTION, seed=7, steps=12)[0]
    maps = dg.attention_maps(book, CAPTION, ["ball", "star"], seed=7, steps=12)
    assert maps.image.tobytes() == plain.tobytes()
    assert list(maps) == ["ball", "star"] and len(maps) == 2
    assert maps["ball"].shape == (16, 16) and maps.steps["star"].shape == (12, 16, 16)
    pixels = torch.tensor(np.asarray(plain.resize((16, 16)))).float()
    yellow = (pixels[..., 0] > 180) & (pixels[..., 2] < 120)
    late = maps.steps["star"][-1]
    assert late.min() >= 0 and late.max() <= 1 and late[yellow].mean() > 5 * late[~yellow].mean()
    assert maps.overlay("ball").size == plain.size
    assert maps.picture(4).size == (128 * 6 + 6 * 5, 2 * (128 + 22))


def test_maps_of_a_tiny_pipeline_at_another_aspect(family):
    maps = dg.attention_maps(family, "a ball and a ball", ["ball", 5], steps=2, width=48, height=32)
    grid = tuple(maps["ball"].shape)
    assert grid[1] * 2 == grid[0] * 3 and maps.notes["ball"].startswith("occurs 2 times")
    assert maps.strip("ball", 8).size[1] == 128
    with pytest.raises(dg.ConceptError):
        dg.attention_maps(family, "a ball", ["star"], steps=1, width=32, height=32)
    with pytest.raises(dg.SettingError, match="list of words"):
        dg.attention_maps(family, "a ball", "ball")


def test_maps_of_joint_attention():
    pipe = tiny_transformers.flux()
    maps = dg.attention_maps(pipe, "a ball and a star", ["ball", "star"], steps=2, width=48, height=32)
    grid = tuple(maps["ball"].shape)
    assert grid[1] * 2 == grid[0] * 3 and maps["ball"].min() > 0 and maps["star"].max() < 1


def test_masks_are_disjoint_and_find_the_things(book):
    picture = dg.generate(book, CAPTION, seed=7, steps=12)[0]
    masks = dg.attention_masks(book, CAPTION, ["ball", "star"], image=picture)
    assert masks["ball"].any() and masks["star"].any() and not (masks["ball"] & masks["star"]).any()
    assert masks.mask("ball").size == picture.size and masks.mask("ball").mode == "L"
    tight = dg.attention_masks(book, CAPTION, ["ball", "star"], image=picture, margin=0.5)
    assert all(not (tight[word] & ~masks[word]).any() for word in masks)
    pixels = torch.tensor(np.asarray(picture.resize((16, 16)))).float()
    yellow = (pixels[..., 0] > 150) & (pixels[..., 2] < 120)
    assert yellow[masks["star"]].float().mean() > 0.5 and not yellow[masks["ball"]].any()
    assert masks.picture().size == (128 * 3 + 12, 2 * (128 + 22))
    with pytest.warns(UserWarning, match="lower margin"):
        assert not dg.attention_masks(book, CAPTION, ["ball", "star"], image=picture, margin=1.0)["ball"].any()


@pytest.mark.parametrize(
    "wrong",
    [{"noise": 0}, {"margin": 2}, {"power": 0}, {"power": True}, {"words": []}, {"image": "no such file.png"},
     {"image": np.zeros((1, 1, 3), np.uint8)}, {"image": np.zeros((64, 64, 3), np.uint8), "widht": 64},
     {"image": np.zeros((64, 64, 3), np.uint8), "prompt": None}],
    ids=["noise", "margin", "power", "bool", "words", "file", "tiny", "unknown", "prompt"],
)  # fmt: skip
def test_wrong_arguments_of_masks(book, wrong):
    with pytest.raises((dg.SettingError, dg.SettingTypeError)):
        dg.attention_masks(**({"pipe": book, "prompt": CAPTION, "words": ["ball"]} | wrong))


def test_masks_need_a_picture_and_self_attention(sd15):
    ask = {"prompt": "a ball and a star", "words": ["ball"], "image": np.zeros((32, 32, 4), np.uint8)}
    masks = dg.attention_masks(sd15, **ask)
    assert masks.image.mode == "RGB" and masks.image.getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(dg.SettingTypeError, match="not a picture"):
        dg.attention_masks(sd15, **(ask | {"image": 3}))
    for pipe in (tiny_transformers.flux(), tiny_transformers.sd3(dual_attention_layers=())):
        with pytest.raises(dg.UnsupportedPipelineError, match="self-attention"):
            dg.attention_masks(pipe, **ask)


def test_masks_beside_a_controlnet_and_of_inpainting_models():
    ask = {"prompt": "a ball and a star", "words": ["ball"], "image": np.zeros((32, 48, 3), np.uint8)}
    model = tiny.unet()
    pipe = tiny.sd15(cls=StableDiffusionControlNetPipeline, unet=model, controlnet=tiny.controlnet(model))
    scores = [dg.attention_masks(each, **ask).scores["ball"] for each in (pipe, tiny.sd15())]
    assert torch.equal(*scores)
    with pytest.raises(dg.UnsupportedPipelineError, match="inpainting model"):
        dg.attention_masks(tiny.sd15(cls=StableDiffusionInpaintPipeline, in_channels=9), **ask)
    pipe = tiny.sd15()
    load_ip_adapter(pipe)
    with pytest.raises(dg.UnsupportedPipelineError, match="unload_ip_adapter"):
        dg.attention_masks(pipe, **ask)


def test_ranked_seeds_agree_with_the_losses_of_a_run_and_cost_half_a_call(sd15):
    prompt, words, calls = "a ball and a star", ["ball", "star"], []
    size = {"width": 32, "height": 32}
    hook = sd15.unet.conv_in.register_forward_hook(lambda m, args, out: calls.append(len(args[0])))
    ranked = dg.rank_seeds(sd15, prompt, words, range(5), batch_size=2, **size)
    hook.remove()
    assert calls == [2, 2, 1] and sorted(r.seed for r in ranked) == list(range(5))
    assert [r.loss for r in ranked] == sorted(r.loss for r in ranked)
    best = ranked[0]
    with dg.graft(sd15, dg.AttentionSegregation(words, loss="attend-and-excite")) as g:
        dg.generate(sd15, prompt, seed=best.seed, **size)
    assert g.report().plugins[0][1]["loss 0"][0] == pytest.approx(best.loss, abs=1e-4)
    later = dg.rank_seeds(sd15, prompt, words, [0], loss="a-star", at=2, steps=3, **size)
    assert later[0].loss > 1  # from the second step on there are regions to keep to
    idle = {"size": 0.0, "segregation": 0.0, "retention": 0.0}  # nothing would be moved anyway
    assert dg.rank_seeds(sd15, prompt, words, range(5), settings=idle, **size) == ranked


@pytest.mark.parametrize(
    "wrong",
    [{"seeds": []}, {"seeds": 3}, {"at": 3, "steps": 3}, {"at": -1}, {"at": "x"}, {"batch_size": 0}, {"concepts": []},
     {"concepts": [["ball"], ["a"]], "seeds": [1, 2]}, {"settings": {"end": 0.5}}],
    ids=str,
)  # fmt: skip
def test_seeds_that_cannot_be_ranked(sd15, wrong):
    right = {"prompt": "a ball", "concepts": ["ball"], "seeds": [1], "width": 32, "height": 32}
    with pytest.raises(dg.SettingError):
        dg.rank_seeds(sd15, **(right | wrong))


def test_a_seed_without_a_loss_is_the_last(sd15):
    losses = iter([2.0, math.nan, 1.0])
    ask = {"loss": lambda maps: torch.tensor(next(losses)), "width": 32, "height": 32}
    assert [one.seed for one in dg.rank_seeds(sd15, "a ball", ["ball"], range(3), **ask)] == [2, 0, 1]


def test_a_step_that_the_scheduler_repeats_ranks_nothing(sd15):
    sd15.scheduler = PNDMScheduler.from_config(sd15.scheduler.config, skip_prk_steps=True)
    call = {"steps": 3, "width": 32, "height": 32}
    assert len(dg.rank_seeds(sd15, "a ball", ["ball"], [0], at=2, **call)) == 1
    with pytest.raises(dg.SettingError, match="repeats"):
        dg.rank_seeds(sd15, "a ball", ["ball"], [0], at=1, **call)


def test_places_are_disjoint_near_their_peaks_and_apart_when_peaks_coincide():
    maps = torch.zeros(2, 16, 16)
    maps[0, 4, 4] = maps[1, 11, 12] = 1
    found = places(maps)
    assert set(found.unique().tolist()) == {0, 1} and found.sum(0).max() == 1
    assert found[0, 4, 4] == found[1, 11, 12] == 1
    assert found.mean().item() == pytest.approx(0.2, abs=0.03)  # 40% of the area, in two
    for count, grid in ((2, (16, 16)), (3, (12, 20)), (4, (16, 16))):
        same = torch.zeros(count, *grid)
        same[:, grid[0] // 2, grid[1] // 2] = 1
        found = places(same)
        assert found.sum(0).max() == 1 and found.flatten(1).sum(1).min() > 0.5 * 0.4 * grid[0] * grid[1] / count
    assert places(torch.zeros(2, 8, 8)).sum(0).max() == 1

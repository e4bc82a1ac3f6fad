"""What redirection costs, counted on published shapes and recorded on real tensors; the table is in make bench."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

import diffgraft as dg
from diffgraft.app.bench.configs import SD15, SDXL, meta_pipe
from diffgraft.app.bench.negative_cost import flux
from diffgraft.app.bench.redirection_cost import (
    Recorder,
    denoiser_flops,
    joint_flops,
    joint_layer_memory,
    layer_memory,
    square,
)
from diffgraft.attention.call import AttentionCall
from diffgraft.attention.edit import attend
from diffgraft.attention.layer import AttentionLayer
from diffgraft.attention.step import Step


@functools.cache
def meta(latent):
    return meta_pipe({64: SD15, 128: SDXL}[latent])


@pytest.mark.parametrize(("latent", "limit"), [(64, 0.83), (128, 0.79)], ids=["sd15", "sdxl"])
def test_a_shared_encoder_and_shorter_keys(latent, limit):
    pipe = meta(latent)
    plain = denoiser_flops(pipe, 1, latent)
    ours = denoiser_flops(pipe, 1, latent, dg.SelfAttentionRedirection(square(latent * 8, 0.1)))
    assert plain < ours <= limit * 2 * plain


@pytest.mark.parametrize(("latent", "count"), [(64, 9), (128, 36)], ids=["sd15", "sdxl"])
def test_the_published_layers_are_the_decoders(latent, count):
    pipe = meta(latent)
    with dg.graft(pipe, dg.SelfAttentionRedirection(square(512, 0.1))) as g:
        layers = [layer for layer in g.layers if layer.name in g.edits]
    first = {9: 7, 36: 34}[count]
    assert [layer.index for layer in layers] == list(range(first, first + count))
    assert {9: "up_blocks.1", 36: "up_blocks.0"}[count] == layers[0].name.split(".attentions")[0]


def flops(masked):
    heads, side, width = 5, 32, 64
    layer = AttentionLayer("up", None, "self", "up", 0)
    rows = {"cond": slice(0, 1), "redirected": slice(1, 2)}
    step = Step(20, 50, size=(side, side), rows=rows, likes={"redirected": "cond"})
    edits = [e for e in dg.SelfAttentionRedirection(masked).edits() if e.active(layer, step)]
    q, k, v = (torch.zeros(2, heads, side * side, width, device="meta") for _ in "qkv")
    with FlopCounterMode(display=False) as counter:
        attend(AttentionCall(layer, q, k, v, None, 1.0, 0, step), edits)
    return counter.get_total_flops()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_attention_of_the_redirected_row_shrinks_with_the_mask(share):
    masked = np.zeros((32, 32), bool)
    masked.reshape(-1)[: round(share * 1024)] = True
    tiniest = np.zeros((32, 32), bool)
    tiniest[0, 0] = True
    one = flops(tiniest) / 2
    assert abs((flops(masked) - one) / one - (1 - share)) <= 0.02


@pytest.mark.parametrize(("heads", "side", "width"), [(10, 64, 64), (8, 64, 40)], ids=["sdxl 1024", "sd15 512"])
def test_no_matrix_of_tokens_by_tokens_and_little_memory(heads, side, width):
    seen = layer_memory(heads, side, width, 0.1, torch.bfloat16)
    background = round(0.9 * side * side)
    assert seen.largest < heads * side * side * background / 10
    assert seen.bytes < 50e6


def test_a_redirected_layer_of_768_pixels_adds_little_to_two_plain_rows():
    """SD1.5: 8 heads of 96x96 tokens in float32; heads are alike, so one is measured."""
    ours, (q, k, v) = layer_memory(1, 96, 40, 0.1, torch.float32), (torch.zeros(2, 1, 96 * 96, 40) for _ in "qkv")
    with Recorder() as plain:
        torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert 0 < 8 * (ours.bytes - plain.bytes) < 100e6


def test_a_whole_run_never_holds_a_matrix_of_tokens_by_tokens():
    pipe = tiny.sd15()
    masked = np.zeros((64, 64), bool)
    masked[20:40, 20:40] = True
    with dg.graft(pipe, dg.SelfAttentionRedirection(masked)), Recorder() as recorder:
        tiny.sample(pipe, height=64, width=64, num_inference_steps=1)
    heads, tokens = 4, 32 * 32
    assert 0 < recorder.largest < heads * tokens * int(tokens * 0.8)


def test_the_late_join_is_exact(family):
    """Joined at the decoder, or at the input because of a branch that brings its own text: the same prediction."""
    masked = np.zeros((32, 32), bool)
    masked[8:20, 8:24] = True

    class OwnText(dg.Plugin):
        def branches(self, step):
            return [dg.Branch("own", text=torch.zeros(1, 77, 64 if "XL" in type(family).__name__ else 32))]

    late = predictions(family, dg.SelfAttentionRedirection(masked))
    early = predictions(family, dg.SelfAttentionRedirection(masked), OwnText())
    for group in ("uncond", "cond", "redirected"):
        assert (late[group] - early[group]).abs().max() <= 1e-5


def predictions(pipe, *plugins):
    """What the denoiser predicts for each group of rows at the first step."""
    found = {}

    class Watch(dg.Plugin):
        def combine(self, step, prediction, rows):
            found.update({name: prediction[group] for name, group in rows.items()})

    with dg.graft(pipe, *plugins, Watch()):
        tiny.sample(pipe, num_inference_steps=1)
    return found


def test_on_a_transformer_one_row_costs_no_more_than_plain_and_a_branch_no_more_than_two():
    """FLUX.1-dev at 1024 in shape, with one block of each kind: its layers are alike."""
    found = joint_flops(flux("FLUX.1-dev 1024", 64, 512, None, guidance=True, layers=1), 0.1)
    assert found["one row"] <= 1.02 and found["branch"] <= 2.0


def test_a_redirected_layer_of_a_transformer_holds_little():
    """FLUX.1 at 1024: 24 heads of 512 + 4096 tokens in bfloat16; heads are alike, so one is measured, in float32."""
    seen = joint_layer_memory(1, 64, 512, 128, 0.1, torch.float32)
    assert 0 < 24 * seen.bytes / 2 < 120e6 and seen.largest <= 4608 * 128

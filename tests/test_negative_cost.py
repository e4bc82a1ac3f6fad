"""What a negative costs on published shapes, counted without weights."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import diffgraft as dg
from diffgraft.app.bench import negative_cost


def counted(name, steps, monkeypatch):
    """(pipeline, its input, plain FLOPs a step, FLOPs of each step with a negative, calls by text projection)."""
    monkeypatch.setattr(negative_cost, "STEPS", steps)
    shape = next(shape for shape in negative_cost.SHAPES if shape.name == name)
    pipe, calls = shape.make(), []
    plain = negative_cost.count(shape, pipe)[0]
    negative = dg.NegativeAway(torch.zeros(1, shape.tokens, shape.width))
    return pipe, shape.inputs(pipe), plain, negative_cost.count(shape, pipe, negative, calls=calls), Counter(calls)


@pytest.mark.parametrize(("name", "bound"), [("SD1.5 512", 0.5), ("SDXL 512", 0.6)])
def test_cross_attention_costs_the_negatives_own_attention(name, bound, monkeypatch):
    """Its projections are made in the first step only, where they are as many as are saved of the prompt's later."""
    pipe, inputs, plain, (first, later), calls = counted(name, 2, monkeypatch)
    assert 100 * (first / plain - 1) <= 4 and 100 * (later / plain - 1) <= bound
    layers = [layer for layer in dg.find_layers(pipe.unet) if layer.kind == "cross"]
    side = inputs["sample"].shape[-1]
    attention = sum(4 * (side // 2**layer.level) ** 2 * 77 * layer.module.inner_dim for layer in layers)
    queries = sum(2 * layer.module.inner_dim**2 for layer in layers)  # of the one image token it is projected with
    assert (first - plain) + (later - plain) == 2 * attention + queries and 100 * attention / plain <= bound
    assert len(calls) == 2 * len(layers) and set(calls.values()) == {2 + 1}  # the prompt's of each step, and one


@pytest.mark.parametrize(
    ("name", "bound"), [("FLUX.1-schnell 1024, 256 tokens", 8), ("FLUX.1-dev 1024, 512 tokens", 14)]
)
def test_joint_attention_costs_the_negatives_tokens(name, bound, monkeypatch):
    _, _, plain, (steered,), _ = counted(name, 1, monkeypatch)
    assert 1 < 100 * (steered / plain - 1) <= bound


@pytest.mark.parametrize(
    "name", ["Z-Image 1024, 128 tokens", "FLUX.2-klein 4B 1024, 512 tokens", "Wan 14B 480p, 81 frames"]
)
def test_a_step_of_the_few_step_models_costs_at_most_15_per_cent_more(name, monkeypatch):
    _, _, plain, (_, steered), _ = counted(name, 2, monkeypatch)
    assert 0.1 < 100 * (steered / plain - 1) <= 15

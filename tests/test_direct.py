"""The short way into a layer's processor gives the same bytes as the long one, and is left where it would not."""

from __future__ import annotations

import pytest
import tiny
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from PIL import Image

import diffgraft as dg
from diffgraft.attention import direct as short

MASK = Image.new("L", (32, 32))
MASK.paste(255, (0, 0, 12, 12))
PLUGINS = {
    "nasa": lambda: dg.NegativeAway("red"),
    "vsf": lambda: dg.NegativeAway("red", rule="vsf"),
    "redirection": lambda: dg.SelfAttentionRedirection(MASK),
    "segregation": lambda: dg.AttentionSegregation(["ball", "star"]),
}


def draw(pipe, plugin):
    with dg.graft(pipe, plugin):
        return tiny.sample(pipe, "a ball and a star", num_inference_steps=2)


@pytest.fixture
def counted(monkeypatch):
    """How often the short way was taken."""
    taken, run = [], short._run
    monkeypatch.setattr(short, "_run", lambda *args, **kwargs: taken.append(1) or run(*args, **kwargs))
    return taken


@pytest.mark.parametrize("plugin", PLUGINS)
def test_the_same_bytes_as_through_the_layers_own_forward(sd15, plugin, counted, monkeypatch):
    got, times = draw(sd15, PLUGINS[plugin]()), len(counted)
    monkeypatch.setattr(short, "_KNOWN", False)
    assert times and torch.equal(got, draw(sd15, PLUGINS[plugin]())) and len(counted) == times


def test_diffusers_forward_is_the_one_whose_work_is_done_here():
    assert short._KNOWN and Attention.forward.__code__.co_argcount == 4


class Twice(AttnProcessor2_0):
    def __call__(self, *args, **kwargs):
        return 2 * super().__call__(*args, **kwargs)


def test_another_processor_further_arguments_and_another_attention_go_the_long_way(sd15, monkeypatch):
    layer = next(x for x in dg.find_layers(sd15.unet) if x.kind == "cross").module
    image = torch.zeros(1, 4, layer.query_dim)
    assert short.direct(layer.forward, (image,), {"encoder_hidden_states": None}, None) is not None
    assert short.direct(layer.forward, (image,), {"scale": 0.5}, None) is None
    assert short.direct(layer.forward, (), {"hidden_states": image}, None) is None
    assert short.direct(lambda *args: None, (image,), {}, None) is None
    with monkeypatch.context() as patched:
        patched.setattr(layer, "processor", Twice())
        assert short.direct(layer.forward, (image,), {}, None) is None
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *args, **kwargs: None)
    assert short.direct(layer.forward, (image,), {}, None) is None


def test_a_projection_that_somebody_watches_is_called(sd15):
    """Products of an unchanged text are remembered, but not behind the back of a hook."""
    layer = next(x for x in dg.find_layers(sd15.unet) if x.kind == "cross").module
    seen = []
    plain = draw(sd15, dg.NegativeAway("red"))
    hook = layer.to_k.register_forward_hook(lambda module, args, output: seen.append(len(args[0])) or output * 2)
    try:
        assert not torch.equal(draw(sd15, dg.NegativeAway("red")), plain)
    finally:
        hook.remove()
    assert len(seen) == 3  # the prompt at both steps, the negative once
    assert torch.equal(draw(sd15, dg.NegativeAway("red")), plain)

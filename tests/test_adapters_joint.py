"""IP-Adapters of FLUX and SD3 as they come: rows that join bring their pictures, and what is added can be scaled."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_transformers as tt
import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from PIL import Image
from test_redirection_joint import run

import diffgraft as dg

SEEN = 16
"""Width of a picture's embedding."""


def flux():
    """With the layout of the published adapters, through diffusers' own loader."""
    pipe = tt.flux()
    torch.manual_seed(5)
    projection = {
        "proj.weight": torch.randn(4 * 32, SEEN) * 0.2, "proj.bias": torch.zeros(4 * 32),
        "norm.weight": torch.ones(32), "norm.bias": torch.zeros(32),
    }  # fmt: skip
    layers = {}
    for number in range(2):
        for kind in "kv":
            layers[f"{number}.to_{kind}_ip.weight"] = torch.randn(32, 32) * 0.3
            layers[f"{number}.to_{kind}_ip.bias"] = torch.zeros(32)
    pipe.transformer._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": layers}])
    return pipe


def sd3():
    pipe = tt.sd3()
    denoiser, config = pipe.transformer, pipe.transformer.config
    torch.manual_seed(5)
    width = config.num_attention_heads * config.attention_head_dim
    made = {
        name: SD3IPAdapterJointAttnProcessor2_0(width, width, config.attention_head_dim, 16)
        for name in denoiser.attn_processors
    }
    denoiser.set_attn_processor({name: tt.lively(one) for name, one in made.items()})
    denoiser.image_proj = tt.lively(
        IPAdapterTimeImageProjection(
            embed_dim=SEEN, output_dim=width, hidden_dim=16, depth=1, dim_head=8, heads=2, num_queries=4,
            timestep_in_dim=32,
        )  # fmt: skip
    )
    return pipe


MAKE = {"flux": flux, "sd3": sd3}


@pytest.fixture(scope="module")
def pipes():
    made = {}

    def get(name):
        if name not in made:
            made[name] = MAKE[name]()
        return made[name]

    return get


def shown(name, seed=3):
    """What the pipeline is called with: one picture, which it repeats for all."""
    picture = torch.randn(1, 1 if name == "flux" else 5, SEEN, generator=torch.Generator().manual_seed(seed))
    if name == "sd3":
        return {"ip_adapter_image_embeds": picture}
    return {"ip_adapter_image_embeds": [picture], "negative_ip_adapter_image_embeds": [picture * 0]}


def sampled(pipe, name, n, *plugins, **call):
    with dg.graft(pipe, *plugins):
        return run(name, pipe, n, num_inference_steps=1, **shown(name) | call)


@pytest.mark.parametrize("name", MAKE)
def test_rows_that_join_bring_the_picture(pipes, name):
    """A redirected branch beside two pictures is what it is alone."""
    pipe, mask = pipes(name), np.zeros((16, 16), bool)
    mask[2:9, 4:12] = True
    plain = sampled(pipe, name, 2)
    alone, far = (sampled(pipe, name, 2, dg.SelfAttentionRedirection(mask, scale=scale)) for scale in (1.0, 3.0))
    wanted = plain + 3 * (alone - plain)
    assert (alone - plain).abs().max() > 1e-3
    assert (far - wanted).abs().max() <= 1e-5 * max(1, wanted.abs().max())


@pytest.mark.parametrize("name", MAKE)
def test_what_it_adds_is_scaled(pipes, name):
    """At 1 the adapter is what it is, at 0 it is not there, between it is what diffusers' own scale makes of it."""
    pipe = pipes(name)
    parts = [layer for layer in pipe.transformer.attn_processors.values() if hasattr(layer, "to_k_ip")]
    scales = [part.scale for part in parts]

    def natively(factor):
        for part, scale in zip(parts, scales, strict=True):
            part.scale = [factor * one for one in scale] if isinstance(scale, list) else factor * scale
        return sampled(pipe, name, 1)

    plain, half, none = (natively(factor) for factor in (1.0, 0.5, 0.0))
    natively(1.0)
    ours = [sampled(pipe, name, 1, dg.StyleInjection(method="ip_adapter", scale=scale)) for scale in (1.0, 0.5, 0.0)]
    assert (plain - none).abs().max() > 1e-3
    for got, wanted in zip(ours, (plain, half, none), strict=True):
        assert (got - wanted).abs().max() <= 1e-5 * max(1, wanted.abs().max())


def test_without_one_it_says_so():
    with pytest.raises(dg.UnsupportedPipelineError, match="no IP-Adapter"):
        dg.graft(tt.flux(), dg.StyleInjection(method="ip_adapter")).attach()


def test_tasks_show_it_a_picture_or_say_what_they_cannot(pipes, monkeypatch):
    content, style = (Image.new("RGB", (32, 32), colour) for colour in ("teal", "red"))
    for name in MAKE:
        monkeypatch.setattr(pipes(name), "default_sample_size", 16)
    with pytest.raises(dg.UnsupportedPipelineError, match="wants a picture at every call.*unload_ip_adapter"):
        dg.stylize(pipes("flux"), content, style, method="ip_adapter", steps=1)
    with pytest.raises(dg.SettingError, match="the IP-Adapter has no picture"):
        dg.erase(pipes("flux"), content, np.eye(32) > 0)
    pipe, asked = pipes("sd3"), []

    def embeds(picture=None, *given, **named):
        asked.append(picture)
        return shown("sd3")["ip_adapter_image_embeds"]

    monkeypatch.setattr(type(pipe), "is_ip_adapter_active", True)
    monkeypatch.setattr(pipe, "prepare_ip_adapter_image_embeds", embeds)
    made = [dg.stylize(pipe, content, style, seed=1, steps=1, method=method) for method in ("ip_adapter", "styleid")]
    assert [one.size for one in asked] == [(32, 32)] and made[0].tobytes() != made[1].tobytes()

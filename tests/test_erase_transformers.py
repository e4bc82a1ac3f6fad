"""erase() on transformers: the blended run by hand, outside the mask every byte, refusals."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import tiny_family_pipelines as tp
import tiny_transformers as tt
import torch
from PIL import Image
from test_inversion_families import as_latents
from test_redirection_joint import PIPES as FIRST
from test_redirection_joint import by_hand

import diffgraft as dg
from diffgraft.attention.morphology import grow
from diffgraft.pipelines.families.latents import encode_image, pixels_of
from diffgraft.pipelines.families.loop import loop_for
from diffgraft.pipelines.tasks.fill import Job, Sampling, sample
from diffgraft.pipelines.tasks.region import Region

MAKE = {
    "flux": tt.flux, "sd3": tt.sd3, "qwen": tp.qwen, "z-image": tp.z_image, "chroma": tp.chroma, "klein": tp.deep_klein,
    "lumina2": tp.wide_lumina2,
}  # fmt: skip


@pytest.fixture(scope="module")
def pipes():
    made = {}

    def get(name):
        if name not in made:
            made[name] = MAKE[name]()
        return made[name]

    return get


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def holes(width, height):
    """Two holes."""
    found = [np.zeros((height, width), bool) for _ in range(2)]
    found[0][height // 4 : height // 2, width // 4 : width // 2] = True
    found[1][height // 8 : height // 4, : width // 2] = True
    return found


def steps_of(call, pipe, jobs, **settings):
    """Latents after each step of a run of `sample`."""
    kept = []

    def keep(pipe, index, timestep, tensors):
        kept.append(tensors["latents"].clone())
        return tensors

    usual = {"scale": 1.0, "suppression": 0.3, "suppression_steps": 10, "layers": "up", "start": 0.0, "end": 1.0}
    scale = settings.pop("scale", 1.0)
    how = Sampling("sip", 4, settings.pop("strength", 0.5), settings.pop("guidance", 1.0), usual | {"scale": scale}, (),
                   {"callback_on_step_end": keep} | call)  # fmt: skip
    sample(pipe, jobs, how)
    return kept


@pytest.mark.parametrize(("scale", "shape"), [(1.0, (16, 16)), (3.0, (8, 20))])
@pytest.mark.parametrize("name", MAKE)
def test_a_run_is_blended_by_hand_with_two_branches(pipes, monkeypatch, name, scale, shape):
    """Two pictures, a hole in each, square and not."""
    pipe, (height, width), seen = pipes(name), shape, []
    loop, factor = loop_for(pipe), pixels_of(pipe)
    patch = 1 if name == "klein" else 2
    size = width * factor // (2 if name == "klein" else 1), height * factor // (2 if name == "klein" else 1)
    images, masks = [picture(*size, seed) for seed in (1, 2)], holes(*size)
    region = Region((0, 0, *size), size, size)
    jobs = [Job(images[i], masks[i], region, "a ball", 5 + i) for i in (0, 1)]
    got = steps_of({"max_sequence_length": 16}, pipe, jobs, scale=scale)
    assert len(got) == 2
    clean = encode_image(pipe, images)
    grid = (clean.shape[-2], clean.shape[-1])
    seeds = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    noise = torch.cat([torch.randn(clean[:1].shape, generator=seed) for seed in seeds])
    hole = torch.stack([torch.from_numpy(m) for m in masks])[:, None].float()
    hole = torch.nn.functional.adaptive_max_pool2d(hole, grid) > 0
    tokens = torch.nn.functional.max_pool2d(hole.float(), patch) > 0
    even = name in ("flux", "qwen", "z-image", "chroma", "klein", "lumina2")
    sigmas = [0.5, 0.25, 0.0] if even else [*np.linspace(1, pipe.scheduler.sigma_min, 4)[2:], 0.0]

    def known(sigma):
        return (1 - sigma) * clean + sigma * noise

    def blend(pipe, index, timestep, tensors):
        latents = as_latents(pipe, name, tensors["latents"], grid)
        seen.append(torch.where(hole, latents, known(sigmas[index + 1])))
        return {"latents": loop.adapter.as_sample(seen[-1]).to(tensors["latents"])}

    call = {
        "prompt": ["a ball"] * 2, "latents": loop.hand_over(known(sigmas[0])), "sigmas": sigmas[:2],
        "num_inference_steps": 4, "max_sequence_length": 16, "height": size[1], "width": size[0],
        "callback_on_step_end": blend,
        "true_cfg_scale" if name in ("qwen", "flux") else "guidance_scale": 0.0 if name == "z-image" else 1.0,
    }  # fmt: skip
    with monkeypatch.context() as patched, torch.no_grad():
        hand = by_hand(pipe.transformer, FIRST[name][1], list(tokens[:, 0]), scale)
        patched.setattr(pipe.transformer, "forward", hand)
        pipe(**call, output_type="latent")
    for ours, wanted in zip(got, seen, strict=True):
        ours = as_latents(pipe, name, ours, grid)
        assert (ours - wanted).abs().max() <= 1e-5 * max(1, wanted.abs().max())


def changed(before, after):
    assert before.size == after.size
    return (np.asarray(before) != np.asarray(after)).any(-1)


@pytest.mark.parametrize("name", MAKE)
def test_outside_the_mask_every_byte_is_the_inputs(pipes, name):
    """Odd sizes, crops, two pictures with a mask each, every origin."""
    pipe = pipes(name)
    images = [picture(61, 45, 3), picture(40, 70, 4)]
    masks = [holes(61, 45)[0], holes(40, 70)[1]]
    made = dg.erase(pipe, images, masks, seed=0, steps=2, grow=1, feather=2, max_sequence_length=16)
    for image, mask, out in zip(images, masks, made, strict=True):
        touched = changed(image, out)
        assert touched[mask].any() and not touched[~grow(mask, 3)].any()
    again = dg.erase(pipe, images[1], masks[1], seed=1, steps=2, grow=1, feather=2, max_sequence_length=16)
    assert again.tobytes() == made[1].tobytes() and made[0].info["diffgraft"]["task"] == "erase"
    how = {"origin": "picture", "method": "dip", "scale": 2.0, "max_sequence_length": 16}
    other = dg.erase(pipe, images[0], masks[0], seed=0, steps=2, **how)
    assert changed(images[0], other)[masks[0]].any()


@pytest.mark.parametrize("name", ["flux", "sd3", "z-image", "chroma", "qwen", "klein"])
def test_image_to_image_and_inpainting_pipelines_make_the_same(pipes, name):
    pipe = pipes(name)
    stem = type(pipe).__name__.removesuffix("Pipeline")
    image, mask = picture(32, 32), holes(32, 32)[0]
    wanted = dg.erase(pipe, image, mask, seed=0, steps=2, max_sequence_length=16)
    for kind in ("Img2Img", "Inpaint"):
        cls = getattr(diffusers, f"{stem}{kind}Pipeline", None)
        if cls is None:
            assert (name, kind) == ("klein", "Img2Img")
            continue
        other = cls(**pipe.components)
        other.set_progress_bar_config(disable=True)
        again = dg.erase(other, image, mask, seed=0, steps=2, max_sequence_length=16)
        assert again.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("name", ["flux", "sd3", "z-image", "qwen"])
def test_guidance_counts_as_on_unets(pipes, name):
    """At 1 there is none; above, the prompt is gone towards."""
    pipe, image, mask = pipes(name), picture(32, 32), holes(32, 32)[0]
    rows, hook = [], None

    def count(module, args, given):
        rows.append(len(given.get("hidden_states", args[0] if args else ())))

    hook = pipe.transformer.register_forward_pre_hook(count, with_kwargs=True)
    try:
        plain = dg.erase(pipe, image, mask, seed=0, steps=2)
        assert rows == [1]
        rows.clear()
        guided = dg.erase(pipe, image, mask, seed=0, steps=2, prompt="a ball", guidance=4.0)
        assert sum(rows) == 3
    finally:
        hook.remove()
    assert guided.tobytes() != plain.tobytes()


def test_at_full_strength_a_clean_start_is_noise_alone(pipes):
    pipe, image, mask = pipes("flux"), picture(32, 32), holes(32, 32)[0]
    starts = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, given: starts.append(given["hidden_states"]), with_kwargs=True
    )
    dg.erase(pipe, image, mask, seed=0, steps=2, strength=1.0, grow=0)
    hook.remove()
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(starts[0], dg.plugins.startpoint.pack(noise), atol=1e-6)


def test_pipelines_that_take_a_mask_themselves_are_refused(pipes):
    flux = pipes("flux")
    parts = {k: v for k, v in flux.components.items() if k not in ("image_encoder", "feature_extractor")}
    names = ("in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim", "axes_dims_rope")
    config = {name: flux.transformer.config[name] for name in (*names, "pooled_projection_dim")}
    net = diffusers.FluxControlNetModel(**config, num_layers=1, num_single_layers=0)
    control = diffusers.FluxControlNetInpaintPipeline(**parts, controlnet=net)
    for pipe in (diffusers.FluxFillPipeline(**parts), control, diffusers.FluxKontextPipeline(**parts)):
        with pytest.raises(dg.UnsupportedPipelineError, match=f"{type(pipe).__name__}.* use FluxPipeline"):
            dg.erase(pipe, picture(32, 32), holes(32, 32)[0])
    with pytest.raises(dg.UnsupportedPipelineError, match="WanTransformer3DModel"):
        dg.erase(tp.wan(), picture(32, 32), holes(32, 32)[0])
    for other in (tt.pixart(), tt.sana()):
        with pytest.raises(dg.UnsupportedPipelineError, match="nothing can be erased with"):
            dg.erase(other, picture(32, 32), holes(32, 32)[0])
    with pytest.raises(dg.SettingTypeError, match="true_cfg_scale="):
        dg.erase(flux, picture(32, 32), holes(32, 32)[0], true_cfg_scale=2.0)
    assert dg.erase(flux, picture(32, 32), holes(32, 32)[0], seed=0, steps=2, guidance_scale=2.0)

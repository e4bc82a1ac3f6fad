"""Attention distillation: its first update against a re-derivation, fixed points, neutral settings, company."""

from __future__ import annotations

import pytest
import tiny
import torch
from PIL import Image
from plugins_for_tests import fingerprint
from test_style import Path, double, normal

import diffgraft as dg
from diffgraft.app.bench.configs import SD15, SDXL, meta_pipe
from diffgraft.plugins import distillation
from diffgraft.plugins.distillation import difference
from diffgraft.plugins.moves import gradient_of
from diffgraft.plugins.optimised_style import OptimisedStyle

ONE = {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 16, "width": 16}


def heads(projected, count):
    return projected.unflatten(-1, (count, -1)).transpose(1, 2)


def looked_at(pipe, latent, timestep, text, chosen):
    """Queries, keys and values of the chosen layers, by hooks on their projections."""
    seen = {name: {} for name in chosen}
    hooks = [
        getattr(pipe.unet.get_submodule(name), part).register_forward_hook(
            lambda module, _, out, name=name, part=part: seen[name].__setitem__(part, out)
        )
        for name in chosen
        for part in ("to_q", "to_k", "to_v")
    ]
    pipe.unet(latent, timestep, encoder_hidden_states=text)
    for hook in hooks:
        hook.remove()
    return {
        name: [heads(parts[part], pipe.unet.get_submodule(name).heads) for part in ("to_q", "to_k", "to_v")]
        for name, parts in seen.items()
    }


def explicit(q, k, v):
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_the_first_update_is_the_papers(weight):
    pipe, z, style, content = double(tiny.sd15()), *(normal(1, 4, 8, 8, seed=i) for i in (1, 2, 3))
    text = pipe.encode_prompt("a star", "cpu", 1, False)[0]
    pipe.scheduler.set_timesteps(1)
    timestep = pipe.scheduler.timesteps[0]
    chosen = [layer.name for layer in dg.find_layers(pipe.unet) if layer.kind == "self" and layer.place == "up"]
    with torch.no_grad():
        ours, theirs = (looked_at(pipe, x, timestep, text, chosen) for x in (style, content))
    point = z.clone().requires_grad_()
    loss = torch.zeros((), dtype=torch.float64)
    for name, (q, k, v) in looked_at(pipe, point, timestep, text, chosen).items():
        ideal = explicit(q, *ours[name][1:]).detach()
        loss = loss + (explicit(q, k, v) - ideal).abs().mean() + weight * (q - theirs[name][0]).abs().mean()
    (gradient,) = torch.autograd.grad(loss, point)
    moved = z - 0.05 * gradient / (gradient.abs() + 1e-8)  # Adam's first step
    want = tiny.sample(pipe, "a star", latents=moved, **ONE)
    plugin = dg.AttentionDistillation(Path(style), content=Path(content), content_weight=weight)
    with dg.graft(pipe, plugin) as g:
        got = tiny.sample(pipe, "a star", latents=z, **ONE)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert g.report().plugins[0][1]["loss, first and last"] == [round(float(loss.detach()), 6)]


def test_difference_is_a_mean_by_picture():
    x, y = normal(3, 2, 5, 4), normal(3, 2, 5, 4, seed=1)
    want = torch.stack([(x[i] - y[i]).abs().sum() / 40 for i in range(3)])
    torch.testing.assert_close(difference(x, y), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_gradients_do_not_underflow_in_half_precision(dtype, monkeypatch):
    """The content's term alone, as small as layers of real models make it."""
    z, content, gradients = normal(1, 4, 16, 16), normal(1, 4, 16, 16, seed=2), []

    def keep(loss, latent, scale):
        gradients.append(gradient_of(loss, latent, scale).double().flatten())
        return gradients[-1].view_as(latent).to(latent)

    monkeypatch.setattr(distillation, "gradient_of", keep)
    for kind in (torch.float32, dtype):
        pipe = tiny.sd15().to(dtype=kind)
        plugin = dg.AttentionDistillation(Path(z), content=Path(content), content_weight=1e-3)
        with dg.graft(pipe, plugin):
            tiny.sample(pipe, latents=z.to(kind), **ONE | {"height": 32, "width": 32})
    assert torch.nn.functional.cosine_similarity(*gradients, 0) > 0.99


def test_updates_bring_the_loss_down(family):
    z, style = normal(1, 4, 16, 16).float(), normal(1, 4, 16, 16, seed=1).float()
    plugin = dg.AttentionDistillation(Path(style), rate=0.01, updates=10, end=0.3)
    with dg.graft(family, plugin) as g:
        tiny.sample(family, latents=z)
    first, last = g.report().plugins[0][1]["loss, first and last"]
    assert last < 0.9 * first
    assert g.report().rows == [2]
    assert g.report().updates == 1


def test_a_latent_that_is_its_own_style_stays():
    pipe, z = double(tiny.sd15()), normal(1, 4, 8, 8)
    plain = tiny.sample(pipe, latents=z, **ONE)
    with dg.graft(pipe, dg.AttentionDistillation(Path(z), content=Path(z), updates=3)):
        got = tiny.sample(pipe, latents=z, **ONE)
    torch.testing.assert_close(got, plain, rtol=0, atol=1e-9)


def test_a_batch_is_its_pictures():
    pipe, z, styles = double(tiny.sd15()), normal(2, 4, 8, 8), normal(2, 4, 8, 8, seed=1)
    prompts, got = ["a ball", "a star"], []
    for rows in (slice(0, 2), slice(1, 2)):
        plugin = dg.AttentionDistillation(Path(styles[rows]), content=Path(z[rows]), updates=2)
        with dg.graft(pipe, plugin):
            got.append(tiny.sample(pipe, prompts[rows], latents=z[rows], height=16, width=16))
    torch.testing.assert_close(got[0][1:], got[1], rtol=0, atol=1e-7)


def test_neutral_is_bit_identical_and_everything_comes_off(sd15):
    before, plain = fingerprint(sd15), tiny.sample(sd15)
    with dg.graft(sd15, dg.AttentionDistillation(normal(1, 4, 16, 16).float(), rate=0)):
        assert torch.equal(tiny.sample(sd15), plain)
    with dg.graft(sd15, dg.AttentionDistillation(normal(1, 4, 16, 16).float())) as g:
        assert not torch.equal(tiny.sample(sd15), plain)
    assert g.report().updates == 3
    assert fingerprint(sd15) == before
    assert torch.equal(tiny.sample(sd15), plain)
    assert all(parameter.requires_grad for parameter in sd15.unet.parameters())


def test_with_other_techniques_that_look_at_attention():
    pipe, z = double(tiny.sd15()), normal(1, 4, 8, 8)
    plugins = [
        lambda: dg.AttentionSegregation(["ball", "star"], end=1.0),
        lambda: dg.AttentionDistillation(Path(normal(1, 4, 8, 8, seed=1))),
        lambda: dg.StyleInjection(Path(normal(1, 4, 8, 8, seed=2)), start_adain=False),
    ]
    with dg.graft(pipe, *(make() for make in plugins)) as g:
        both = tiny.sample(pipe, "a red ball and a blue star", latents=z, height=16, width=16)
    values = {name: value for _, report in g.report().plugins for name, value in report.items()}
    assert len(values["loss, first and last"]) == 2
    for left in range(3):
        with dg.graft(pipe, *(make() for i, make in enumerate(plugins) if i != left)):
            fewer = tiny.sample(pipe, "a red ball and a blue star", latents=z, height=16, width=16)
        assert (fewer - both).abs().max() > 1e-6


def test_a_gradient_that_is_not_finite_moves_nothing(sd15):
    style = torch.full((1, 4, 16, 16), float("nan"))
    plain = tiny.sample(sd15)
    with dg.graft(sd15, dg.AttentionDistillation(Path(style))) as g:
        assert torch.equal(tiny.sample(sd15), plain)
    assert g.report().skipped == {"the gradient is not finite": 3}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"style": None}, "a style is"),
        ({"rate": -0.1}, "rate"),
        ({"content_weight": "1"}, "number"),
        ({"updates": 0}, "updates"),
        ({"layers": 5}, "layers=5"),
        ({"content": 5}, "a content is"),
        ({"content": 5, "content_weight": 0}, "a content is"),
        ({"updates": 1.5}, "whole"),
        ({"start": 2.0}, "start"),
    ],
)
def test_bad_settings_say_what_to_do(call, says):
    with pytest.raises(dg.GraftError, match=says):
        dg.AttentionDistillation(**({"style": torch.zeros(1, 4, 8, 8)} | call))


def loss_at(pipe, point, timestep, text, chosen, style, content):
    """The published loss of a latent, its references as they are given."""
    with torch.no_grad():
        ours, theirs = (looked_at(pipe, x, timestep, text, chosen) for x in (style, content))
    total = torch.zeros((), dtype=torch.float64)
    for name, (q, k, v) in looked_at(pipe, point, timestep, text, chosen).items():
        total = total + (explicit(q, k, v) - explicit(q, *ours[name][1:]).detach()).abs().mean()
        total = total + 0.25 * (q - theirs[name][0]).abs().mean()
    return total


@pytest.mark.parametrize(("config", "count"), [(SD15, 16), (SDXL, 70)], ids=["sd15", "sdxl"])
def test_the_layers_are_the_last_six(config, count):
    """On SDXL the decoder has 36."""
    plugin, pipe = dg.AttentionDistillation(normal(1, 4, 16, 16)), meta_pipe(config)
    names = [layer.name for layer in dg.find_layers(pipe.unet) if layer.kind == "self"]
    with dg.graft(pipe, plugin):
        assert plugin.edits()[0].chosen == set(names[count - 6 :])


def test_a_latent_is_optimised_as_published():
    """From the clean content, one Adam over all timesteps, style and content without noise."""
    pipe, style, content = double(tiny.sd15()), normal(1, 4, 8, 8, seed=2), normal(1, 4, 8, 8, seed=3)
    chosen = [layer.name for layer in dg.find_layers(pipe.unet) if layer.kind == "self" and layer.place == "up"]
    text = pipe.encode_prompt("", "cpu", 1, False)[0].detach()
    pipe.scheduler.set_timesteps(3)
    z = content.clone().requires_grad_()
    adam = torch.optim.Adam([z], lr=0.05)
    for timestep in pipe.scheduler.timesteps:
        adam.zero_grad()
        loss_at(pipe, z, timestep, text, chosen, style, content).backward()
        adam.step()
    plugin = OptimisedStyle(style, content, layers="up")
    with dg.graft(pipe, plugin):
        tiny.sample(pipe, "", **ONE | {"num_inference_steps": 3})
    torch.testing.assert_close(plugin.found, z.detach(), rtol=0, atol=1e-10)


def test_updates_behind_the_steps_leave_the_first_noise_alone():
    pipe, z, style = double(tiny.sd15()), normal(1, 4, 8, 8), normal(1, 4, 8, 8, seed=2)
    chosen = [layer.name for layer in dg.find_layers(pipe.unet) if layer.kind == "self" and layer.place == "up"]
    text = pipe.encode_prompt("", "cpu", 1, False)[0].detach()
    pipe.scheduler.set_timesteps(2)
    first, second = pipe.scheduler.timesteps
    with torch.no_grad():
        x = pipe.scheduler.step(pipe.unet(z, first, text)[0], first, z).prev_sample
    point = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_at(pipe, point, second, text, chosen, style, style), point)
    x = x - 0.05 * gradient / (gradient.abs() + 1e-8)
    with torch.no_grad():
        wanted = pipe.scheduler.step(pipe.unet(x, second, text)[0], second, x).prev_sample
    plugin = dg.AttentionDistillation(Path(style), content=Path(style), layers="up", order="after")
    with dg.graft(pipe, plugin):
        got = tiny.sample(pipe, "", latents=z, **ONE | {"num_inference_steps": 2})
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-7)


def test_stylize_decodes_the_optimised_latent(sd15):
    content, style = (Image.new("RGB", (32, 24), colour) for colour in ("teal", "orange"))
    made = dg.stylize(sd15, content, style, seed=1, steps=2, method="optimised")
    assert made.size == (32, 24) and made.info["diffgraft"]["method"] == "optimised"
    assert made.tobytes() != content.tobytes()
    assert (
        dg.stylize(sd15, content, style, seed=1, steps=2, method="optimised", strength=0).tobytes() == content.tobytes()
    )

"""Moved latents and extra branches against loops written by hand, on every scheduler and pipeline that matters."""

from __future__ import annotations

import copy
import inspect
import warnings

import diffusers
import pytest
import tiny
import tiny_transformers
import torch
from plugins_for_tests import Climb, Guide, Scaled

import diffgraft as dg
from diffgraft.pipelines.grafting.scheduler_link import discards
from diffgraft.plugins.startpoint import pack


def scheduler(name, **config):
    return getattr(diffusers, f"{name}Scheduler").from_config(tiny.ddim().config, **config)


def attention_gradient(pipe, latent, t, text, name):
    """Gradient of token 2's mean attention by hooks and explicit arithmetic: independent of the seam."""
    module, seen = dict(pipe.unet.named_modules())[name], {}
    hooks = [
        module.to_q.register_forward_hook(lambda m, a, o: seen.update(q=o)),
        module.to_k.register_forward_hook(lambda m, a, o: seen.update(k=o)),
    ]
    latent = latent.detach().requires_grad_(True)
    with torch.enable_grad():
        pipe.unet(pipe.scheduler.scale_model_input(latent, t), t, encoder_hidden_states=text)
        q, k = (seen[x].unflatten(-1, (module.heads, -1)).transpose(1, 2) for x in "qk")
        probs = (q @ k.transpose(-1, -2) * module.scale).softmax(-1)
        (gradient,) = torch.autograd.grad(probs[..., 2].mean(), latent)
    for hook in hooks:
        hook.remove()
    return gradient


def loop_by_hand(pipe, name, rate, guidance, steps, skips=()):
    """The whole sampling loop with the update before each denoiser call but those in `skips`."""
    text, empty = pipe.encode_prompt("a red ball and a blue star", "cpu", 1, True)
    pipe.scheduler.set_timesteps(steps)
    latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * pipe.scheduler.init_noise_sigma
    for i, t in enumerate(pipe.scheduler.timesteps):
        pipe.scheduler.scale_model_input(latent, t)  # sets the step index before the probe, as a pipeline does
        if i not in skips:
            latent = (latent + rate * attention_gradient(pipe, latent, t, text, name)).detach()
        with torch.no_grad():
            x = pipe.scheduler.scale_model_input(torch.cat([latent] * 2), t)
            u, c = pipe.unet(x, t, encoder_hidden_states=torch.cat([empty, text])).sample.chunk(2)
            latent = pipe.scheduler.step(u + guidance * (c - u), t, latent).prev_sample
    return latent


@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete", "DPMSolverMultistep", "HeunDiscrete", "PNDM"])
def test_equals_a_loop_written_by_hand(name):
    config = {"skip_prk_steps": True} if name == "PNDM" else {}
    pipe, plugin = tiny.sd15(scheduler=scheduler(name, **config)), Climb(2.0)
    with dg.graft(pipe, plugin) as g:
        out = tiny.sample(pipe, num_inference_steps=3)
    skips = {"HeunDiscrete": (1, 3), "PNDM": (1,)}.get(name, ())
    expected = loop_by_hand(pipe, plugin.name, 2.0, 4.0, 3, skips)
    assert (out - expected).abs().max() <= 2e-5 * expected.abs().max()
    report = g.report()
    assert report.updates == {"HeunDiscrete": 3, "PNDM": 3}.get(name, 3)
    assert sum(report.skipped.values()) == len(skips)


@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete", "HeunDiscrete", "KDPM2Discrete", "DPMSolverSinglestep"])
def test_steps_are_the_schedulers_not_the_calls(name):
    pipe, plugin = tiny.sd15(scheduler=scheduler(name)), Scaled(0.5)
    with dg.graft(pipe, plugin):
        for steps in (4, 2):
            plugin.steps.clear()
            tiny.sample(pipe, num_inference_steps=steps)
            assert plugin.steps.pop(0) == "begin"
            second_order = name in ("HeunDiscrete", "KDPM2Discrete")
            twice = 2 if second_order else 1
            expected = [(i, steps) for i in range(steps) for _ in range(twice)][: twice * steps - (twice - 1)]
            assert plugin.steps == expected


@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete", "HeunDiscrete", "DPMSolverMultistep"])
def test_img2img_counts_the_steps_that_it_runs(name):
    pipe = tiny.sd15(cls=diffusers.StableDiffusionImg2ImgPipeline, scheduler=scheduler(name))
    plugin = Scaled(0.5)
    with dg.graft(pipe, plugin):
        tiny.sample(pipe, image=torch.rand(1, 3, 32, 32), num_inference_steps=6, strength=0.5)
    seen = [s for s in plugin.steps if s != "begin"]
    assert sorted(set(seen)) == [(0, 3), (1, 3), (2, 3)]


def test_denoising_end_counts_the_steps_that_it_runs():
    pipe, plugin = tiny.sdxl(), Scaled(0.5)
    with dg.graft(pipe, plugin):
        tiny.sample(pipe, num_inference_steps=10, denoising_end=0.5)
    assert plugin.steps == ["begin"] + [(i, 5) for i in range(5)]


def test_runge_kutta_is_refused_and_correctors_warn():
    pipe = tiny.sd15(scheduler=scheduler("PNDM", skip_prk_steps=False))
    with dg.graft(pipe, Climb()), pytest.raises(dg.UnsupportedSchedulerError, match="skip_prk_steps"):
        tiny.sample(pipe, num_inference_steps=8)
    pipe = tiny.sd15(scheduler=scheduler("UniPCMultistep"))
    with dg.graft(pipe, Climb()), pytest.warns(UserWarning, match="weakened") as seen:
        tiny.sample(pipe)
    assert sum("weakened" in str(w.message) for w in seen) == 1
    with dg.graft(pipe, Scaled(0.5)), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # no warning where no latent moves
        tiny.sample(pipe)


@pytest.mark.parametrize(
    "name", ["DDIM", "EulerDiscrete", "HeunDiscrete", "KDPM2Discrete", "PNDM", "DEISMultistep",
             "EulerAncestralDiscrete", "DPMSolverMultistep", "KDPM2AncestralDiscrete", "LCM", "IPNDM"],
)  # fmt: skip
def test_every_update_that_is_made_arrives(name):
    """A latent moved before a step moves its result exactly where the update was not skipped."""
    config = {"skip_prk_steps": True} if name == "PNDM" else {}
    s = scheduler(name, **config)
    s.set_timesteps(5)
    latent = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    for t in s.timesteps:
        s.scale_model_input(latent, t)
        ends = []
        for moved in (0.0, 1.0):
            twin = copy.deepcopy(s)
            options = {"generator": torch.Generator().manual_seed(0)} if "generator" in step_names(s) else {}
            ends.append(twin.step(torch.zeros_like(latent), t, latent + moved, **options)[0])
        arrives = bool((ends[1] - ends[0]).abs().max() > 1e-3)
        assert arrives == (discards(s) is None), (name, t)
        options = {"generator": torch.Generator().manual_seed(0)} if "generator" in step_names(s) else {}
        s.step(torch.zeros_like(latent), t, latent, **options)


def step_names(s):
    return inspect.signature(s.step).parameters


def test_a_single_step_solver_takes_updates_at_its_first_stages():
    pipe, plugin = tiny.sd15(scheduler=scheduler("DPMSolverSinglestep")), Climb()
    with dg.graft(pipe, plugin) as g:
        tiny.sample(pipe, num_inference_steps=6)
    firsts = [i for i, order in enumerate(pipe.scheduler.order_list) if order == 1]
    assert plugin.indices == firsts and g.report().skipped == {"later stage of a single-step solver": 6 - len(firsts)}


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("place", ["up", "mid", "down"])
def test_a_branch_equals_three_calls_by_hand(family, guidance, place):
    """u + g (c - u) + d by separate denoiser calls, whatever block the extra row joins at."""
    from plugins_for_tests import Damp

    with dg.graft(family, Guide(2.0, place)) as g:
        out = tiny.sample(family, guidance_scale=guidance)
    assert g.report().rows == [3 if guidance > 1 else 2]

    class Always(Damp):
        def out(self, call, out):
            return out * 0.5

    class Damped(dg.Plugin):
        def edits(self):
            edit = Always(place)
            edit.rows = None
            return [edit]

    family.scheduler.set_timesteps(3)
    latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    text, extra = conditions(family)
    damp = dg.graft(family, Damped())
    with torch.no_grad():
        for t in family.scheduler.timesteps:
            predict = lambda row: family.unet(latent, t, encoder_hidden_states=text[row], **extra(row)).sample  # noqa: E731, B023
            c = predict(1)
            with damp:
                d = 2.0 * (c - predict(1))
            guided = c if guidance == 1 else (lambda u, c=c: u + guidance * (c - u))(predict(0))
            latent = family.scheduler.step(guided + d, t, latent).prev_sample
    assert (out - latent).abs().max() <= 1e-5 * latent.abs().max()


def conditions(pipe):
    """Text [uncond, cond] and SDXL's added conditions by row."""
    encoded = pipe.encode_prompt("a red ball and a blue star", device="cpu", num_images_per_prompt=1,
                                 do_classifier_free_guidance=True)  # fmt: skip
    if len(encoded) == 2:
        return [encoded[1], encoded[0]], lambda row: {}
    ids = torch.tensor([[32.0, 32, 0, 0, 32, 32]])
    pooled = [encoded[3], encoded[2]]
    return [encoded[1], encoded[0]], lambda row: {"added_cond_kwargs": {"text_embeds": pooled[row], "time_ids": ids}}


def test_a_branch_is_computed_from_its_first_edited_block_on(sd15):
    rows = {}

    def count(name):
        return lambda m, args: rows.update({name: len(args[0])})

    hooks = [m.register_forward_pre_hook(count(n)) for n, m in sd15.unet.named_modules() if n.endswith("norm1")]
    with dg.graft(sd15, Guide(place="up")):
        tiny.sample(sd15, num_inference_steps=1)
    for hook in hooks:
        hook.remove()
    assert {rows[n] for n in rows if n.startswith(("down", "mid"))} == {2}
    assert {rows[n] for n in rows if n.startswith("up")} == {3}


def test_a_branch_may_have_its_own_latent_and_text(sd15):
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))

    class Other(dg.Plugin):
        def __init__(self, **own):
            super().__init__()
            self.own, self.seen = own, []

        def branches(self, step):
            return [dg.Branch("other", **self.own)]

        def combine(self, step, prediction, rows):
            self.seen.append(prediction[rows["other"]])

    own = Other(latent=lambda step: noise)
    plain = tiny.sample(sd15, num_inference_steps=1)
    with dg.graft(sd15, own):
        assert (tiny.sample(sd15, num_inference_steps=1) - plain).abs().max() < 1e-5
    text, _ = conditions(sd15)
    t = sd15.scheduler.timesteps[0]
    with torch.no_grad():
        assert (own.seen[0] - sd15.unet(noise, t, encoder_hidden_states=text[1]).sample).abs().max() < 1e-5
        worded = Other(text=text[0])
        with dg.graft(sd15, worded):
            tiny.sample(sd15, num_inference_steps=1)
        latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        assert (worded.seen[0] - sd15.unet(latent, t, encoder_hidden_states=text[0]).sample).abs().max() < 1e-5


def test_under_inference_mode_and_checkpointing_the_same(sd15):
    with dg.graft(sd15, Climb()):
        expected = tiny.sample(sd15)
    with dg.graft(sd15, Climb()), torch.inference_mode():
        assert torch.equal(tiny.sample(sd15), expected)
    sd15.unet.enable_gradient_checkpointing()
    sd15.unet.train()  # diffusers checkpoints in training mode only; there is no dropout here
    with dg.graft(sd15, Climb()):
        assert torch.equal(tiny.sample(sd15), expected)
    assert all(p.grad is None and p.requires_grad for p in sd15.unet.parameters())


def test_a_loop_without_the_pipelines_scheduler_is_told(sd15):
    text = sd15.encode_prompt("a", "cpu", 1, False)[0]
    latent = torch.randn(1, 4, 16, 16)
    sd15.scheduler.set_timesteps(3)
    with pytest.raises(dg.GraftError, match="scheduler.step"), torch.no_grad(), dg.graft(sd15, Climb()):
        for t in sd15.scheduler.timesteps:
            latent = latent - 0.1 * sd15.unet(latent, t, encoder_hidden_states=text).sample


def test_batches_equal_single_runs(sd15):
    """The update and the branch of one picture do not see its neighbours."""
    prompts = ["a red ball", "a blue star"]
    seeds = lambda: [torch.Generator().manual_seed(i) for i in range(4)]  # noqa: E731
    plugins = [Climb(50.0), Guide(), Scaled(0.5)]
    with dg.graft(sd15, *plugins):
        batch = tiny.sample(sd15, prompts, num_images_per_prompt=2, generator=seeds())
    for i in range(4):
        single = Climb(50.0 / 4)  # the test plugin averages over the batch
        with dg.graft(sd15, single, Guide(), Scaled(0.5)):
            one = tiny.sample(sd15, prompts[i // 2], generator=seeds()[i])
        assert (batch[i] - one[0]).abs().max() < 1e-4 * one.abs().max()


def test_a_call_that_failed_is_forgotten(sd15):
    with dg.graft(sd15, Climb(), Guide()):
        expected = tiny.sample(sd15)
        with pytest.raises(RuntimeError, match="size|shape|multiplied"):
            tiny.sample(sd15, prompt=None, prompt_embeds=torch.zeros(1, 77, 8), guidance_scale=1.0)
        hook = sd15.unet.up_blocks[1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="boom"):
            tiny.sample(sd15)
        hook.remove()
        assert torch.equal(tiny.sample(sd15), expected)


def fail(module, args):
    if not torch.is_grad_enabled():
        raise RuntimeError("boom")


def test_a_packed_latent_is_moved_unpacked():
    """FLUX.1 keeps tokens of 2x2 cells; a plugin sees [n, C, h, w], at any aspect."""
    pipe, start = tiny_transformers.flux(), dg.StartpointFilter()
    noise = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(0))
    call = {"num_inference_steps": 2, "width": 48, "height": 32, "output_type": "latent"}
    with dg.graft(pipe, start):
        grafted = pipe("a ball", latents=pack(noise), **call).images
    assert torch.equal(pipe("a ball", latents=pack(start(noise)), **call).images, grafted)
    assert not torch.equal(pipe("a ball", latents=pack(noise), **call).images, grafted)

"""Put on, used, taken off without a trace; idle or neutral is bit-identical."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import tiny
import torch
from plugins_for_tests import Climb, Guide, NoOp, Scaled, fingerprint

import diffgraft as dg
from diffgraft.pipelines.grafting.blocks import suspended


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_idle_is_bit_identical(family, guidance, dtype):
    pipe = family.to(dtype=dtype)
    plain = tiny.sample(pipe, guidance_scale=guidance)
    with dg.graft(pipe, NoOp()) as g:
        edited = tiny.sample(pipe, guidance_scale=guidance)
    assert torch.equal(plain, edited)
    assert len(g.report().layers) == len(g.layers) and set(g.report().layers.values()) == {3}


@pytest.mark.parametrize("plugin", [Scaled(0.5), Climb(), Guide()], ids=["edit", "latent", "branch"])
@pytest.mark.parametrize("end", ["ok", "exception", "interrupt", "twice"])
def test_nothing_is_left(family, plugin, end):
    before, plain = fingerprint(family), tiny.sample(family)
    error = {"exception": RuntimeError("boom"), "interrupt": KeyboardInterrupt()}.get(end)

    def stop(pipe, i, t, kwargs):
        if error is not None and i == 1:
            raise error
        return kwargs

    def run():
        with dg.graft(family, plugin):
            return tiny.sample(family, callback_on_step_end=stop)

    if error is None:
        changed = run()
        assert not torch.equal(changed, plain)
        if end == "twice":
            assert torch.equal(run(), changed)
    else:
        with pytest.raises(type(error)) as caught:
            run()
        assert caught.value is error
    assert fingerprint(family) == before
    assert torch.equal(tiny.sample(family), plain)


def test_a_failing_bind_leaves_nothing(sd15):
    class Bad(Scaled):
        def bind(self, session):
            raise ValueError("no")

    before = fingerprint(sd15)
    with pytest.raises(ValueError, match="no"), dg.graft(sd15, Scaled(0.5), Bad(0.5)):
        pass
    assert fingerprint(sd15) == before
    with dg.graft(sd15, Scaled(0.5)):  # and the pipe is free again
        pass


def test_attach_and_detach_are_idempotent(sd15):
    before, plain = fingerprint(sd15), tiny.sample(sd15)
    g = dg.graft(sd15, Scaled(0.5))
    assert g.attach() is g and g.attach() is g and g.attached
    changed = tiny.sample(sd15)
    g.detach()
    g.detach()
    assert not g.attached and fingerprint(sd15) == before
    with g:
        assert torch.equal(tiny.sample(sd15), changed)
    assert torch.equal(tiny.sample(sd15), plain) and not torch.equal(plain, changed)


def test_one_graft_at_a_time(sd15):
    with dg.graft(sd15, Scaled(0.5)), pytest.raises(dg.AlreadyGraftedError, match="one graft"):
        dg.graft(sd15, Scaled(0.2)).attach()
    g = dg.graft(sd15, Scaled(0.5)).attach()
    with pytest.raises(dg.AlreadyGraftedError), dg.graft(sd15, Scaled(0.2)):
        pass
    g.detach()


def test_a_window_limits_the_steps(sd15):
    plain = tiny.sample(sd15, num_inference_steps=10)
    plugin = Scaled(0.5, start=0.3, end=0.7)
    with dg.graft(sd15, plugin) as g:
        changed = tiny.sample(sd15, num_inference_steps=10)
    assert [s for s in plugin.steps if s != "begin"] == [(i, 10) for i in range(3, 7)]
    assert set(g.report().layers.values()) == {4} and not torch.equal(plain, changed)
    with dg.graft(sd15, Scaled(0.5, start=0.5, end=0.5)):
        assert torch.equal(tiny.sample(sd15, num_inference_steps=10), plain)
    for window in ({"start": 0.6, "end": 0.5}, {"start": -0.1}, {"end": 1.5}, {"start": float("nan")}):
        with pytest.raises(ValueError, match="start|end|finite"):
            Scaled(0.5, **window)


def test_order_of_plugins_does_not_matter_where_the_maths_commutes(sd15):
    results = []
    for plugins in ([Scaled(0.5), Climb(), Guide()], [Guide(), Scaled(0.5), Climb()]):
        with dg.graft(sd15, *plugins):
            results.append(tiny.sample(sd15))
    assert torch.equal(*results)


# -- contexts, threads, siblings, copies ---------------------------------------------------------------------------


def in_thread(work):
    result = []
    thread = threading.Thread(target=lambda: result.append(work()))
    thread.start()
    thread.join()
    return result[0]


def test_with_edits_this_context_only_and_attach_every_thread(sd15):
    plain = tiny.sample(sd15)
    g = dg.graft(sd15, Scaled(0.5))
    with g:
        changed = tiny.sample(sd15)
        assert torch.equal(in_thread(lambda: tiny.sample(sd15)), plain)
    g.attach()
    assert torch.equal(in_thread(lambda: tiny.sample(sd15)), changed)
    g.detach()
    assert torch.equal(in_thread(lambda: tiny.sample(sd15)), plain)


def test_two_pipelines_that_share_a_unet_in_two_threads(sd15):
    other = tiny.sd15(unet=sd15.unet)
    plain = tiny.sample(sd15, num_inference_steps=6)
    expected = {}
    for name, pipe, factor in (("a", sd15, 0.5), ("b", other, 0.2)):
        with dg.graft(pipe, Scaled(factor)):
            expected[name] = tiny.sample(pipe, num_inference_steps=6)
    before, results, gate = fingerprint(sd15), {}, threading.Barrier(3)

    def work(name, pipe, factor):
        if factor is None:
            gate.wait()
            results[name] = tiny.sample(pipe, num_inference_steps=6)
            return
        with dg.graft(pipe, Scaled(factor)):
            gate.wait()
            results[name] = tiny.sample(pipe, num_inference_steps=6)

    third = tiny.sd15(unet=sd15.unet)
    threads = [
        threading.Thread(target=work, args=args) for args in (("a", sd15, 0.5), ("b", other, 0.2), ("c", third, None))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(results["a"], expected["a"]) and torch.equal(results["b"], expected["b"])
    assert torch.equal(results["c"], plain) and fingerprint(sd15) == before


def test_a_sibling_is_edited_inside_the_block_and_refused_where_latents_would_be_lost(sd15):
    sibling = tiny.sd15(unet=sd15.unet)
    plain = tiny.sample(sibling)
    with dg.graft(sd15, Scaled(0.5)):
        changed = tiny.sample(sibling)
        assert torch.equal(changed, tiny.sample(sd15))
    assert not torch.equal(plain, changed) and "step" not in sibling.scheduler.__dict__
    with dg.graft(sd15, Climb()), pytest.raises(dg.UnsupportedSchedulerError, match="another scheduler"):
        tiny.sample(sibling)
    shared = tiny.sd15(unet=sd15.unet, scheduler=sd15.scheduler)
    with dg.graft(sd15, Climb()):
        assert torch.equal(tiny.sample(shared), tiny.sample(sd15))


def test_from_pipe_of_a_grafted_pipe(sd15):
    from diffusers import StableDiffusionImg2ImgPipeline

    with dg.graft(sd15, Scaled(0.5)):
        other = tiny.quiet(StableDiffusionImg2ImgPipeline.from_pipe(sd15))
        changed = tiny.sample(other, image=torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    plain = tiny.sample(other, image=torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(plain, changed)


def test_deepcopy_inside_computes_with_its_own_weights(sd15):
    plain = tiny.sample(sd15)
    with dg.graft(sd15, Scaled(0.5), Climb(), Guide()):
        twin = tiny.sd15(unet=copy.deepcopy(sd15.unet), scheduler=copy.deepcopy(sd15.scheduler))
        assert torch.equal(tiny.sample(twin), plain)
        with torch.no_grad():
            for parameter in twin.unet.parameters():
                parameter.mul_(0.5)
        assert not torch.equal(tiny.sample(twin), plain)
        twin.scheduler.set_timesteps(7)
        assert len(sd15.scheduler.timesteps) != 7
    assert torch.equal(tiny.sample(sd15), plain)


def test_save_pretrained_inside(sd15, tmp_path):
    from diffusers import StableDiffusionPipeline

    plain, keys = tiny.sample(sd15), set(sd15.unet.state_dict())
    with dg.graft(sd15, Scaled(0.5), Guide()):
        assert set(sd15.unet.state_dict()) == keys
        sd15.save_pretrained(tmp_path)
        torch.save(sd15.unet, tmp_path / "unet.pt")
    again = tiny.quiet(StableDiffusionPipeline.from_pretrained(tmp_path))
    assert torch.equal(tiny.sample(again), plain)
    loaded = torch.load(tmp_path / "unet.pt", weights_only=False)
    assert torch.equal(tiny.sample(tiny.sd15(unet=loaded)), plain)


def test_modules_are_looked_for_again_where_they_have_changed(sd15):
    """A graft for each request walks through a model once; a layer that was exchanged meanwhile is edited all the same,
    also where another one has its address.
    """
    first = {layer.name: layer.module for layer in dg.graft(sd15, Scaled(0.5)).layers}
    assert {layer.name: layer.module for layer in dg.graft(sd15, Scaled(0.5)).layers} == first
    block = sd15.unet.mid_block.attentions[0].transformer_blocks[0]
    name = next(name for name, module in first.items() if module is block.attn2)
    block.attn2 = copy.deepcopy(block.attn2)
    with dg.graft(sd15, Scaled(0.5)) as g:
        assert {layer.name: layer.module for layer in g.layers} == first | {name: block.attn2}
        assert "forward" in vars(block.attn2) and "forward" not in vars(first[name])
    del sd15.unet.mid_block.attentions[0], first, g
    gc.collect()
    assert name not in {layer.name for layer in dg.graft(sd15, Scaled(0.5)).layers}


def test_an_attached_pipe_can_be_collected():
    pipe = tiny.sd15()
    dg.graft(pipe, Scaled(0.5), Guide()).attach()
    gone = weakref.ref(pipe.unet)
    del pipe
    gc.collect()
    assert gone() is None


def test_a_script_may_end_attached():
    code = "import tiny, diffgraft as dg; graft = dg.graft(tiny.sd15(), dg.NegativeAway('cat')).attach()"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0 and "Exception ignored" not in done.stderr


def test_suspended_runs_plain(sd15):
    plain = tiny.sample(sd15)
    with dg.graft(sd15, Scaled(0.5), Guide(), Climb()), suspended():
        assert torch.equal(tiny.sample(sd15), plain)


def test_report_names_what_was_done(sd15):
    from diffusers.models.attention_processor import AttnProcessor2_0

    with dg.graft(sd15, Scaled(0.5), Guide(), Climb()) as g:
        tiny.sample(sd15)
        sd15.unet.set_attn_processor(AttnProcessor2_0())
        report = g.report()
    assert report.calls == 3 and report.rows == [3] and report.updates == 3 and report.backend == "sdpa"
    assert set(report.displaced) == {x.name for x in g.layers} and report.skipped == {}
    text = str(report)
    assert "displaced processor: mid_block" in text and "3 latent updates" in text and "Climb" in text


def test_what_is_no_plugin_is_refused(sd15):
    with pytest.raises(TypeError, match="not a plugin"):
        dg.graft(sd15, "blurry")
    with pytest.raises(dg.UnsupportedPipelineError, match="not supported"):
        dg.graft(object())


def test_a_graft_that_never_ran_reports_nothing_and_plugins_name_their_settings(sd15):
    g = dg.graft(sd15, dg.NegativeAway("red", scale=0.5))
    assert not g.report().displaced and not g.report().calls
    assert repr(g.plugins[0]).startswith("NegativeAway(") and "negative='red'" in repr(g.plugins[0])

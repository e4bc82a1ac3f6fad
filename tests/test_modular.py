"""Modular pipelines: the guider has the denoiser called once a batch, and plugins do there what they do elsewhere."""

from __future__ import annotations

import functools

import diffusers
import pytest
import tiny
import tiny_families as tf
import tiny_family_pipelines as fp
import tiny_transformers as tt
import torch
from plugins_for_tests import fingerprint

import diffgraft as dg

CALL = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "pt"}
LAYERS = {"text_encoder_out_layers": (1, 2, 3), "max_sequence_length": 16}
KINDS = {
    "sdxl": (tiny.sdxl, "StableDiffusionXLAutoBlocks", {}),
    "flux": (tt.flux, "FluxAutoBlocks", {}),
    "klein": (fp.klein, "Flux2KleinAutoBlocks", LAYERS),
    "klein-base": (fp.klein, "Flux2KleinBaseAutoBlocks", LAYERS),
    "qwen": (fp.qwen, "QwenImageAutoBlocks", {}),
    "sd3": (tt.sd3, "StableDiffusion3AutoBlocks", {}),
    "z-image": (fp.z_image, "ZImageAutoBlocks", {"max_sequence_length": 16}),
}  # fmt: skip
GUIDED = {"sdxl": {"guidance_scale": 4.0}, "sd3": {"guidance_scale": 4.0, "negative_prompt": "star"},
          "klein-base": {"guidance_scale": 4.0}, "z-image": {"guidance_scale": 4.0},
          "qwen": {"true_cfg_scale": 4.0, "negative_prompt": "star"}}  # fmt: skip
"""How the usual pipelines are asked for what the guider does with a scale of 4; FLUX.1 and klein have no guider."""
SKIP = {"fqn": "mid_block.attentions.0.transformer_blocks", "indices": [0], "skip_ff": False}
SCORES = {"skip_attention": False, "skip_attention_scores": True}
GUIDERS = [
    ("z-image", diffusers.ClassifierFreeGuidance, {}), ("z-image", diffusers.ClassifierFreeZeroStarGuidance, {}),
    ("z-image", diffusers.AdaptiveProjectedGuidance, {}), ("sdxl", diffusers.AdaptiveProjectedMixGuidance, {}),
    ("z-image", diffusers.TangentialClassifierFreeGuidance, {}),
    ("sdxl", diffusers.SkipLayerGuidance,
     {"skip_layer_config": diffusers.LayerSkipConfig(**SKIP), "skip_layer_guidance_start": 0.0,
      "skip_layer_guidance_stop": 1.0}),
    ("sdxl", diffusers.PerturbedAttentionGuidance,
     {"perturbed_guidance_config": diffusers.LayerSkipConfig(**SKIP, **SCORES), "perturbed_guidance_start": 0.0,
      "perturbed_guidance_stop": 1.0}),
    ("sdxl", diffusers.AutoGuidance,
     {"auto_guidance_config": diffusers.LayerSkipConfig(**SKIP)}),
]  # fmt: skip


@functools.cache
def usual(name):
    return KINDS[name][0]()


@functools.cache
def modular(name):
    blocks = getattr(diffusers, KINDS[name][1])()
    pipe = blocks.init_pipeline()
    names = {spec.name for spec in blocks.expected_components}
    pipe.update_components(**{k: v for k, v in usual(name).components.items() if k in names})
    pipe.set_progress_bar_config(disable=True)
    pipe.guider_of_test = getattr(pipe, "guider", None)
    return pipe


def guide(pipe, guider):
    if pipe.guider_of_test is not None:
        pipe.update_components(guider=guider)


def draw(name, *plugins, guider=None, **call):
    pipe = modular(name)
    guide(pipe, guider or diffusers.ClassifierFreeGuidance(guidance_scale=1.0))
    options = CALL | KINDS[name][2] | {"prompt": "a blue ball", "generator": torch.Generator().manual_seed(0)} | call
    with dg.graft(pipe, *plugins) as g:
        return pipe(**options, output="images"), g.report()


def draw_usual(name, *plugins, **call):
    pipe = usual(name)
    none = {} if name == "qwen" else {"guidance_scale": 3.5 if name == "flux" else 0.0}
    options = CALL | KINDS[name][2] | none | {"generator": torch.Generator().manual_seed(0)} | call
    with dg.graft(pipe, *plugins):
        return pipe(prompt="a blue ball", **options).images


def near(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", KINDS)
def test_it_paints_what_the_usual_pipeline_paints_and_comes_off(name):
    pipe, away = modular(name), dg.NegativeAway("red cat", scale=0.8)
    plain = draw(name)[0]
    near(plain, draw_usual(name))
    before = fingerprint(pipe)
    steered, report = draw(name, away)
    near(steered, draw_usual(name, away))
    assert (steered - plain).abs().max() > 1e-4 and report.calls == 2 and report.layers
    assert torch.equal(draw(name, dg.NegativeAway("red cat", scale=0))[0], plain)
    assert torch.equal(draw(name)[0], plain) and fingerprint(pipe) == before


@pytest.mark.parametrize("name", GUIDED)
def test_under_guidance_it_paints_what_the_usual_pipeline_paints(name):
    guider, away = diffusers.ClassifierFreeGuidance(guidance_scale=4.0), dg.NegativeAway("red cat", scale=0.5)
    asked = GUIDED[name]
    more = {"negative_prompt": asked["negative_prompt"]} if "negative_prompt" in asked else {}
    if name == "z-image":  # guidance there is pos + g (pos - neg)
        guider = diffusers.ClassifierFreeGuidance(guidance_scale=4.0, use_original_formulation=True)
    steered, report = draw(name, away, guider=guider, **more)
    near(steered, draw_usual(name, away, **asked))
    assert report.calls == 4 and sum(report.layers.values()) == 2 * len(report.layers)


@pytest.mark.parametrize(("name", "kind", "settings"), GUIDERS, ids=lambda x: getattr(x, "__name__", ""))
def test_of_any_guider_the_prompts_own_batch_is_steered_and_no_other(name, kind, settings, monkeypatch):
    seen = []
    guider, forward = kind(**settings), kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, **given: seen.append(given) or forward(self, **given))
    plain = draw(name, guider=guider, num_inference_steps=3)[0]
    away = dg.NegativeAway("red cat", scale=0.8, start=0.3)  # from the second step on: some guiders need a first one
    steered = draw(name, away, guider=guider, num_inference_steps=3)[0]
    before, after = seen[1], seen[4]
    assert set(before) == set(after) == set(guider._input_predictions)
    for batch in before:
        assert torch.equal(before[batch], after[batch]) == (batch != "pred_cond"), batch
    assert (steered - plain).abs().max() > 1e-4


def test_flux3_which_has_no_other_pipeline():
    pipe = fp.flux3()
    call = CALL | {"prompt": "a blue ball", "text_encoder_out_layers": (0, 1, 2), "max_sequence_length": 64}

    def made(*plugins):
        with dg.graft(pipe, *plugins) as g:
            return pipe(**call, generator=torch.Generator().manual_seed(0), output="images"), g.report()

    plain, before = made()[0], fingerprint(pipe)
    steered, report = made(dg.NegativeAway("red cat", scale=0.8))
    assert (steered - plain).abs().max() > 1e-4 and report.calls == 4 and set(report.layers.values()) == {2}
    near(made(dg.NegativeAway("red cat", scale=0.8, form="rows"))[0], steered)
    assert torch.equal(made(dg.NegativeAway("red cat", scale=0))[0], plain) and fingerprint(pipe) == before


def test_latents_move_and_maps_are_seen():
    away = dg.AttentionSegregation(["ball", "star"])
    for name, guider in (("sdxl", diffusers.ClassifierFreeGuidance(guidance_scale=4.0)), ("flux", None)):
        call = {"prompt": "a blue ball and a star"}
        moved, report = draw(name, away, guider=guider, **call)
        assert report.updates and not torch.equal(moved, draw(name, guider=guider, **call)[0])


def test_windows_count_the_steps_of_the_schedule():
    half = draw("z-image", dg.NegativeAway("red cat", scale=0.8, end=0.5), num_inference_steps=4)[1]
    assert set(half.layers.values()) == {2}


def test_a_negative_for_each_encoder_and_embeddings():
    one = draw("sdxl", dg.NegativeAway("red cat", negative_2="red cat", scale=0.8))[0]
    assert torch.equal(one, draw("sdxl", dg.NegativeAway("red cat", scale=0.8))[0])
    assert not torch.equal(one, draw("sdxl", dg.NegativeAway("red cat", negative_2="star", scale=0.8))[0])
    one = draw("flux", dg.NegativeAway("red cat", scale=0.8))[0]
    rows = draw("flux", dg.NegativeAway("red cat", scale=0.8, form="rows"))[0]
    assert not torch.equal(rows, one)  # the negative's own pooled vector
    given = usual("flux").encode_prompt("red cat", "red cat", device="cpu")[0]
    near(draw("flux", dg.NegativeAway(given, scale=0.8))[0], one)


def test_what_is_not_served_is_refused_by_name():
    made = diffusers.ModularPipeline(blocks=diffusers.FluxAutoBlocks())
    with pytest.raises(dg.UnsupportedPipelineError, match="load_components"):
        dg.graft(made)
    made.transformer = tf.denoiser("AuraFlowTransformer2DModel")
    with pytest.raises(dg.UnsupportedPipelineError, match="nobody has said what its text block makes"):
        dg.graft(made)


def test_without_a_text_block_embeddings_are_wanted():
    blocks = diffusers.FluxAutoBlocks()
    blocks.sub_blocks.pop("text_encoder")
    pipe = blocks.init_pipeline()
    pipe.update_components(**{k: v for k, v in usual("flux").components.items() if k in pipe._component_specs})
    pipe.set_progress_bar_config(disable=True)
    words, pooled, _ = usual("flux").encode_prompt("a ball", "a ball", device="cpu")
    call = CALL | {"prompt_embeds": words, "pooled_prompt_embeds": pooled}
    with dg.graft(pipe, dg.NegativeAway(words * 0.5, scale=0.8)):
        assert pipe(**call, output="images").isfinite().all()
    with dg.graft(pipe, dg.NegativeAway("red")), pytest.raises(dg.UnsupportedPipelineError, match="embeddings"):
        pipe(**call, output="images")

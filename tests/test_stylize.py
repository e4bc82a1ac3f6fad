"""The task: sizes, orientation, sharing of inversions, determinism, pipelines of other kinds."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import tiny
import tiny_transformers
import torch
from diffusers import (
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PNDMScheduler,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPAGPipeline,
)
from PIL import Image
from test_style import add_ip_adapter

import diffgraft as dg
from diffgraft.pipelines.tasks import stylize as module
from diffgraft.pipelines.tasks.region import whole_region
from diffgraft.plugins.defaults import preferred

FAST = {"steps": 2, "iterations": 0}


def picture(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    rough = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return rough.resize((width, height), Image.Resampling.BICUBIC)


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and a.tobytes() == b.tobytes()


@pytest.fixture
def inversions(monkeypatch):
    """Every inversion that `stylize` makes: how many, and of what."""
    made = []

    def counting(pipe, image, **options):
        made.append(options.get("negative"))
        return dg.invert(pipe, image, **options)

    monkeypatch.setattr(module, "invert", counting)
    return made


@pytest.mark.parametrize("size", [(32, 32), (37, 21), (20, 61), (100, 40)])
def test_output_has_the_contents_size(sd15, size):
    out = dg.stylize(sd15, picture(*size), picture(50, 30, 1), seed=1, **FAST)
    assert (out.size, out.mode) == (size, "RGB")
    settings = out.info["diffgraft"]
    assert (settings["width"], settings["height"], settings["seed"]) == (*size, 1)


@pytest.mark.parametrize(
    ("kind", "levels"),
    [(tiny.vae, 1), (tiny.vae, 3), (tiny.vae, 5), (tiny.posteriorless, 4)],
    ids=["1", "4", "16", "8, no posterior"],
)
def test_any_size_with_any_autoencoder(kind, levels):
    pipe = tiny.sd15(vae=kind(levels=levels), unet=tiny.unet(sample_size=8))
    assert pipe.vae_scale_factor == 2 ** (levels - 1)
    assert dg.stylize(pipe, picture(13, 21), picture(9, 5, 1), seed=1, **FAST).size == (13, 21)


@pytest.mark.parametrize("size", [(13, 21), (40, 24)])
@pytest.mark.parametrize("kind", ["pixart", "sd3"])
def test_any_size_with_transformers(kind, size):
    out = dg.stylize(getattr(tiny_transformers, kind)(), picture(*size), picture(9, 5, 1), seed=1, **FAST)
    assert out.size == size


@pytest.mark.parametrize("kind", ["pixart", "sd3"])
def test_a_picture_is_a_style_where_tokens_are_patches(kind):
    pipe = getattr(tiny_transformers, kind)()
    call = {"num_inference_steps": 2, "width": 48, "height": 32, "output_type": "latent"}
    call |= {"use_resolution_binning": False, "clean_caption": False} if kind == "pixart" else {}
    plain = pipe("a ball", generator=torch.Generator().manual_seed(0), **call).images
    with dg.graft(pipe, dg.StyleInjection(picture(9, 5, 1))):
        styled = pipe("a ball", generator=torch.Generator().manual_seed(0), **call).images
    assert styled.isfinite().all() and not torch.allclose(styled, plain, atol=1e-3)


def test_a_denoiser_that_was_made_for_oblong_pictures():
    pipe = tiny.sd15(unet=tiny.unet(sample_size=(16, 8)))
    assert dg.stylize(pipe, picture(30, 40), picture(seed=1), seed=1, **FAST).size == (30, 40)


def test_the_model_sees_the_contents_aspect():
    region = whole_region((300, 150), 32, 8)
    assert region.size == (48, 24)  # 1.5 times the model's own 32 pixels
    assert region.padded == (48, 24)
    assert whole_region((37, 21), 32, 8).padded == (40, 24)
    assert whole_region((16, 8), 32, 8).size == (32, 16)
    assert whole_region((1, 90), 32, 8).padded == (8, 48)


def test_exif_orientation_and_transparency(sd15, tmp_path):
    upright, path = picture(40, 24), tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    upright.save(path, exif=exif, quality=95)
    assert dg.stylize(sd15, path, picture(), seed=1, **FAST).size == (24, 40)
    clear = picture().convert("RGBA")
    clear.putalpha(0)
    assert same(dg.stylize(sd15, clear, picture(), strength=0.0), Image.new("RGB", (32, 32), "white"))


def test_same_seed_same_bytes_and_nothing_else_changes(sd15):
    state, scheduler, before = torch.get_rng_state(), sd15.scheduler, dict(sd15.scheduler.config)
    first, again, other = (dg.stylize(sd15, picture(), picture(seed=1), seed=s, **FAST) for s in (5, 5, 6))
    assert same(first, again)
    assert not same(first, other)
    noisy, again = (dg.stylize(sd15, picture(), picture(seed=1), seed=5, eta=1.0, **FAST) for _ in range(2))
    assert same(noisy, again)
    assert not same(noisy, first)
    assert torch.equal(torch.get_rng_state(), state)
    assert sd15.scheduler is scheduler
    assert dict(scheduler.config) == before
    assert not any("forward" in part.__dict__ for part in sd15.unet.modules())


def test_many_by_many_share_inversions(sd15, inversions):
    contents, styles = [picture(seed=i) for i in range(2)], [picture(seed=i) for i in (6, 7, 8)]
    table = dg.stylize(sd15, contents, styles, seed=10, **FAST)
    assert len(inversions) == 2 + 3
    assert [len(row) for row in table] == [3, 3]
    assert same(dg.stylize(sd15, contents[1:], styles[2], seed=15, **FAST)[0], table[1][2])
    assert same(dg.stylize(sd15, contents[0], styles[:2], seed=10, **FAST)[1], table[0][1])


@pytest.mark.parametrize(("negative", "inversions"), [(None, 20 + 40), ("a star", 2 * 20 + 40)])
def test_twenty_contents_in_forty_styles_are_sixty_inversions(negative, inversions):
    pipe = tiny.sd15(unet=tiny.unet(sample_size=4))
    rows = []
    pipe.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    look = module.Look("styleid", 1.0, 0.5, 0.7, 0.75, 1.5, True)
    recipe = module.Recipe("", 1, 1.0, look, module.Inverting(negative, 1.5, 0, 0.0), (), {})
    contents, styles = ([picture(8, 8, seed) for seed in seeds] for seeds in (range(20), range(20, 60)))
    made = list(module.pairs(pipe, recipe, contents, styles, 0))
    used = {(id(pair.inversion), id(pair.reference.style)) for pair in made}
    assert len(made) == len(used) == 800
    assert sum(rows) == inversions  # of one step each; a negative text is one more row


def test_a_negative_by_pair_costs_an_inversion_by_pair(sd15, inversions):
    styles = [picture(seed=7), picture(seed=8)]
    row = dg.stylize(sd15, [picture(), picture(seed=1)], styles, seed=1, negative="style", **FAST)
    assert len(inversions) == 2 * 2 + 2
    assert row[0][0].info["diffgraft"]["negative"] == "attention"
    inversions.clear()
    dg.stylize(sd15, picture(), styles, seed=1, negative="a star", invert_style=False, **FAST)
    assert inversions == ["a star"]


def test_strength_zero_is_the_content_and_more_is_further(sd15):
    content, style = picture(), picture(seed=1)
    assert same(dg.stylize(sd15, content, style, strength=0.0, seed=1), content)
    plain = dg.stylize(sd15, content, style, strength=1e-6, alpha=1.0, seed=1, **FAST)
    far = [
        np.abs(np.asarray(dg.stylize(sd15, content, style, strength=s, alpha=1.0, seed=1, **FAST), int) - plain).mean()
        for s in (0.1, 1.0)
    ]
    assert 0 < far[0] < far[1]


def test_structure_sets_the_papers_values_in_the_middle(sd15):
    settings = dg.stylize(sd15, picture(), picture(seed=1), seed=1, **FAST).info["diffgraft"]
    assert (settings["alpha"], settings["gamma"]) == (0.7, 0.75)
    settings = dg.stylize(sd15, picture(), picture(seed=1), structure=1.0, gamma=0.3, seed=1, **FAST).info["diffgraft"]
    assert (settings["alpha"], settings["gamma"]) == (0.4, 0.3)


def test_what_was_measured_on_the_picture_book_is_its_default_and_the_papers_stay_to_be_chosen():
    paper = {"rate": 0.05, "content_weight": 0.25, "start": 0.0}
    assert module.distilling("sd15", module.look_of("sd15", "distillation"), 50) == paper
    chosen = module.look_of("picturebook", "distillation", 0.5, begin=0.0)
    assert module.distilling("picturebook", chosen, 20) == paper
    for family in ("picturebook", "joint"):
        usual = module.look_of(family, "distillation")
        for steps, rate in ((20, 0.05), (50, 0.02), (2, 0.1)):
            found = module.distilling(family, usual, steps)
            assert found == {"rate": pytest.approx(rate), "content_weight": 0.1, "start": 0.4}
        assert usual.alpha == 1.0 and preferred("stylize: method", family) == "distillation"
    assert module.look_of("picturebook", "styleid").begin == 0.0 and preferred("stylize: method", "sdxl") == "styleid"


@pytest.mark.parametrize("method", ["styleid", "distillation"])
def test_before_it_begins_the_content_is_repeated(sd15, method):
    never = [dg.stylize(sd15, picture(), picture(seed=i), seed=1, method=method, begin=1.0, **FAST) for i in (1, 2)]
    inversion = dg.invert(sd15, picture(), steps=2, iterations=0)
    start = dg.StartpointFilter(0.7, generator=torch.Generator().manual_seed(1))
    with dg.graft(sd15, start):
        want = sd15("", guidance_scale=1.0, output_type="np", **inversion.call(sd15)).images
    assert same(*never) and np.abs(np.asarray(never[0], int) - 255 * want[0]).max() <= 1
    late = dg.stylize(sd15, picture(), picture(seed=1), seed=1, method=method, begin=0.5, **FAST)
    assert not same(late, never[0])
    with pytest.raises(dg.SettingError, match="begin"):
        dg.stylize(sd15, picture(), picture(seed=1), begin=1.1, **FAST)


@pytest.mark.parametrize("method", ["styleid", "stylealigned", "distillation"])
def test_families_and_guidance(family, method):
    out = dg.stylize(family, picture(), picture(seed=1), method=method, guidance=3.0, prompt="a star", seed=1, **FAST)
    assert out.size == (32, 32)


def test_other_schedulers_are_left_alone(sd15):
    want = dg.stylize(sd15, picture(), picture(seed=1), seed=1, **FAST)
    sd15.scheduler = PNDMScheduler.from_config(sd15.scheduler.config, skip_prk_steps=True)
    assert same(dg.stylize(sd15, picture(), picture(seed=1), seed=1, **FAST), want)
    assert isinstance(sd15.scheduler, PNDMScheduler)
    sd15.scheduler = EulerDiscreteScheduler.from_config(sd15.scheduler.config)
    assert dg.stylize(sd15, picture(), picture(seed=1), seed=1, **FAST).info["diffgraft"]["scheduler"].startswith("Eu")


def test_an_image_to_image_pipeline_serves_too(sd15):
    want = dg.stylize(sd15, picture(), picture(seed=1), seed=1, **FAST)
    other = tiny.quiet(StableDiffusionImg2ImgPipeline(**sd15.components, requires_safety_checker=False))
    assert same(dg.stylize(other, picture(), picture(seed=1), seed=1, **FAST), want)


def test_a_controlnet_is_shown_the_content(sd15):
    net = tiny.controlnet(sd15.unet)
    pipe = tiny.sd15(cls=StableDiffusionControlNetPipeline, unet=sd15.unet, controlnet=net)
    seen = []
    net.register_forward_pre_hook(lambda _, __, kw: seen.append(kw["controlnet_cond"]), with_kwargs=True)
    out = dg.stylize(pipe, picture(30, 22), picture(seed=1), seed=1, **FAST)
    assert out.size == (30, 22)
    assert len(seen) == 2
    assert (seen[0].min() >= 0) and seen[0].std() > 0.05
    plain = dg.stylize(sd15, picture(30, 22), picture(seed=1), seed=1, **FAST)
    assert not same(out, plain)
    weaker = {"controlnet_conditioning_scale": 0.0}
    assert same(dg.stylize(pipe, picture(30, 22), picture(seed=1), seed=1, **FAST, **weaker), plain)


def test_each_of_several_controlnets_is_shown_the_content(sd15):
    nets = [tiny.controlnet(sd15.unet, seed) for seed in (5, 6)]
    shown = []
    for net in nets:
        net.register_forward_pre_hook(lambda _, __, kw: shown.append(kw["controlnet_cond"]), with_kwargs=True)
    pipe = tiny.sd15(cls=StableDiffusionControlNetPipeline, unet=sd15.unet, controlnet=nets)
    assert dg.stylize(pipe, picture(30, 22), picture(seed=1), seed=1, **FAST).size == (30, 22)
    assert len(shown) == 4 and all(torch.equal(shown[0], other) for other in shown)


def test_an_ip_adapter_adds_to_its_own_method_only(sd15):
    plain = {
        m: dg.stylize(sd15, picture(), picture(seed=1), seed=1, method=m, **FAST) for m in ("styleid", "distillation")
    }
    add_ip_adapter(sd15)
    for method, want in plain.items():
        got = dg.stylize(sd15, picture(), picture(seed=1), seed=1, method=method, **FAST)
        assert np.abs(np.asarray(got, int) - np.asarray(want, int)).max() <= 1
    styles = [picture(seed=i) for i in (1, 2)]
    one, other = dg.stylize(sd15, picture(), styles, seed=1, method="ip_adapter", alpha=1.0, **FAST)
    assert not same(one, other)
    weak = dg.stylize(sd15, picture(), styles[0], seed=1, method="ip_adapter", alpha=1.0, strength=1e-6, **FAST)
    back = dg.stylize(sd15, picture(), styles[1], seed=1, method="ip_adapter", alpha=1.0, strength=1e-6, **FAST)
    assert np.abs(np.asarray(weak, int) - np.asarray(back, int)).max() <= 1


def test_each_of_several_ip_adapters_is_shown_the_style(sd15):
    add_ip_adapter(sd15, 2)
    one, other = dg.stylize(sd15, picture(), [picture(seed=i) for i in (1, 2)], seed=1, method="ip_adapter", **FAST)
    assert not same(one, other)


def test_a_controlnet_of_sd3_is_shown_the_content():
    """Its pipeline calls the picture otherwise."""
    pipe = tiny_transformers.sd3()
    known = inspect.signature(SD3ControlNetModel.__init__).parameters
    net = SD3ControlNetModel(**{k: v for k, v in pipe.transformer.config.items() if k in known})
    seen = []
    net.register_forward_pre_hook(lambda _, __, kw: seen.append(kw["controlnet_cond"]), with_kwargs=True)
    parts = {k: v for k, v in pipe.components.items() if k not in ("image_encoder", "feature_extractor")}
    pipe = tiny.quiet(StableDiffusion3ControlNetPipeline(**parts, controlnet=net))
    assert dg.stylize(pipe, picture(), picture(seed=1), seed=1, **FAST).size == (32, 32)
    assert len(seen) == 2 and seen[0].std() > 0.05


def test_pag_keeps_its_layers_where_another_scheduler_samples(sd15):
    pipe = tiny.sd15(cls=StableDiffusionPAGPipeline, pag_applied_layers=["up_blocks.1"])
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
    assert module.sampling_pipe(pipe).pag_applied_layers == ["up_blocks.1"]


def test_lcm_has_no_scheduler_that_can_be_inverted():
    scheduler = LCMScheduler.from_config(tiny.ddim().config)
    pipe = tiny.sd15(cls=LatentConsistencyModelPipeline, scheduler=scheduler)
    with pytest.raises(dg.UnsupportedPipelineError, match="use StableDiffusionPipeline"):
        dg.stylize(pipe, picture(), picture(seed=1), **FAST)


def test_the_settings_that_make_it_again_are_in_the_picture(sd15):
    how = {"temperature": 1.2, "invert_style": False, "omega": 0.5, "tolerance": 0.0, "alpha": 0.6, "gamma": 0.9}
    away = dg.NegativeAway("red", scale=0.5)
    out = dg.stylize(sd15, picture(), picture(seed=1), plugins=away, prompt="a star", **how, **FAST)
    settings = dict(out.info["diffgraft"])
    assert settings["plugins"] == [{"plugin": "NegativeAway"} | away.settings()] and settings["negative"] == "none"
    for name in ("task", "pipeline", "scheduler", "plugins", "negative", "width", "height"):
        del settings[name]
    assert same(dg.stylize(sd15, picture(), picture(seed=1), plugins=[away], **settings), out)


def test_what_is_not_finite_is_an_error_and_no_black_picture(sd15):
    steps = []

    class Spoil(dg.Plugin):
        def combine(self, step, prediction, rows):
            return prediction[rows["cond"]] * float("nan") if step.index == 1 else None

    with pytest.raises(dg.NonFiniteError, match="step 2 of 2"):
        dg.stylize(
            sd15, picture(), picture(seed=1), seed=1, **FAST,
            callback_on_step_end=lambda pipe, i, t, given: steps.append(i) or given, plugins=Spoil(),
        )  # fmt: skip
    assert steps == [0]  # the user's callback runs behind the check
    torch.nn.init.constant_(sd15.vae.decoder.conv_out.bias, float("nan"))
    with pytest.raises(dg.NonFiniteError, match="decoding"):
        dg.stylize(sd15, picture(), picture(seed=1), seed=1, **FAST)


def test_more_plugins_run_along(sd15):
    plain = dg.stylize(sd15, picture(), picture(seed=1), seed=1, prompt="a star", **FAST)
    away = dg.NegativeAway("red", scale=0.5)
    other = dg.stylize(sd15, picture(), picture(seed=1), seed=1, prompt="a star", plugins=[away], **FAST)
    assert not same(other, plain)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"strength": 1.5}, "strength"),
        ({"nonsense": 1}, "nonsense="),
        ({"structure": -1.0}, "structure"),
        ({"method": "gram"}, "styleid"),
        ({"steps": 0}, "steps"),
        ({"seed": -3}, "seed"),
        ({"content": 7}, "picture"),
        ({"style": 7}, "picture"),
        ({"guidance": float("nan")}, "guidance"),
        ({"temperature": 0.0}, "temperature"),
        ({"prompt": ["a star"]}, "prompt"),
        ({"negative": 7}, "negative"),
        ({"latents": 1}, "latents="),
        ({"prompt_embeds": 1}, "prompt_embeds="),
        ({"omega": "strong"}, "omega"),
        ({"output_type": "pt"}, "output_type="),
        ({"method": "ip_adapter"}, "IP-Adapter"),
    ],
)
def test_bad_settings_say_what_to_do(sd15, call, says):
    call = {"content": picture(), "style": picture(seed=1), "seed": 1, **FAST} | call
    with pytest.raises(dg.GraftError, match=says):
        dg.stylize(sd15, **call)


@pytest.mark.parametrize("omega", [1.0, 1.5])
@pytest.mark.parametrize("kind", ["flux", "sd3", "pixart"])
def test_transformers_invert_and_come_back(kind, omega):
    pipe = tiny.double(getattr(tiny_transformers, kind)())
    pixels = picture(32, 32) if kind == "pixart" else picture(48, 32)
    away = {} if omega == 1 else {"negative": "a star", "guidance": omega}
    inversion = dg.invert(pipe, pixels, prompt="a ball", steps=4, iterations=80, tolerance=1e-9, **away)
    assert inversion.negative == ("text" if away else "none")
    call = {"output_type": "latent", "width": pixels.width, "height": pixels.height, "guidance_scale": omega}
    if kind == "flux":
        call |= {"guidance_scale": 1.0, "true_cfg_scale": omega}
    if kind == "pixart":
        call["use_resolution_binning"] = False
    if away:
        call["negative_prompt"] = "a star"
    back = pipe("a ball", **inversion.call(pipe), **call).images
    if kind == "flux":
        back = pipe._unpack_latents(back, 32, 48, pipe.vae_scale_factor)
    torch.testing.assert_close(back, inversion.clean, rtol=0, atol=1e-3)


def test_half_precision(sd15):
    sd15.to(torch.bfloat16)
    assert dg.invert(sd15, picture(), steps=2).latents.dtype == torch.bfloat16
    assert dg.stylize(sd15, picture(), picture(seed=1), seed=1, **FAST).size == (32, 32)


# -- behaviour on the picture book, where the true re-rendering is known -------------------------------------------


def test_style_arrives_and_what_is_there_stays(picturebook):
    """A content in four styles: the judge names each style and sees every thing; the layout as far as the true
    re-rendering shows it, to nine tenths (`style_effect` has the table).
    """
    from diffgraft.app.bench import world
    from diffgraft.app.bench.judge import load_judge, look
    from diffgraft.app.bench.style_effect import pairs
    from diffgraft.app.bench.style_scores import layout_accuracy, style_distance

    chosen = pairs(2)[4:]
    content, styles = world.render(chosen[0].content), [world.render(pair.style) for pair in chosen]
    outs = dg.stylize(picturebook, content, styles, seed=1, steps=20, iterations=0)
    assert outs[0].info["diffgraft"]["alpha"] == 1.0 and outs[0].info["diffgraft"]["method"] == "distillation"
    distance = [style_distance(o, s) / style_distance(content, s) for o, s in zip(outs, styles, strict=True)]
    ideal = [layout_accuracy(pair.truth, pair.content) for pair in chosen]
    layout = [layout_accuracy(o, chosen[0].content) / best for o, best in zip(outs, ideal, strict=True)]
    verdicts = look(load_judge(), outs)
    right = [verdict.style == pair.style.style for verdict, pair in zip(verdicts, chosen, strict=True)]
    assert sum(right) >= 3 and all({t.kind for t in chosen[0].content.things} <= set(v.colours) for v in verdicts)
    assert np.mean(distance) < 0.6 and np.mean(layout) >= 0.9, (distance, layout)

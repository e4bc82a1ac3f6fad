"""Inversion: exact inverses of steps, fixed points, guidance and its count, hand-over, families."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import tiny_transformers
import torch
from diffusers import (
    DDIMInverseScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
)
from PIL import Image

import diffgraft as dg
from diffgraft.app.bench.startpoint_cost import counting
from diffgraft.pipelines.families.latents import encode_image
from diffgraft.pipelines.tasks.inversion import fixed_point
from diffgraft.pipelines.tasks.schedule import grid_of, predicted_noise, reverse_step

MODES = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0], [0.0, 1.4], [0.0, -1.4]]).double()
WIDTH = 0.6


class Mixture(UNet2DConditionModel):
    """The exact denoiser of a mixture of Gaussians over pairs of channels; the text sets the weights of the modes."""

    signals = tiny.ddim().alphas_cumprod.double()

    def weights(self, text: torch.Tensor) -> torch.Tensor:
        return text[:, 2, : len(MODES)].double().softmax(-1)

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True, **_):
        signal = self.signals[int(timestep)]
        alpha, variance = signal.sqrt(), signal * WIDTH**2 + 1 - signal
        x = sample.double().unflatten(1, (-1, 2)).movedim(2, -1)  # [B, pairs, h, w, 2]
        away = x[..., None, :] - alpha * MODES
        logits = -away.pow(2).sum(-1) / (2 * variance) + self.weights(encoder_hidden_states).log()[:, None, None, None]
        score = -(logits.softmax(-1)[..., None] * away).sum(-2) / variance
        noise = (-(1 - signal).sqrt() * score).movedim(-1, 2).flatten(1, 2).to(sample)
        return (noise,) if not return_dict else SimpleNamespace(sample=noise)


@pytest.fixture(scope="module")
def mixture():
    model = tiny.unet()
    model.__class__ = Mixture
    pipe = tiny.sd15(unet=model.double())
    pipe.text_encoder.double()
    pipe.vae.double()
    return pipe


def drawn(n: int = 2, seed: int = 0) -> torch.Tensor:
    """Samples of the mixture, [n, 4, 8, 8]."""
    generator = torch.Generator().manual_seed(seed)
    modes = MODES[torch.randint(len(MODES), (n, 2, 8, 8), generator=generator)]
    x = modes + WIDTH * torch.randn(modes.shape, generator=generator, dtype=torch.float64)
    return x.movedim(-1, 2).flatten(1, 2)


def resample(pipe, inversion, prompt="", **call):
    options = {"guidance_scale": 1.0, "output_type": "latent"} | inversion.call(pipe) | call
    return pipe([prompt] * len(inversion.latents), **options).images


def rms(x: torch.Tensor) -> float:
    return x.double().pow(2).mean().sqrt().item()


def counted(pipe, run):
    """Rows that the denoiser computes while `run()` runs."""
    rows: list[int] = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, args, kwargs: rows.append(len(args[0])), with_kwargs=True)
    try:
        return run(), sum(rows)
    finally:
        hook.remove()


# -- the equation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_reverse_step_undoes_every_ddim_step(prediction, spacing):
    scheduler = tiny.ddim(prediction_type=prediction, timestep_spacing=spacing)
    grid = grid_of(scheduler, 30)
    scheduler.set_timesteps(30)
    generator = torch.Generator().manual_seed(0)
    for i, t in enumerate(scheduler.timesteps):
        x, output = torch.randn(2, 1, 4, 8, 8, generator=generator)
        z = scheduler.step(output, t, x).prev_sample
        start, end, kind = grid.starts[i], grid.ends[i], prediction
        if prediction == "sample":
            output, kind = predicted_noise(x, output, start, "sample"), "epsilon"
        assert rms(reverse_step(z, output, start, end, kind) - x) < 1e-6


def test_reverse_step_undoes_every_euler_and_flow_step():
    generator = torch.Generator().manual_seed(0)
    for scheduler in (
        EulerDiscreteScheduler.from_config(tiny.ddim().config),
        EulerDiscreteScheduler.from_config(tiny.ddim().config, prediction_type="v_prediction"),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    ):
        grid = grid_of(scheduler, 20)
        scheduler.set_timesteps(20)
        for i, t in enumerate(scheduler.timesteps):
            x, output = torch.randn(2, 1, 4, 8, 8, generator=generator)
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            z = scheduler.step(output, t, grid.latents(x, i)).prev_sample
            z = z / grid.scales[i + 1] if i + 1 < len(grid.scales) else z
            back = reverse_step(z, output, grid.starts[i], grid.ends[i], grid.prediction)
            assert rms(back - x) < 1e-6


def test_predicted_noise_is_the_noise():
    at = grid_of(tiny.ddim(), 10).starts[3]
    clean, noise = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = at.alpha * clean + at.sigma * noise
    outputs = {"epsilon": noise, "sample": clean, "v_prediction": at.alpha * noise - at.sigma * clean}
    for prediction, output in outputs.items():
        torch.testing.assert_close(predicted_noise(x, output, at, prediction), noise)


def test_without_iterations_it_is_ddim_inversion(sd15):
    """Against diffusers' own inverse scheduler, whose grid is one step off by design: compared where both go."""
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    parts = {**sd15.components, "scheduler": DDIMInverseScheduler.from_config(sd15.scheduler.config)}
    sibling = tiny.quiet(type(sd15)(**parts, requires_safety_checker=False))
    want = sibling("a red ball", latents=z, num_inference_steps=10, guidance_scale=1.0, output_type="latent").images
    got = dg.invert(sd15, z, prompt="a red ball", steps=10, iterations=0).latents
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


# -- fixed points --------------------------------------------------------------------------------------------------


def test_round_trip_error_falls_geometrically(mixture):
    z = drawn()
    errors = [rms(resample(mixture, dg.invert(mixture, z, iterations=k, tolerance=0)) - z) for k in (0, 1, 2, 3, 5, 10)]
    assert 5e-3 < errors[0] < 0.2
    for worse, better in zip(errors[:4], errors[1:4], strict=False):
        assert better < worse / 8
    assert errors[4] < 5e-7
    assert errors[5] < 1e-7  # the scheduler's table of float32 ends it


def test_the_residual_says_how_good_it_is(mixture):
    z = drawn()
    loose, tight = (dg.invert(mixture, z, iterations=30, tolerance=tolerance) for tolerance in (1e-2, 1e-7))
    assert max(loose.residuals) == loose.residual <= 1e-2
    assert tight.residual <= 1e-7
    assert len(tight.residuals) == 50
    assert loose.evaluations < tight.evaluations < 50 * 31
    assert rms(resample(mixture, tight) - z) < 1e-5


def test_guided_inversion_is_undone_by_the_same_guidance_while_sampling(mixture):
    z = drawn()
    errors = []
    for k in (0, 1, 2, 3):
        inversion = dg.invert(mixture, z, prompt="a ball", negative="a star", guidance=1.5, iterations=k, tolerance=0)
        back = resample(mixture, inversion, "a ball", guidance_scale=1.5, negative_prompt=["a star"] * 2)
        errors.append(rms(back - z))
    assert errors[0] > 5e-3 and errors[3] < 1e-4
    assert all(better < worse / 8 for worse, better in zip(errors, errors[1:], strict=False))
    assert inversion.negative == "text"


def test_a_growing_change_is_damped():
    swing = -1.5 * torch.ones(1, 1)
    x, residual, used = fixed_point(lambda x: 1 + swing * x, torch.zeros(1, 1), 60, 1e-6)
    assert x.item() == pytest.approx(0.4, abs=1e-5)
    assert used < 60
    assert residual.item() <= 1e-6


def test_a_batch_is_its_pictures(mixture):
    z = drawn(3)
    batch = dg.invert(mixture, z, prompt=["a", "ball", "star"], steps=12)
    for i, prompt in enumerate(["a", "ball", "star"]):
        single = dg.invert(mixture, z[i : i + 1], prompt=prompt, steps=12)
        torch.testing.assert_close(batch.latents[i : i + 1], single.latents, rtol=0, atol=1e-12)


# -- negative guidance ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 2])
def test_passes_are_counted(sd15, k):
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    for options, rows in (({}, 1), ({"negative": "a star"}, 2), ({"negative": z}, 3)):
        call = {"steps": 4, "iterations": k, "tolerance": 0, **options}
        inversion, count = counted(sd15, lambda call=call: dg.invert(sd15, z, **call))
        assert count == inversion.evaluations == rows * 4 * (k + 1)
    with counting(sd15.unet) as counter:
        dg.invert(sd15, z, negative="a star", steps=4, iterations=k, tolerance=0)
    assert (counter.calls, counter.rows, counter.twice) == (4 * (k + 1), 8 * (k + 1), 0)  # no row is another's twin


def test_without_weight_the_negative_is_not_evaluated_and_no_bit_differs(sd15):
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    plain = dg.invert(sd15, z, steps=5)
    for options in ({"negative": "a star", "guidance": 1.0}, {"negative": None, "guidance": 7.0}):
        other, count = counted(sd15, lambda options=options: dg.invert(sd15, z, steps=5, **options))
        assert torch.equal(other.latents, plain.latents)
        assert count == plain.evaluations
        assert other.negative == "none"


def test_guidance_is_continuous_at_one(mixture):
    z = drawn(1)
    call = {"prompt": "a ball", "negative": "a star", "steps": 10, "iterations": 8, "tolerance": 0}
    plain = dg.invert(mixture, z, guidance=1.0, **call).latents
    near, nearer = (rms(dg.invert(mixture, z, guidance=1 + w, **call).latents - plain) for w in (1e-3, 1e-4))
    assert 0 < nearer < 1e-3
    assert near / nearer == pytest.approx(10, rel=0.05)


def test_the_same_text_as_negative_has_no_effect(mixture):
    z = drawn(1)
    call = {"prompt": "a ball", "steps": 10}
    plain = dg.invert(mixture, z, **call).latents
    for guidance in (1.5, 4.0):
        other = dg.invert(mixture, z, negative="a ball", guidance=guidance, **call).latents
        torch.testing.assert_close(other, plain, rtol=0, atol=1e-12)


def test_which_way_the_negative_pushes(mixture):
    """The modes that the negative stands for, after sampling back without it: their mass rises with omega.

    The guided step is integrated backwards, so omega > 1 undoes a push away that sampling then never makes.
    """
    z, unet = drawn(4), mixture.unet
    away, towards = unet.weights(mixture.encode_prompt(["a star", "a ball"], "cpu", 1, False)[0])
    shares = []
    for guidance in (0.0, 0.5, 1.0, 1.5, 3.0):
        call = {"prompt": "a ball", "negative": "a star", "guidance": guidance, "steps": 15}
        back = resample(mixture, dg.invert(mixture, z, **call), "a ball")
        x = back.unflatten(1, (-1, 2)).movedim(2, -1)
        near = (-(x[..., None, :] - MODES).pow(2).sum(-1) / (2 * WIDTH**2)).softmax(-1).mean((0, 1, 2, 3))
        shares.append((near * (away - towards)).sum().item())
    assert all(less < more for less, more in zip(shares, shares[1:], strict=False)), shares


def test_a_picture_is_a_negative_by_attention_where_there_is_no_adapter(sd15):
    picture = Image.new("RGB", (40, 40), "orange")
    z = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    call = {"negative": picture, "steps": 3, "iterations": 1, "tolerance": 0}
    one, two = (dg.invert(sd15, z, guidance=w, **call) for w in (1.5, 3.0))
    assert one.negative == "attention"
    plain = dg.invert(sd15, z, steps=3, iterations=1, tolerance=0)
    assert rms(one.latents - plain.latents) > 1e-4
    assert rms(two.latents - plain.latents) > rms(one.latents - plain.latents)
    several = dg.invert(sd15, z, guidance=3.0, **call | {"negative": [picture, Image.new("RGB", (9, 9), "orange")]})
    torch.testing.assert_close(several.latents, two.latents, rtol=0, atol=1e-5)  # each under the noise of one
    assert not any("forward" in layer.module.__dict__ for layer in dg.find_layers(sd15.unet))


# -- hand-over -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("kind", ["ddim", "euler"])
def test_a_picture_comes_back_on_every_grid(mixture, kind, spacing):
    if (kind, spacing) == ("ddim", "linspace"):
        spacing = "trailing"
    config = {**tiny.ddim().config, "timestep_spacing": spacing}
    cls = type(tiny.ddim()) if kind == "ddim" else EulerDiscreteScheduler
    mixture.scheduler = cls.from_config(config)
    z = drawn(1)
    inversion = dg.invert(mixture, z, steps=25, iterations=12, tolerance=1e-7)
    assert rms(resample(mixture, inversion) - z) < 1e-5
    mixture.scheduler = tiny.ddim()


def test_another_start_is_refused(sd15):
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    inversion = dg.invert(sd15, z, steps=4, iterations=0)
    assert inversion.call(sd15)["num_inference_steps"] == 4
    with pytest.raises(dg.SettingError, match="steps=0"):
        inversion.call(sd15, steps=0)
    with pytest.raises(dg.UnsupportedSchedulerError, match="first timestep"):
        inversion.call(sd15, steps=7)
    sd15.scheduler = EulerDiscreteScheduler.from_config(sd15.scheduler.config)
    with pytest.raises(dg.UnsupportedSchedulerError, match="scheduler"):
        inversion.call(sd15)
    inversion = dg.invert(sd15, z, steps=4, iterations=0)
    sd15.scheduler = EulerDiscreteScheduler.from_config(sd15.scheduler.config, beta_end=0.02)
    with pytest.raises(dg.UnsupportedSchedulerError, match="init_noise_sigma"):
        inversion.call(sd15)


def test_a_scheduler_without_inverse_is_replaced_with_a_warning(sd15):
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    want = dg.invert(sd15, z, steps=4).latents
    sd15.scheduler = PNDMScheduler.from_config(sd15.scheduler.config, skip_prk_steps=True)
    with pytest.warns(UserWarning, match="PNDMScheduler"):
        inversion = dg.invert(sd15, z, steps=4)
    assert torch.equal(inversion.latents, want)
    sd15.scheduler = inversion.scheduler
    assert set(inversion.call(sd15)) == {"latents", "num_inference_steps"}


def test_trajectory_is_on_the_samplers_timesteps(mixture):
    z = drawn(1)
    inversion = dg.invert(mixture, z, steps=10, iterations=12, tolerance=1e-8, trajectory=True)
    path = []

    def note(pipe, i, t, tensors):
        path.append((t, tensors["latents"]))
        return {}

    resample(mixture, inversion, callback_on_step_end=note)
    for (_, latents), timestep in zip(path[:-1], inversion.timesteps[1:], strict=True):
        torch.testing.assert_close(inversion.at(timestep), latents, rtol=0, atol=1e-5)
    assert torch.equal(inversion.at(inversion.timesteps[0]), inversion.latents)
    with pytest.raises(dg.SettingError, match="steps"):
        inversion.at(2)
    with pytest.raises(dg.SettingError, match="trajectory=True"):
        dg.invert(mixture, z, steps=3).at(1)


# -- pipelines -----------------------------------------------------------------------------------------------------


def test_families_come_back(family):
    """Random weights are ill-conditioned: double precision and many iterations."""
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if getattr(family, part, None) is not None:
            getattr(family, part).double()
    z = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inversion = dg.invert(family, z, prompt="a red ball", steps=6, iterations=80, tolerance=1e-7)
    size = {"height": 16, "width": 24}
    back = resample(family, inversion, "a red ball", **size)
    assert rms(back - z) < 1e-3


def test_the_picture_book_brings_a_picture_back(picturebook):
    from diffgraft.app.bench import world
    from diffgraft.pipelines.families.latents import decode_latents

    pictures = [world.render(world.scene(world.FRESH + i, style="plain")) for i in range(1)]
    want = decode_latents(picturebook, encode_image(picturebook, pictures), "np")
    inversion = dg.invert(picturebook, pictures)
    got = decode_latents(picturebook, resample(picturebook, inversion), "np")
    assert -10 * torch.tensor((got - want) ** 2).mean((1, 2, 3)).log10().max() > 20


def test_grafts_are_off_and_nothing_global_changes(sd15):
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    want, state, config = dg.invert(sd15, z, steps=3).latents, torch.get_rng_state(), dict(sd15.scheduler.config)
    with dg.graft(sd15, dg.NegativeAway("red", scale=0.5)) as g:
        assert torch.equal(dg.invert(sd15, z, steps=3).latents, want)
    assert g.report().calls == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(sd15.scheduler.config) == config


def test_a_picture_comes_in_many_forms(sd15, tmp_path):
    values = torch.randint(0, 256, (24, 32, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    picture, path = Image.fromarray(values.numpy()), tmp_path / "picture.png"
    clear = Image.merge("RGBA", [*picture.split(), Image.new("L", picture.size, 255)])
    picture.save(path)
    want = encode_image(sd15, picture)
    chw = values.permute(2, 0, 1)
    same = [path, str(path), values.numpy(), values.numpy() / 255, chw, chw / 255, chw[None] / 255, [picture], clear]
    for form in same:
        torch.testing.assert_close(encode_image(sd15, form), want, rtol=0, atol=1e-5)
    hidden = Image.merge("RGBA", [*picture.split(), Image.new("L", picture.size, 0)])
    for form, like in ((hidden, Image.new("RGB", picture.size, "white")), (picture.convert("L"), None)):
        got = encode_image(sd15, form)
        assert got.shape == want.shape and (like is None or torch.equal(got, encode_image(sd15, like)))


@pytest.mark.parametrize("form", [None, 5, "nowhere.png", torch.zeros(4, 16), torch.full((3, 8, 8), torch.nan), []])
def test_what_is_no_picture_is_told_so(sd15, form):
    with pytest.raises(dg.GraftError, match="picture"):
        dg.invert(sd15, form, steps=1)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"steps": 0}, "steps"),
        ({"prompt": 5}, "prompt"),
        ({"steps": 2.0}, "whole"),
        ({"iterations": -1}, "iterations"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"guidance": float("nan")}, "guidance"),
        ({"prompt": ["a", "b"]}, "prompts"),
        ({"negative": ["a", "b"]}, "negatives"),
        ({"negative": [Image.new("RGB", (16, 16))] * 2}, "2 negatives for 1"),
        ({"negative": torch.zeros(1, 4, 9, 9)}, r"\[1 or 1, 4, 8, 8\]"),
        ({"negative": torch.zeros(4, 8, 8)}, "negatives"),
        ({"negative": torch.full((1, 4, 8, 8), torch.nan)}, "finite"),
        ({"generator": 5}, "Generator"),
        ({"negative": 7}, "negative"),
    ],
)
def test_bad_settings_say_what_to_do(sd15, call, says):
    with pytest.raises(dg.GraftError, match=says):
        dg.invert(sd15, torch.zeros(1, 4, 8, 8), **call)


@pytest.mark.parametrize("kind", ["flux", "sd3", "pixart"])
def test_sides_are_rounded_to_whole_tokens(kind):
    pipe = getattr(tiny_transformers, kind)()
    inversion = dg.invert(pipe, Image.new("RGB", (27, 31), "red"), steps=2, iterations=0)
    assert inversion.clean.shape[2:] == (14, 12)
    with pytest.raises(dg.SettingError, match="even sides"):
        dg.invert(pipe, torch.zeros(1, 4, 9, 8))


@pytest.mark.parametrize(
    ("channels", "cls"), [(9, StableDiffusionInpaintPipeline), (8, StableDiffusionInstructPix2PixPipeline)]
)
def test_a_model_that_wants_a_mask_or_a_picture_is_refused(channels, cls):
    with pytest.raises(dg.UnsupportedPipelineError, match=f"takes {channels} channels where latents have 4"):
        dg.invert(tiny.sd15(cls=cls, in_channels=channels), torch.zeros(1, 4, 8, 8))


def told(pipe, run):
    """What the denoiser is given besides latents, timestep and text, at its first call."""
    given: list[dict] = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, __, inputs: given.append(inputs), with_kwargs=True)
    run()
    hook.remove()
    return given[0].get("timestep_cond"), (given[0].get("added_cond_kwargs") or {}).get("time_ids")


def refiner():
    unet = tiny.unet_xl()
    config = dict(unet.config) | {
        "projection_class_embeddings_input_dim": 8 * 5 + tiny.WIDTH,
        "cross_attention_dim": 32,
    }
    return tiny.sdxl(
        cls=StableDiffusionXLImg2ImgPipeline, unet=type(unet).from_config(config), text_encoder=None, tokenizer=None,
        requires_aesthetics_score=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "make", [refiner, lambda: tiny.sd15(unet=tiny.unet(time_cond_proj_dim=16))], ids=["refiner", "lcm"]
)
def test_the_denoiser_is_told_what_the_pipeline_tells_it(make):
    pipe, picture = make(), Image.new("RGB", (32, 32), "red")
    own = {"image": picture, "strength": 1.0} if "Img2Img" in type(pipe).__name__ else {}
    inverting = told(pipe, lambda: dg.invert(pipe, picture, steps=2, iterations=0))
    sampling = told(pipe, lambda: tiny.sample(pipe, "", guidance_scale=1.0, **own))
    assert any(found is not None for found in inverting)
    for found, wanted in zip(inverting, sampling, strict=True):
        assert (found is None) == (wanted is None) and (found is None or torch.equal(found, wanted))


@pytest.mark.parametrize("latents", [torch.full((1, 4, 8, 8), torch.nan), torch.zeros(0, 4, 8, 8)])
def test_latents_that_are_none_are_told_so(sd15, latents):
    with pytest.raises(dg.SettingError, match="finite"):
        dg.invert(sd15, latents, steps=1)

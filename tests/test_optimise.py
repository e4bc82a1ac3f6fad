"""The startpoint by search: the update against torch's own, the gradient, what is put back, and that losses fall."""

from __future__ import annotations

import math

import pytest
import tiny
import tiny_transformers as tt
import torch
from plugins_for_tests import fingerprint

import diffgraft as dg
from diffgraft.pipelines.tasks.optimise import SearchError, initial_noise, search, updated
from diffgraft.pipelines.tasks.search import OnPictures, Surrogate
from diffgraft.plugins.startpoint_losses import cumulative, noise_energy, region

SMALL = {"width": 32, "height": 32, "steps": 2, "guidance": 1.0}


def blue(pictures, prompt):
    return dg.colour_loss((0, 0, 1))(pictures, prompt)


def test_the_update_is_torchs_nesterov_with_clipped_gradients():
    noise = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, velocity = noise, torch.zeros_like(noise)
    for _ in range(4):
        ours, velocity = updated(ours, velocity, 2 * (ours - target), 0.5, 0.9, 0.1, 0.01)
    for i in range(2):  # each picture as if alone
        z = noise[i : i + 1].clone().requires_grad_()
        optimiser = torch.optim.SGD([z], lr=0.5, momentum=0.9, nesterov=True)
        for _ in range(4):
            optimiser.zero_grad()
            energy = z.square().sum() / 2 - (z.numel() - 1) * z.norm().log()
            ((z - target[i]).square().sum() + 0.01 * energy).backward()
            torch.nn.utils.clip_grad_norm_([z], 0.1)
            optimiser.step()
        torch.testing.assert_close(ours[i : i + 1], z.detach(), rtol=0, atol=1e-5)


def test_noise_is_least_in_energy_at_the_length_of_noise():
    direction = torch.nn.functional.normalize(torch.randn(1, 4, 8, 8).flatten(1), dim=1)
    lengths = [0.9, 1.0, 1.1]
    energies = [float(noise_energy(direction * (x * math.sqrt(255)))) for x in lengths]
    assert min(energies) == energies[1]


def test_losses_know_their_targets():
    picture = torch.zeros(2, 3, 8, 8)
    picture[0, 2] = 1
    picture[1, :, :, :4] = 1
    assert dg.colour_loss((0, 0, 1))(picture, "").tolist() == pytest.approx([0, (2 * 0.5 + 1 * 0.5) / 3])
    assert dg.colour_loss((1, 1, 1), "left")(picture, "")[1] == 0
    assert dg.intensity_loss("left")(picture, "")[1] == pytest.approx(0, abs=1e-6)
    assert dg.intensity_loss("right")(picture, "")[1] == pytest.approx(1, abs=1e-5)
    assert dg.histogram_loss(picture[1])(picture.flip(-1), "")[1] == pytest.approx(0, abs=1e-6)  # wherever they stand
    assert dg.histogram_loss(picture[1])(picture, "")[0] > 0.1
    assert cumulative(picture, 8)[1, 0, 3] == pytest.approx(0.5, abs=1e-3)
    assert region("top", picture).sum() == 32 and region("all", picture).mean() == 1
    for wrong in (lambda: dg.colour_loss((0, 2, 0)), lambda: dg.histogram_loss(picture), lambda: region("x", picture)):
        with pytest.raises(dg.SettingError):
            wrong()


def test_the_gradient_is_the_slope():
    """Through denoiser, scheduler and decoder, in float64, checkpointed or not."""
    pipe = tiny.double(tiny.sd15())
    noise = initial_noise(pipe, [3], 32, 32).double()
    found = []
    for checkpointed in (True, False):
        at = Surrogate(pipe, ["a red ball"], 1, 1.0, (), checkpointed, {"width": 32, "height": 32})
        found.append(OnPictures(at, blue)(noise))
    (loss, gradient), other = found
    torch.testing.assert_close(other, (loss, gradient), rtol=1e-9, atol=1e-12)
    way = torch.randn(noise.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    step = 1e-6
    ends = [OnPictures(at, blue)(noise + sign * step * way)[0] for sign in (1, -1)]
    slope = (ends[0] - ends[1]) / (2 * step)
    assert slope.item() == pytest.approx((gradient * way).sum().item(), rel=1e-4)


@pytest.mark.parametrize("make", [tiny.sd15, tiny.sdxl, tt.sd3, tt.flux], ids=["sd15", "sdxl", "sd3", "flux"])
def test_every_family_finds_a_lower_loss_and_is_put_back(make):
    pipe = make()
    dg.generate(pipe, "a red ball", seed=1, **SMALL)  # a scheduler's first call leaves a mark
    before, bar = fingerprint(pipe), dict(getattr(pipe, "_progress_bar_config", {}))
    trained = [p.requires_grad for part in (pipe.vae, pipe.text_encoder) for p in part.parameters()]
    seen = []
    found = dg.optimise_startpoint(
        pipe, "a red ball", blue, iterations=4, seed=1, n=2, callback=lambda i, x: seen.append(x), clip=1e9, rate=20.0,
        regularise=0.0, **SMALL,
    )  # fmt: skip
    assert found.latents.shape[0] == len(found.pictures) == 2 and found.picture.size == (32, 32)
    assert [list(x) for x in zip(*found.losses, strict=True)] == seen and len(seen) == 5
    for losses in found.losses:
        assert min(losses) < losses[0]
    assert found.picture.info["diffgraft"]["task"] == "optimise"
    assert fingerprint(pipe) == before and getattr(pipe, "_progress_bar_config", {}) == bar
    assert [p.requires_grad for part in (pipe.vae, pipe.text_encoder) for p in part.parameters()] == trained
    assert all(p.grad is None for part in (pipe.vae, pipe.text_encoder) for p in part.parameters())


def test_no_update_is_the_plain_picture(picturebook):
    found = dg.optimise_startpoint(picturebook, "a ball , sky", blue, iterations=0, seed=4, steps=2, guidance=2.5)
    (plain,) = dg.generate(picturebook, "a ball , sky", seed=4, steps=2, guidance=2.5)
    assert found.picture.tobytes() == plain.tobytes() and len(found.losses[0]) == 1


def test_maps_of_the_student_come_apart(picturebook):
    """The surrogate's split: the gradient is the student's, the picture the many-step model's; plugins run in both."""
    student = tiny.quiet(dg.picturebook(one_step=True))
    prompt, words = "a blue ball and a yellow star and a red fish , sky", ["ball", "star", "fish"]
    found = dg.optimise_startpoint(
        picturebook, prompt, "a-star", concepts=words, surrogate=student, iterations=3, seed=2, steps=1,
        plugins=[dg.NegativeAway("night")],
    )  # fmt: skip
    assert min(found.losses[0]) < 0.8 * found.losses[0][0]
    assert found.picture.info["diffgraft"]["plugins"][0]["plugin"] == "NegativeAway"


def quadratic(z):
    return z.square().sum((1, 2, 3)), 2 * z


def test_interrupted_it_gives_the_best_so_far():
    def stop(number, losses):
        if number == 3:
            raise KeyboardInterrupt

    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    found = search(quadratic, noise, 50, rate=0.1, momentum=0.0, clip=1e9, regularise=0, callback=stop)
    assert found.interrupted and len(found.losses[0]) == 4
    assert quadratic(found.latents)[0].item() == pytest.approx(min(found.losses[0]))


def test_nan_names_the_update_and_keeps_the_last_good_noise():
    calls = []

    def breaks(z):
        calls.append(z)
        loss, gradient = quadratic(z)
        return (loss * float("nan"), gradient) if len(calls) == 3 else (loss, gradient)

    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(SearchError, match="update 2") as error:
        search(breaks, noise, 9, rate=0.1, momentum=0, clip=1e9, regularise=0)
    assert torch.equal(error.value.startpoint.latents, calls[1])


def test_each_picture_keeps_its_own_best():
    def diverging(z):
        loss, gradient = quadratic(z)
        return loss, gradient * torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)

    noise = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    found = search(diverging, noise, 5, rate=0.1, momentum=0, clip=1e9, regularise=0)
    assert torch.equal(found.latents[1], noise[1]) and not torch.equal(found.latents[0], noise[0])


def test_wrong_settings_say_so(sd15):
    for wrong in ({"iterations": -1}, {"surrogate_steps": 0}, {"rate": float("nan")}, {"n": 0}):
        with pytest.raises(dg.SettingError):
            dg.optimise_startpoint(sd15, "a ball", blue, **wrong)
    for wrong in ({"loss": "a-star"}, {"loss": lambda pictures, prompt: 3}, {"prompt": [3], "loss": blue}):
        with pytest.raises(dg.SettingTypeError):
            dg.optimise_startpoint(sd15, wrong.pop("prompt", "a ball"), wrong["loss"], width=32, height=32)
    with pytest.raises(dg.SettingError, match="gradient"):
        dg.optimise_startpoint(sd15, "a ball", lambda pictures, prompt: pictures.detach().mean(), width=32, height=32)


def test_losses_as_a_person_writes_them(tmp_path):
    from diffgraft.app import losses
    from diffgraft.app.batch.schema import make_row
    from diffgraft.app.errors import ManifestError

    picture = torch.zeros(1, 3, 8, 8)
    spec = losses.parse('{"loss": "colour", "colour": "#0000ff", "region": "left"}')
    assert losses.build(spec)["loss"](picture, "").item() == pytest.approx(1 / 3)
    assert losses.build({"loss": "intensity", "region": "all"})["loss"](picture, "").item() == pytest.approx(1)
    assert losses.build({"loss": "a-star", "concepts": ["a"]}) == {"loss": "a-star", "concepts": ["a"]}
    row = {"task": "optimise", "prompt": "a ball", "settings": {"loss": dict(spec), "iterations": 2}}
    assert make_row(row, {}, 1, strict=True).settings["iterations"] == 2
    for wrong in ({"loss": "x"}, {"loss": "a-star"}, {"loss": "colour"}, None, {"loss": "intensity", "mask": "a.png"}):
        with pytest.raises(ManifestError):
            make_row({**row, "settings": {"loss": wrong}}, {}, 1, strict=True)

"""The startpoint filter against the paper's equation, in numbers."""

from __future__ import annotations

import math

import pytest
import tiny
import torch

import diffgraft as dg
from diffgraft.plugins.startpoint import damp_low, low_pass, official_mask, pack, unpack


def white(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_dft(latent: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """The paper's equation by explicit Fourier matrices: complex, float64, no FFT."""

    def matrix(n: int) -> torch.Tensor:
        k = torch.arange(n, dtype=torch.float64)
        return torch.exp(-2j * math.pi * k[:, None] * k / n)

    def frequency(n: int) -> torch.Tensor:
        return torch.tensor([2 * (k if 2 * k < n else k - n) / n for k in range(n)], dtype=torch.float64)

    h, w = latent.shape[-2:]
    r2 = frequency(h)[:, None] ** 2 + frequency(w) ** 2
    spectrum = matrix(h) @ latent.to(torch.complex128) @ matrix(w)
    spectrum = spectrum * (1 - (1 - alpha) * torch.exp(-r2 / (2 * sigma**2)))
    back = matrix(h).conj() @ spectrum @ matrix(w).conj() / (h * w)
    assert back.imag.abs().max() < 1e-12 * latent.std()
    return back.real


@pytest.mark.parametrize("size", [(8, 8), (9, 7), (6, 11), (16, 24), (1, 5)])
def test_filter_is_the_papers_equation_at_any_size(size):
    z = white(2, 4, *size)
    got = dg.StartpointFilter(0.7, 0.3, refill="none")(z)
    torch.testing.assert_close(got, by_dft(z, 0.7, 0.3), rtol=0, atol=1e-12)


def test_alpha_one_returns_the_input_and_draws_nothing():
    z, generator = white(1, 4, 8, 8), torch.Generator().manual_seed(3)
    before = generator.get_state()
    assert dg.StartpointFilter(1.0, generator=generator)(z) is z
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("side", [64, 128])
def test_band_power_of_white_noise(side):
    z = white(48 if side == 64 else 12, 4, side, side)
    filtered = dg.StartpointFilter(0.7, 0.3, refill="none")(z)
    power = torch.fft.fft2(filtered).abs() ** 2 / (torch.fft.fft2(z).abs() ** 2)
    f = torch.fft.fftfreq(side, 0.5, dtype=torch.float64)
    r = (f[:, None] ** 2 + f**2).sqrt()
    edges, table = [0, 0.05, 0.15, 0.3, 0.6, 1, 1.41], [0.493, 0.519, 0.608, 0.822, 0.978, 0.999]
    for low, high, wanted in zip(edges, edges[1:], table, strict=False):
        assert power[..., (r >= low) & (r < high)].mean().item() == pytest.approx(wanted, abs=0.002)
    assert (filtered.var() / z.var()).item() == pytest.approx(0.9217, abs=0.002)
    gain = 1 - 0.3 * torch.exp(-(r**2) / 0.18)
    assert (gain**2).mean().item() + 0.09 == pytest.approx(1.0117, abs=2e-4)
    assert dg.StartpointFilter(0.7, 0.3)(z).var().item() == pytest.approx(1.0117, abs=0.008)


def test_mean_is_scaled_by_alpha_and_the_rest_is_linear():
    a, b = white(1, 4, 9, 12), white(1, 4, 9, 12, seed=1)
    both = damp_low(2 * a - 3 * b, 0.4, 0.3)
    torch.testing.assert_close(both, 2 * damp_low(a, 0.4, 0.3) - 3 * damp_low(b, 0.4, 0.3), rtol=0, atol=1e-12)
    torch.testing.assert_close(damp_low(a, 0.4, 0.3).mean((-2, -1)), 0.4 * a.mean((-2, -1)), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_shape_and_memory_format_are_kept(dtype):
    z = white(2, 4, 10, 6).to(dtype).contiguous(memory_format=torch.channels_last)
    got = dg.StartpointFilter(refill="none")(z)
    assert (got.dtype, got.shape, got.stride()) == (z.dtype, z.shape, z.stride())
    # The last operation rounds once: half an eps of the result. What it takes away went, at least in float32, through
    # two transforms of 60 terms, each log2(60) = 6 additions deep with an error of eps / 2, and is 0.3 times the low
    # part of z, whose deviation is 0.27: 2 * 6 * eps / 2 * 0.3 * 0.27 = 0.5 eps. In 300 draws the most was 0.6.
    rtol, atol = torch.finfo(dtype).eps / 2, torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    torch.testing.assert_close(got.double(), by_dft(z.double(), 0.7, 0.3), rtol=rtol, atol=max(1e-13, atol))


def test_video_is_filtered_frame_by_frame():
    clip = white(1, 4, 3, 8, 8)
    frames = [dg.StartpointFilter(refill="none")(clip[:, :, i]) for i in range(3)]
    torch.testing.assert_close(dg.StartpointFilter(refill="none")(clip), torch.stack(frames, 2))


def test_packed_latents_are_the_unpacked_ones():
    z, seeded = white(2, 16, 6, 10), lambda: torch.Generator().manual_seed(1)
    packed = pack(z)
    assert packed.shape == (2, 15, 64)
    assert torch.equal(unpack(packed, (3, 5)), z)
    want = dg.StartpointFilter(generator=seeded())(z)
    assert torch.equal(dg.StartpointFilter(generator=seeded())(packed, grid=(3, 5)), pack(want))


def test_pack_is_the_layout_of_flux():
    from diffusers import FluxPipeline

    z = white(2, 4, 6, 10)
    assert torch.equal(pack(z), FluxPipeline._pack_latents(z, 2, 4, 6, 10))


def test_same_seed_same_bytes_and_the_global_generator_untouched():
    z, state = white(2, 4, 8, 8), torch.get_rng_state()
    first, second = (dg.StartpointFilter(generator=torch.Generator().manual_seed(9))(z) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(dg.StartpointFilter()(z), dg.StartpointFilter()(z))
    assert not torch.equal(first, dg.StartpointFilter(generator=torch.Generator().manual_seed(8))(z))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_batch_is_its_rows_when_each_has_a_generator_or_none_has():
    z = white(3, 4, 7, 8)
    seeded = [torch.Generator().manual_seed(i) for i in (5, 6, 7)]
    batch = dg.StartpointFilter(generator=seeded)(z)
    for i in range(3):
        single = dg.StartpointFilter(generator=torch.Generator().manual_seed(5 + i))(z[i : i + 1])
        assert torch.equal(batch[i : i + 1], single)
        assert torch.equal(dg.StartpointFilter()(z)[i : i + 1], dg.StartpointFilter()(z[i : i + 1]))


def test_refill_can_match_the_latents():
    z = 5 * white(1, 4, 64, 64)
    added = dg.StartpointFilter(refill="match")(z) - dg.StartpointFilter(refill="none")(z)
    assert added.std().item() == pytest.approx(0.3 * z.std().item(), rel=0.03)


def test_official_preset_has_the_recorded_gains():
    """Net gains by channel frequency (0, +-1, -2) and radius, and the statistics, as recorded from the program."""
    mask = official_mask((4, 128, 128), 0.3, torch.zeros((), dtype=torch.float64))
    fy, fx = torch.fft.fftfreq(128, 0.5), torch.fft.rfftfreq(128, 0.5)
    r = (fy[:, None] ** 2 + fx**2).sqrt()
    edges = [0, 0.05, 0.15, 0.3, 0.5, 0.7, 1, 1.4]
    table = {
        0: [0.70, 0.72, 0.77, 0.85, 0.90, 0.88, 0.84],
        1: [0.70, 0.71, 0.72, 0.74, 0.75, 0.75, 0.73],
        2: [0.70] * 7,
    }
    for channel, row in table.items():
        for low, high, wanted in zip(edges, edges[1:], row, strict=False):
            gain = 1 - 0.3 * mask[channel][(r >= low) & (r < high)].mean().item()
            assert gain == pytest.approx(wanted, abs=0.0056)  # two decimals were recorded, of bins of their own
    assert torch.equal(mask[1], mask[3])


def test_official_preset_has_the_recorded_statistics():
    z = white(16, 4, 64, 64)
    got = dg.StartpointFilter(preset="official")(z)
    assert got.std().item() == pytest.approx(0.815, abs=0.006)
    assert torch.corrcoef(torch.stack([got.flatten(), z.flatten()]))[0, 1].item() == pytest.approx(0.934, abs=0.004)
    plugin = dg.StartpointFilter(preset="official", generator=torch.Generator().manual_seed(0))
    assert (plugin(z) - plugin(z)).std().item() == pytest.approx(0.40, abs=0.01)


def test_grafted_it_filters_the_initial_latents_once(family):
    z = white(1, 4, 16, 16, dtype=torch.float32)
    want = tiny.sample(family, latents=dg.StartpointFilter(0.5)(z))
    with dg.graft(family, dg.StartpointFilter(0.5)) as g:
        got = tiny.sample(family, latents=z)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
    assert g.report().updates == 1


def test_grafted_the_refill_fits_the_space_of_the_scheduler(sd15):
    from diffusers import EulerDiscreteScheduler

    sd15.scheduler = EulerDiscreteScheduler.from_config(sd15.scheduler.config, timestep_spacing="leading")
    z = white(1, 4, 16, 16, dtype=torch.float32)
    want = tiny.sample(sd15, latents=dg.StartpointFilter(0.5)(z))
    with dg.graft(sd15, dg.StartpointFilter(0.5)):
        got = tiny.sample(sd15, latents=z)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_grafted_and_neutral_changes_no_bit(sd15):
    plain = tiny.sample(sd15)
    with dg.graft(sd15, dg.StartpointFilter(1.0)):
        assert torch.equal(tiny.sample(sd15), plain)


def test_one_picture_is_a_batch_of_one():
    z = white(4, 8, 9)
    for preset in (None, "official"):
        start = dg.StartpointFilter(preset=preset)
        assert torch.equal(start(z), start(z[None])[0])  # its channels are refilled with noise of their own
    assert not torch.equal(*dg.StartpointFilter()(torch.zeros(2, 8, 8)))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: dg.StartpointFilter(1.5), "alpha"),
        (lambda: dg.StartpointFilter(sigma=0.0), "sigma"),
        (lambda: dg.StartpointFilter("0.7"), "number"),
        (lambda: dg.StartpointFilter(refill="some"), "refill"),
        (lambda: dg.StartpointFilter(preset="paper"), "preset"),
        (lambda: dg.StartpointFilter()(torch.zeros(8, 8)), "shape"),
        (lambda: dg.StartpointFilter()(torch.zeros(1, 4, 8, 8, dtype=torch.long)), "floating"),
        (lambda: dg.StartpointFilter()(torch.full((1, 4, 8, 8), torch.nan)), "NaN"),
        (lambda: dg.StartpointFilter()(torch.zeros(1, 4, 0, 0)), "shape"),
        (lambda: dg.StartpointFilter()(torch.zeros(0, 4, 8, 8)), "shape"),
        (lambda: dg.StartpointFilter()(torch.zeros(2, 15, 64), grid=(3, 4)), r"grid=\(3, 4\)"),
        (lambda: dg.StartpointFilter()(torch.zeros(2, 15, 6), grid=(3, 5)), "4C"),
        (lambda: dg.StartpointFilter()(torch.zeros(2, 4, 8, 8), grid=(4, 4)), "tokens"),
        (lambda: dg.StartpointFilter()(torch.zeros(2, 15, 64), grid=15), "grid=15"),
        (lambda: dg.StartpointFilter(generator=5), "Generator"),
        (lambda: dg.StartpointFilter(generator=[torch.Generator()])(torch.zeros(2, 4, 8, 8)), "generators"),
    ],
)
def test_bad_settings_say_what_to_do(make, says):
    with pytest.raises(dg.GraftError, match=says):
        make()


def test_low_pass_is_one_at_the_mean_and_half_width_is_sigma():
    mask = low_pass((64, 64), 0.5, torch.zeros((), dtype=torch.float64))
    assert mask[0, 0] == 1
    assert mask[16, 0].item() == pytest.approx(math.exp(-0.5))  # bin 16 of 64 is half of Nyquist

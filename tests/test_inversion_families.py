"""Inversion on transformers: an exact flow comes back, the denoiser is told what the pipeline tells it."""

from __future__ import annotations

import contextlib

import pytest
import tiny_family_pipelines as tp
import tiny_transformers as tt
import torch

import diffgraft as dg
from diffgraft.pipelines.families.latents import channels_of, decode_latents, encode_image, scaled, unscaled

WIDTH = 0.6
PIPES = {
    "flux": tt.flux, "flux guidance": lambda: tt.flux(guidance=True), "sd3": tt.sd3, "qwen": tp.qwen,
    "z-image": tp.z_image, "chroma": tp.chroma, "klein": tp.deep_klein, "lumina2": tp.lumina2, "sana": tt.sana,
    "pixart": tt.pixart,
}  # fmt: skip
SIZES = {"sana": (16, 32)}
SIGN = {"z-image": -1, "lumina2": -1}


@pytest.fixture(scope="module")
def pipes():
    made = {}

    def get(name):
        if name not in made:
            made[name] = PIPES[name]()
        return made[name]

    return get


def usual(name, pipe, size):
    """How a pipeline is called for latents of `size`, without guidance."""
    height, width = (side * pipe.vae_scale_factor * (2 if name == "klein" else 1) for side in size)
    given = {"prompt": ["a red ball"], "height": height, "width": width, "output_type": "latent"}
    given["true_cfg_scale" if name == "qwen" else "guidance_scale"] = 0.0 if name == "z-image" else 1.0
    return given | ({"use_resolution_binning": False} if name in ("pixart", "sana") else {})


def level(name, pipe, time):
    """(alpha, sigma) of what the denoiser is told."""
    if name == "pixart":
        signal = pipe.scheduler.alphas_cumprod[int(time.flatten()[0])].double()
        return signal**0.5, (1 - signal) ** 0.5
    time = float(time.flatten()[0])
    told = {"sd3": time / 1000, "z-image": 1 - time, "lumina2": 1 - time, "sana": time / 1000}
    return 1 - told.get(name, time), told.get(name, time)


def exact(name, pipe):
    """The denoiser's forward, exact for two Gaussians around -1 and 1 in every value, however these lie."""
    spec = {"z-image": ("x", "t")}.get(name, ("hidden_states", "timestep"))

    def forward(*args, **kwargs):
        given = dict(zip(spec, args, strict=False)) | kwargs
        sample = given[spec[0]]
        x = (torch.stack(sample) if isinstance(sample, list) else sample).double()
        alpha, sigma = level(name, pipe, torch.as_tensor(given[spec[1]]))
        variance = alpha**2 * WIDTH**2 + sigma**2
        towards = torch.tanh(alpha * x / variance)
        clean = towards + alpha * WIDTH**2 / variance * (x - alpha * towards)
        noise = (x - alpha * clean) / sigma
        out = noise if name == "pixart" else SIGN.get(name, 1) * (noise - clean)
        out = torch.cat([out, out], 1) if name == "pixart" else out
        return (list(out),) if isinstance(sample, list) else (out,)

    return forward


def data(channels, size):
    g = torch.Generator().manual_seed(1)
    shape = (1, channels, *size)
    modes = torch.randint(0, 2, shape, generator=g).double() * 2 - 1
    return modes + WIDTH * torch.randn(shape, generator=g, dtype=torch.float64)


def as_latents(pipe, name, latents, size):
    """Latents as the pipeline keeps them, as [n, C, h, w]."""
    if latents.ndim == 4:
        return latents
    if name == "klein":
        return latents.mT.unflatten(-1, size)
    return dg.plugins.startpoint.unpack(latents, (size[0] // 2, size[1] // 2))


@contextlib.contextmanager
def last(pipe):
    """Inside, what the scheduler's last step gave."""
    own, seen = pipe.scheduler.step, []

    def step(*args, **kwargs):
        out = own(*args, **kwargs)
        seen[:] = [out[0] if isinstance(out, tuple) else out.prev_sample]
        return out

    pipe.scheduler.step = step
    try:
        yield seen
    finally:
        del pipe.scheduler.__dict__["step"]


@pytest.mark.parametrize("name", PIPES)
def test_an_exact_flow_comes_back(pipes, monkeypatch, name):
    pipe, size = pipes(name), SIZES.get(name, (8, 12))
    monkeypatch.setattr(pipe.transformer, "forward", exact(name, pipe))
    z = data(channels_of(pipe), size)
    inversion = dg.invert(pipe, z, prompt="a red ball", steps=50, iterations=3, tolerance=0.0)
    assert inversion.evaluations == 50 * 4
    monkeypatch.setattr(type(pipe.transformer), "dtype", torch.float64)
    given = usual(name, pipe, size) | inversion.call(pipe)
    with last(pipe) as seen, torch.no_grad():
        pipe(**given | {"latents": given["latents"].double()})
    back = as_latents(pipe, name, seen[0].double(), size)
    assert (back - z).pow(2).mean().sqrt() <= 1e-4


@contextlib.contextmanager
def told(pipe):
    """Inside, the arguments of every call of the denoiser."""
    calls = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, given: calls.append((args, given)), with_kwargs=True
    )
    try:
        yield calls
    finally:
        hook.remove()


@pytest.mark.parametrize("name", PIPES)
def test_the_denoiser_is_told_what_the_pipeline_tells_it(pipes, name):
    pipe, size = pipes(name), SIZES.get(name, (8, 12))
    z = data(channels_of(pipe), size).float()
    with told(pipe) as calls, torch.no_grad():
        inversion = dg.invert(pipe, z, prompt="a red ball", steps=2, iterations=0)
        pipe(**usual(name, pipe, size) | inversion.call(pipe))
    names = ("x", "t", "cap_feats") if name == "z-image" else ("hidden_states", "timestep", "encoder_hidden_states")
    ours, theirs = (dict(zip(names, args, strict=False)) | given for args, given in (calls[1], calls[2]))
    for key in sorted(set(ours) | {k for k, v in theirs.items() if v is not None and k != "joint_attention_kwargs"}):
        mine, wanted = ours.get(key), theirs.get(key)
        if key in (names[0], "attention_kwargs", "return_dict", "added_cond_kwargs"):
            continue
        for a, b in zip(*([t] if isinstance(t, torch.Tensor) else list(t or ()) for t in (mine, wanted)), strict=True):
            assert a == b if not isinstance(a, torch.Tensor) else torch.allclose(a.float(), b.float()), key
    kept = inversion.latents
    start = calls[2][0][0] if calls[2][0] else calls[2][1][names[0]]
    start = torch.stack(list(start))[:, :, 0] if isinstance(start, list) else start
    assert torch.allclose(start.flatten(1).sort().values, kept.flatten(1).sort().values, atol=1e-6)


@pytest.mark.parametrize("name", ["qwen", "klein", "chroma"])
def test_pictures_and_latents_are_the_pipelines_own(pipes, name):
    pipe, size = pipes(name), SIZES.get(name, (8, 12))
    given = usual(name, pipe, size) | {"num_inference_steps": 1, "output_type": "np"}
    with last(pipe) as seen, torch.no_grad():
        wanted = pipe(**given, generator=torch.Generator().manual_seed(0)).images
    got = decode_latents(pipe, as_latents(pipe, name, seen[0], size), "np")
    assert abs(got - wanted).max() <= 1e-5
    clean = encode_image(pipe, torch.from_numpy(wanted).movedim(-1, 1))
    assert clean.shape == (1, channels_of(pipe), *size)
    assert torch.allclose(scaled(pipe, unscaled(pipe, clean)), clean, atol=1e-5)


@pytest.mark.parametrize("name", PIPES)
def test_a_startpoint_filter_takes_what_was_inverted(pipes, name):
    pipe, size = pipes(name), SIZES.get(name, (8, 12))
    z = data(channels_of(pipe), size).float()
    inversion = dg.invert(pipe, z, steps=2, iterations=0)
    call = usual(name, pipe, size) | inversion.call(pipe)
    with torch.no_grad(), told(pipe) as calls, dg.graft(pipe, dg.StartpointFilter(0.5)):
        pipe(**call)
    start = calls[0][0][0] if calls[0][0] else calls[0][1].get("x", calls[0][1].get("hidden_states"))
    start = torch.stack(list(start))[:, :, 0] if isinstance(start, list) else start
    wanted = dg.StartpointFilter(0.5)(as_latents(pipe, name, inversion.latents, size))
    assert torch.allclose(as_latents(pipe, name, start, size), wanted, atol=1e-5)


def test_films_and_others_are_refused():
    with pytest.raises(dg.UnsupportedPipelineError, match="WanTransformer3DModel cannot be inverted"):
        dg.invert(tp.wan(), torch.zeros(1, 4, 8, 8))

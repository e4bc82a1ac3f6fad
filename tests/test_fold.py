"""Candidates of one picture in one row: exact, and cheap."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_family_pipelines as tp
import tiny_transformers as tt
import torch
from PIL import Image
from test_redirection_joint import run
from torch.utils.flop_counter import FlopCounterMode

import diffgraft as dg
from diffgraft.pipelines.families.latents import channels_of
from diffgraft.pipelines.grafting import calls

MAKE = {"flux": tt.flux, "chroma": tp.chroma, "klein": tp.klein}


def candidates(pipe, n, size, hole):
    """Latents that differ in the hole alone, packed as the pipeline takes them."""
    noise = torch.randn(n, channels_of(pipe), *size, generator=torch.Generator().manual_seed(4))
    return torch.where(hole, noise, noise[:1])


@pytest.mark.parametrize("name", MAKE)
def test_rows_that_differ_in_the_hole_are_one_row(monkeypatch, name):
    pipe, size = MAKE[name](), (8, 8) if name == "klein" else (16, 16)
    mask = np.zeros((16, 16), bool)
    mask[4:8, 2:8] = True
    hole = torch.nn.functional.adaptive_max_pool2d(torch.from_numpy(mask)[None].float(), size) > 0
    z, rows = candidates(pipe, 3, size, hole), []
    hook = pipe.transformer.x_embedder.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[:2]))
    from diffgraft.pipelines.families.loop import loop_for

    call = {"n": 3, "num_inference_steps": 1, "latents": loop_for(pipe).hand_over(z)}
    with dg.graft(pipe, dg.SelfAttentionRedirection(mask, scale=1.0)) as g:
        got = run(name, pipe, **call)
    assert rows[-1] == (1, 64 + 2 * 6) and g.report().rows == [1]
    with monkeypatch.context() as patched:
        patched.setattr(calls, "fold_rows", lambda run, active, inputs: inputs)
        with dg.graft(pipe, dg.SelfAttentionRedirection(mask, scale=1.0)):
            wanted = run(name, pipe, **call)
    assert rows[-1] == (3, 64)
    hook.remove()
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (got[1:] - got[:1]).abs().amax() > 1e-2


def test_other_rows_stay_rows():
    """Another background, guidance, a branch, layers that are left alone: each would see what is in the hole."""
    pipe, mask, seen = tt.flux(), np.zeros((16, 16), bool), []
    mask[4:8, 2:8] = True
    z = candidates(pipe, 2, (16, 16), torch.from_numpy(mask))
    hook = pipe.transformer.x_embedder.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    other = z.clone()
    other[1, :, 15, 15] += 1
    for latents, settings in ((other, {"scale": 1.0}), (z, {"scale": 3.0}), (z, {"scale": 1.0, "layers": "late"})):
        with dg.graft(pipe, dg.SelfAttentionRedirection(mask, **settings)):
            run("flux", pipe, 2, num_inference_steps=1, latents=dg.plugins.startpoint.pack(latents))
    hook.remove()
    assert seen == [2, 4, 2]


def test_four_candidates_cost_little_more_than_one():
    """A hole of a tenth of the picture."""
    pipe, picture = tt.flux(), Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8))
    mask = np.zeros((80, 80), bool)
    mask[20:44, 24:48] = True
    how = {"seed": 1, "steps": 2, "grow": 0, "feather": 0, "crop": False, "max_sequence_length": 16}
    flops, made = [], []
    for more in ({}, {"n": 4, "batch_size": 4, "shared": True}):
        with FlopCounterMode(display=False) as counter:
            made.append(dg.erase(pipe, picture, mask, **how, **more))
        flops.append(counter.get_flop_counts()["FluxTransformer2DModel"])
    one, four = (sum(each.values()) for each in flops)
    assert 1.2 * one < four <= 1.6 * one
    assert made[1][0].tobytes() == made[0].tobytes()
    assert len({out.tobytes() for out in made[1]}) == 4

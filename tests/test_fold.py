"""Candidates of one picture in one row: exact, and cheap."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_transformers as tt
import torch
from PIL import Image
from test_redirection_joint import PIPES, run
from torch.utils.flop_counter import FlopCounterMode

import diffgraft as dg
from diffgraft.pipelines.families.latents import channels_of
from diffgraft.pipelines.families.loop import loop_for
from diffgraft.pipelines.grafting import calls

MAKE = {name: make for name, (make, _) in PIPES.items() if name != "pixart"}
HIDE = {"scale": 1.0}


def candidates(pipe, n, size, hole):
    """Latents that differ in the hole alone, as the pipeline takes them."""
    noise = torch.randn(n, channels_of(pipe), *size, generator=torch.Generator().manual_seed(4))
    return loop_for(pipe).hand_over(torch.where(hole, noise, noise[:1]))


def shapes_of(module, seen):
    """Notes (rows, tokens) of what a layer gets; returns the undo."""

    def before(_, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        seen.append(tuple(x.shape[:2]))

    return module.register_forward_pre_hook(before, with_kwargs=True)


@pytest.mark.parametrize("name", MAKE)
def test_rows_that_differ_in_the_hole_are_one_row(monkeypatch, name):
    pipe, size = MAKE[name](), (8, 8) if name == "klein" else (16, 16)
    mask = np.zeros((16, 16), bool)
    mask[4:8, 2:8] = True
    hole = torch.nn.functional.adaptive_max_pool2d(torch.from_numpy(mask)[None].float(), size) > 0
    call = {"n": 3, "num_inference_steps": 1, "latents": candidates(pipe, 3, size, hole)}
    with dg.graft(pipe, dg.SelfAttentionRedirection(mask, **HIDE)) as g:
        seen = {layer.name: [] for layer in g.layers if layer.kind != "text"}
        undos = [shapes_of(layer.module, seen[layer.name]) for layer in g.layers if layer.name in seen]
        got = run(name, pipe, **call)
        assert g.report().rows == [1]
    with monkeypatch.context() as patched:
        patched.setattr(calls, "fold_rows", lambda run, active, inputs: None)
        with dg.graft(pipe, dg.SelfAttentionRedirection(mask, **HIDE)):
            wanted = run(name, pipe, **call)
    for undo in undos:
        undo.remove()
    assert seen and all(one == (1, tokens + 2 * 6) for one, (_, tokens) in seen.values())
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (got[1:] - got[:1]).abs().amax() > 1e-2
    assert not pipe.transformer._forward_hooks and not pipe.transformer._forward_pre_hooks


def test_other_rows_stay_rows():
    """Another background, guidance, a branch, layers that are left alone: each would see what is in the hole."""
    pipe, mask, seen = tt.flux(), np.zeros((16, 16), bool), []
    mask[4:8, 2:8] = True
    z = candidates(pipe, 2, (16, 16), torch.from_numpy(mask))
    hook = shapes_of(pipe.transformer.single_transformer_blocks[-1].attn, seen)
    other = z.clone()
    other[1, -1] += 1
    for latents, settings in ((other, {"scale": 1.0}), (z, {"scale": 3.0}), (z, {"scale": 1.0, "layers": "late"})):
        with dg.graft(pipe, dg.SelfAttentionRedirection(mask, **settings)):
            run("flux", pipe, 2, num_inference_steps=1, latents=latents)
    hook.remove()
    assert [rows for rows, _ in seen] == [2, 4, 2]


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_blocks_get_one_row_and_a_model_compiled_whole_all_of_them(whole):
    pipe, mask = tt.flux(), np.zeros((16, 16), bool)
    mask[4:8, 2:8] = True
    call = {"n": 2, "num_inference_steps": 1, "latents": candidates(pipe, 2, (16, 16), torch.from_numpy(mask))}
    with dg.graft(pipe, dg.SelfAttentionRedirection(mask, **HIDE)):
        wanted = run("flux", pipe, **call)
    torch._dynamo.reset()
    if whole:
        pipe.transformer.compile(backend="eager")
    else:
        pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    with dg.graft(pipe, dg.SelfAttentionRedirection(mask, **HIDE)) as g:
        got = run("flux", pipe, **call)
        seen = g.report().rows
    assert seen == [2 if whole else 1]
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


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

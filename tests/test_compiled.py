"""Compiled models stay compiled under a graft: no graph breaks, few compilations, and what the eager graft computes."""

from __future__ import annotations

import pytest
import tiny
import tiny_transformers
import torch
from PIL import Image
from torch._dynamo.utils import counters

import diffgraft as dg

PICTURE = Image.new("RGB", (32, 32), "teal")
MASK = Image.new("L", (32, 32))
MASK.paste(255, (0, 0, 12, 12))
PLUGINS = {
    "nasa": lambda: dg.NegativeAway("red", start=0.3),
    "nag": lambda: dg.NegativeAway("red", rule="nag", start=0.3),
    "vsf": lambda: dg.NegativeAway("red", rule="vsf", start=0.3),
    "redirection": lambda: dg.SelfAttentionRedirection(MASK, suppression_steps=0, start=0.3),
    "styleid": lambda: dg.StyleInjection(PICTURE, start=0.3),
    "stylealigned": lambda: dg.StyleInjection(PICTURE, method="stylealigned", start=0.3),
    "startpoint": lambda: dg.StartpointFilter(),
}


class Counted:
    """A backend that counts graphs by the code that they are made of, and runs them as they are."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def compile_by(pipe, how, backend):
    """Compile the denoiser one way; the undo."""
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    denoiser = getattr(pipe, name)
    if how == "torch.compile":
        setattr(pipe, name, torch.compile(denoiser, backend=backend, fullgraph=True))
    elif how == "module.compile":
        denoiser.compile(backend=backend, fullgraph=True)
    else:
        denoiser.compile_repeated_blocks(backend=backend, fullgraph=True)
    compiled = [module for module in denoiser.modules() if module._compiled_call_impl is not None]

    def undo():
        setattr(pipe, name, denoiser)
        for module in compiled:
            module._compiled_call_impl = None

    return undo


def check(pipe, how, plugin, call, steps=10):
    """Runs plain, grafted and plain again, compiled; then grafted, eager."""
    backend = Counted()
    undo = compile_by(pipe, how, backend)
    try:
        call = {"num_inference_steps": steps, **call}
        plain = tiny.sample(pipe, **call)
        before = backend.graphs
        with dg.graft(pipe, plugin()) as g:
            compiled = tiny.sample(pipe, **call)
        grafted = backend.graphs - before
        again = tiny.sample(pipe, **call)
    finally:
        undo()
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert before > 0 and backend.graphs == before + grafted and torch.equal(plain, again)
    with dg.graft(pipe, plugin()):
        eager = tiny.sample(pipe, **call)
    assert not torch.equal(eager, plain) and torch.allclose(eager, compiled, rtol=0, atol=1e-5)
    assert g.report().calls == steps
    return before, grafted


@pytest.mark.parametrize("plugin", PLUGINS)
def test_compiled_blocks_stay_compiled(sd15, plugin):
    """Before the window a block is compiled with nothing to do and in it with its work; a block without edits again
    where rows are joined to the batch.
    """
    before, grafted = check(sd15, "compile_repeated_blocks", PLUGINS[plugin], {"guidance_scale": 1.0}, steps=4)
    assert grafted <= (3 if plugin.startswith("style") else 2) * before


@pytest.mark.parametrize(("how", "plugin"), [("torch.compile", "nasa"), ("module.compile", "redirection")])
def test_a_model_that_is_compiled_whole_stays_compiled(how, plugin):
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    pipe = tiny.sd15(unet=tiny.unet(layers_per_block=1, down_block_types=down, up_block_types=up))
    before, grafted = check(pipe, how, PLUGINS[plugin], {"guidance_scale": 1.0}, steps=4)
    assert before == 1 and grafted <= 2


def test_joint_attention_stays_compiled_block_by_block():
    """The negative rides in the sequence, so a block is compiled for the longer one as well."""
    pipe = tiny_transformers.flux()
    before, grafted = check(pipe, "compile_repeated_blocks", PLUGINS["nag"], {"guidance_scale": 1.0})
    assert 0 < grafted <= 2 * before

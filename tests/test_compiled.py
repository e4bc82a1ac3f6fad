"""Compiled models stay compiled under a graft: no graph breaks, few compilations, and what the eager graft computes."""

from __future__ import annotations

import contextlib
from collections import Counter

import pytest
import test_families as families
import tiny
import tiny_families
import tiny_transformers
import torch
from PIL import Image
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler

import diffgraft as dg
from diffgraft.pipelines.families import adapters_for
from diffgraft.pipelines.families.hear import blocks
from diffgraft.pipelines.grafting.compiled import own_graphs

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
    "rows": lambda: dg.NegativeAway("red", form="rows", start=0.3),
    "concept": lambda: dg.ConceptBlock("ball", threshold=-2, start=0.3),
    "concept nasa": lambda: dg.ConceptBlock("ball", threshold=-2, rule="nasa", start=0.3),
}


class Counted:
    """A backend that runs graphs as they are, and counts how many there are and how often they ran."""

    def __init__(self):
        self.graphs = self.runs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1

        def run(*given):
            assert not torch.is_grad_enabled()  # a probe is never compiled code
            self.runs += 1
            return graph.forward(*given)

        return run


@pytest.fixture(autouse=True)
def fresh(request):
    """Nothing is compiled yet, but for the tests of a class, which go on with what the first of them compiled."""
    counters.clear()
    if request.cls is not None:
        yield
        return
    torch.compiler.reset()
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
    elif denoiser._repeated_blocks:
        denoiser.compile_repeated_blocks(backend=backend, fullgraph=True)
    else:
        for block in denoiser.transformer_blocks:
            block.compile(backend=backend, fullgraph=True)
    compiled = [module for module in denoiser.modules() if module._compiled_call_impl is not None]

    def undo():
        setattr(pipe, name, denoiser)
        for module in compiled:
            module._compiled_call_impl = None

    return undo


@contextlib.contextmanager
def counting(denoiser, backend):
    """How many graphs were made while each compiled part ran."""
    made, before = Counter(), Counter()

    @torch.compiler.disable
    def note(module, *given):
        made[module] += backend.graphs - before[module] if len(given) > 1 else 0
        before[module] = backend.graphs

    parts = [part for part in denoiser.modules() if part._compiled_call_impl is not None]
    handles = [f(note) for x in parts for f in (x.register_forward_pre_hook, x.register_forward_hook)]
    yield made
    for handle in handles:
        handle.remove()


def check(pipe, how, plugin, call, steps=10):
    """Runs plain, grafted and plain again, compiled; then grafted, eager. No part is compiled more than twice more."""
    backend = Counted()
    undo = compile_by(pipe, how, backend)
    try:
        call = {"num_inference_steps": steps, **call}
        plain = tiny.sample(pipe, **call)
        before = backend.graphs
        with dg.graft(pipe, plugin()) as g, counting(adapters_for(pipe)[0].denoiser, backend) as made:
            compiled = tiny.sample(pipe, **call)
        grafted = backend.graphs - before
        again = tiny.sample(pipe, **call)
    finally:
        undo()
    assert not any("forward" in module.__dict__ for module in adapters_for(pipe)[0].denoiser.modules())
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert before > 0 and backend.graphs == before + grafted and torch.equal(plain, again)
    assert max(made.values(), default=0) <= 2
    with dg.graft(pipe, plugin()):
        eager = tiny.sample(pipe, **call)
    assert not torch.equal(eager, plain) and torch.allclose(eager, compiled, rtol=0, atol=1e-5)
    assert g.report().calls == steps
    return before, grafted


@pytest.fixture(scope="module")
def small():
    """The smallest UNet in which rows join on the way and every kind of layer is there."""
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    return tiny.sd15(unet=tiny.unet(layers_per_block=1, down_block_types=down, up_block_types=up))


@pytest.fixture(scope="class")
def blocks_of(small):
    """(pipe, backend, its call, what it draws plain): compiled once, block by block, and edited by one technique after
    the other.
    """
    torch.compiler.reset()
    backend, call = Counted(), {"num_inference_steps": 10, "guidance_scale": 1.0}
    undo = compile_by(small, "compile_repeated_blocks", backend)
    yield small, backend, call, tiny.sample(small, **call)
    undo()
    torch.compiler.reset()


class TestBlocks:
    @pytest.mark.parametrize("plugin", [name for name in PLUGINS if name not in ("nag", "concept")])  # further down
    def test_stay_compiled(self, blocks_of, plugin):
        """A block that is edited is compiled twice: before the window with nothing to do, and in it with its work. One
        that is not edited is compiled once more where a reference's rows come in before it, as for two pictures; that
        graph is the plain code's.
        """
        pipe, backend, call, plain = blocks_of
        graphs, own = backend.graphs, plain_graphs(pipe.unet)
        with dg.graft(pipe, PLUGINS[plugin]()) as g, counting(pipe.unet, backend) as made:
            compiled = tiny.sample(pipe, **call)
        more, grafted = plain_graphs(pipe.unet) - own, backend.graphs - graphs
        assert more <= 1 and grafted - more <= 2 and max(made.values()) <= 2
        assert not counters["graph_break"], dict(counters["graph_break"])
        assert g.report().calls == 10 and not any("forward" in vars(module) for module in pipe.unet.modules())
        assert torch.equal(tiny.sample(pipe, **call), plain) and backend.graphs == graphs + grafted
        with torch.compiler.set_stance("force_eager"), dg.graft(pipe, PLUGINS[plugin]()):
            runs, eager = backend.runs, tiny.sample(pipe, **call)
        assert backend.runs == runs
        assert not torch.equal(eager, plain) and torch.allclose(eager, compiled, rtol=0, atol=1e-5)


def plain_graphs(denoiser):
    """How many graphs torch keeps of the code that compiled blocks of one class share."""
    (code,) = {type(x).forward.__code__ for x in denoiser.modules() if x._compiled_call_impl is not None}
    return len(_debug_get_cache_entry_list(code))


@pytest.mark.parametrize(("how", "plugin", "most"), [
    ("torch.compile", PLUGINS["nasa"], 2),
    ("module.compile", lambda: dg.SelfAttentionRedirection(MASK, suppression_steps=0), 1),
])  # fmt: skip
def test_a_model_that_is_compiled_whole_stays_compiled(how, plugin, most):
    """One level and one layer: torch takes its time for each."""
    level = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    pipe = tiny.sd15(unet=tiny.unet(layers_per_block=1, block_out_channels=(32,), **level))
    before, grafted = check(pipe, how, plugin, {"guidance_scale": 1.0}, steps=4)
    assert before == 1 and grafted <= most


def test_joint_attention_stays_compiled_block_by_block():
    """The negative rides in the sequence, so a block is compiled for the longer one as well. Of SD3.5's class there are
    three kinds, each of which a window compiles twice: with the plain graphs that is more than torch's eight.
    """
    pipe = tiny_transformers.sd3()
    before, grafted = check(pipe, "compile_repeated_blocks", PLUGINS["nag"], {"guidance_scale": 1.0}, steps=4)
    assert (before, grafted) == (3, 6) and torch._dynamo.config.recompile_limit == 8


def test_joint_attention_stays_compiled_whole():
    """The negative joins in front of the first block, inside of the model's one graph."""
    pipe = tiny_transformers.flux()
    del pipe.transformer.transformer_blocks[1:], pipe.transformer.single_transformer_blocks[1:]
    before, grafted = check(pipe, "torch.compile", PLUGINS["nasa"], {"guidance_scale": 1.0}, steps=10)
    assert before == 1 and grafted <= 2


def test_qwen_image_stays_compiled_whole():
    """The tiny one has no text encoder: its texts are embeddings."""
    pipe, texts = tiny_transformers.qwen(), torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(8))
    del pipe.transformer.transformer_blocks[1:]
    call = {"prompt": None, "prompt_embeds": texts[:1], "height": 16, "width": 16, "true_cfg_scale": 1.0}
    away = lambda: dg.NegativeAway(texts[1:, :4], start=0.3)  # noqa: E731
    assert check(pipe, "torch.compile", away, call, steps=4) == (1, 2)


@pytest.mark.parametrize(("name", "form", "whole"), [
    ("ZImageTransformer2DModel", "rows", False), ("ZImageTransformer2DModel", "streams", True),
    ("WanTransformer3DModel", "streams", False), ("PRXTransformer2DModel", "streams", False),
])  # fmt: skip
def test_models_stay_compiled_wherever_text_meets_image(name, form, whole):
    """In one sequence, across, and as keys of both."""
    texts, model, backend = families.texts_of(name, (7, 7)), tiny_families.denoiser(name), Counted()
    plugin = families.away(name, texts[1], form=form, scale=0.5)
    adapter = adapters_for(tiny_families.bare(name))[0]
    compiled = [model] if whole else [block for meet in adapter.spec.meets for block in blocks(model, meet)]
    eager, _ = families.steered(name, texts, plugin)
    try:
        for block in compiled:
            block.compile(backend=backend, fullgraph=True)
        with torch.no_grad():
            model(**families.TINY[name].call(texts[:1]))
        before = backend.graphs, backend.runs
        got, _ = families.steered(name, texts, plugin)
    finally:
        for block in compiled:
            block._compiled_call_impl = None
    assert backend.graphs - before[0] <= 2 * before[0] and backend.runs == 2 * before[1] > 0
    assert not counters["graph_break"] and (got - eager).abs().max() <= 1e-5 * eager.abs().max()


def test_a_copy_of_a_block_s_code_goes_with_its_last_user(small):
    """Of two grafts at once the second finds the first one's; whoever wraps it meanwhile keeps it."""
    block = next(x for name, x in small.unet.named_modules() if name.endswith("transformer_blocks.0"))
    block._compiled_call_impl = lambda: None
    before, code = dict(block.__dict__), lambda: block.forward.__func__.__code__
    with own_graphs([block], {block.attn1}, "one"):
        one = code()
        assert one is not type(block).forward.__code__ and one == type(block).forward.__code__
    assert block.__dict__ == before
    first, second = (own_graphs([block], {block.attn1}, kind) for kind in ("one", "two"))
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert code() is one  # also of the graph that was made before
    second.__exit__(None, None, None)
    assert "forward" not in block.__dict__
    with own_graphs([block], {block.attn1}, "two"):
        assert code() is not one
        wrapper = block.__dict__["forward"] = lambda: None
    assert block.__dict__.pop("forward") is wrapper and block.__dict__ == before
    block._compiled_call_impl = None


def seen(pipe, plugins, steps=3):
    """Latents under compiled blocks, how often compiled code ran, and the latents without it; plain code before and
    after is the same.
    """
    backend, call = Counted(), {"num_inference_steps": steps, "guidance_scale": 1.0}
    undo = compile_by(pipe, "compile_repeated_blocks", backend)
    try:
        plain = tiny.sample(pipe, **call)
        before, graphs = backend.runs, backend.graphs
        with dg.graft(pipe, *plugins()):
            compiled = tiny.sample(pipe, **call)
        runs, made = backend.runs - before, backend.graphs
        assert torch.equal(tiny.sample(pipe, **call), plain) and backend.graphs == made
        assert backend.runs == 2 * before + runs and made <= 3 * graphs
    finally:
        undo()
    with dg.graft(pipe, *plugins()):
        eager = tiny.sample(pipe, **call)
    assert not torch.equal(eager, plain) and torch.allclose(eager, compiled, rtol=0, atol=1e-5)
    assert not counters["graph_break"]
    return runs, before


@pytest.mark.parametrize(("previous", "compiled"), [("pre", 3), ("post", 1)])
def test_probes_for_gradients_run_eager_and_the_prediction_compiled(small, previous, compiled):
    """The probes have gradients on, which the backend refuses. "post" records maps in the first two predictions."""
    plugins = lambda: [dg.AttentionSegregation(["ball", "star"], previous=previous), dg.NegativeAway("red")]  # noqa: E731
    runs, plain = seen(small, plugins)
    assert runs == plain * compiled // 3


class Halved(dg.Edit):
    def selects(self, layer):
        return layer.kind == "cross" and layer.place == "up"

    def out(self, call, out):
        return out / 2


class Half(dg.Plugin):
    def edits(self):
        return [Halved()]


def test_an_edit_that_says_nothing_runs_eager_in_its_own_blocks_only(small):
    up = sum(name.startswith("up") for name, x in small.unet.named_modules() if name.endswith("transformer_blocks.0"))
    every = sum(name.endswith("transformer_blocks.0") for name, _ in small.unet.named_modules())
    runs, plain = seen(small, lambda: [Half()])
    assert 0 < runs == plain * (every - up) // every


def test_the_first_step_of_a_blocked_concept_runs_eager(small):
    runs, plain = seen(small, lambda: [PLUGINS["concept"]()])
    assert runs == plain * 2 // 3  # before the window, and behind the first step in it


def test_maps_are_captured_eager_and_leave_compiled_blocks_alone(small):
    words, backend = ["ball", "star"], Counted()
    call = {"seed": 1, "steps": 2, "height": 32, "width": 32}
    eager = dg.attention_maps(small, "a red ball and a blue star", words, **call)
    undo = compile_by(small, "compile_repeated_blocks", backend)
    try:
        plain = tiny.sample(small, num_inference_steps=2)
        runs, graphs = backend.runs, backend.graphs
        compiled = dg.attention_maps(small, "a red ball and a blue star", words, **call)
        assert backend.runs == runs
        assert torch.equal(tiny.sample(small, num_inference_steps=2), plain) and backend.graphs == graphs
    finally:
        undo()
    assert all(torch.equal(compiled[word], eager[word]) for word in words)


def compiler():
    """The C++ compiler that inductor would use, None without one."""
    with contextlib.suppress(InvalidCxxCompiler):
        return cpp_builder.get_cpp_compiler()
    return None


@pytest.mark.skipif(compiler() is None, reason="inductor finds no C++ compiler here: apt-get install g++")
def test_inductor_gives_what_the_eager_graft_gives(small):
    """One layer is enough: it is the layer that is edited. Without vectors, which take longest to be asked for."""
    layer = next(x.module for x in dg.find_layers(small.unet) if x.kind == "cross")
    call, plugin = {"num_inference_steps": 2, "guidance_scale": 1.0}, dg.NegativeAway("red", rule="nag")
    plain = tiny.sample(small, **call)
    with dg.graft(small, plugin):
        eager = tiny.sample(small, **call)
    layer.compile(fullgraph=True)
    try:
        with dg.graft(small, plugin), inductor.patch({"cpp.simdlen": 1, "cpp_cache_precompile_headers": False}):
            compiled = tiny.sample(small, **call)
    finally:
        layer._compiled_call_impl = None
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1
    assert torch.allclose(compiled, eager, rtol=0, atol=1e-5) and not torch.allclose(compiled, plain, rtol=0, atol=1e-4)

"""Shared style in sequences of text and image: layers and runs against explicit attention, rotary keys, sets."""

from __future__ import annotations

import math

import pytest
import tiny
import tiny_family_pipelines as tp
import tiny_transformers as tt
import torch
import torch.nn.functional as F
from PIL import Image
from plugins_for_tests import fingerprint
from test_redirection_joint import PIPES, run
from torch.overrides import TorchFunctionMode

import diffgraft as dg
from diffgraft.attention.call import AttentionCall
from diffgraft.attention.edit import attend
from diffgraft.attention.layer import AttentionLayer
from diffgraft.attention.step import Step
from diffgraft.pipelines.families.latents import channels_of
from diffgraft.plugins.rotary import Rotary, turned, weighted
from diffgraft.plugins.style_joint import Guest, JointStyle, Manner

SDPA = F.scaled_dot_product_attention
GRID = (3, 4)


def statistics_of(x, like):
    """AdaIN by hand, over tokens."""
    deviation = ((like.var(-2, keepdim=True) + 1e-5) / (x.var(-2, keepdim=True) + 1e-5)).sqrt()
    return (x - x.mean(-2, keepdim=True)) * deviation + like.mean(-2, keepdim=True)


def explicit(q, k, v, mask, scale, image, source, method="stylealigned", heat=1.5, seen=lambda keys: keys):
    """Rows whose image queries see the reference's image as well, by all logits; `source` is a row for each, `seen`
    what the reference's keys are seen as.
    """
    out, shift = [], math.log(2)
    for row, ref in enumerate(source):
        q1, k1, v1, k2, v2 = q[row], k[row], v[row], seen(k[ref][:, image]), v[ref][:, image]
        m = torch.zeros(q1.shape[-2], k1.shape[-2], dtype=q.dtype) if mask is None else mask[row % len(mask), 0]
        m = m.expand(q1.shape[-2], -1)
        plain = ((q1 @ k1.mT) * scale + m).softmax(-1) @ v1
        words = torch.ones(k1.shape[-2], dtype=torch.bool)
        words[image] = False
        if method == "styleid":
            q1 = q1 * heat
            keys, values = torch.cat([k1[:, words], k2], 1), torch.cat([v1[:, words], v2], 1)
            bias = torch.cat([m[:, words], m.new_zeros(len(m), k2.shape[1])], 1)
        else:
            q1, k1 = q1.clone(), k1.clone()
            q1[:, image], k1[:, image] = (statistics_of(a[row][:, image], a[ref][:, image]) for a in (q, k))
            keys, values = torch.cat([k1, k2], 1), torch.cat([v1, v2], 1)
            m = m.clone()
            m[:, image] = 0
            bias = torch.cat([m, m.new_full((len(m), k2.shape[1]), shift)], 1)
        styled = ((q1 @ keys.mT) * scale + bias).softmax(-1) @ values
        plain[:, image] = styled[:, image]
        out.append(plain)
    return torch.stack(out)


def aside(keys):
    """Keys [H, N, 8] turned by a picture's width along the columns and weighted, as complex numbers."""
    angle = torch.zeros(4, dtype=torch.float64)
    angle[2:] = GRID[1] * 100.0 ** -torch.tensor([0.0, 0.5], dtype=torch.float64)
    factors = torch.tensor([1.2, 0.5, 0.5, 1.2], dtype=torch.float64)  # not spatial; the only, the highest, the lowest
    turned_on = torch.view_as_complex(keys.unflatten(-1, (4, 2)).contiguous()) * torch.polar(factors, angle)
    return torch.view_as_real(turned_on).flatten(-2)


@pytest.mark.parametrize("method", ["stylealigned", "styleid"])
def test_a_layer_with_a_reference_moved_aside_by_hand(method):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, 17, 8, generator=g, dtype=torch.float64) for _ in "qkv")
    step = Step(0, 10, size=GRID, rows={"cond": slice(0, 2), "style": slice(2, 3)}, likes={"style": "cond"})
    call = AttentionCall(AttentionLayer("a", None, "joint", "block", 0), q, k, v, None, 0.3, 0, step, slice(0, 5))
    manner = Manner(method, 1.0, 0.75, 1.5, math.log(2), 1.0, (0.5, 1.2), Rotary((2, 2, 4), 100.0))
    got = attend(call, [JointStyle("cond", {"a"}, manner, False)])[:2]
    wanted = explicit(q, k, v, None, 0.3, slice(5, 17), [2, 2], method, seen=aside)
    assert (got - wanted).abs().max() <= 1e-10
    assert (got - explicit(q, k, v, None, 0.3, slice(5, 17), [2, 2], method)).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["stylealigned", "styleid"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_a_layer_by_hand(method, first, masked):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, 17, 8, generator=g, dtype=torch.float64) for _ in "qkv")
    text = slice(0, 5) if first else slice(12, 17)
    image = slice(5, 17) if first else slice(0, 12)
    mask = None
    if masked:  # of text columns alone, as models have it
        mask = torch.zeros(3, 1, 1, 17, dtype=torch.float64)
        mask[..., text] = torch.randn(3, 1, 1, 5, generator=g, dtype=torch.float64)
    layer = AttentionLayer("a.attn", None, "joint", "block", 0)
    step = Step(0, 10, size=GRID, rows={"cond": slice(0, 2), "style": slice(2, 3)}, likes={"style": "cond"})
    manner = Manner(method, 1.0, 0.75, 1.5, math.log(2))
    edit = JointStyle("cond", {"a.attn"}, manner, False)
    got = attend(AttentionCall(layer, q, k, v, mask, 8**-0.5, 0, step, text), [edit])
    wanted = explicit(q, k, v, mask, 8**-0.5, image, [2, 2], method)
    assert (got[:2] - wanted).abs().max() <= 1e-10
    assert torch.equal(got[2:], SDPA(q, k, v, mask, scale=8**-0.5)[2:])
    half = JointStyle("cond", {"a.attn"}, Manner(method, 0.5, 0.75, 1.5, math.log(2)), False)
    plain = SDPA(q, k, v, mask, scale=8**-0.5)
    between = attend(AttentionCall(layer, q, k, v, mask, 8**-0.5, 0, step, text), [half])
    assert (between[:2] - (plain[:2] + wanted) / 2).abs().max() <= 1e-10


def test_a_contents_queries_are_kept():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, 17, 8, generator=g, dtype=torch.float64) for _ in "qkv")
    step = Step(0, 10, size=GRID, rows={"cond": slice(0, 1), "style": slice(1, 2), "content": slice(2, 3)})
    call = AttentionCall(AttentionLayer("a", None, "joint", "block", 0), q, k, v, None, 1.0, 0, step, slice(0, 5))
    edit = JointStyle("cond", {"a"}, Manner("styleid", 1.0, 1.0, 1.0, 0.0), False)
    got = attend(call, [edit])[:1]
    keys, values = (torch.cat([t[:1, :, :5], t[1:2, :, 5:]], 2) for t in (k, v))
    assert (got[:, :, 5:] - SDPA(q[2:, :, 5:], keys, values, scale=1.0)).abs().max() <= 1e-10


# -- rotary ----------------------------------------------------------------------------------------------------------


def test_keys_are_turned_as_the_models_turn_them():
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    k = torch.randn(1, 2, 12, 16, generator=torch.Generator().manual_seed(0))
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(3.0), torch.arange(4.0))
    embed, rotary = FluxPosEmbed(10000, (4, 6, 6)), Rotary((4, 6, 6))
    here = apply_rotary_emb(k, embed(ids))
    there = apply_rotary_emb(k, embed(ids + torch.tensor([0.0, 2.0, 4.0])))
    assert torch.allclose(turned(here, rotary, (0.0, 2.0, 4.0)), there, atol=1e-5)
    assert torch.allclose(weighted(here, rotary, 0.3, 1.2), apply_rotary_emb(weighted(k, rotary, 0.3, 1.2), embed(ids)))
    assert torch.equal(weighted(here, rotary, 1.0, 1.0), here)
    factors = weighted(torch.ones(16), rotary, 0.25, 1.0)
    assert factors[:4].eq(1).all() and factors[4] == 0.25 and factors[8] == 1 and factors[4] == factors[5]


@pytest.mark.parametrize("name", ["flux", "qwen", "z-image", "chroma", "klein", "lumina2"])
def test_declared_frequencies_are_the_models(pipes, name):
    """Of a picture that is the same everywhere the first keys differ by their places alone."""
    from diffgraft.pipelines.families import adapter_for

    adapter, seen = adapter_for(pipes(name)), []

    class Watch(dg.Edit):
        def selects(self, layer):
            return layer.kind == "joint" or "noise_refiner" in layer.name

        def qkv(self, call):
            image = slice(0, call.step.size[0] * call.step.size[1]) if call.layer.kind == "self" else call.asked
            seen.append(call.k[:1, :, image].unflatten(2, call.step.size))

    class Watcher(dg.Plugin):
        def edits(self):
            return [Watch()]

    flat = torch.ones(1, channels_of(pipes(name)), *size_of(name)) * 0.5
    with dg.graft(pipes(name), Watcher()):
        run(name, pipes(name), num_inference_steps=1, latents=handed(adapter, name, flat), **told(name))
    k, rotary = seen[0], adapter.rotary
    rows, columns = (turned(k, rotary, (0.0, *by)) for by in ((1.0, 0.0), (0.0, 1.0)))
    assert torch.allclose(rows[:, :, :-1], k[:, :, 1:], atol=1e-4)
    assert torch.allclose(columns[:, :, :, :-1], k[:, :, :, 1:], atol=1e-4)
    assert (k[:, :, 1:] - k[:, :, :-1]).abs().max() > 1e-2 and (k[..., 1:, :] - k[..., :-1, :]).abs().max() > 1e-2


def handed(adapter, name, latent):
    """Latents as the pipeline takes them."""
    return latent if name in ("z-image", "lumina2", "klein") else adapter.as_sample(latent)


# -- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipes():
    made = {}

    def get(name):
        if name not in made:
            made[name] = {"qwen": tp.qwen, "klein": tp.deep_klein}.get(name, PIPES[name][0])()
        return made[name]

    return get


def told(name):
    """What `run` is to be told where the pipeline has its text encoder."""
    if name == "qwen":
        return {"prompt_embeds": None, "prompt_embeds_mask": None, "prompt": ["a red ball"], "true_cfg_scale": 1.0}
    return {"text_encoder_out_layers": (9, 18, 27)} if name == "klein" else {}


JOINT = ["flux", "sd3", "qwen", "z-image", "chroma", "klein", "lumina2"]


def style(pipe, size=(16, 16), n=1):
    return torch.randn(n, channels_of(pipe), *size, generator=torch.Generator().manual_seed(7))


def size_of(name):
    return (8, 8) if name == "klein" else (16, 16)


class Shared(TorchFunctionMode):
    """Explicit shared attention: the last row is the reference of the others; its image stands `ahead` of theirs."""

    def __init__(self, first, tokens, least, ahead=0):
        super().__init__()
        self.first, self.tokens, self.least, self.ahead = first, tokens, least, ahead

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | (kwargs or {})
        if func is not SDPA or given["key"].shape[-2] < self.least:
            return func(*args, **(kwargs or {}))
        q, k, v = (given[name] for name in ("query", "key", "value"))
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        q, k, v = (torch.cat([x[:-1], x[-1:].roll(self.ahead, -2)]) for x in (q, k, v))
        mask, scale = given.get("attn_mask"), given.get("scale") or 1 / math.sqrt(q.shape[-1])
        image = slice(k.shape[-2] - self.tokens, None) if self.first else slice(0, self.tokens)
        plain = func(*args, **(kwargs or {}))
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
        rows = explicit(q, k, v, mask, scale, image, [len(q) - 1] * (len(q) - 1))
        return torch.cat([rows, plain[-1:]])


@pytest.mark.parametrize("name", JOINT)
def test_a_run_is_one_row_more_by_hand(pipes, monkeypatch, name):
    """The reference's latent and empty text beside two oblong pictures' in one batch, attention written out."""
    pipe, size = pipes(name), (16, 24)
    z = style(pipe, (8, 12) if name == "klein" else size)
    two = told(name) | ({"prompt": ["a red ball"] * 2} if name == "qwen" else {})
    with dg.graft(pipe, dg.StyleInjection(z, method="stylealigned", layers="all")) as g:
        got = run(name, pipe, 2, size, num_inference_steps=1, **two)
    [rows] = g.report().rows  # where texts may differ a reference for each picture
    own = slice(2, rows)
    adapter, forwarded = g.adapter, pipe.transformer.forward
    noise = torch.randn(1, *z.shape[1:], generator=torch.Generator().manual_seed(2312090082))

    class Empty(dg.Plugin):
        def begin(self, session, step):
            empty.append(session.encode([""]))

        def moves(self, step):
            return False

    empty = []
    with dg.graft(pipe, Empty()):
        run(name, pipe, num_inference_steps=1, **told(name))

    def forward(*args, **kwargs):
        inputs = adapter.take(adapter.bind(args, kwargs), torch.tensor([0, 1, 0, 1][:rows]))
        inputs = adapter.with_words(inputs, own, empty[0])
        inputs = adapter.with_rows(inputs, own, noise)  # at the first step nothing but noise
        least, ahead = 96 if name == "sd3" else 97, 0  # SD3.5 has layers of the image alone
        if name == "lumina2":  # each row's image follows its own text at once
            lengths = inputs["encoder_attention_mask"].sum(1).tolist()
            ahead = lengths[0] - lengths[2]
            assert ahead > 0
        with Shared(PIPES[name][1], 96, least, ahead):
            return (forwarded(**inputs)[0][:2],)

    monkeypatch.setattr(pipe.transformer, "forward", forward)
    wanted = run(name, pipe, 2, size, num_inference_steps=1, **two)
    assert (got - wanted).abs().max() <= 1e-5 * max(1, wanted.abs().max())


@pytest.mark.parametrize("name", JOINT)
def test_style_comes_in_and_neutral_is_bit_identical(pipes, name):
    pipe, z = pipes(name), style(pipes(name), size_of(name))
    plain = run(name, pipe, **told(name))
    before = fingerprint(pipe)
    for method in ("styleid", "stylealigned"):
        with dg.graft(pipe, dg.StyleInjection(z, method=method, strength=0)):
            assert torch.equal(run(name, pipe, **told(name)), plain)
        with dg.graft(pipe, dg.StyleInjection(z, method=method, start_adain=False)):
            moved = run(name, pipe, **told(name))
        assert (moved - plain).abs().max() > 1e-3 and moved.isfinite().all()
    if name != "sd3":
        with dg.graft(pipe, dg.StyleInjection(z, method="stylealigned", apart=1.0, key_weights=(0.5, 1.1))):
            aside = run(name, pipe, **told(name))
        assert (aside - moved).abs().max() > 1e-4
    with dg.graft(pipe, dg.AttentionDistillation(z, content=z * 0.5)) as g:
        distilled = run(name, pipe, **told(name))
    assert (distilled - plain).abs().max() > 1e-3 and "loss" in str(g.report())
    assert fingerprint(pipe) == before and torch.equal(run(name, pipe, **told(name)), plain)


@pytest.mark.parametrize("name", ["flux", "z-image", "sd15", "pixart"])
def test_the_first_picture_leads_a_set(pipes, name):
    """It stays what it is; the others see it; one picture alone is left alone bit for bit."""
    pipe = tiny.sd15() if name == "sd15" else pipes(name)

    def made(n, *plugins):
        with dg.graft(pipe, *plugins):
            if name == "sd15":
                seeds = [torch.Generator().manual_seed(i) for i in range(n)]
                return tiny.sample(pipe, ["a red ball"] * n, generator=seeds, guidance_scale=4.0)
            return run(name, pipe, n)

    together = dg.StyleInjection(None, method="stylealigned")
    plain, got = made(3), made(3, together)
    assert torch.allclose(got[0], plain[0], atol=1e-4) and (got[1:] - plain[1:]).abs().amax((1, 2)).min() > 1e-3
    assert torch.equal(made(1, together), made(1))


def test_a_set_needs_shared_attention():
    with pytest.raises(dg.SettingError, match="needs a style picture"):
        dg.StyleInjection(None, method="styleid")
    with pytest.raises(dg.SettingTypeError, match="key_weights"):
        dg.StyleInjection(None, method="stylealigned", key_weights=(1.0,))
    with pytest.raises(dg.UnsupportedPipelineError, match="rotary positions"):
        dg.graft(tt.sd3(), dg.StyleInjection(None, method="stylealigned", apart=1.0)).attach()


def test_films_and_linear_attention_are_refused():
    with pytest.raises(dg.UnsupportedPipelineError, match="makes films"):
        dg.graft(tp.wan(), dg.StyleInjection(None, method="stylealigned")).attach()
    with pytest.raises(dg.UnsupportedPipelineError, match="no self-attention layer"):
        dg.graft(tt.sana(), dg.StyleInjection(None, method="stylealigned")).attach()


def test_beside_a_removal_in_the_same_layers_it_says_so(pipes):
    import numpy as np

    mask = np.zeros((16, 16), bool)
    mask[2:6, 2:6] = True
    both = dg.SelfAttentionRedirection(mask, scale=1.0), dg.StyleInjection(style(pipes("flux")), method="stylealigned")
    with pytest.raises(dg.SettingError, match="attention of the same rows"), dg.graft(pipes("flux"), *both):
        run("flux", pipes("flux"))


def test_guests_are_image_tokens_alone():
    step = Step(0, 1, size=GRID, rows={"cond": slice(0, 1)})
    q = torch.arange(17.0).view(1, 1, 17, 1)
    call = AttentionCall(AttentionLayer("a", None, "joint", "block", 0), q, q, q, None, 1.0, 0, step, slice(0, 5))
    guest = Guest(*call.image_part(slice(0, 1)))
    assert guest.k.flatten().tolist() == list(range(5, 17))


@pytest.mark.parametrize("name", JOINT)
def test_stylize_gives_a_picture_of_the_contents_size(pipes, monkeypatch, name):
    pipe = pipes(name)
    monkeypatch.setattr(type(pipe), "default_sample_size", 8, raising=False)
    monkeypatch.setattr(pipe, "default_sample_size", 16)
    content, look = (Image.new("RGB", size, colour) for size, colour in (((37, 29), "teal"), ((20, 30), "red")))
    made = dg.stylize(pipe, content, look, seed=1, steps=2, iterations=1)
    assert made.size == content.size and made.info["diffgraft"]["method"] == "distillation"
    same = dg.stylize(pipe, content, look, seed=1, steps=2, iterations=1, strength=0.0)
    assert same.tobytes() == content.tobytes()
    if name == "flux":
        ways = ("styleid", "stylealigned")
        others = [dg.stylize(pipe, content, look, seed=1, steps=2, iterations=1, method=way) for way in ways]
        assert len({made.tobytes(), *(other.tobytes() for other in others)}) == 3


def test_stylize_says_what_it_cannot(pipes):
    content = Image.new("RGB", (32, 32))
    with pytest.raises(dg.UnsupportedPipelineError, match="no self-attention layer"):
        dg.stylize(tt.sana(), content, content, seed=1, steps=1, iterations=0)
    with pytest.raises(dg.UnsupportedPipelineError, match="cannot be inverted"):
        dg.stylize(tp.wan(), content, content)


@pytest.mark.parametrize(("name", "scale"), [("chroma", 3.0), ("z-image", 2.0)])
def test_both_halves_of_guidance_are_styled(pipes, name, scale):
    """In one call or in two: the prompt beside the style, and the negative beside the style under its own text."""
    pipe, z = pipes(name), style(pipes(name), size_of(name))

    def made(prompt, words, **call):
        with dg.graft(pipe, dg.StyleInjection(z, method="stylealigned", prompt=words)) as g:
            return run(name, pipe, num_inference_steps=1, prompt=[prompt], **call), g.report().rows

    given = {"negative_prompt": ["a blue cat"], "guidance_scale": scale}
    (got, rows), (towards, _), (away, _) = (
        made("a red ball", "", **given),
        made("a red ball", ""),
        made(*["a blue cat"] * 2),
    )
    assert rows == [4 if name == "z-image" else 2]
    wanted = away + 3 * (towards - away)
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()

"""StyleID, StyleAligned and the IP-Adapter's style block: equations, rows, neutral settings, restore."""

from __future__ import annotations

import itertools
import math
import threading

import pytest
import tiny
import tiny_transformers as tt
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionControlNetPipeline
from PIL import Image
from plugins_for_tests import fingerprint
from test_matrix import load_ip_adapter
from torch.profiler import ProfilerActivity, profile

import diffgraft as dg
from diffgraft.attention.edit import attend
from diffgraft.pipelines.families import adapter_for
from diffgraft.plugins.style_injection import adain, choose_layers, preserved_query, shared_attention


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax_attention(q, k, v, scale, bias=0.0):
    return (q @ k.transpose(-1, -2) * scale + bias).softmax(-1) @ v


def double(pipe):
    for name in ("unet", "vae", "text_encoder"):
        getattr(pipe, name).double()
    return pipe


# -- equations -----------------------------------------------------------------------------------------------------


def test_adain_takes_mean_and_deviation():
    x, style = 2 * normal(2, 4, 8, 8) + 1, 5 * normal(2, 4, 8, 8, seed=1) - 3
    got = adain(x, style)
    torch.testing.assert_close(got.mean((-2, -1)), style.mean((-2, -1)), rtol=0, atol=1e-5)
    torch.testing.assert_close(got.std((-2, -1)), style.std((-2, -1)), rtol=0, atol=1e-5)
    torch.testing.assert_close(adain(x, x), x, rtol=0, atol=1e-14)
    assert adain(torch.ones(1, 1, 2, 2), style[:1, :1]).isfinite().all()
    for dtype in (torch.float16, torch.bfloat16):  # rounded once, at the end
        half, reference = (100 + normal(1, 4, 64, 64, seed=i).to(dtype) for i in (0, 1))
        assert adain(torch.ones(1, 1, 2, 2, dtype=dtype), reference[:, :1]).isfinite().all()
        exact = adain(half.double(), reference.double())
        assert (adain(half, reference) - exact).abs().max() <= torch.finfo(dtype).eps / 2 * 128


def test_shared_attention_is_the_papers():
    q, k, v, q_ref, k_ref, v_ref = (normal(2, 3, 5, 4, seed=i) for i in range(6))

    def matched(x, reference):
        variance, wanted = x.var(-2, keepdim=True) + 1e-5, reference.var(-2, keepdim=True) + 1e-5
        return (x - x.mean(-2, keepdim=True)) * (wanted / variance).sqrt() + reference.mean(-2, keepdim=True)

    bias = torch.cat([torch.zeros(5), math.log(2) * torch.ones(5)]).double()
    both = torch.cat([matched(k, k_ref), k_ref], -2)
    want = softmax_attention(matched(q, q_ref), both, torch.cat([v, v_ref], -2), 0.5, bias)
    q2, k2, v2, mask = shared_attention(q, k, v, q_ref, k_ref, v_ref, math.log(2))
    torch.testing.assert_close(softmax_attention(q2, k2, v2, 0.5, mask), want)


def test_sharing_with_nothing_is_plain_attention():
    q, k, v = (normal(1, 2, 5, 4, seed=i) for i in range(3))
    nothing = torch.zeros(1, 2, 0, 4)
    assert shared_attention(q, k, v, nothing, nothing, nothing, 1.0) == (q, k, v, None)


def test_a_reference_that_is_the_target_changes_nothing():
    q, k, v = (normal(1, 2, 5, 4, seed=i) for i in range(3))
    q2, k2, v2, mask = shared_attention(q, k, v, q, k, v, math.log(2))
    torch.testing.assert_close(softmax_attention(q2, k2, v2, 0.5, mask), softmax_attention(q, k, v, 0.5))


def test_gamma_one_keeps_the_contents_query():
    q, content = normal(1, 2, 5, 4), normal(1, 2, 5, 4, seed=1)
    assert preserved_query(q, content, 1.0) is content
    torch.testing.assert_close(preserved_query(q, content, 0.75), 0.75 * content + 0.25 * q)


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_styleid_on_the_rows_of_a_guided_batch(sd15, strength):
    layer = next(x for x in dg.find_layers(sd15.unet) if x.kind == "self" and x.place == "up")
    rows = {"uncond": slice(0, 2), "cond": slice(2, 4), "style": slice(4, 6), "content": slice(6, 8)}
    step = dg.Step(0, 10, size=(2, 3), rows=rows, likes={"style": "cond", "content": "cond"})
    q, k, v = (normal(8, 2, 6, 4, seed=i) for i in range(3))
    plugin = dg.StyleInjection(normal(1, 4, 2, 3), strength=strength, gamma=0.6, temperature=1.5)
    got = attend(dg.AttentionCall(layer, q, k, v, None, 0.5, 0, step), plugin.edits())
    own = softmax_attention(q, k, v, 0.5)
    for group in ("uncond", "cond"):
        query = 0.6 * q[6:8] + 0.4 * q[rows[group]]
        styled = softmax_attention(query, k[4:6], v[4:6], 0.5 * 1.5)
        torch.testing.assert_close(got[rows[group]], strength * styled + (1 - strength) * own[rows[group]])
    torch.testing.assert_close(got[4:], own[4:])


# -- in pipelines --------------------------------------------------------------------------------------------------


def test_the_content_as_its_own_style_comes_back():
    pipe = double(tiny.sd15())
    z = normal(1, 4, 8, 8)
    inversion = dg.invert(pipe, z, steps=4, iterations=200, tolerance=1e-8, trajectory=True)
    size = {"height": 16, "width": 16, "guidance_scale": 1.0}
    plain = tiny.sample(pipe, "", **inversion.call(pipe), **size)
    for plugin in (
        dg.StyleInjection(inversion, content=inversion, gamma=1.0, temperature=1.0),
        dg.StyleInjection(inversion, method="stylealigned"),
    ):
        with dg.graft(pipe, plugin):
            got = tiny.sample(pipe, "", **inversion.call(pipe), **size)
        torch.testing.assert_close(got, plain, rtol=0, atol=1e-4)


def test_the_reference_joins_as_a_row_and_styles_the_picture(family):
    style, plain = normal(1, 4, 16, 16, seed=3).float(), tiny.sample(family)
    for method, rows in (("styleid", 3), ("stylealigned", 4)):  # uncond, cond, style, and it with the negative's text
        with dg.graft(family, dg.StyleInjection(style, method=method)) as g:
            got = tiny.sample(family)
        assert g.report().rows == [rows]
        assert not torch.equal(got, plain)
        with dg.graft(family, dg.StyleInjection(style, method=method)):
            assert torch.equal(tiny.sample(family), got)


def test_a_picture_needs_no_inversion_and_content_adds_a_row(sd15):
    picture = Image.new("RGB", (50, 40), "orange")
    content = dg.invert(sd15, normal(1, 4, 16, 16).float(), steps=3, iterations=0, trajectory=True)
    with dg.graft(sd15, dg.StyleInjection(picture, content=content)) as g:
        tiny.sample(sd15, **content.call(sd15))
    assert g.report().rows == [4]


def test_a_content_comes_in_the_forms_of_a_style(sd15):
    style, content = normal(1, 4, 16, 16).float(), normal(1, 4, 16, 16, seed=1).float()
    noise = torch.randn(content.shape, generator=torch.Generator().manual_seed(9))

    class Noised:
        def at(self, timestep):
            return sd15.scheduler.add_noise(content, noise, timestep.flatten()[:1])

    got = []
    for form in (content, Noised()):
        generator = torch.Generator().manual_seed(9)
        with dg.graft(sd15, dg.StyleInjection(Path(style), content=form, generator=generator)) as g:
            got.append(tiny.sample(sd15))
        assert g.report().rows == [4]
    torch.testing.assert_close(got[0], got[1], rtol=0, atol=1e-5)


def test_several_pictures_each_with_its_style(sd15):
    styles, z = normal(2, 4, 16, 16, seed=3).float(), normal(2, 4, 16, 16).float()
    with dg.graft(sd15, dg.StyleInjection(styles[1:], start_adain=False)):
        second = tiny.sample(sd15, latents=z[1:])
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))

    class Same(dg.StyleInjection):
        def begin(self, session, step):
            super().begin(session, step)
            self._style._noise = noise.expand(2, -1, -1, -1)

    with dg.graft(sd15, Same(styles, start_adain=False)):
        both = tiny.sample(sd15, ["a red ball and a blue star"] * 2, latents=z)
    with dg.graft(sd15, Same(styles[1:].expand(2, -1, -1, -1), start_adain=False)):
        again = tiny.sample(sd15, ["a red ball and a blue star"] * 2, latents=z)
    torch.testing.assert_close(both[1], again[1], rtol=0, atol=1e-5)
    assert not torch.allclose(both[1], second[0])


def test_two_of_one_technique_at_once_are_refused_and_one_after_the_other_work(sd15):
    one, other = Image.new("RGB", (32, 32), "red"), Image.new("RGB", (32, 32), "navy")
    mask = torch.zeros(32, 32)
    mask[8:16, 8:16] = 1
    for make, a, b in ((dg.StyleInjection, one, other), (dg.SelfAttentionRedirection, mask, mask.T)):
        with dg.graft(sd15, make(a), make(b)), pytest.raises(dg.SettingError, match="two plugins bring rows named"):
            tiny.sample(sd15)
        with dg.graft(sd15, make(a, end=0.5), make(b, start=0.5)):
            assert tiny.sample(sd15).isfinite().all()


@pytest.mark.parametrize("technique", [dg.StyleInjection, dg.AttentionDistillation])
def test_a_batch_with_a_picture_each_is_every_picture_alone(technique):
    """Styles and contents as pictures, under the noise that is drawn when no generator is given."""
    pipe, z, prompts = double(tiny.sd15()), normal(2, 4, 16, 16), ["a ball", "a star"]
    styles, contents = (
        [Image.new("RGB", (32, 32), name) for name in names] for names in (("red", "navy"), ("gold", "black"))
    )
    got = []
    for rows in (slice(0, 2), slice(1, 2)):
        with dg.graft(pipe, technique(styles[rows], content=contents[rows])):
            got.append(tiny.sample(pipe, prompts[rows], latents=z[rows]))
    torch.testing.assert_close(got[0][1:], got[1], rtol=0, atol=1e-7)


class Path:
    """A trajectory that stands still."""

    def __init__(self, latents):
        self.latents = latents

    def at(self, timestep):
        return self.latents


@pytest.mark.parametrize("method", ["styleid", "stylealigned"])
@pytest.mark.parametrize(
    ("make", "prompts", "rows"),
    [(tiny.sd15, ["a ball", "a star"], 2), (tiny.sdxl, ["a red ball"], 2), (tiny.sdxl, ["a cat", "a star"], 4)],
    ids=["any prompts", "one prompt", "prompts that reach the reference"],
)
def test_pictures_share_a_reference_row(make, prompts, rows, method):
    pipe, z = double(make()), normal(2, 4, 8, 8, seed=2)
    if "text_encoder_2" in pipe.components:
        pipe.text_encoder_2.double()
    style, content = normal(1, 4, 8, 8, seed=3), normal(1, 4, 8, 8, seed=4)
    call = {"latents": z, "height": 16, "width": 16, "num_images_per_prompt": 2 // len(prompts)}
    got = []
    for n in (1, 2):
        one, other = (Path(x.expand(n, -1, -1, -1)) for x in (style, content))
        with dg.graft(pipe, dg.StyleInjection(one, method=method, content=other)) as g:
            got.append((tiny.sample(pipe, prompts, **call), g.report().rows[0]))
    torch.testing.assert_close(got[0][0], got[1][0], rtol=0, atol=1e-11)
    own = 2  # style and content, or the style with its text and with the negative's
    assert [counted for _, counted in got] == [4 + own * rows // 2, 4 + own * 2]


class Published(torch.overrides.TorchFunctionMode):
    """StyleAligned's program, written again from its description: of each half of the batch the first row leads; its
    statistics in queries and keys, its keys and values beside a row's own, and in group norms its picture below."""

    def __init__(self, norms, shift):
        super().__init__()
        self.norms, self.shift = norms, shift

    @staticmethod
    def leaders(x):
        half = len(x) // 2
        return x[[0] * half + [half] * half]

    def standard(self, x):
        moments = x.mean(-2, keepdim=True), (x.var(-2, keepdim=True) + 1e-5).sqrt()
        return (x - moments[0]) / moments[1] * self.leaders(moments[1]) + self.leaders(moments[0])

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.nn.functional.group_norm and self.norms:
            x, rows = args[0], args[0].shape[-2]
            return func(torch.cat([x, self.leaders(x)], -2), *args[1:], **kwargs)[..., :rows, :]
        if func is not torch.nn.functional.scaled_dot_product_attention or args[0].shape[-2] != args[1].shape[-2]:
            return func(*args, **kwargs)
        q, k, v = args
        q, k = self.standard(q), self.standard(k)
        k, v = (torch.cat([x, self.leaders(x)], -2) for x in (k, v))
        bias = torch.zeros(k.shape[-2], dtype=q.dtype)
        bias[k.shape[-2] // 2 :] = self.shift
        return (q @ k.mT / q.shape[-1] ** 0.5 + bias).softmax(-1) @ v


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("make", [tiny.sd15, tiny.sdxl])
def test_stylealigned_is_its_published_program(make, norms, monkeypatch):
    """Under guidance, in all layers: the style with its text and with the negative's, beside two pictures."""
    pipe, z, style = double(make()), normal(2, 4, 8, 8, seed=2), normal(1, 4, 8, 8, seed=3)
    if "text_encoder_2" in pipe.components:
        pipe.text_encoder_2.double()
    call = {"latents": z, "height": 16, "width": 16, "num_images_per_prompt": 2, "guidance_scale": 3.0}
    plugin = dg.StyleInjection(Path(style), method="stylealigned", prompt="a red cat", share_norms=norms)
    texts = []

    class Encoded(dg.Plugin):
        def begin(self, session, step):
            texts.append(session.encode(["a red cat"]).embeddings)

    with dg.graft(pipe, plugin) as g:
        got = tiny.sample(pipe, "a ball", num_inference_steps=2, **call)
    assert g.report().rows == [6]
    with dg.graft(pipe, Encoded()):
        tiny.sample(pipe, "a ball", num_inference_steps=1, **call)
    own, index = pipe.unet.forward, [0, 0, 1, 2, 2, 3]

    def forward(sample, timestep, encoder_hidden_states, added_cond_kwargs=None, **others):
        sample, text = sample[index], encoder_hidden_states[index]
        sample[[0, 3]] = style
        text[3] = texts[0]
        added = added_cond_kwargs and {name: value[index] for name, value in added_cond_kwargs.items()}
        with Published(norms, math.log(2)):
            out = own(sample, timestep, text, added_cond_kwargs=added, **others)[0]
        return (out[[1, 2, 4, 5]],)

    monkeypatch.setattr(pipe.unet, "forward", forward)
    wanted = tiny.sample(pipe, "a ball", num_inference_steps=2, **call)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


def test_shared_norms_belong_to_stylealigned_on_unets(sd15):
    before, plain = fingerprint(sd15), tiny.sample(sd15)
    with pytest.raises(dg.SettingError, match="share_norms"):
        dg.StyleInjection(normal(1, 4, 16, 16), share_norms=True)
    half = dg.StyleInjection(normal(1, 4, 16, 16), method="stylealigned", share_norms=True, strength=0.5)
    with dg.graft(sd15, half):
        assert not torch.equal(tiny.sample(sd15), plain)
    assert fingerprint(sd15) == before and torch.equal(tiny.sample(sd15), plain)
    together = dg.StyleInjection(None, method="stylealigned", share_norms=True)
    with dg.graft(sd15, together):
        assert torch.equal(tiny.sample(sd15), plain)  # one picture leads itself
    with pytest.raises(dg.UnsupportedPipelineError, match="GroupNorm"):
        dg.graft(tt.flux(), together).attach()


@pytest.mark.parametrize("negatives", [["red"], ["red", "blue"]])
def test_a_shared_reference_leaves_other_techniques_what_they_are(negatives):
    pipe, z = double(tiny.sd15()), normal(2, 4, 8, 8, seed=2)
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:4, :4] = True
    call = {"latents": z, "height": 16, "width": 16, "num_images_per_prompt": 2 // len(negatives)}
    got, rows = [], []
    for n in (1, 2):
        style = dg.StyleInjection(Path(normal(1, 4, 8, 8, seed=3).expand(n, -1, -1, -1)))
        others = (dg.SelfAttentionRedirection(mask, scale=2.0), dg.NegativeAway(negatives, scale=0.5))
        with dg.graft(pipe, style, *others) as g:
            got.append(tiny.sample(pipe, ["a ball", "a star"][: len(negatives)], **call))
        rows += g.report().rows
    torch.testing.assert_close(got[0], got[1], rtol=0, atol=1e-11)
    assert rows == [6 + len(negatives), 8]  # each negative steers the reference of its own picture


def test_memory_grows_by_the_same_for_every_style_and_not_with_steps(sd15):
    def peak(n, steps=2):
        content = dg.invert(sd15, normal(n, 4, 8, 8).float(), steps=steps, iterations=0, trajectory=True)
        plugin = dg.StyleInjection(normal(n, 4, 8, 8, seed=1).float(), content=content)
        call = {"height": 16, "width": 16, "guidance_scale": 1.0, "latents": content.latents}
        recorder = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
        with recorder as seen, dg.graft(sd15, plugin):
            tiny.sample(sd15, [""] * n, **(content.call(sd15) | call))
        events = sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns())
        return max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]"))

    peaks = [peak(n) for n in (1, 2, 3)]
    assert 0 < peaks[2] - peaks[1] <= 1.01 * (peaks[1] - peaks[0])
    assert peak(2, steps=4) <= 1.01 * peaks[1]  # keys and values are not kept


def test_euler_keeps_the_reference_in_its_own_space(sd15):
    """Euler is DDIM at another scale where both end without noise."""
    style, z = normal(1, 4, 16, 16, seed=3).float(), normal(1, 4, 16, 16).float()
    outs = []
    for scheduler in (
        tiny.ddim(set_alpha_to_one=True),
        EulerDiscreteScheduler.from_config(tiny.ddim().config, timestep_spacing="leading"),
    ):
        sd15.scheduler = scheduler
        with dg.graft(sd15, dg.StyleInjection(style)):
            outs.append(tiny.sample(sd15, latents=z))
    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=2e-3)


def test_neutral_is_bit_identical_and_everything_comes_off(sd15):
    plain, style = tiny.sample(sd15), normal(1, 4, 16, 16).float()
    before = dict(sd15.unet.attn_processors)
    with dg.graft(sd15, dg.StyleInjection(style, strength=0.0)) as g:
        assert torch.equal(tiny.sample(sd15), plain)
    assert g.report().rows == [2]

    def broken(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), dg.graft(sd15, dg.StyleInjection(style)):
        tiny.sample(sd15, callback_on_step_end=broken)
    assert torch.equal(tiny.sample(sd15), plain)
    assert all(sd15.unet.attn_processors[name] is processor for name, processor in before.items())
    assert not any("forward" in module.__dict__ for module in sd15.unet.modules())


def test_two_pipelines_at_once():
    pipes = [tiny.sd15(), tiny.sd15(seed=7)]
    styles = [normal(1, 4, 16, 16, seed=i).float() for i in (3, 4)]

    def styled(i: int) -> torch.Tensor:
        with dg.graft(pipes[i], dg.StyleInjection(styles[i])):
            return tiny.sample(pipes[i])

    want, got = [styled(0), styled(1)], [torch.zeros(()), torch.zeros(())]

    def run(i: int) -> None:
        got[i] = styled(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


def test_a_controlnet_says_nothing_to_the_reference(sd15):
    pipe = tiny.sd15(cls=StableDiffusionControlNetPipeline, unet=sd15.unet, controlnet=tiny.controlnet(sd15.unet))
    seen: list[torch.Tensor] = []

    class Look(dg.Edit):
        def selects(self, layer):
            return layer.place == "up" and layer.kind == "self" and layer.index == 6

        def qkv(self, call):
            seen.append(call.v[call.rows["style"]])

    class Style(dg.StyleInjection):
        def edits(self):
            return (*super().edits(), Look())

    style = normal(1, 4, 16, 16).float()
    for colour in ("black", "white"):
        with dg.graft(pipe, Style(style, layers=[6])):
            tiny.sample(pipe, image=Image.new("RGB", (32, 32), colour), height=None, width=None)
    half = len(seen) // 2
    assert all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))


def test_layers_by_word_and_number(sd15):
    layers = dg.find_layers(sd15.unet)
    own = [x for x in layers if x.kind == "self"]
    assert choose_layers(layers, "up") == {x.name for x in own if x.place == "up"} == choose_layers(layers, "decoder")
    assert choose_layers(layers, "all") == {x.name for x in own}
    assert choose_layers(layers, [0, 3]) == {own[0].name, own[3].name}


def test_decoder_leaves_out_the_coarsest_of_three_levels(picturebook):
    chosen = choose_layers(dg.find_layers(picturebook.unet), "decoder")
    assert {name[:11] for name in chosen} == {"up_blocks.1", "up_blocks.2"}


# -- IP-Adapter ----------------------------------------------------------------------------------------------------


def test_ip_adapter_is_kept_in_its_style_block(sd15):
    """Against diffusers' own scales by block."""
    load_ip_adapter(sd15)
    call = {"ip_adapter_image_embeds": [torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(5))]}
    sd15.set_ip_adapter_scale({"up": {"block_0": [0.0, 1.2, 0.0]}})
    want = tiny.sample(sd15, **call)
    sd15.set_ip_adapter_scale(1.0)
    everywhere = tiny.sample(sd15, **call)
    with dg.graft(sd15, dg.StyleInjection(method="ip_adapter", scale=1.2)):
        got = tiny.sample(sd15, **call)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert not torch.allclose(want, everywhere, atol=1e-4)
    assert torch.equal(tiny.sample(sd15, **call), everywhere)


def test_inversion_with_an_ip_adapter_loaded_ignores_it(sd15):
    z = normal(1, 4, 8, 8).float()
    want = dg.invert(sd15, z, steps=3).latents
    load_ip_adapter(sd15)
    torch.testing.assert_close(dg.invert(sd15, z, steps=3).latents, want, rtol=0, atol=1e-5)


def add_ip_adapter(pipe, count=1):
    """With the encoder that turns a picture into its embedding."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, projection_dim=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    pipe.register_modules(image_encoder=CLIPVisionModelWithProjection(config).eval(), feature_extractor=processor)
    load_ip_adapter(pipe, count)


def test_a_picture_is_a_negative_by_ip_adapter(sd15):
    add_ip_adapter(sd15)
    content, style = Image.new("RGB", (32, 32), "navy"), Image.new("RGB", (32, 32), "gold")
    call = {"steps": 3, "iterations": 0}
    plain, away = dg.invert(sd15, content, **call), dg.invert(sd15, content, negative=style, **call)
    assert (plain.negative, away.negative) == ("none", "image")
    assert not torch.allclose(plain.latents, away.latents)
    same = dg.invert(sd15, content, negative=content, **call)
    stronger = dg.invert(sd15, content, negative=content, guidance=4.0, **call)
    torch.testing.assert_close(same.latents, stronger.latents, rtol=0, atol=1e-5)


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"method": "gram"}, "styleid"),
        ({"style": None}, "picture"),
        ({"strength": 2.0}, "strength"),
        ({"gamma": -0.1}, "gamma"),
        ({"temperature": 0.0}, "temperature"),
        ({"style": None, "method": "ip_adapter"}, "IP-Adapter"),
        ({"layers": "down"}, "decoder"),
        ({"layers": [99]}, "self-attention layers"),
        ({"style": torch.zeros(1, 4, 9, 9)}, "16, 16"),
        ({"style": torch.zeros(9, 9)}, "16, 16"),
        ({"style": 5}, "int"),
        ({"style": "nowhere.png"}, "nowhere.png"),
        ({"style": torch.zeros(2, 4, 16, 16)}, "styles"),
        ({"style": torch.zeros(1, 8, 16, 16)}, "4, 16, 16"),
        ({"style": torch.full((1, 4, 16, 16), torch.nan)}, "finite"),
        ({"style": Path(torch.zeros(1, 4, 20, 20))}, "20x20 in a call of 16x16"),
        ({"content": Path(torch.zeros(1, 4, 20, 20))}, "content latents of 20x20"),
        ({"content": torch.zeros(2, 4, 16, 16)}, "2 contents for 1"),
        ({"content": 5}, "a content is"),
        ({"prompt": 5}, "prompt=5"),
        ({"layers": 5}, "layers=5"),
        ({"generator": 5}, "Generator"),
    ],
)
def test_bad_settings_say_what_to_do(sd15, call, says):
    with pytest.raises(dg.GraftError, match=says):  # noqa: SIM117
        with dg.graft(sd15, dg.StyleInjection(**({"style": torch.zeros(1, 4, 16, 16)} | call))):
            tiny.sample(sd15)


def test_the_adapter_keeps_control_from_rows(sd15):
    adapter = adapter_for(sd15)
    inputs = {"down_block_additional_residuals": (torch.ones(3, 2),), "mid_block_additional_residual": torch.ones(3, 2)}
    got = adapter.without_control(inputs, slice(2, 3))
    assert got["down_block_additional_residuals"][0].tolist() == [[1, 1], [1, 1], [0, 0]]
    assert got["mid_block_additional_residual"].sum() == 4
    assert inputs["mid_block_additional_residual"].sum() == 6

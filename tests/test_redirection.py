"""Self-attention redirection: the closed form against the published one in float64, the branch, the guidance."""

from __future__ import annotations

import math

import diffusers
import numpy as np
import pytest
import tiny
import torch
from plugins_for_tests import Scaled, fingerprint
from test_matrix import load_ip_adapter

import diffgraft as dg
from diffgraft.attention.call import AttentionCall
from diffgraft.attention.edit import attend
from diffgraft.attention.layer import AttentionLayer
from diffgraft.attention.step import Step

BOX = np.zeros((32, 32), bool)
BOX[6:18, 10:24] = True
EMPTY = np.zeros((32, 32), bool)
CORNER = np.zeros((32, 32), bool)
CORNER[20:, :9] = True


def official(q, k, v, masked, factor):
    """The published form, in the dtype of q: minus "infinity" on masked columns, two softmaxes, rows selected."""
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    block = torch.zeros(len(masked), dtype=q.dtype).masked_fill(masked, torch.finfo(q.dtype).min)
    inside = (factor * logits + block).softmax(-1) @ v
    outside = (logits + block).softmax(-1) @ v
    return torch.where(masked[:, None], inside, outside)


LAYER = AttentionLayer("up_blocks.0.attentions.0.attn1", None, "self", "up", 0)


def ours(q, k, v, masked, factor=0.3, index=0, pictures=1, **call):
    """What the branch's rows come to, through the edit itself: rows [cond, redirected] of equal tokens."""
    grid = masked.shape[-2:]
    plugin = dg.SelfAttentionRedirection(masked.numpy(), suppression=factor, **call)
    step = Step(index, 50, size=tuple(grid), rows={"cond": slice(0, pictures), "redirected": slice(pictures, None)})
    step.rows["redirected"] = slice(pictures, 2 * pictures)
    step.likes["redirected"] = "cond"
    q, k, v = (torch.cat([t, t]) for t in (q, k, v))
    edits = [edit for edit in plugin.edits() if edit.active(LAYER, step)]
    out = attend(AttentionCall(LAYER, q, k, v, None, 1 / math.sqrt(q.shape[-1]), 0, step), edits)
    return out[pictures:]


def tensors(heads, grid, width=8, dtype=torch.float64, seed=0, rows=1):
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(rows, heads, grid[0] * grid[1], width, generator=g, dtype=torch.float64).to(dtype) for _ in "qkv"
    ]


def cover(grid, share, seed=0):
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(grid[0] * grid[1], generator=g)
    mask = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
    mask[order[: max(1, int(share * len(mask)))]] = True
    return mask.view(grid)


CASES = [(1, (8, 8), 0.05), (5, (16, 16), 0.5), (8, (12, 20), 0.95), (20, (16, 16), 0.3), (2, (32, 32), 0.1)]


@pytest.mark.parametrize(("heads", "grid", "share"), CASES)
@pytest.mark.parametrize("index", [0, 30])
def test_parity_with_the_published_formula(heads, grid, share, index):
    masked, factor = cover(grid, share), 0.3 if index < 10 else 1.0
    q, k, v = tensors(heads, grid)
    expected = official(q, k, v, masked.flatten(), factor)
    assert (ours(q, k, v, masked, index=index) - expected).abs().max() <= 1e-12
    q, k, v = (t.float() for t in (q, k, v))
    assert (ours(q, k, v, masked, index=index).double() - expected).abs().max() <= 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("index", [0, 30])
def test_half_precision_is_at_least_as_close_as_the_published_formula(dtype, index):
    for seed in range(4):
        masked, factor = cover((16, 16), 0.3, seed), 0.3 if index < 10 else 1.0
        q, k, v = tensors(4, (16, 16), 40, dtype, seed)
        expected = official(*(t.double() for t in (q, k, v)), masked.flatten(), factor)
        error = (ours(q, k, v, masked, index=index).double() - expected).abs()
        theirs = (official(q, k, v, masked.flatten(), factor).double() - expected).abs()
        assert error.max() <= theirs.max() and error.mean() <= theirs.mean()


def test_half_precision_stays_finite_where_a_product_overflows():
    """|q.k| above 65504: einsum first and scale afterwards gives infinity in float16."""
    masked = cover((8, 8), 0.3)
    q, k, v = tensors(2, (8, 8), 64, torch.float16)
    q, k = q * 60, k * 60
    assert not torch.isfinite(official(q, k, v, masked.flatten(), 1.0)).all()
    assert torch.isfinite(ours(q, k, v, masked)).all()


def test_all_attention_is_on_the_background():
    masked = cover((16, 16), 0.4)
    q, k, v = (t.float() for t in tensors(3, (16, 16)))
    assert (ours(q, k, torch.ones_like(v), masked) - 1).abs().max() <= 1e-6
    indicator = masked.flatten()[:, None].float().expand_as(v)
    assert (ours(q, k, indicator, masked) == 0).all()


@pytest.mark.parametrize("poison", [1e4, float("nan"), float("inf")])
def test_masked_tokens_cannot_be_seen(poison):
    masked = cover((16, 16), 0.4)
    q, k, v = (t.float() for t in tensors(3, (16, 16)))
    expected = ours(q, k, v, masked)
    rows = masked.flatten()
    k[:, :, rows], v[:, :, rows] = poison, poison
    assert torch.equal(ours(q, k, v, masked), expected)


def test_suppression_at_its_ends():
    masked = cover((16, 16), 0.4)
    rows = masked.flatten()
    q, k, v = (t.float() for t in tensors(3, (16, 16)))
    none, strong, flat = (ours(q, k, v, masked, factor) for factor in (1.0, 0.3, 0.0))
    assert torch.equal(none, ours(q, k, v, masked, index=40)) and not torch.equal(none, strong)
    mean = v[:, :, ~rows].mean(2, keepdim=True).expand_as(flat[:, :, rows])
    assert (flat[:, :, rows] - mean).abs().max() <= 1e-6
    assert torch.equal(none[:, :, ~rows], strong[:, :, ~rows]) and torch.equal(flat[:, :, ~rows], strong[:, :, ~rows])


def test_suppression_steps_is_a_count():
    masked = cover((8, 8), 0.3)
    q, k, v = tensors(2, (8, 8))
    plain = official(q, k, v, masked.flatten(), 1.0)
    for steps in (10, 1, 0):
        outs = [ours(q, k, v, masked, index=i, suppression_steps=steps) for i in range(12)]
        assert [not torch.allclose(out, plain) for out in outs] == [i < steps for i in range(12)]


def test_a_batch_is_each_picture_alone():
    masks = torch.stack([cover((8, 12), share, i) for i, share in enumerate((0.1, 0.5, 0.9))])
    q, k, v = (t.float() for t in tensors(2, (8, 12), rows=3))
    together = ours(q, k, v, masks, pictures=3)
    turned = ours(q.flip(0), k.flip(0), v.flip(0), masks.flip(0), pictures=3).flip(0)
    for i in range(3):
        alone = ours(q[i : i + 1], k[i : i + 1], v[i : i + 1], masks[i])
        assert (together[i : i + 1] - alone).abs().max() <= 1e-6
        assert (together[i] - turned[i]).abs().max() <= 1e-6
    padded = torch.zeros(3, dtype=torch.long)  # and equals one padded batch with a mask of what is real
    kept = [(~mask.flatten()).nonzero()[:, 0] for mask in masks]
    most = max(len(x) for x in kept)
    index = torch.stack([torch.cat([x, padded[:1].expand(most - len(x))]) for x in kept])
    real = torch.arange(most) < torch.tensor([len(x) for x in kept])[:, None]
    pick = index[:, None, :, None].expand(-1, 2, -1, 8)
    scaled = torch.where(masks.flatten(1)[:, None, :, None], q * 0.3, q)
    batch = torch.nn.functional.scaled_dot_product_attention(
        scaled, k.gather(2, pick), v.gather(2, pick), attn_mask=real[:, None, None]
    )
    assert (together - batch).abs().max() <= 1e-6


# -- on pipelines ---------------------------------------------------------------------------------------------------


def erased(pipe, mask=BOX, call=None, **settings):
    with dg.graft(pipe, dg.SelfAttentionRedirection(mask, **settings)) as g:
        return tiny.sample(pipe, **(call or {})), g.report()


def test_an_empty_mask_or_no_scale_leaves_the_pipeline_alone(family):
    plain = tiny.sample(family)
    with pytest.warns(UserWarning, match="the mask is empty"):
        out, report = erased(family, EMPTY)
    assert torch.equal(out, plain) and report.rows == [2] and not report.layers
    for settings in ({"scale": 0}, {"start": 0.4, "end": 0.4}):
        out, report = erased(family, **settings)
        assert torch.equal(out, plain) and report.rows == [2]


def test_a_picture_with_an_empty_mask_among_others_stays_exactly_what_it_is(sd15):
    def run(mask):
        generators = [torch.Generator().manual_seed(i) for i in (0, 1)]
        call = {"prompt": ["a ball", "a cat"], "generator": generators}
        with dg.graft(sd15, dg.SelfAttentionRedirection(mask)):
            return tiny.sample(sd15, **call)

    generators = [torch.Generator().manual_seed(i) for i in (0, 1)]
    plain = tiny.sample(sd15, prompt=["a ball", "a cat"], generator=generators)
    both = run([BOX, EMPTY])
    assert torch.allclose(both[1], plain[1], atol=1e-5) and not torch.allclose(both[0], plain[0], atol=1e-2)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_guidance_is_affine_in_its_scale(family, guidance):
    """One step, so that the result is affine in the prediction: u + g (c - u) + s (r - c)."""
    tiny.double(family)
    family.scheduler = tiny.ddim(prediction_type=family.scheduler.config.prediction_type, timestep_spacing="trailing")
    call = {"num_inference_steps": 1, "guidance_scale": guidance}
    plain = tiny.sample(family, **call)
    at = {s: erased(family, scale=s, call=call)[0] for s in (1.0, 2.0, 9.0)}
    one = at[1.0] - plain
    assert one.abs().max() > 1e-3
    for s in (2.0, 9.0):
        assert (at[s] - plain - s * one).abs().max() <= 1e-6


@pytest.mark.parametrize("adapter", [False, True], ids=["", "ip-adapter"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_equals_three_denoiser_calls_by_hand(sd15, guidance, adapter):
    """eps = u + g (c - u) + s (r - c), r by a processor of its own in the decoder; at g = 1 the published form."""

    class Redirecting:
        def __call__(self, attn, x, encoder_hidden_states=None, attention_mask=None, **rest):
            side = math.isqrt(x.shape[1])
            pooled = torch.nn.functional.max_pool2d(torch.from_numpy(BOX)[None].float(), 32 // side)[0].flatten() > 0
            q, k, v = (f(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for f in (attn.to_q, attn.to_k, attn.to_v))
            out = official(q, k, v, pooled, self.factor).transpose(1, 2).flatten(2)
            return attn.to_out[0](out)

    own, added = {}, {}
    if adapter:
        load_ip_adapter(sd15)
        picture = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        added = {"added_cond_kwargs": {"image_embeds": [picture]}}
        own = {"ip_adapter_image_embeds": [picture if guidance == 1 else torch.cat([picture, picture])]}
    tiny.double(sd15)
    redirecting, usual = Redirecting(), dict(sd15.unet.attn_processors)
    edited = {n: redirecting if "up_blocks" in n and "attn1" in n else p for n, p in usual.items()}
    text, empty = sd15.encode_prompt("a red ball and a blue star", "cpu", 1, True)
    sd15.scheduler.set_timesteps(4)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        for i, t in enumerate(sd15.scheduler.timesteps):
            u, c = (sd15.unet(x, t, encoder_hidden_states=words, **added).sample for words in (empty, text))
            redirecting.factor = 0.3 if i < 2 else 1.0
            sd15.unet.set_attn_processor(dict(edited))
            r = sd15.unet(x, t, encoder_hidden_states=text, **added).sample
            sd15.unet.set_attn_processor(dict(usual))
            guided = c if guidance == 1 else u + guidance * (c - u)
            x = sd15.scheduler.step(guided + 9 * (r - c), t, x).prev_sample
    call = {"num_inference_steps": 4, "guidance_scale": guidance, **own}
    out, report = erased(sd15, suppression_steps=2, call=call)
    assert (out - x).abs().max() <= 1e-6
    assert report.rows == [2 if guidance == 1 else 3]


def test_at_scale_one_the_redirected_prediction_needs_one_row(sd15):
    call = {"guidance_scale": 1.0}
    alone, report = erased(sd15, scale=1.0, call=call)
    assert report.rows == [1]
    with dg.graft(sd15, dg.SelfAttentionRedirection(BOX, scale=1.0), Twin()) as g:  # beside a branch that is the plain
        assert torch.allclose(tiny.sample(sd15, **call), alone, atol=1e-5) and g.report().rows == [2]
    near, report = erased(sd15, scale=1.0 + 1e-7, call=call)
    assert report.rows == [2] and (near - alone).abs().max() <= 1e-4


class Twin(dg.Plugin):
    def branches(self, step):
        return [dg.Branch("twin")]


def test_outside_its_window_one_branch_runs(sd15):
    rows = []

    class Watch(dg.Plugin):
        def combine(self, step, prediction, rows_):
            rows.append((step.index, len(prediction)))

    call = {"num_inference_steps": 10}
    with dg.graft(sd15, dg.SelfAttentionRedirection(BOX, start=0.2, end=0.5), Watch()):
        tiny.sample(sd15, **call)
    assert rows == [(i, 3 if 2 <= i < 5 else 2) for i in range(10)]
    states = {}

    def keep(name):
        def callback(pipe, i, t, given):
            states.setdefault(name, []).append(given["latents"].clone())
            return given

        return callback

    tiny.sample(sd15, **call, callback_on_step_end=keep("plain"))
    erased(sd15, start=0.2, call={**call, "callback_on_step_end": keep("late")})
    assert all(torch.equal(states["plain"][i], states["late"][i]) for i in (0, 1))
    assert not torch.equal(states["plain"][2], states["late"][2])


SCHEDULERS = ["DDIM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "UniPCMultistep", "HeunDiscrete"]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name):
    pipe = tiny.sd15(scheduler=getattr(diffusers, f"{name}Scheduler").from_config(tiny.ddim().config))
    plain = tiny.sample(pipe, num_inference_steps=5)
    out, report = erased(pipe, call={"num_inference_steps": 5}, end=0.6)
    calls = 9 if name == "HeunDiscrete" else 5
    assert report.calls == calls and report.rows == [2, 3] and torch.isfinite(out).all()
    edited = 6 if name == "HeunDiscrete" else 3  # both calls of a second-order step belong to it
    assert set(report.layers.values()) == {edited} and not torch.equal(out, plain)


@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_steps_of_an_image_to_image_run_are_its_own(sd15, strength):
    pipe = tiny.quiet(diffusers.StableDiffusionImg2ImgPipeline(**sd15.components, requires_safety_checker=False))
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    out, report = erased(pipe, call={"image": image, "strength": strength, "num_inference_steps": 10}, end=0.5)
    steps = round(10 * strength)
    assert report.calls == steps and set(report.layers.values()) == {math.ceil(steps / 2 - 1e-6)}


def test_interruption_and_denoising_end():
    pipe = tiny.sdxl()
    _, report = erased(pipe, call={"num_inference_steps": 10, "denoising_end": 0.5})
    assert set(report.layers.values()) == {report.calls} and report.calls < 10

    def stop(pipe, i, t, given):
        pipe._interrupt = i == 1
        return given

    _, report = erased(pipe, call={"num_inference_steps": 6, "callback_on_step_end": stop})
    assert report.calls == 2


def test_sizes_of_any_aspect():
    """Three levels below an autoencoder of factor 8, as SD has: 65x97 latents go 33x49, 17x25."""
    places = ["CrossAttn" * (i > 0) for i in range(3)]
    model = tiny.unet(
        block_out_channels=(16, 16, 16), layers_per_block=1, sample_size=64,
        down_block_types=[f"{place}DownBlock2D" for place in places],
        up_block_types=[f"{place}UpBlock2D" for place in reversed(places)],
    )  # fmt: skip
    pipe = tiny.sd15(unet=model, vae=tiny.vae(levels=4))
    for height, width in ((512, 768), (520, 776), (904, 1128), (1016, 640)):
        mask = np.zeros((height, width), bool)
        mask[100:220, 300:420] = True
        out, report = erased(pipe, mask, call={"height": height, "width": width, "num_inference_steps": 1})
        grid = (height // 8, width // 8)
        assert out.shape[-2:] == grid and torch.isfinite(out).all()
        halves = [tuple(-(-side // parts) for side in grid) for parts in (2, 4)]
        [(_, values)] = report.plugins
        assert list(values["masked tokens (largest share)"]) == [f"{h}x{w}" for h, w in halves]


@pytest.mark.parametrize("how", ["compiled", "offloaded"])
def test_compiled_and_offloaded_models(sd15, how):
    expected = erased(sd15)[0]
    if how == "compiled":
        torch.compiler.reset()
        sd15.unet = torch.compile(sd15.unet, backend="eager")
    else:
        sd15.enable_model_cpu_offload(device="cpu")
    assert torch.equal(erased(sd15)[0], expected)
    torch.compiler.reset()


# -- masks that cannot be used --------------------------------------------------------------------------------------


def untouched(pipe, run):
    """Calls of the denoiser that a run made before it failed."""
    calls = []
    hook = pipe.unet.conv_in.register_forward_hook(lambda *a: calls.append(1))
    try:
        run()
    finally:
        hook.remove()
        assert not calls


def test_no_background_is_an_error_before_any_denoiser_call(sd15):
    with pytest.raises(dg.MaskError, match="covers everything"):
        dg.SelfAttentionRedirection(np.ones((32, 32), bool))
    comb = np.zeros((32, 32), bool)
    comb[::4] = True  # a quarter of the pixels, half of the 16x16 tokens, all of the 8x8
    with pytest.raises(dg.MaskError, match=r"8x8 tokens \(the mask covers 25% of it all\)"):
        untouched(sd15, lambda: erased(sd15, comb))
    fine = [i for i, name in SELF if name.startswith("up_blocks.1")]
    out, _ = erased(sd15, comb, layers=fine)  # but not where only finer levels are asked for
    assert torch.isfinite(out).all()
    assert isinstance(dg.MaskError("x"), ValueError)


SELF = [(x.index, x.name) for x in dg.find_layers(tiny.unet()) if x.kind == "self"]


def test_scarce_background_is_a_warning(sd15):
    nearly = np.ones((32, 32), bool)
    nearly[:2, :2] = False
    with pytest.warns(UserWarning, match="0.4% of the 16x16 tokens"):
        erased(sd15, nearly, layers=[i for i, name in SELF if name.startswith("up_blocks.1")])


def test_masks_that_do_not_fit_the_call(sd15):
    with pytest.raises(dg.MaskError, match="2 masks for 1 pictures"):
        untouched(sd15, lambda: erased(sd15, [BOX, CORNER]))
    with pytest.raises(dg.MaskError, match="another aspect"):
        untouched(sd15, lambda: erased(sd15, BOX, call={"height": 32, "width": 48}))


def test_masks_of_a_batch_and_of_several_pictures_a_prompt(sd15):
    tiny.double(sd15)

    def run(masks, prompts, n, seeds):
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        call = {"prompt": prompts, "num_images_per_prompt": n, "generator": generators}
        return erased(sd15, masks, call=call)[0]

    both = run([BOX, CORNER], ["a ball", "a cat"], 2, [1, 2, 3, 4])
    for i, (mask, prompt) in enumerate([(BOX, "a ball"), (BOX, "a ball"), (CORNER, "a cat"), (CORNER, "a cat")]):
        alone = run(mask, [prompt], 1, [i + 1])
        assert (both[i] - alone[0]).abs().max() <= 1e-5
    three = run(BOX, ["a ball"], 3, [1, 2, 9])
    assert len(three) == 3 and (three[:2] - both[:2]).abs().max() <= 1e-5


# -- layers ---------------------------------------------------------------------------------------------------------


def chosen(unet, layers):
    pipe = tiny.sdxl(unet=unet) if "XL" in str(layers) else tiny.sd15(unet=unet)
    with dg.graft(pipe, dg.SelfAttentionRedirection(BOX, layers=layers)) as g:
        return list(g.edits)


def test_layers_by_place_name_prefix_and_execution_order():
    unet = tiny.unet()
    names = dict(SELF)
    assert [n.split("_")[0] for n in names.values()] == ["down"] * 4 + ["mid"] + ["up"] * 6
    up = [n for n in names.values() if n.startswith("up")]
    assert chosen(unet, "up") == up == chosen(unet, [5, 6, 7, 8, 9, 10]) == chosen(unet, ["up_blocks.0", "up_blocks.1"])
    assert chosen(unet, "all") == list(names.values())
    assert chosen(unet, ["mid", 0]) == [names[0], names[4]]
    assert chosen(unet, names[7]) == [names[7]]
    for wrong in ("decoder", [11], [-1], ["up", 99], [True], []):
        with pytest.raises(dg.SettingError, match=r"layers is empty|choose up, mid, down, all or among: 0 down_blocks"):
            chosen(unet, wrong)


@pytest.mark.parametrize("depth", [(1, 2), (2, 1)])
def test_layer_numbers_hold_for_any_depth(depth):
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2, cross_attention_dim=32, attention_head_dim=4, norm_num_groups=8,
        transformer_layers_per_block=depth,
    )  # fmt: skip
    down, up = sum(depth), 2 * sum(depth)
    layers = [x for x in dg.find_layers(unet) if x.kind == "self"]
    assert [x.place for x in layers] == ["down"] * down + ["mid"] * depth[-1] + ["up"] * up
    assert [x.index for x in layers] == list(range(len(layers)))


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_grounding_of_gligen_counts_no_layer_and_goes_to_every_row(guidance):
    """Its fusers are attention too, and boxes and phrases come by rows: unused, and used beside the branch."""
    plain = tiny.sd15()
    pipe = tiny.sd15(unet=tiny.unet(attention_type="gated"))
    names = [(layer.index, layer.name) for layer in dg.find_layers(pipe.unet) if layer.kind == "self"]
    assert names == SELF and pipe.unet.load_state_dict(plain.unet.state_dict(), strict=False)
    for block in pipe.unet.modules():
        if hasattr(block, "alpha_attn"):
            torch.nn.init.constant_(block.alpha_attn, 0.5)
    call = {"guidance_scale": guidance}
    assert torch.equal(erased(pipe, call=call)[0], erased(plain, call=call)[0])
    rows, g = 1 if guidance == 1 else 2, torch.Generator().manual_seed(0)
    boxes, phrases = torch.rand(1, 3, 4, generator=g), torch.randn(1, 3, 32, generator=g)
    grounding = {"boxes": boxes.repeat(rows, 1, 1), "positive_embeddings": phrases.repeat(rows, 1, 1)}
    grounding["masks"] = torch.tensor([[0.0] * 3, [1.0] * 3])[-rows:]  # a negative prompt has no boxes
    call["cross_attention_kwargs"] = {"gligen": grounding}
    late, report = erased(pipe, call=call)
    plain = tiny.sample(pipe, **call)
    assert report.rows == [rows + 1] and not torch.allclose(late, plain, atol=1e-3)
    with dg.graft(pipe, dg.SelfAttentionRedirection(BOX), OwnText()):  # joins at the input
        assert torch.allclose(tiny.sample(pipe, **call), late, atol=1e-3)


class OwnText(dg.Plugin):
    def branches(self, step):
        return [dg.Branch("own", text=torch.zeros(1, 77, 32))]


@pytest.mark.parametrize("layers", ["all", "mid", "down"])
def test_redirection_may_begin_before_the_decoder(family, layers):
    out, report = erased(family, layers=layers)
    assert report.rows == [3] and not torch.equal(out, tiny.sample(family)) and torch.isfinite(out).all()


# -- what else is there ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["ok", "exception", "interrupt"])
def test_nothing_is_left(family, end):
    before, plain = fingerprint(family), tiny.sample(family)
    error = {"exception": RuntimeError("boom"), "interrupt": KeyboardInterrupt()}.get(end)

    def stop(pipe, i, t, given):
        if error is not None and i == 1:
            raise error
        return given

    if error is None:
        erased(family)
    else:
        with pytest.raises(type(error)):
            erased(family, call={"callback_on_step_end": stop})
    assert fingerprint(family) == before and torch.equal(tiny.sample(family), plain)


def test_the_same_seed_gives_the_same_picture_and_the_global_generator_is_left_alone(sd15):
    state = torch.random.get_rng_state()
    first, second = erased(sd15)[0], erased(sd15)[0]
    assert torch.equal(first, second) and torch.equal(torch.random.get_rng_state(), state)


def test_reports_what_is_masked_at_every_level(sd15):
    _, report = erased(sd15)
    [(name, values)] = report.plugins
    assert name == "SelfAttentionRedirection" and values["masked pixels"] == [round(12 * 14 / 1024, 4)]
    assert values["masked tokens (largest share)"] == {"16x16": round(6 * 7 / 256, 4), "8x8": 4 * 4 / 64}


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": -1}, {"scale": float("nan")}, {"suppression": -0.1}, {"suppression": "0.3"},
        {"start": 0.9, "end": 0.1},
        {"suppression_steps": 2.5}, {"suppression_steps": -1}, {"suppression_steps": True},
        {"layers": 5},
    ],
)  # fmt: skip
def test_settings_outside_their_range(wrong):
    with pytest.raises(dg.GraftError) as caught:
        dg.SelfAttentionRedirection(BOX, **wrong)
    assert isinstance(caught.value, (ValueError, TypeError)) and next(iter(wrong)) in str(caught.value)


def test_composes_with_lora_freeu_controlnet_and_another_technique(sd15):
    from peft import LoraConfig

    sd15.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights="gaussian"))
    for name, parameter in sd15.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    with_lora = erased(sd15)[0]
    sd15.unet.disable_adapters()
    without = erased(sd15)[0]
    assert not torch.allclose(with_lora, without, atol=1e-3)
    sd15.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    freed = erased(sd15)[0]
    sd15.disable_freeu()
    assert not torch.allclose(freed, without, atol=1e-3) and torch.equal(erased(sd15)[0], without)
    with dg.graft(sd15, Scaled(0.5), dg.SelfAttentionRedirection(BOX)):
        one = tiny.sample(sd15)
    with dg.graft(sd15, dg.SelfAttentionRedirection(BOX), Scaled(0.5)):
        assert torch.equal(tiny.sample(sd15), one) and not torch.allclose(one, without, atol=1e-3)


def test_a_custom_processor_serves_the_plain_rows(sd15):
    class Counting(diffusers.models.attention_processor.AttnProcessor2_0):
        count = 0

        def __call__(self, *args, **kwargs):
            Counting.count += 1
            return super().__call__(*args, **kwargs)

    expected = erased(sd15)[0]
    sd15.unet.set_attn_processor(Counting())
    assert torch.equal(erased(sd15)[0], expected) and Counting.count == 3 * 22

"""Joint attention: one image stream against the doubled form, on tiny FLUX, SD3 and Qwen-Image transformers."""

from __future__ import annotations

from collections import Counter

import diffusers
import pytest
import tiny
import tiny_transformers as tt
import torch
import torch.nn.functional as F
from plugins_for_tests import fingerprint
from test_matrix import IMAGE, MASK
from torch.overrides import TorchFunctionMode

import diffgraft as dg

FAMILIES = ("flux", "sd3", "qwen")
TOKENS, HEIGHT, WIDTH = 4 * 6, 4, 6
CASES = [
    ("nasa", {"scale": 0.4}),
    ("nasa", {"scale": 0.4, "joint": "full"}),
    ("nag", {"scale": 3.0, "alpha": 0.5, "tau": 1.1}),
    ("vsf", {"scale": 1.5, "offset": 0.3}),
]
IDS = ["nasa", "nasa-full", "nag", "vsf"]


@pytest.fixture(scope="module", params=FAMILIES)
def pipe(request):
    pipe = getattr(tt, request.param)()
    pipe.scheduler.set_timesteps(2)
    return pipe


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def family(pipe):
    return next(name for name in FAMILIES if name in type(pipe).__name__.lower().replace("stablediffusion3", "sd3"))


def inputs(pipe, text, copies=1):
    """Arguments of the transformer for texts [n, L, D]; every row sees the same image and pooled text."""
    name, n = family(pipe), len(text)
    common = {"encoder_hidden_states": text, "timestep": torch.full((n,), 0.7), "return_dict": False}
    if name == "sd3":
        image = normal(1, 4, 2 * HEIGHT, 2 * WIDTH)
        pooled = normal(1, 64).expand(n, -1)
        return common | {"hidden_states": image.expand(n, -1, -1, -1), "pooled_projections": pooled}
    common["hidden_states"] = normal(1, TOKENS, 16).expand(n, -1, -1)
    if name == "qwen":
        return common | {"img_shapes": [(1, HEIGHT, WIDTH)] * n}
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(float(HEIGHT)), torch.arange(float(WIDTH)))
    ids = {"img_ids": grid, "txt_ids": torch.zeros(text.shape[1], 3)}
    return common | ids | {"pooled_projections": normal(1, 32).expand(n, -1)}


def to(tree, dtype):
    return {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in tree.items()}


class Doubled(TorchFunctionMode):
    """The image twice, beside the prompt and beside the negative; both get the combined image tokens.

    Attention is written out; text columns from `lengths` on are padding that nobody sees.
    """

    def __init__(self, text, lengths, rule, settings):
        super().__init__()
        self.text, self.lengths, self.rule, self.settings = text, lengths, rule, settings

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        q, k, v = named["query"], named["key"], named["value"]
        if q.shape[-2] == TOKENS:  # a self-attention of SD3.5
            return func(*args, **kwargs)
        return self.attend(q, k, v)

    def attend(self, q, k, v):
        start, stop = self.text
        image = [i for i in range(q.shape[-2]) if not start <= i < stop]
        logits = q @ k.mT * q.shape[-1] ** -0.5
        for row, length in enumerate(self.lengths):
            logits[row, :, :, start + length : stop] = -torch.inf
        p = logits.softmax(-1)
        out = p @ v
        z, n = out[:1, :, image], out[1:, :, image]
        words = slice(start, start + self.lengths[1])
        out[:, :, image] = self.combine(z, n, logits, p, v, image, words)
        return out

    def combine(self, z, n, logits, p, v, image, words):
        scale = self.settings["scale"]
        share = p[1:, :, image][..., words] @ v[1:, :, words]
        if self.rule == "nasa":
            return z - scale * (n if self.settings.get("joint") == "full" else share)
        if self.rule == "nag":
            far, tau, alpha = z + scale * (z - n), self.settings["tau"], self.settings["alpha"]
            ratio = far.abs().sum((1, 3), keepdim=True) / z.abs().sum((1, 3), keepdim=True)
            return alpha * far * ratio.clamp_max(tau) / ratio + (1 - alpha) * z
        flipped = logits[1:, :, image][..., words] - self.settings["offset"]
        weights = torch.cat([logits[:1, :, image], flipped], -1).softmax(-1)
        return weights @ torch.cat([v[:1], -scale * v[1:, :, words]], 2)


def doubled(pipe, positive, negative, rule, settings):
    longest = max(positive.shape[1], negative.shape[1])
    texts = torch.cat([F.pad(t, (0, 0, 0, longest - t.shape[1])) for t in (positive, negative)])
    start = TOKENS if family(pipe) == "sd3" else 0
    with Doubled((start, start + longest), (positive.shape[1], negative.shape[1]), rule, settings), torch.no_grad():
        return pipe.transformer(**to(inputs(pipe, texts), positive.dtype))[0][:1]


def shared(pipe, positive, plugin):
    with dg.graft(pipe, plugin), torch.no_grad():
        return pipe.transformer(**to(inputs(pipe, positive), positive.dtype))[0]


@pytest.mark.parametrize("lengths", [(7, 7), (7, 3), (3, 9)], ids=str)
@pytest.mark.parametrize(("rule", "settings"), CASES, ids=IDS)
def test_one_image_stream_is_the_doubled_form(pipe, rule, settings, lengths):
    width = pipe.transformer.config.joint_attention_dim
    positive, negative = (normal(1, n, width, seed=n + i) for i, n in enumerate(lengths))
    plugin = dg.NegativeAway(negative, rule=rule, **settings)
    expected = doubled(pipe, positive, negative, rule, settings)
    found, plain = shared(pipe, positive, plugin), shared(pipe, positive, dg.NegativeAway(None))
    size = float(expected.abs().max())
    assert (found - expected).abs().max() <= 1e-6 * size
    assert (found - plain).abs().max() > 1e-3 * size


@pytest.mark.parametrize(("rule", "settings"), CASES, ids=IDS)
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_in_float64_to_the_last_digits(name, rule, settings):
    pipe = getattr(tt, name)()
    pipe.transformer.to(torch.float64)
    pipe.scheduler.set_timesteps(2)
    width = pipe.transformer.config.joint_attention_dim
    positive, negative = normal(1, 5, width).double(), normal(1, 4, width, seed=1).double()
    expected = doubled(pipe, positive, negative, rule, settings)
    found = shared(pipe, positive, dg.NegativeAway(negative, rule=rule, **settings))
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_several_negatives_ride_side_by_side():
    """A mapping of one text is that text; of two, each attends to its own words only."""
    pipe = tt.flux()
    one = run(pipe, dg.NegativeAway("red cat", scale=0.5))
    assert torch.equal(run(pipe, dg.NegativeAway({"red cat": 1.0}, scale=0.5)), one)
    halves = run(pipe, dg.NegativeAway({"red cat": 0.5, "red  cat": 0.5}, scale=0.5))
    torch.testing.assert_close(halves, one, rtol=0, atol=1e-5)
    assert (run(pipe, dg.NegativeAway({"red cat": 1.0, "star": 1.0}, scale=0.5)) - one).abs().max() > 1e-3


# -- through the pipelines ------------------------------------------------------------------------------------------


SMALL = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "latent"}


def run(pipe, *plugins, prompt="a blue ball", **call):
    options = dict(SMALL)
    options["generator"] = torch.Generator().manual_seed(0)
    if family_name(pipe) == "qwen":
        options["prompt_embeds"] = normal(2 if isinstance(prompt, list) else 1, 6, 32, seed=8)
        options["height"] = options["width"] = 16
        prompt = None
    torch.manual_seed(0)  # ControlNet pipelines draw the control latent from the global generator
    with dg.graft(pipe, *plugins):
        return pipe(prompt=prompt, **(options | call)).images


def family_name(pipe):
    return type(pipe).__name__.removesuffix("Pipeline").lower().removesuffix("image")


def negative_for(pipe, n=1):
    texts = ["red cat", "green star"][:n]
    return normal(n, 4, 32, seed=5) if family_name(pipe) == "qwen" else texts if n > 1 else texts[0]


@pytest.fixture(scope="module", params=["flux", "sd3", "qwen", "pixart", "sana"])
def any_pipe(request):
    return getattr(tt, request.param)()


GUIDED = {
    "flux": {"true_cfg_scale": 3.0, "negative_prompt": "star"}, "stablediffusion3": {"guidance_scale": 3.0},
    "qwen": {"true_cfg_scale": 3.0, "negative_prompt_embeds": normal(1, 5, 32, seed=9)},
    "pixartsigma": {"guidance_scale": 3.0}, "sana": {"guidance_scale": 3.0},
}  # fmt: skip
UNGUIDED = {"flux": {}, "qwen": {}, "stablediffusion3": {"guidance_scale": 1.0}}


def call_of(pipe, guided):
    name = family_name(pipe)
    call = GUIDED[name] if guided else UNGUIDED.get(name, {"guidance_scale": 1.0})
    if name == "pixartsigma":
        call = call | {"use_resolution_binning": False, "clean_caption": False}
    if name == "sana":
        call = call | {"use_resolution_binning": False, "clean_caption": False, "complex_human_instruction": None}
    return call


@pytest.mark.parametrize("guided", [False, True], ids=["alone", "guided"])
def test_every_family_steers_and_comes_off(any_pipe, guided):
    call = call_of(any_pipe, guided)
    plain, before = run(any_pipe, **call), fingerprint(any_pipe)
    for rule in ("nasa", "nag", "vsf"):
        steered = run(any_pipe, dg.NegativeAway(negative_for(any_pipe), rule=rule), **call)
        assert steered.isfinite().all() and (steered - plain).abs().max() > 1e-3, rule
    for settings in ({"scale": 0}, {"end": 0}, {"layers": []}, {"rule": "nag", "alpha": 0}):
        neutral = dg.NegativeAway(negative_for(any_pipe), **settings)
        assert torch.equal(run(any_pipe, neutral, **call), plain)
    faint = run(any_pipe, dg.NegativeAway(negative_for(any_pipe), scale=1e-30), **call)
    torch.testing.assert_close(faint, plain, rtol=0, atol=3e-5)
    assert fingerprint(any_pipe) == before and torch.equal(run(any_pipe, **call), plain)


def test_only_the_conditional_rows_or_call_change(any_pipe):
    call = call_of(any_pipe, guided=True) | {"num_inference_steps": 1}
    seen = []
    hook = any_pipe.transformer.register_forward_hook(lambda module, args, out: seen.append(out[0].clone()))
    for plugins in ((), (dg.NegativeAway(negative_for(any_pipe), scale=0.8),)):
        run(any_pipe, *plugins, **call)
    hook.remove()
    if len(seen) == 4:  # cond, then uncond in a call of its own
        plain, steered = ({"cond": seen[i], "uncond": seen[i + 1]} for i in (0, 2))
    else:
        plain, steered = ({"uncond": out[:1], "cond": out[1:]} for out in seen)
    torch.testing.assert_close(steered["uncond"], plain["uncond"], rtol=0, atol=1e-5)
    assert (steered["cond"] - plain["cond"]).abs().max() > 1e-3


@pytest.mark.parametrize("guided", [False, True], ids=["alone", "guided"])
def test_a_batch_is_its_single_runs(any_pipe, guided):
    name, call = family_name(any_pipe), call_of(any_pipe, guided)
    prompts, negatives = ["a blue ball", "a cat and a red star"], negative_for(any_pipe, 2)
    if name in ("flux", "qwen"):
        noise = normal(2, 256 if name == "flux" else 16, 16)
        noise = normal(2, 64, 16) if name == "flux" else noise
    else:
        noise = normal(2, 4, 16, 16)
    guide = call.get("negative_prompt_embeds")
    batch_call = call | ({"negative_prompt_embeds": guide.expand(2, -1, -1)} if guide is not None else {})
    if name == "flux" and guided:
        batch_call = call | {"negative_prompt": ["star", "star"]}
    batch = run(any_pipe, dg.NegativeAway(negatives), prompt=prompts, latents=noise, **batch_call)
    for i in range(2):
        own = {"latents": noise[i : i + 1]}
        if name == "qwen":
            own["prompt_embeds"] = normal(2, 6, 32, seed=8)[i : i + 1]
        plugin = dg.NegativeAway(negatives[i : i + 1] if torch.is_tensor(negatives) else negatives[i])
        single = run(any_pipe, plugin, prompt=prompts[i], **(call | own))
        torch.testing.assert_close(batch[i], single[0], rtol=0, atol=3e-5)


def test_the_image_is_computed_once():
    """Linear layers see as many image tokens as without a negative; text tokens are those of both texts."""
    pipe = tt.flux()
    tokens = Counter()

    def count(module, args, out):
        tokens[module] += args[0].shape[-2] if args[0].ndim > 2 else 0

    hooks = [
        module.register_forward_hook(count)
        for name, module in pipe.transformer.named_modules()
        if name.endswith(("attn.to_q", "ff.net.2", "proj_mlp"))
    ]
    run(pipe, num_inference_steps=1)
    plain = dict(tokens)
    tokens.clear()
    run(pipe, dg.NegativeAway("red cat", scale=0.5), num_inference_steps=1)
    [hook.remove() for hook in hooks]
    singles = {m for block in pipe.transformer.single_transformer_blocks for m in block.modules()}
    text = pipe._tokenizer_max_length if hasattr(pipe, "_tokenizer_max_length") else 512
    for module, count in tokens.items():
        assert count == plain[module] + (text if module in singles else 0)


def test_text_slices_of_other_plugins():
    """An edit beside the negative sees [text, image] as without it, and its place is right in every layer."""
    seen = []

    class Look(dg.Edit):
        def selects(self, layer):
            return layer.kind == "joint"

        def out(self, call, out):
            seen.append((call.layer.index, call.text, call.q.shape[-2], call.grid))
            return out

    class Looking(dg.Plugin):
        def edits(self):
            return [Look()]

    for name in ("flux", "sd3"):
        pipe, found = getattr(tt, name)(), []
        for plugins in ((Looking(),), (Looking(), dg.NegativeAway("red")), (dg.NegativeAway("red"), Looking())):
            seen.clear()
            run(pipe, *plugins, num_inference_steps=1)
            found.append(list(seen))
        assert found[0] == found[1] == found[2]
        index, text, tokens, grid = found[0][0]
        assert text.stop - text.start + grid[0] * grid[1] == tokens and grid == (8, 8)
        assert text.start == (64 if name == "sd3" else 0)


def test_beside_an_edit_that_wants_probabilities():
    class Look(dg.Edit):
        wants_probs = True

        def selects(self, layer):
            return layer.kind == "joint"

    class Looking(dg.Plugin):
        def edits(self):
            return [Look()]

    for rule in ("nasa", "nag", "vsf"):
        pipe = tt.sd3()
        both = run(pipe, Looking(), dg.NegativeAway("red", rule=rule))
        torch.testing.assert_close(both, run(pipe, dg.NegativeAway("red", rule=rule)), rtol=0, atol=1e-4)


def test_layers_choose_where_the_image_is_steered():
    pipe = tt.flux()
    whole, part = (run(pipe, dg.NegativeAway("red", scale=0.5, layers=layers)) for layers in (None, [0]))
    assert torch.equal(run(pipe, dg.NegativeAway("red", scale=0.5, layers=[0, 1, 2, 3])), whole)
    assert (part - whole).abs().max() > 1e-4 and (part - run(pipe)).abs().max() > 1e-4


def test_learned_variance_and_perturbed_attention():
    pipe = tt.pixart(cls=diffusers.PixArtAlphaPipeline)
    call = call_of(tt.pixart(), guided=True)
    assert pipe.transformer.config.out_channels == 8
    assert (run(pipe, dg.NegativeAway("red"), **call) - run(pipe, **call)).abs().max() > 1e-3
    pag = tt.pixart(cls=diffusers.PixArtSigmaPAGPipeline)
    pag.set_pag_applied_layers(["blocks.1"])
    seen = []
    hook = pag.transformer.register_forward_hook(lambda module, args, out: seen.append(out[0].clone()))
    for plugins in ((), (dg.NegativeAway("red"),)):
        run(pag, *plugins, **call, pag_scale=2.0, num_inference_steps=1)
    hook.remove()
    torch.testing.assert_close(seen[0][[0, 2]], seen[1][[0, 2]], rtol=0, atol=1e-5)
    assert (seen[0][1] - seen[1][1]).abs().max() > 1e-3


def test_skip_layer_guidance_runs_its_third_call_plain():
    pipe = tt.sd3(dual_attention_layers=())
    call = {"skip_guidance_layers": [1], "skip_layer_guidance_start": -1.0, "skip_layer_guidance_stop": 1.0}
    seen = []
    hook = pipe.transformer.register_forward_hook(lambda module, args, out: seen.append(out[0].clone()))
    for plugins in ((), (dg.NegativeAway("red", scale=0.8),)):
        run(pipe, *plugins, num_inference_steps=1, **call)
    hook.remove()
    assert len(seen) == 4 and torch.equal(seen[1], seen[3]) and not torch.equal(seen[0][1], seen[2][1])


def variant(name):
    """(pipeline, what its call needs) of the same families' other pipelines."""
    model, cls = {
        "flux dev": ("flux", None), "flux img2img": ("flux", "FluxImg2ImgPipeline"),
        "flux inpaint": ("flux", "FluxInpaintPipeline"), "flux kontext": ("flux", "FluxKontextPipeline"),
        "sd3 img2img": ("sd3", "StableDiffusion3Img2ImgPipeline"), "sd3 controlnet": ("sd3", None),
        "sana sprint": ("sana", "SanaSprintPipeline"), "pixart lcm": ("pixart", None),
    }[name]  # fmt: skip
    pipe = tt.flux(guidance=True) if name == "flux dev" else getattr(tt, model)()
    parts, call = pipe.components, call_of(pipe, guided=False) if model in ("sana", "pixart") else {}
    if name == "sd3 controlnet":
        net = diffusers.SD3ControlNetModel.from_transformer(
            parts["transformer"], num_layers=2, num_extra_conditioning_channels=0
        )
        kept = {k: v for k, v in parts.items() if k not in ("image_encoder", "feature_extractor")}
        pipe = diffusers.StableDiffusion3ControlNetPipeline(controlnet=tt.lively(net), **kept)
        return tiny.quiet(pipe), {"control_image": IMAGE}
    if name == "sana sprint":
        parts = tt.sana(guidance=True).components | {"scheduler": diffusers.SCMScheduler()}
        call = {k: v for k, v in call.items() if k != "guidance_scale"}
    if name == "pixart lcm":
        parts, call = parts | {"scheduler": diffusers.LCMScheduler()}, call | {"num_inference_steps": 1}
    if "kontext" in name:
        call = {"image": IMAGE, "_auto_resize": False, "max_area": 32 * 32}
    elif cls and "Sprint" not in cls:
        call = {"image": IMAGE, "strength": 0.7} | ({"mask_image": MASK} if "inpaint" in name else {})
    cls = getattr(diffusers, cls) if cls else type(pipe)
    return tiny.quiet(cls(**parts)), call


@pytest.mark.parametrize(
    "name", ["flux dev", "flux img2img", "flux inpaint", "flux kontext", "sd3 img2img", "sd3 controlnet",
             "sana sprint", "pixart lcm"],
)  # fmt: skip
def test_other_pipelines_of_the_families(name):
    pipe, call = variant(name)
    plain = run(pipe, prompt="a ball", **call)
    for rule in ("nasa", "vsf"):
        steered = run(pipe, dg.NegativeAway("red cat", rule=rule, scale=0.8), prompt="a ball", **call)
        assert steered.isfinite().all() and (steered - plain).abs().max() > 1e-3
    assert torch.equal(run(pipe, prompt="a ball", **call), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_stays_finite(dtype):
    for name in ("flux", "sd3", "qwen", "pixart", "sana"):
        pipe = getattr(tt, name)().to(dtype)
        call = call_of(pipe, guided=False)
        call |= {"prompt_embeds": normal(1, 6, 32).to(dtype)} if name == "qwen" else {}
        for rule in ("nasa", "nag", "vsf"):
            for scale in (None, 100.0):
                assert run(pipe, dg.NegativeAway(negative_for(pipe), rule=rule, scale=scale), **call).isfinite().all()


def test_what_joint_models_refuse():
    pipe = tt.flux()
    with pytest.raises(dg.SettingError, match="one NegativeAway"):
        run(pipe, dg.NegativeAway("red"), dg.NegativeAway("blue"))
    kontext, call = variant("flux kontext")
    with pytest.raises(dg.UnsupportedPipelineError, match="another picture's tokens"):
        run(kontext, dg.AttentionSegregation(["ball"], loss="attend-and-excite"), **call)
    with pytest.raises(dg.SettingError, match="width 5"):
        run(pipe, dg.NegativeAway(torch.zeros(1, 4, 5)))
    with pytest.raises(dg.UnsupportedPipelineError, match="embeddings"):
        run(tt.qwen(), dg.NegativeAway("red"))
    sprint, call = variant("sana sprint")
    with pytest.raises(dg.UnsupportedSchedulerError, match="SCMScheduler"):
        run(sprint, dg.AttentionSegregation(["ball"], loss="attend-and-excite"), **call)
    for masked in (pipe, tt.sd3()):
        embeds = torch.ones(1, 4, masked.transformer.config.joint_attention_dim)
        with pytest.raises(dg.SettingError, match="cut the padding off"):
            run(masked, dg.NegativeAway(embeds, mask=torch.arange(4)[None] < 2))
    assert torch.equal(run(pipe), run(pipe))


def test_lora_and_fused_projections_on_joint_attention():
    pipe = tt.flux()
    apart = run(pipe, dg.NegativeAway("red", scale=0.5))
    pipe.transformer.fuse_qkv_projections()
    torch.testing.assert_close(run(pipe, dg.NegativeAway("red", scale=0.5)), apart, rtol=0, atol=1e-4)
    from peft import LoraConfig

    pipe = tt.flux()
    torch.manual_seed(3)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "add_k_proj"], init_lora_weights=False))
    assert (run(pipe, dg.NegativeAway("red", scale=0.5)) - apart).abs().max() > 1e-4


def test_a_negative_is_encoded_again_for_another_lora_scale_of_the_text_encoder():
    from peft import LoraConfig

    pipe, kept = tt.flux(), []
    torch.manual_seed(3)
    pipe.text_encoder_2.add_adapter(LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=False))
    embeds = dict(zip(("prompt_embeds", "pooled_prompt_embeds"), pipe.encode_prompt("a ball", "a ball"), strict=False))
    calls = [embeds | {"prompt": None, "joint_attention_kwargs": {"scale": scale}} for scale in (1.0, 0.2)]
    with dg.graft(pipe, dg.NegativeAway("red", scale=0.8)):
        for call in calls:
            kept.append(pipe(**call, **SMALL, generator=torch.Generator().manual_seed(0)).images)
    for call, found in zip(calls, kept, strict=True):
        assert torch.equal(found, run(pipe, dg.NegativeAway("red", scale=0.8), **call))
    assert not torch.equal(*kept)


def test_padding_that_qwen_masks_changes_nothing():
    pipe, negative = tt.qwen(), normal(1, 4, 32, seed=5)
    junk = torch.cat([negative, 9 * torch.ones(1, 3, 32)], 1)
    short = run(pipe, dg.NegativeAway(negative, scale=0.5))
    padded = run(pipe, dg.NegativeAway(junk, scale=0.5, mask=torch.arange(7)[None] < 4))
    torch.testing.assert_close(padded, short, rtol=0, atol=1e-5)
    assert (run(pipe, dg.NegativeAway(junk, scale=0.5)) - short).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_a_negative_prompt_that_the_call_ignores_is_said(name):
    pipe, call = getattr(tt, name)(), {"flux": {}, "sd3": {"guidance_scale": 0.0}}[name]
    with pytest.warns(UserWarning, match="negative_prompt='green' does nothing"):
        run(pipe, dg.NegativeAway("red"), negative_prompt="green", **call)


def test_padding_of_masked_captions_changes_nothing():
    pipe = tt.pixart()
    embeds, mask = pipe.encode_prompt("red cat", do_classifier_free_guidance=False, max_sequence_length=9)[:2]
    call = call_of(pipe, guided=False) | {"max_sequence_length": 9}
    told = run(pipe, dg.NegativeAway("red cat"), **call)
    torch.testing.assert_close(run(pipe, dg.NegativeAway(embeds, mask=mask), **call), told, rtol=0, atol=1e-5)
    real = int(mask.sum())
    short = run(pipe, dg.NegativeAway(embeds[:, :real]), **call)
    torch.testing.assert_close(short, told, rtol=0, atol=1e-5)
    assert (run(pipe, dg.NegativeAway(embeds), **call) - told).abs().max() > 1e-4

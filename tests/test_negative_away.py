"""NegativeAway on UNet pipelines: against a processor of our own, batches, forms of the negative, caches, company."""

from __future__ import annotations

import copy
import warnings
from collections import Counter

import accelerate
import diffusers
import pytest
import tiny
import tiny_transformers
import torch
from plugins_for_tests import Guide, Scaled, fingerprint
from test_matrix import add_lora, load_ip_adapter, variant
from torch.utils.flop_counter import FlopCounterMode

import diffgraft as dg
from diffgraft.plugins.defaults import DEFAULTS, default
from diffgraft.plugins.negative_away import RULES
from diffgraft.plugins.negative_edits import CrossAway

ONE = {"num_images_per_prompt": 1, "device": "cpu"}
SETTINGS = {"nasa": {"scale": 0.3}, "nag": {"scale": 3.0, "alpha": 0.5}, "vsf": {"scale": 1.5, "offset": 0.2},
            "ong": {"scale": 0.6}}  # fmt: skip


def away(negative="red cat", rule="nasa", **settings):
    return dg.NegativeAway(negative, rule=rule, **(SETTINGS[rule] | settings))


def run(pipe, *plugins, prompt="a blue ball", **call):
    with dg.graft(pipe, *plugins):
        return tiny.sample(pipe, prompt, **call)


@pytest.fixture(scope="module")
def pipe():
    return tiny.sd15()


class Reference:
    """A classic processor of its own: two softmaxes written out, combined before the output projection.

    `hidden`: tokens of the negative that are padding, [1, L]; a bias tells those of the prompt.
    """

    def __init__(self, negative, rule, guided, hidden=None):
        self.negative, self.rule, self.guided, self.hidden = negative, rule, guided, hidden

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        q = attn.to_q(hidden_states)
        q = attn.head_to_batch_dim(q if attn.norm_q is None else attn.norm_q(q))
        z, lse = self.attend(attn, q, encoder_hidden_states, None if attention_mask is None else attention_mask < -1)
        negative = self.negative.to(q).expand(len(hidden_states), -1, -1)
        n, lse_n = self.attend(attn, q, negative, self.hidden)
        new = self.combine(attn, z, lse, n, lse_n)
        if self.guided:
            new = torch.cat([z[: len(z) // 2], new[len(z) // 2 :]])
        return attn.to_out[0](attn.batch_to_head_dim(new))

    def attend(self, attn, q, text, hidden):
        k, v = attn.to_k(text), attn.head_to_batch_dim(attn.to_v(text))
        k = attn.head_to_batch_dim(k if attn.norm_k is None else attn.norm_k(k))
        weights = (q @ k.mT * q.shape[-1] ** -0.5).exp()
        if hidden is not None:  # one row here
            weights = weights * ~hidden.reshape(1, 1, -1)
        total = weights.sum(-1, keepdim=True)
        return weights @ v / total, total.log()

    def combine(self, attn, z, lse, n, lse_n):
        if self.rule == "nasa":
            return z - 0.3 * n
        if self.rule == "vsf":
            w = 1 / (1 + (lse_n - lse - 0.2).exp())
            return w * z - 1.5 * (1 - w) * n
        flat, other = attn.batch_to_head_dim(z), attn.batch_to_head_dim(n)
        if self.rule == "ong":
            unit = torch.nn.functional.normalize(flat, dim=-1)
            return attn.head_to_batch_dim(flat - 0.6 * (other - (other * unit).sum(-1, keepdim=True) * unit))
        far = 4 * flat - 3 * other
        ratio = far.abs().sum(-1, keepdim=True) / flat.abs().sum(-1, keepdim=True)
        return attn.head_to_batch_dim(0.5 * flat + 0.5 * far * ratio.clamp_max(2.5) / ratio)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("rule", RULES)
def test_parity_with_a_processor_of_our_own(rule, guidance):
    pipe = tiny.sd2().to(torch.float64)
    found = run(pipe, away(rule=rule), guidance_scale=guidance)
    negative = pipe.encode_prompt("red cat", "cpu", 1, False)[0]
    processors = {
        name: Reference(negative, rule, guidance > 1) if "attn2" in name else processor
        for name, processor in pipe.unet.attn_processors.items()
    }
    pipe.unet.set_attn_processor(processors)
    expected = tiny.sample(pipe, "a blue ball", guidance_scale=guidance)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["pixart", "sana"])
def test_parity_where_captions_are_projected_and_masked(name, rule):
    """Each text's padding hidden by its own mask; Sana also norms queries and keys."""
    pipe = getattr(tiny_transformers, name)().to(torch.float64)
    model, call = pipe.transformer, {"guidance_scale": 1.0, "use_resolution_binning": False, "clean_caption": False}
    call |= {"complex_human_instruction": None} if name == "sana" else {}
    seen = []  # the pipeline's latents are float32
    model.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    run(pipe, away(rule=rule), num_inference_steps=1, **call)
    text, mask = pipe.encode_prompt("red cat", do_classifier_free_guidance=False, **ONE)[:2]
    with torch.no_grad():
        text = model.caption_projection(text)
        text = model.caption_norm(text) if name == "sana" else text
    assert not mask.all()
    for block in model.transformer_blocks:
        block.attn2.set_processor(Reference(text, rule, False, mask == 0))
    tiny.sample(pipe, "a blue ball", num_inference_steps=1, **call)
    assert seen[0].dtype == torch.float64
    torch.testing.assert_close(*seen, rtol=0, atol=1e-10)


NEUTRAL = [
    away(scale=0), away(rule="nag", scale=0), away(rule="nag", alpha=0), away(None), away(None, "vsf"),
    away({"red": 0.0}), away(layers=[]), away(end=0.0), away("red", start=1.0),
]  # fmt: skip


@pytest.mark.parametrize("plugin", NEUTRAL, ids=range(len(NEUTRAL)))
def test_neutral_settings_are_bit_identical(pipe, plugin):
    plain, before = tiny.sample(pipe), fingerprint(pipe)
    with dg.graft(pipe, plugin):
        assert torch.equal(tiny.sample(pipe), plain)
    assert fingerprint(pipe) == before


def test_only_the_conditional_half_changes(pipe):
    """u + g (c' - u) with u of the plain pipeline and c' of a run without guidance, in one step."""
    seen = []
    hook = pipe.unet.register_forward_hook(lambda module, args, out: seen.append(out[0].clone()))
    tiny.sample(pipe, num_inference_steps=1)
    run(pipe, away(), prompt="a red ball and a blue star", num_inference_steps=1)
    run(pipe, away(), prompt="a red ball and a blue star", num_inference_steps=1, guidance_scale=1.0)
    hook.remove()
    plain, guided, alone = seen
    assert torch.equal(guided[0], plain[0]) and (guided[1] - plain[1]).abs().max() > 1e-2
    torch.testing.assert_close(guided[1], alone[0], rtol=0, atol=1e-5)


def test_guidance_keeps_its_own_negative(pipe):
    call = {"negative_prompt": "a star"}
    both, one = run(pipe, away(), **call), run(pipe, away())
    assert (both - one).abs().max() > 1e-3 and (both - tiny.sample(pipe, "a blue ball", **call)).abs().max() > 1e-3


def test_perturbed_attention_guidance_beside_it():
    pipe = tiny.sd15(cls=diffusers.StableDiffusionPAGPipeline, pag_applied_layers=["mid"])
    seen = []
    hook = pipe.unet.register_forward_hook(lambda module, args, out: seen.append(out[0].clone()))
    for plugins in ((), (away(),)):
        run(pipe, *plugins, num_inference_steps=1, pag_scale=2.0)
    hook.remove()
    plain, steered = seen
    assert len(steered) == 3 and torch.equal(plain[[0, 2]], steered[[0, 2]])
    assert (plain[1] - steered[1]).abs().max() > 1e-2


def test_the_empty_text_is_a_negative_like_others(pipe):
    assert not torch.equal(run(pipe, away("")), tiny.sample(pipe, "a blue ball"))


# -- batches and forms of the negative ------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("negatives", [["red cat", "star"], "red cat"])
def test_a_batch_is_its_single_runs(pipe, negatives, guidance):
    prompts, each = ["a blue ball", "a red star and a cat"], 2
    noise = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    call = {"guidance_scale": guidance, "num_images_per_prompt": each}
    batch = run(pipe, away(negatives, "nag"), prompt=prompts, latents=noise, **call)
    for i in range(4):
        negative = negatives if isinstance(negatives, str) else negatives[i // each]
        single = run(
            pipe, away(negative, "nag"), prompt=prompts[i // each], latents=noise[i : i + 1], guidance_scale=guidance
        )
        torch.testing.assert_close(batch[i], single[0], rtol=0, atol=2e-5)


def test_embeddings_do_what_their_text_does(family):
    embeds = family.encode_prompt("red cat", do_classifier_free_guidance=False, **ONE)[0]
    told = run(family, away("red cat"))
    assert torch.equal(run(family, away(embeds)), told) and torch.equal(run(family, away(embeds[0])), told)
    two = family.encode_prompt(["red cat", "star"], do_classifier_free_guidance=False, **ONE)[0]
    prompts = ["a ball", "a cat"]
    assert torch.equal(run(family, away(two), prompt=prompts), run(family, away(["red cat", "star"]), prompt=prompts))


@pytest.mark.parametrize("rule", RULES)
def test_several_negatives_at_once(pipe, rule):
    one = run(pipe, away("red cat", rule))
    torch.testing.assert_close(run(pipe, away({"red cat": 1.0, "star": 0.0}, rule)), one, rtol=0, atol=0)
    two = run(pipe, away({"red cat": 1.0, "star": 0.7}, rule))
    assert (two - one).abs().max() > 1e-3
    if rule == "nasa":  # linear: the same negative twice is twice the scale
        half = run(pipe, away({"red cat": 0.5, "red  cat": 0.5}, rule))
        torch.testing.assert_close(half, one, rtol=0, atol=2e-5)


def test_padding_that_is_masked_changes_nothing(pipe):
    embeds = pipe.encode_prompt("red cat", "cpu", 1, False)[0][:, :9]
    junk = torch.cat([embeds, 9 * torch.ones(1, 5, embeds.shape[-1])], 1)
    mask = torch.arange(14)[None] < 9
    for rule in RULES:
        short, padded = run(pipe, away(embeds, rule)), run(pipe, away(junk, rule, mask=mask))
        torch.testing.assert_close(padded, short, rtol=0, atol=2e-5)
        assert (run(pipe, away(junk, rule)) - short).abs().max() > 1e-3


# -- what is done once ----------------------------------------------------------------------------------------------


def count_linears(pipe, names):
    """Calls of the projections of cross-attention, by number of text tokens that they got."""
    calls = Counter()
    hooks = [
        module.register_forward_hook(lambda m, args, out, name=name: calls.update([(name, args[0].shape[1])]))
        for name, module in pipe.unet.named_modules()
        if "attn2" in name and name.endswith(names)
    ]
    return calls, lambda: [hook.remove() for hook in hooks]


@pytest.mark.parametrize("steps", [1, 4])
def test_negative_keys_are_projected_once_a_call(pipe, steps):
    embeds = pipe.encode_prompt("red cat", "cpu", 1, False)[0][:, :7]  # tells its calls from the prompt's 77
    calls, undo = count_linears(pipe, ("to_k", "to_v"))
    with dg.graft(pipe, away(embeds)):
        for done in (1, 2):
            tiny.sample(pipe, num_inference_steps=steps, num_images_per_prompt=2)
            negative = {key: n for key, n in calls.items() if key[1] == 7}
            assert len(negative) == 2 * 11 and set(negative.values()) == {done}
    undo()


def call_flops(pipe, **call):
    with dg.graft(pipe, away()), FlopCounterMode(display=False) as counter:
        return tiny.sample(pipe, **call), counter.get_total_flops()


@pytest.mark.parametrize("lora", [False, True])
def test_the_prompt_is_projected_once_too(lora, monkeypatch):
    """Bit-identical, and what is saved is the prompt's products of every step but the first."""
    pipe = tiny.sdxl()
    if lora:
        add_lora(pipe)
    kept, few = call_flops(pipe)
    monkeypatch.setattr(CrossAway, "keeps_text", False)
    again, many = call_flops(pipe)
    assert torch.equal(kept, again)
    layers = [layer.module for layer in dg.find_layers(pipe.unet) if layer.kind == "cross"]
    once = sum(2 * 2 * 77 * 64 * (m.inner_dim + (2 if lora else 0)) for m in layers) * 2  # rows, k and v
    assert many - few == 2 * once


def test_a_prompt_that_changes_is_projected_again(pipe, monkeypatch):
    def fade(pipe, index, timestep, tensors):
        if index == 0:
            tensors["prompt_embeds"].mul_(0.5)
            return {"prompt_embeds": tensors["prompt_embeds"]}
        return {"prompt_embeds": tensors["prompt_embeds"] + 0.1}

    call = {"callback_on_step_end": fade, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    kept = run(pipe, away(), **call)
    monkeypatch.setattr(CrossAway, "keeps_text", False)
    assert torch.equal(run(pipe, away(), **call), kept) and not torch.equal(run(pipe, away()), kept)


def test_a_negative_is_encoded_once_over_calls(pipe):
    texts = []
    hook = pipe.text_encoder.register_forward_pre_hook(lambda module, args: texts.append(len(args[0])))
    with dg.graft(pipe, away(["red cat", "star"])) as g:
        for _ in range(3):
            tiny.sample(pipe, ["a ball", "a cat"], guidance_scale=1.0)
        assert g.plugins[0].report()["scale"] == 0.3
    hook.remove()
    assert texts.count(2) == 4  # three times the prompts, once the negatives


def test_a_negative_is_encoded_again_when_its_tokens_mean_something_else(pipe):
    """A word learned by textual inversion under the same graft."""
    pipe, steered = copy.deepcopy(pipe), []
    with dg.graft(pipe, away("<bad>")):
        steered.append(tiny.sample(pipe))
        pipe.load_textual_inversion(torch.randn(2, 32, generator=torch.Generator().manual_seed(4)), token="<bad>")
        steered.append(tiny.sample(pipe))
    assert torch.equal(steered[1], run(pipe, away("<bad>"), prompt="a red ball and a blue star"))
    assert not torch.equal(*steered)


def test_nothing_is_kept_after_a_call(pipe):
    plugin = away()
    with dg.graft(pipe, plugin) as graft:
        tiny.sample(pipe)
        assert not graft.run.notes
        with pytest.raises(KeyboardInterrupt):
            tiny.sample(pipe, callback_on_step_end=lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert not graft.run.notes


def test_caches_do_not_outlive_what_they_were_made_from(pipe):
    """Prompt, negative, LoRA scale, dtype and device may change between calls; a fresh graft says what is right."""
    pipe = copy.deepcopy(pipe)
    add_lora(pipe)
    changes = [
        lambda: {"prompt": "a cat"},
        lambda: {"cross_attention_kwargs": {"scale": 0.3}},
        lambda: pipe.unet.disable_adapters() or {},
        lambda: pipe.to(torch.float64) and {},
        lambda: pipe.to(torch.float32) and {"num_inference_steps": 1},
        lambda: {"num_images_per_prompt": 2},
    ]
    with dg.graft(pipe, away()) as graft:
        for change in changes:
            call = change()
            with graft:
                kept = tiny.sample(pipe, call.pop("prompt", "a ball"), **call)
            graft.detach()
            fresh = run(pipe, away(), prompt="a cat" if change is changes[0] else "a ball", **call)
            assert torch.equal(kept, fresh)
            graft.attach()


def test_lora_switched_in_the_middle_of_a_call(pipe):
    pipe = copy.deepcopy(pipe)
    add_lora(pipe)

    def off(pipe, index, timestep, tensors):
        if index == 0:
            pipe.unet.disable_adapters()
        return tensors

    embeds = pipe.encode_prompt("red cat", "cpu", 1, False)[0][:, :7]
    calls, undo = count_linears(pipe, ("to_k",))
    run(pipe, away(embeds), callback_on_step_end=off)
    undo()
    assert {n for key, n in calls.items() if key[1] == 7} == {2}


def test_two_pipelines_on_one_unet(pipe):
    other = diffusers.StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    other.scheduler = tiny.ddim()
    tiny.quiet(other)
    with dg.graft(pipe, away()):
        first, second, again = (tiny.sample(p, "a cat") for p in (pipe, other, pipe))
    assert torch.equal(first, again) and torch.equal(first, second)


def test_one_plugin_on_several_pipelines(pipe):
    plugin, other, flux = away(), tiny.sd15(seed=7), tiny_transformers.flux()
    alone = run(pipe, plugin)

    def meanwhile(p, index, timestep, tensors):
        with dg.graft(other, plugin):
            tiny.sample(other, num_inference_steps=1)
        return tensors

    with dg.graft(pipe, plugin):
        with dg.graft(flux, plugin):
            assert torch.equal(tiny.sample(pipe, "a blue ball"), alone)
            tiny.sample(flux, max_sequence_length=16)
        assert torch.equal(tiny.sample(pipe, "a blue ball", callback_on_step_end=meanwhile), alone)


# -- windows and layers ---------------------------------------------------------------------------------------------


def test_windows_of_layers_and_steps(pipe):
    whole = run(pipe, away())
    names = [layer.name for layer in dg.find_layers(pipe.unet) if layer.kind == "cross"]
    for everything in (["down", "mid", "up"], list(range(11)), names):
        assert torch.equal(run(pipe, away(layers=everything)), whole)
    with dg.graft(pipe, away(layers=["mid", 9])) as g:
        tiny.sample(pipe)
    assert len(g.report().layers) == 2
    with dg.graft(pipe, away(layers="mid")) as g:
        tiny.sample(pipe)
    assert len(g.report().layers) == 1
    steered, stock = [], []

    def note(pipe, index, timestep, tensors):
        steered.append(tensors["latents"].clone())
        return tensors

    def swap(pipe, index, timestep, tensors):
        stock.append(tensors["latents"].clone())
        return {"latents": steered[0].clone()} if index == 0 else tensors

    run(pipe, away(end=0.33), callback_on_step_end=note)
    tiny.sample(pipe, "a blue ball", callback_on_step_end=swap)
    assert not torch.equal(stock[0], steered[0]) and torch.equal(stock[2], steered[2])


# -- company --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["img2img", "inpaint-4", "inpaint-9", "controlnet", "controlnet-xl"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_pipelines_of_the_family(name, guidance):
    pipe, call = variant(name)
    call |= {"guidance_scale": guidance} | ({"height": 32, "width": 32} if "inpaint" in name else {})
    plain = tiny.sample(pipe, **call)
    for rule in RULES:
        steered = run(pipe, away(rule=rule), prompt="a red ball and a blue star", **call)
        assert steered.isfinite().all() and (steered - plain).abs().max() > 1e-3
    assert torch.equal(tiny.sample(pipe, **call), plain)


def test_fused_projections(family):
    apart = run(family, away())
    family.fuse_qkv_projections()
    torch.testing.assert_close(run(family, away()), apart, rtol=0, atol=2e-5)


def test_lora_reaches_the_negative_too(pipe):
    lora = copy.deepcopy(pipe)
    add_lora(lora)
    steered = run(lora, away())
    merged = copy.deepcopy(lora)
    merged.unet.fuse_lora()
    torch.testing.assert_close(run(merged, away()), steered, rtol=0, atol=2e-5)
    assert (steered - run(pipe, away())).abs().max() > 1e-3


def test_an_ip_adapter_keeps_its_image_tokens():
    pipe = tiny.sd15()
    load_ip_adapter(pipe)
    picture = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(5))
    seen = []

    class Look(dg.Edit):
        order, every_call = 2000, True

        def selects(self, layer):
            return layer.kind == "cross"

        def out(self, call, out):
            seen.append((call.number, call.layer.index, out.clone()))
            return out

    class Looking(dg.Plugin):
        def edits(self):
            return [Look()]

    call = {"ip_adapter_image_embeds": [picture], "num_inference_steps": 1, "guidance_scale": 1.0}
    call["ip_adapter_image_embeds"] = [picture[1:]]
    plain = run(pipe, Looking(), **call)
    before, seen = {(n, i): out for n, i, out in seen}, []
    steered = run(pipe, away(), Looking(), **call)
    after = {(n, i): out for n, i, out in seen}
    assert (plain - steered).abs().max() > 1e-3 and {n for n, _ in after} == {0, 1}
    assert torch.equal(before[1, 0], after[1, 0]) and not torch.equal(before[0, 0], after[0, 0])


@pytest.mark.parametrize("how", ["model", "sequential", "group"])
def test_offload(how):
    pipe = tiny.sd15()
    expected = run(pipe, away())
    if how == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    elif how == "sequential":
        accelerate.cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    else:
        pipe.unet.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    with dg.graft(pipe, away()):
        for _ in range(2):
            assert torch.equal(tiny.sample(pipe, "a blue ball"), expected)


def test_beside_other_plugins_in_any_order(pipe):
    makers = (away, lambda: Scaled(0.5, kind="self"), Guide)
    one, other = (run(pipe, *(make() for make in order)) for order in (makers, makers[::-1]))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_beside_an_edit_that_wants_probabilities(pipe, rule):
    class Look(dg.Edit):
        wants_probs = True

        def selects(self, layer):
            return layer.kind == "cross"

    class Looking(dg.Plugin):
        def edits(self):
            return [Look()]

    torch.testing.assert_close(run(pipe, Looking(), away(rule=rule)), run(pipe, away(rule=rule)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_half_precision_stays_finite(rule, dtype):
    pipe = tiny.sd15().to(dtype)
    assert run(pipe, away(rule=rule), num_inference_steps=2).isfinite().all()
    assert run(pipe, away(rule=rule, scale=100.0), num_inference_steps=2).isfinite().all()


# -- bad input ------------------------------------------------------------------------------------------------------


def test_a_negative_prompt_that_the_call_ignores_is_said(pipe):
    with dg.graft(pipe, away("red")):
        with pytest.warns(UserWarning, match="negative_prompt='green' does nothing") as said:
            tiny.sample(pipe, negative_prompt="green", guidance_scale=0.0)
        assert len([w for w in said if "negative_prompt" in str(w.message)]) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            tiny.sample(pipe, negative_prompt="green")
            tiny.sample(pipe, guidance_scale=0.0)


def test_latent_consistency_models():
    """Their UNet takes the guidance as an embedding: no pipeline runs it twice, whatever is asked for."""
    lcm = diffusers.LCMScheduler.from_config(tiny.ddim().config)
    parts = {"unet": tiny.unet(time_cond_proj_dim=16), "scheduler": lcm}
    pipe = tiny.sd15(**parts)
    with dg.graft(pipe, away()), pytest.warns(UserWarning, match="does nothing"):
        assert tiny.sample(pipe, negative_prompt="green", guidance_scale=8.0).isfinite().all()
    pipe = tiny.sd15(cls=diffusers.LatentConsistencyModelPipeline, **parts)
    assert (run(pipe, away()) - tiny.sample(pipe, "a blue ball")).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"negative": 3}, dg.SettingTypeError, "text"),
        ({"negative": ["red", 3]}, dg.SettingTypeError, "text"),
        ({"negative": []}, dg.SettingError, "empty"),
        ({"negative": {}}, dg.SettingError, "empty"),
        ({"negative": {"red": -1.0}}, dg.SettingError, "weight"),
        ({"negative": {"red": float("nan")}}, dg.SettingError, "weight"),
        ({"negative": {"red": 1e30}}, dg.SettingError, "weight"),
        ({"negative": torch.zeros(3)}, dg.SettingError, "L, D"),
        ({"negative": torch.full((2, 3), torch.nan)}, dg.SettingError, "NaN"),
        ({"rule": "cfg"}, dg.SettingError, "nasa, nag, vsf"),
        ({"scale": -1}, dg.SettingError, "scale"),
        ({"scale": float("inf")}, dg.SettingError, "scale"),
        ({"scale": "much"}, dg.SettingTypeError, "scale"),
        ({"tau": 0}, dg.SettingError, "tau"),
        ({"alpha": 2}, dg.SettingError, "alpha"),
        ({"joint": "half"}, dg.SettingError, "joint"),
        ({"mask": torch.ones(1, 3)}, dg.SettingTypeError, "mask"),
        ({"negative": torch.zeros(1, 4, 32), "mask": torch.ones(1, 3)}, dg.SettingError, "mask"),
        ({"negative": torch.zeros(1, 4, 32), "mask": torch.zeros(1, 4)}, dg.SettingError, "padding"),
    ],
)
def test_settings_out_of_range(arguments, error, match):
    with pytest.raises(error, match=match):
        dg.NegativeAway(**({"negative": "red"} | arguments))


def test_negatives_that_do_not_fit_the_call(pipe):
    before = fingerprint(pipe)
    for negative, prompts, match in (
        (["red", "blue"], ["a", "b", "c"], "2 negatives for 3 prompts"),
        (["red", "blue"], "a", "2 negatives for 1 prompts"),
        (torch.zeros(1, 4, 5), "a", "width 5"),
    ):
        with pytest.raises(dg.SettingError, match=match):
            run(pipe, away(negative), prompt=prompts)
    with pytest.raises(dg.SettingError, match="no text-attention layer"):
        run(pipe, away(layers=["sideways"]))
    assert fingerprint(pipe) == before


def test_no_text_attention_and_no_usual_attention():
    with pytest.raises(dg.UnsupportedPipelineError, match="not supported"):
        dg.graft(diffusers.DDPMPipeline(diffusers.UNet2DModel(block_out_channels=(32,), layers_per_block=1,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)), tiny.ddim()), away())  # fmt: skip
    pipe = tiny.sd15()
    pipe.unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    with pytest.raises(dg.AttentionNotReachedError, match="AttnProcessor"):
        run(pipe, away())
    blocks = [f"SimpleCrossAttn{place}Block2D" for place in ("Down", "Up")]
    unet = tiny.unet(
        down_block_types=blocks[:1] * 2, up_block_types=blocks[1:] * 2, mid_block_type="UNetMidBlock2DSimpleCrossAttn"
    )
    with pytest.raises(dg.UnsupportedPipelineError, match="DeepFloyd"), dg.graft(tiny.sd15(unet=unet), away()):
        pass
    with dg.graft(tiny.sd15(unet=unet), away(None)):
        pass


class Bare(diffusers.DiffusionPipeline):
    """Encodes its prompts inside `__call__`."""

    def __init__(self, unet, scheduler, tokenizer, text_encoder):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, tokenizer=tokenizer, text_encoder=text_encoder)

    def __call__(self, text):
        self.scheduler.set_timesteps(1)
        return self.unet(torch.ones(1, 4, 16, 16), self.scheduler.timesteps[0], text).sample


def test_a_pipeline_that_encodes_no_text_apart_takes_embeddings(pipe):
    bare, text = Bare(pipe.unet, tiny.ddim(), pipe.tokenizer, pipe.text_encoder), torch.ones(1, 3, tiny.WIDTH)
    with dg.graft(bare, away()), pytest.raises(dg.UnsupportedPipelineError, match="pass embeddings"):
        bare(text)
    with dg.graft(bare, away(-text)), torch.no_grad():
        assert bare(text).isfinite().all()


def test_the_report_says_where_the_scale_is_from(pipe):
    with dg.graft(pipe, dg.NegativeAway("red")) as g:
        tiny.sample(pipe)
    assert "unmeasured" in str(g.report())
    with dg.graft(pipe, dg.NegativeAway("red", scale=0.25)) as g:
        tiny.sample(pipe)
    assert g.report().plugins == [("NegativeAway", {"rule": "nasa", "scale": 0.25, "scale_from": "given"})]


def test_defaults_by_family_rule_and_guidance():
    for rule, families in DEFAULTS.items():
        assert rule in RULES and families["other"].source == "unmeasured"
        for family in (*families, "never heard of"):
            for guided in (False, True):
                found = default(rule, family, guided)
                assert 0 < found.scale <= 100 and 0 < found.alpha <= 1
                assert found.source.startswith("unmeasured") or family in families
    assert default("nasa", "sd15", False) == (0.1, 0.1, 0.5, "NASA's own settings")
    assert default("nag", "sd3", False)[::2] == (4.0, 0.125)
    assert "under guidance" in default("nasa", "sd15", True).source


def test_the_picture_book_is_a_family_of_its_own(picturebook):
    with dg.graft(picturebook, dg.NegativeAway("red")) as g:
        picturebook("a ball , sky", num_inference_steps=1, guidance_scale=0.0, output_type="latent")
    assert "measured on the picture book" in str(g.report())

"""The new families through their own pipelines: guidance, batches, encoders, experts, windows and refusals."""

from __future__ import annotations

import copy
import functools
import inspect
from contextlib import contextmanager

import diffusers
import numpy as np
import pytest
import tiny_families as tf
import tiny_family_pipelines as fp
import tiny_transformers as tt
import torch
from diffusers.models import attention_dispatch
from PIL import Image
from plugins_for_tests import fingerprint
from test_matrix import IMAGE, MASK

import diffgraft as dg
from diffgraft.pipelines.families import adapter_for

SMALL = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "latent", "max_sequence_length": 16}
CALLS = {
    "z_image": {}, "chroma": {}, "lumina2": {}, "wan": {"num_frames": 5},
    "klein": {"text_encoder_out_layers": (1, 2, 3)}, "krea2": {},
}  # fmt: skip
WORDED = ["z_image", "klein", "chroma", "lumina2", "krea2", "qwen"]
"""Whose words have columns."""


@functools.cache
def pipe_of(name):
    return getattr(fp, name)()


def run(pipe, *plugins, prompt="a blue ball", backend="auto", **call):
    options = SMALL | {"generator": torch.Generator().manual_seed(0)} | call
    with dg.graft(pipe, *plugins, backend=backend) as g:
        return pipe(prompt=prompt, **options)[0], g.report()


def draw(pipe, *plugins, **call):
    """As `run`, of a pipeline without the usual arguments."""
    size = {name: SMALL[name] for name in ("num_inference_steps", "height", "width", "output_type")}
    with dg.graft(pipe, *plugins) as g:
        return pipe("a blue ball", generator=torch.Generator().manual_seed(0), **size | call)[0], g.report()


def calls_of(pipe, *plugins, **call):
    """The denoiser's outputs, one by one."""
    seen = []
    hook = pipe.transformer.register_forward_hook(
        lambda module, args, out: seen.append(torch.stack(out[0]) if isinstance(out[0], list) else out[0].clone())
    )
    run(pipe, *plugins, **call)
    hook.remove()
    return seen


@pytest.mark.parametrize("guidance", [0.0, 4.0])
@pytest.mark.parametrize("name", CALLS)
def test_a_pipeline_steers_and_comes_off(name, guidance):
    pipe, call = pipe_of(name), CALLS[name] | {"guidance_scale": guidance}
    plain, before = run(pipe, **call)[0], fingerprint(pipe)
    for rule in ("nasa", "nag", "vsf", "ong"):
        steered, report = run(pipe, dg.NegativeAway("red cat", rule=rule, scale=0.8), **call)
        assert steered.isfinite().all() and (steered - plain).abs().max() > 1e-4, rule
        assert set(report.layers) and report.calls == len(calls_of(pipe, **call))
    for settings in ({"scale": 0}, {"end": 0}, {"until": 0}, {"layers": []}):
        assert torch.equal(run(pipe, dg.NegativeAway("red cat", **settings), **call)[0], plain)
    assert torch.equal(run(pipe, **call)[0], plain) and fingerprint(pipe) == before


@pytest.mark.parametrize("name", CALLS)
def test_only_the_conditional_half_changes(name):
    pipe, call = pipe_of(name), CALLS[name] | {"guidance_scale": 4.0, "num_inference_steps": 1}
    plain, steered = calls_of(pipe, **call), calls_of(pipe, dg.NegativeAway("red cat", scale=0.8), **call)
    if name == "z_image":
        plain, steered = ([rows[:1], rows[1:]] for rows in (plain[0], steered[0]))
    torch.testing.assert_close(steered[1], plain[1], rtol=0, atol=1e-5)
    assert (steered[0] - plain[0]).abs().max() > 1e-4


def test_guidance_of_z_image_may_end_early():
    """cfg_truncation: the last steps are unguided, in one batch of half the rows."""
    pipe = pipe_of("z_image")
    call = {"guidance_scale": 4.0, "cfg_truncation": 0.5, "num_inference_steps": 4}
    rows = [len(out) for out in calls_of(pipe, dg.NegativeAway("red cat", scale=0.8), **call)]
    assert set(rows) == {1, 2}


def test_prompts_of_different_lengths_in_one_batch_are_each_alone():
    long = " ".join(["a red ball and a blue star"] * 6)  # 36 words: 64 columns where 32 hold the other
    pipe = pipe_of("z_image")
    noise, prompts = tf.normal(2, 4, 16, 16), ["a ball", long]
    for guidance in (0.0, 4.0):
        call = {"guidance_scale": guidance, "max_sequence_length": 48}
        both = run(pipe, dg.NegativeAway(["cat", "red"], scale=0.5), prompt=list(prompts), latents=noise, **call)[0]
        for i, negative in enumerate(("cat", "red")):
            own = {"prompt": prompts[i], "latents": noise[i : i + 1]}
            alone = run(pipe, dg.NegativeAway(negative, scale=0.5), **own, **call)[0]
            torch.testing.assert_close(both[i], alone[0], rtol=0, atol=2e-5 * float(alone.abs().max()))


def test_negatives_of_different_lengths_in_one_batch_are_each_alone():
    long = " ".join(["a red ball and a blue star"] * 6)
    pipe = pipe_of("z_image")
    noise, negatives = tf.normal(2, 4, 16, 16), ["cat", long]
    call = {"guidance_scale": 0.0, "max_sequence_length": 48}
    both = run(pipe, dg.NegativeAway(negatives, scale=0.5), prompt=["a ball", "a cat"], latents=noise, **call)[0]
    for i, prompt in enumerate(("a ball", "a cat")):
        alone = run(pipe, dg.NegativeAway(negatives[i], scale=0.5), prompt=prompt, latents=noise[i : i + 1], **call)[0]
        torch.testing.assert_close(both[i], alone[0], rtol=0, atol=2e-5 * float(alone.abs().max()))


def test_several_negatives_and_several_pictures():
    for name in ("z_image", "lumina2", "wan"):
        pipe, call = pipe_of(name), CALLS[name] | {"guidance_scale": 0.0}
        one = run(pipe, dg.NegativeAway("red cat", scale=0.5), **call)[0]
        halves = run(pipe, dg.NegativeAway({"red cat": 0.5, "red  cat": 0.5}, scale=0.5), **call)[0]
        torch.testing.assert_close(halves, one, rtol=0, atol=1e-4)
        assert not torch.equal(run(pipe, dg.NegativeAway({"red cat": 1.0, "star": 1.0}, scale=0.5), **call)[0], one)
        count = "num_videos_per_prompt" if name == "wan" else "num_images_per_prompt"
        assert len(run(pipe, dg.NegativeAway("red cat", scale=0.5), **call, **{count: 2})[0]) == 2


def test_two_sizes_under_one_graft_are_not_mixed():
    pipe, call = pipe_of("z_image"), {"guidance_scale": 0.0}
    with dg.graft(pipe, dg.NegativeAway("red cat", scale=0.5)):
        mixed = [pipe("a ball", generator=torch.Generator().manual_seed(0), **SMALL | call | {"height": h})[0]
                 for h in (32, 64, 32)]  # fmt: skip
    for made, h in zip(mixed, (32, 64, 32), strict=True):
        assert torch.equal(made, run(pipe, dg.NegativeAway("red cat", scale=0.5), prompt="a ball", height=h, **call)[0])


# -- hearing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["z_image", "klein", "chroma", "lumina2", "wan"])
def test_a_negative_is_heard_once_a_call(name, monkeypatch):
    pipe, call = pipe_of(name), CALLS[name] | {"guidance_scale": 0.0, "num_inference_steps": 3}
    ran = []
    kind = type(pipe.transformer)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", functools.wraps(forward)(lambda *a, **k: ran.append(1) or forward(*a, **k)))
    run(pipe, **call)
    plain = len(ran)
    run(pipe, dg.NegativeAway("red cat", scale=0.5), **call)
    assert len(ran) == 2 * plain + 1


def test_an_error_while_a_negative_is_heard_leaves_nothing():
    pipe = pipe_of("z_image")
    plain, before = run(pipe, guidance_scale=0.0)[0], fingerprint(pipe)
    wrong = torch.randn(1, 5, 16) * torch.inf
    with pytest.raises(dg.SettingError):
        run(pipe, dg.NegativeAway(wrong), guidance_scale=0.0)
    with pytest.raises(dg.SettingError, match="width 7"):
        run(pipe, dg.NegativeAway(torch.randn(1, 5, 7)), guidance_scale=0.0)
    refiner = pipe.transformer.context_refiner[0]

    def fail(module, args):
        raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"), dg.graft(pipe, dg.NegativeAway("red")):
        hook = refiner.register_forward_pre_hook(fail)
        try:
            pipe("a ball", guidance_scale=0.0, **SMALL)
        finally:
            hook.remove()
    assert torch.equal(run(pipe, guidance_scale=0.0)[0], plain) and fingerprint(pipe) == before


# -- encoding ---------------------------------------------------------------------------------------------------------


def test_lumina2_encodes_a_negative_as_it_encodes_its_own():
    pipe = pipe_of("lumina2")
    own = pipe.encode_prompt(
        "a ball", True, negative_prompt="red cat", device=torch.device("cpu"), max_sequence_length=16
    )
    seen = []

    class Look(dg.Plugin):
        films = True

        def begin(self, session, step):
            seen.append(session.encode(["red cat"]))

        def edits(self):
            return ()

    run(pipe, Look(), guidance_scale=0.0)
    assert torch.equal(seen[0].embeddings, own[2]) and torch.equal(seen[0].mask, own[3].bool())


def test_wan_encodes_a_negative_at_the_length_of_the_call():
    pipe, seen = pipe_of("wan"), []

    class Look(dg.Plugin):
        films = True

        def begin(self, session, step):
            seen.append(session.encode(["red cat"]).embeddings.shape[1])

    for length in (16, 12):
        run(pipe, Look(), num_frames=5, guidance_scale=1.0, max_sequence_length=length)
    assert seen == [16, 12]


def test_another_negative_for_each_text_encoder():
    pipe = tt.sd3()
    call = {"guidance_scale": 1.0, "max_sequence_length": 16}
    same = run(pipe, dg.NegativeAway("red cat", scale=0.5), **call)[0]
    assert torch.equal(run(pipe, dg.NegativeAway("red cat", negative_2="red cat", scale=0.5), **call)[0], same)
    other = run(pipe, dg.NegativeAway("red cat", negative_2="green star", scale=0.5), **call)[0]
    assert (other - same).abs().max() > 1e-4
    with pytest.raises(dg.SettingError, match="takes 1 prompts"):
        run(pipe_of("z_image"), dg.NegativeAway("red", negative_2="blue"), guidance_scale=0.0)
    with pytest.raises(dg.SettingTypeError):
        dg.NegativeAway({"red": 1.0}, negative_2="blue")


# -- experts, windows -------------------------------------------------------------------------------------------------


def test_both_experts_of_wan_are_steered():
    pipe = fp.wan(True, True, 0.6)
    call = {"num_frames": 5, "num_inference_steps": 4, "guidance_scale": 1.0}
    plugin = dg.NegativeAway("red cat", scale=0.8)
    report = run(pipe, plugin, **call)[1]
    first = [name for name in report.layers if not name.startswith("transformer_2.")]
    assert len(report.layers) == 4 and len(first) == 2 and report.calls == 4
    assert sum(report.layers.values()) == 8
    half = run(pipe, dg.NegativeAway("red cat", scale=0.8, end=0.25), **call)[1]
    assert not any(name.startswith("transformer_2.") for name in half.layers)


def test_only_the_second_expert_is_there():
    pipe = fp.wan(False, True, 1.1)
    call = {"num_frames": 5, "guidance_scale": 1.0}
    plain = run(pipe, **call)[0]
    assert (run(pipe, dg.NegativeAway("red cat", scale=0.8), **call)[0] - plain).abs().max() > 1e-4


def test_until_counts_time_and_end_counts_steps():
    """On a schedule that is shifted towards noise."""
    pipe = tt.flux()
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)

    def steps(**window):
        report = run(pipe, dg.NegativeAway("red", scale=0.5, **window), num_inference_steps=28)[1]
        return max(report.layers.values(), default=0)

    assert steps(end=0.25) == 7
    counted = steps(until=0.25)
    times = pipe.scheduler.timesteps.tolist()
    assert counted == sum(t >= 750 for t in times) > 7
    assert steps(until=0.25, end=0.25) == 7 and steps(until=1.0) == 28


# -- pictures in, refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["z img2img", "z inpaint", "chroma img2img"])
def test_pipelines_that_take_a_picture(kind):
    name, way = kind.split()
    cls = {"z": "ZImage", "chroma": "Chroma"}[name] + {"img2img": "Img2ImgPipeline", "inpaint": "InpaintPipeline"}[way]
    pipe = getattr(fp, {"z": "z_image", "chroma": "chroma"}[name])(getattr(diffusers, cls))
    call = {"image": IMAGE, "strength": 0.7, "guidance_scale": 0.0} | ({"mask_image": MASK} if way == "inpaint" else {})
    plain = run(pipe, **call)[0]
    steered = run(pipe, dg.NegativeAway("red cat", scale=0.8), **call)[0]
    assert steered.isfinite().all() and (steered - plain).abs().max() > 1e-4
    assert torch.equal(run(pipe, **call)[0], plain)


def test_what_is_refused_by_name():
    z = pipe_of("z_image")
    with pytest.raises(dg.UnsupportedPipelineError, match="omni"), dg.graft(z, dg.NegativeAway("red")):
        z.transformer(x=[[torch.zeros(4, 1, 8, 8)]], t=torch.tensor([0.5]), cap_feats=[[torch.zeros(5, 16)]])
    klein = pipe_of("klein")
    with pytest.raises(dg.UnsupportedPipelineError, match="keys of its"), dg.graft(klein, dg.NegativeAway("red")):
        klein.transformer(**tf.TINY["Flux2Transformer2DModel"].call([tf.normal(5, 24)]), kv_cache_mode="extract")
    for plugin in (dg.StartpointFilter(), dg.AttentionSegregation(["ball"])):
        with pytest.raises(dg.UnsupportedPipelineError, match="films"):
            run(pipe_of("wan"), plugin, num_frames=5, guidance_scale=1.0)


def test_families_have_names_for_defaults():
    names = {adapter_for(pipe_of(name)).family for name in CALLS}
    assert names == {"z-image", "chroma", "lumina2", "wan", "flux2", "krea2"}
    report = run(pipe_of("z_image"), dg.NegativeAway("red", rule="nag"), guidance_scale=0.0)[1]
    assert report.plugins[0][1]["scale_from"].startswith("users of Z-Image-Turbo")
    report = run(pipe_of("z_image"), dg.NegativeAway("red"), guidance_scale=3.0)[1]
    used = {"rule": "nasa", "scale": 0.5, "scale_from": "measured on the transformer picture book"}
    assert report.plugins == [("NegativeAway", used)]
    report = run(pipe_of("z_image"), dg.NegativeAway("red", rule="vsf"), guidance_scale=0.0)[1]
    assert report.plugins[0][1] == {"rule": "vsf", "scale": 0.5, "scale_from": f"{used['scale_from']} without guidance"}


# -- rows of its own ----------------------------------------------------------------------------------------


def test_rows_of_its_own_where_nothing_is_pooled_are_the_streams():
    import tiny

    pipe = tiny.sd15()
    for guidance in (1.0, 4.0):
        made = []
        for form in ("streams", "rows"):
            with dg.graft(pipe, dg.NegativeAway("red", scale=0.5, form=form)) as g:
                made.append(tiny.sample(pipe, guidance_scale=guidance))
        torch.testing.assert_close(made[1], made[0], rtol=0, atol=1e-4)
        assert g.report().rows == [2 if guidance == 1.0 else 3]
    for name in ("z_image", "chroma", "wan"):
        pipe, call = pipe_of(name), CALLS[name] | {"guidance_scale": 4.0}
        made = [run(pipe, dg.NegativeAway("red cat", scale=0.5, form=form), **call)[0] for form in ("streams", "rows")]
        torch.testing.assert_close(made[1], made[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", ["ernie", "hidream"])
def test_pipelines_that_only_rows_serve(name, guidance):
    own = {"ernie": {"use_pe": False}, "hidream": {"max_sequence_length": 16}}
    pipe, call = pipe_of(name), own[name] | {"guidance_scale": guidance}
    plain, before = draw(pipe, **call)[0], fingerprint(pipe)
    for negative in ("cat", " ".join(["red cat"] * 4)):  # shorter and longer than the prompt
        steered, report = draw(pipe, dg.NegativeAway(negative, form="rows", scale=0.8), **call)
        assert steered.isfinite().all() and (steered - plain).abs().max() > 1e-4
        assert report.rows == [2 if guidance == 1 else 3] and report.calls == 2
    assert torch.equal(draw(pipe, dg.NegativeAway("cat", form="rows", scale=0), **call)[0], plain)
    with pytest.raises(dg.UnsupportedPipelineError, match="form='rows'"), dg.graft(pipe, dg.NegativeAway("cat")):
        pass
    assert fingerprint(pipe) == before


def test_rows_of_its_own_take_the_negatives_pooled_text():
    pipe = tt.flux()
    text, pooled = pipe.encode_prompt("red cat", "red cat", max_sequence_length=16)[:2]
    streams = run(pipe, dg.NegativeAway("red cat", scale=0.5))[0]
    given = run(pipe, dg.NegativeAway(text, scale=0.5, form="rows"))[0]  # embeddings bring no pooled text
    torch.testing.assert_close(given, streams, rtol=0, atol=1e-4)
    assert (run(pipe, dg.NegativeAway("red cat", scale=0.5, form="rows"))[0] - streams).abs().max() > 1e-4
    assert pooled.shape[-1] == pipe.transformer.config.pooled_projection_dim


def test_what_rows_of_its_own_refuse():
    pipe = tt.flux()
    with pytest.raises(dg.SettingError, match="one negative for a picture"):
        run(pipe, dg.NegativeAway({"red": 1.0, "blue": 1.0}, form="rows"))
    with pytest.raises(dg.SettingError, match="texts of one length"):
        run(pipe, dg.NegativeAway(tf.normal(1, 5, 32), form="rows"))
    with pytest.raises(dg.SettingError, match="form="):
        dg.NegativeAway("red", form="columns")


# -- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORDED)
def test_words_are_found_where_the_template_puts_them(name):
    """The column of a word is the place of its token in what the text encoder reads."""
    pipe, seen, read = pipe_of(name), {}, []

    class Look(dg.Plugin):
        films = True

        def begin(self, session, step):
            texts = session.prompt.texts
            seen.update(texts=texts, span=session.token_spans(texts[0], "ball"), inner=session.token_range(texts[0]))

    hook = pipe.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(args[0] if args else kwargs["input_ids"]), with_kwargs=True
    )
    length = {"max_sequence_length": 40} if name == "lumina2" else {}
    call, dropped = CALLS.get(name, {}) | length, getattr(pipe, "prompt_template_encode_start_idx", 0)
    call |= {} if name == "qwen" else {"guidance_scale": 0.0}
    for prompt in ("a blue ball", ["a blue ball"]):
        read.clear()
        run(pipe, Look(), prompt=prompt, **call)
        column = read[0][0].tolist().index(tt.WORDS.index("ball")) - dropped
        assert seen["span"] == [[column]] and seen["texts"] == ["a blue ball"]
        assert list(seen["inner"])[-1] == column and len(seen["inner"]) == 3
    hook.remove()


@pytest.mark.parametrize("name", WORDED)
def test_a_filtered_start_on_the_new_families(name):
    pipe, call = pipe_of(name), CALLS.get(name, {"true_cfg_scale": 4.0})
    call |= {} if name == "qwen" else {"guidance_scale": 4.0}
    plain = run(pipe, **call)[0]
    filtered, report = run(pipe, dg.StartpointFilter(), **call)
    assert report.updates == 1 and filtered.isfinite().all() and not torch.equal(filtered, plain)
    assert torch.equal(run(pipe, **call)[0], plain)


@pytest.mark.parametrize("name", WORDED)
def test_segregation_and_maps_on_the_new_families(name):
    pipe, call = pipe_of(name), CALLS.get(name, {}) | ({} if name == "qwen" else {"guidance_scale": 0.0})
    prompt, words = "a blue ball and a cat", ["ball", "cat"]
    call |= {"max_sequence_length": 40} if name == "lumina2" else {}
    plain = run(pipe, prompt=prompt, **call)[0]
    moved, report = run(pipe, dg.AttentionSegregation(words, loss="attend-and-excite"), prompt=prompt, **call)
    assert moved.isfinite().all() and not torch.equal(moved, plain) and report.updates > 0
    assert torch.equal(run(pipe, prompt=prompt, **call)[0], plain)
    asked = {"steps": 2, "height": 32, "width": 32, "max_sequence_length": 40}
    asked["guidance"] = call.pop("guidance_scale", None)
    maps = dg.attention_maps(pipe, prompt, words, seed=0, **call | asked)
    assert maps["ball"].isfinite().all() and (maps["ball"] - maps["cat"]).abs().max() > 1e-4
    drawn = dg.generate(pipe, prompt, seed=0, **call | asked)[0]
    assert np.array_equal(np.asarray(maps.image), np.asarray(drawn))


def test_guidance_by_attention_distillation_moves_lists_of_latents():
    pipe, call = pipe_of("z_image"), {"guidance_scale": 0.0}
    plain = run(pipe, **call)[0]
    picture = Image.new("RGB", (32, 32), "red")
    moved, report = run(pipe, dg.AttentionDistillation(picture, layers="all"), **call)
    assert report.updates == 2 and moved.isfinite().all() and not torch.equal(moved, plain)


@pytest.mark.parametrize("name", ["HunyuanImageTransformer2DModel", "GlmImageTransformer2DModel"])
def test_where_texts_are_in_another_order_words_are_refused(name):
    adapter = adapter_for(tf.bare(name) if name in tf.models() else tf.Bare(diffusers.GlmImageTransformer2DModel, None))
    with pytest.raises(dg.UnsupportedPipelineError, match="another order"):
        adapter.wrapped("a ball")


# -- pictures beside the prompt, other pipelines and backends ----------------------------------------------------------


@pytest.mark.parametrize("name", ["edit", "edit_plus"])
def test_an_edit_pipeline_encodes_the_negative_with_its_pictures(name, monkeypatch):
    """The encoder sees with the negative what it saw with the prompt."""
    kind = {"edit": diffusers.QwenImageEditPipeline, "edit_plus": diffusers.QwenImageEditPlusPipeline}[name]
    place, pipe = inspect.getmodule(kind), fp.qwen(kind)
    sizes = place.calculate_dimensions  # of a megapixel, which takes a minute
    monkeypatch.setattr(place, "calculate_dimensions", lambda area, ratio: sizes(area // 256, ratio))
    seen, call = [], SMALL | {"image": Image.new("RGB", (64, 64), "red"), "true_cfg_scale": 1.0}
    hook = pipe.text_encoder.register_forward_pre_hook(lambda module, args, given: seen.append(given), with_kwargs=True)
    plain = run(pipe, **call)[0]
    seen.clear()
    steered, report = run(pipe, dg.NegativeAway("red cat", scale=0.8), **call)
    hook.remove()
    prompt, negative = seen
    assert prompt["pixel_values"].numel() and torch.equal(prompt["pixel_values"], negative["pixel_values"])
    assert not torch.equal(prompt["input_ids"], negative["input_ids"]) and report.calls == 2
    assert steered.isfinite().all() and (steered - plain).abs().max() > 1e-4
    with pytest.raises(dg.UnsupportedPipelineError, match="reads pictures with its prompt"):
        dg.attention_maps(pipe, "a ball", ["ball"], image=call["image"], steps=2)


# -- what people put on a model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["z_image", "klein"])
def test_a_lora_reaches_the_negative_too(name):
    """An adapter is what its weights added to the model's own are: heard, joined and projected."""
    from peft import LoraConfig

    pipe, call = getattr(fp, name)(), CALLS[name] | {"guidance_scale": 0.0}
    pipe.transformer = copy.deepcopy(pipe.transformer)
    away = dg.NegativeAway("red cat", scale=0.8)
    without = run(pipe, away, **call)[0]
    modules = ["to_k", "to_v", "to_out.0", "linear_in"]
    config = LoraConfig(r=2, lora_alpha=4, target_modules=modules, init_lora_weights=False)
    torch.manual_seed(3)
    pipe.transformer.add_adapter(config)
    plain, steered = run(pipe, **call)[0], run(pipe, away, **call)[0]
    assert (steered - without).abs().max() > 1e-4 and (steered - plain).abs().max() > 1e-4
    pipe.transformer.fuse_lora()
    torch.testing.assert_close(run(pipe, away, **call)[0], steered, rtol=0, atol=1e-5)
    pipe.transformer.unfuse_lora()
    pipe.transformer.disable_adapters()
    torch.testing.assert_close(run(pipe, away, **call)[0], without, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["z_image", "wan"])
@pytest.mark.parametrize("way", ["sequential", "group"])
def test_offloaded_weights_change_nothing(name, way):
    """By accelerate's hooks and by diffusers' groups, both to the CPU itself, which has no other device."""
    from accelerate import cpu_offload

    pipe, call = getattr(fp, name)(), CALLS[name] | {"guidance_scale": 0.0}
    pipe.transformer = copy.deepcopy(pipe.transformer)
    away = dg.NegativeAway("red cat", scale=0.8)
    before, plain = run(pipe, away, **call)[0], run(pipe, **call)[0]
    if way == "sequential":
        cpu_offload(pipe.transformer, torch.device("cpu"))
    else:
        device = torch.device("cpu")
        pipe.transformer.enable_group_offload(device, device, "block_level", num_blocks_per_group=1)
    steered, report = run(pipe, away, **call)
    assert torch.equal(steered, before) and torch.equal(run(pipe, **call)[0], plain) and report.layers


# -- attention backends ------------------------------------------------------------------------------------------------


@contextmanager
def on_backend(pipe, name):
    """The pipeline on an attention backend; diffusers sets it for all models."""
    pipe.transformer.set_attention_backend(name)
    try:
        yield
    finally:
        pipe.transformer.set_attention_backend("native")


BACKED = {"wan": {"guidance_scale": 1.0}, "klein": {"guidance_scale": 1.0}}


@pytest.mark.parametrize("name", BACKED)
def test_an_edited_layer_runs_on_the_backend_that_the_pipeline_has(name):
    pipe, away, call = getattr(fp, name)(), dg.NegativeAway("red cat", scale=0.8), CALLS[name] | BACKED[name]
    with on_backend(pipe, "native"):
        plain, (steered, report) = run(pipe, **call)[0], run(pipe, away, **call)
    assert report.backend == "sdpa"
    with on_backend(pipe, "flex"):
        flexed, report = run(pipe, away, **call)
        ours = run(pipe, away, backend="sdpa", **call)[0]
        torch.testing.assert_close(run(pipe, **call)[0], plain, rtol=0, atol=1e-5)
    assert report.backend == "flex" and (steered - plain).abs().max() > 1e-4
    torch.testing.assert_close(flexed, steered, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours, steered, rtol=0, atol=1e-5)
    with on_backend(pipe, "_native_math"):
        torch.testing.assert_close(run(pipe, away, **call)[0], steered, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["flash", "sage", "xformers", "_flash_3_hub"])
def test_which_backend_each_layer_asks(backend, monkeypatch):
    """Kernels that do not run here, by what the dispatcher is asked for: native ones answer."""
    table, asked = attention_dispatch._AttentionBackendRegistry, []
    name, native = attention_dispatch.AttentionBackendName(backend), table._backends["native"]

    def answer(**given):
        asked.append(given["key"].shape[1])
        return native(**{k: v for k, v in given.items() if k in table._supported_arg_names["native"]})

    pipe, call = fp.wan(), CALLS["wan"] | {"guidance_scale": 1.0, "num_inference_steps": 1}
    steered = run(pipe, dg.NegativeAway("red cat", scale=0.8), **call)[0]
    monkeypatch.setitem(table._backends, name, answer)
    for layer in adapter_for(pipe).layers:
        layer.module.processor._attention_backend = name
    run(pipe, **call)
    plain, _ = list(asked), asked.clear()
    again, report = run(pipe, dg.NegativeAway("red cat", scale=0.8), **call)
    assert torch.equal(again, steered) and report.backend == backend and table._backends[name] is answer
    text = plain[1]  # self-attention, then attention to the text
    assert sorted(asked) == sorted([*plain, *[text] * len(report.layers)]), "the prompt and the negative, on it both"
    asked.clear()
    run(pipe, dg.NegativeAway("red cat", scale=0.8, rule="vsf"), **call)  # wants the log-sum-exp
    assert asked == [keys for keys in plain if keys != text], "layers that are not edited keep theirs"


def test_a_backend_without_masks_is_named():
    from diffgraft.attention.dispatched import kernel_of

    q = tf.normal(1, 2, 4, 8)
    with pytest.raises(dg.BackendError, match=r"'flash' takes no mask.*set_attention_backend\('native'\)"):
        kernel_of(attention_dispatch.AttentionBackendName("flash"))(q, q, q, attn_mask=torch.zeros(1, 1, 4, 4))

"""What touches the same layers in diffusers: adapters, offload, compile, other pipelines, other processors."""

from __future__ import annotations

import copy
import warnings

import accelerate
import diffusers
import pytest
import tiny
import torch
from plugins_for_tests import Climb, Guide, NoOp, Scaled, fingerprint

import diffgraft as dg

PLUGINS = {"edit": lambda: Scaled(0.5), "latent": lambda: Climb(), "branch": lambda: Guide()}
IMAGE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
MASK = torch.zeros(1, 1, 32, 32).index_fill(2, torch.arange(8, 24), 1.0)


def plugins():
    return [make() for make in PLUGINS.values()]


def grafted(pipe, *items, **call):
    with dg.graft(pipe, *(items or plugins())):
        return tiny.sample(pipe, **call)


# -- pipelines of the family ----------------------------------------------------------------------------------------


def variant(name):
    """(pipeline, what its call needs)."""
    if name == "controlnet":
        unet = tiny.unet()
        pipe = tiny.sd15(cls=diffusers.StableDiffusionControlNetPipeline, unet=unet, controlnet=tiny.controlnet(unet))
        return pipe, {"image": IMAGE}
    if name == "controlnet-xl":
        unet = tiny.unet_xl()
        pipe = tiny.sdxl(cls=diffusers.StableDiffusionXLControlNetPipeline, unet=unet, controlnet=tiny.controlnet(unet))
        return pipe, {"image": IMAGE}
    cls, channels, call = {
        "img2img": (diffusers.StableDiffusionImg2ImgPipeline, 4, {"image": IMAGE, "strength": 0.7}),
        "inpaint-4": (diffusers.StableDiffusionInpaintPipeline, 4, {"image": IMAGE, "mask_image": MASK}),
        "inpaint-9": (diffusers.StableDiffusionInpaintPipeline, 9, {"image": IMAGE, "mask_image": MASK}),
    }[name]
    return tiny.sd15(cls=cls, in_channels=channels), call


@pytest.mark.parametrize("name", ["img2img", "inpaint-4", "inpaint-9", "controlnet", "controlnet-xl"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_every_pipeline_of_the_family(name, guidance):
    pipe, call = variant(name)
    call = {**call, "guidance_scale": guidance}
    if "inpaint" in name:
        call |= {"height": 32, "width": 32}
    plain, before = tiny.sample(pipe, **call), fingerprint(pipe)
    assert torch.equal(grafted(pipe, NoOp(), **call), plain)
    for make in PLUGINS.values():
        with dg.graft(pipe, make()) as g:
            changed = tiny.sample(pipe, **call)
        assert changed.isfinite().all() and not torch.equal(changed, plain), g.report()
    assert fingerprint(pipe) == before and torch.equal(tiny.sample(pipe, **call), plain)


def test_controlnet_residuals_fit_a_branch_that_joins_late():
    """Joining at the up blocks, at the middle and at the input give the same rows."""
    pipe, call = variant("controlnet")
    for place in ("up", "mid", "down"):
        with dg.graft(pipe, Guide(0.0, place)) as g:
            out = tiny.sample(pipe, **call)
        assert (out - tiny.sample(pipe, **call)).abs().max() < 1e-4 and g.report().rows == [3]


def test_sizes_and_aspects(sd15):
    grids = []

    class Look(dg.Edit):
        def selects(self, layer):
            return layer.kind == "self"

        def qkv(self, call):
            grids.append(call.grid)

    class Looker(dg.Plugin):
        def edits(self):
            return [Look()]

    with dg.graft(sd15, Looker(), Guide()):
        out = tiny.sample(sd15, height=40, width=72, num_inference_steps=1)
    assert out.shape[-2:] == (20, 36) and {(20, 36), (10, 18)} == set(grids)


def test_sdxl_with_pag_rows_are_known():
    unet = tiny.unet_xl()
    pipe = tiny.sdxl(cls=diffusers.StableDiffusionXLPAGPipeline, unet=unet, pag_applied_layers="mid")
    rows = []

    class Look(Scaled):
        def branches(self, step):
            rows.append(dict(step.rows))
            return ()

    with dg.graft(pipe, Look(0.5)):
        tiny.sample(pipe, pag_scale=2.0)
    assert rows[0] == {"uncond": slice(0, 1), "cond": slice(1, 2), "perturbed": slice(2, 3)}
    before = dict(unet.attn_processors)
    with dg.graft(pipe, Guide()), pytest.raises(dg.UnsupportedPipelineError, match="PAG"):
        tiny.sample(pipe, pag_scale=2.0)
    assert dict(unet.attn_processors) == before  # a call that ends early leaves PAG's own on


# -- adapters -------------------------------------------------------------------------------------------------------


def add_lora(pipe, seed=7):
    from peft import LoraConfig

    torch.manual_seed(seed)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))


def test_lora_before_and_inside(sd15):
    first = grafted(sd15)
    with dg.graft(sd15, *plugins()):
        add_lora(sd15)
        inside = tiny.sample(sd15)
    assert torch.equal(inside, grafted(sd15)) and not torch.equal(inside, first)
    scaled = grafted(sd15, cross_attention_kwargs={"scale": 0.3})
    assert not torch.equal(scaled, inside)


def load_ip_adapter(pipe, count=1):
    """Tiny IP-Adapters through diffusers' own loader: state dict of the real layout, image tokens of width 32."""
    torch.manual_seed(11)
    state = {"image_proj": {}, "ip_adapter": {}}
    tokens = 4
    state["image_proj"] = {
        "proj.weight": torch.randn(tokens * 32, 16) * 0.2, "proj.bias": torch.zeros(tokens * 32),
        "norm.weight": torch.ones(32), "norm.bias": torch.zeros(32),
    }  # fmt: skip
    key = 1
    for name in pipe.unet.attn_processors:
        if not name.endswith("attn2.processor"):
            continue
        inner = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        state["ip_adapter"] |= {f"{key}.to_k_ip.weight": torch.randn(inner, 32) * 0.3}
        state["ip_adapter"] |= {f"{key}.to_v_ip.weight": torch.randn(inner, 32) * 0.3}
        key += 2
    pipe.unet._load_ip_adapter_weights([state] * count)
    pipe.set_ip_adapter_scale([0.8] * count)


def test_ip_adapter_loaded_before_and_inside(sd15):
    embeds = [torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(5))]
    call = {"ip_adapter_image_embeds": embeds}
    with dg.graft(sd15, *plugins()) as g:
        load_ip_adapter(sd15)
        inside = tiny.sample(sd15, **call)
    displaced = g.report().displaced
    assert set(displaced) == {x.name for x in g.layers}  # loading one makes every processor anew
    plain = tiny.sample(sd15, **call)
    assert torch.equal(grafted(sd15, NoOp(), **call), plain)
    assert torch.equal(grafted(sd15, **call), inside) and not torch.equal(inside, plain)


def test_image_tokens_of_an_ip_adapter_are_left_alone(sd15):
    load_ip_adapter(sd15)
    call = {"ip_adapter_image_embeds": [torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(5))]}
    seen = []

    class Look(dg.Edit):
        def __init__(self, every_call):
            self.every_call = every_call

        def selects(self, layer):
            return layer.kind == "cross"

        def qkv(self, c):
            seen.append((c.number, c.k.shape[-2]))

    class Looker(dg.Plugin):
        def __init__(self, every_call):
            super().__init__()
            self.every_call = every_call

        def edits(self):
            return [Look(self.every_call)]

    grafted(sd15, Looker(False), **call)
    assert set(seen) == {(0, 77)}
    grafted(sd15, Looker(True), **call)
    assert set(seen) == {(0, 77), (1, 4)}


def test_fused_projections_and_new_processors_inside(sd15):
    from diffusers.models.attention_processor import AttnProcessor2_0

    expected = grafted(sd15)
    with dg.graft(sd15, *plugins()):
        sd15.unet.set_attn_processor(AttnProcessor2_0())
        assert torch.equal(tiny.sample(sd15), expected)
        sd15.unet.fuse_qkv_projections()
        assert (tiny.sample(sd15) - expected).abs().max() < 1e-4
        sd15.unet.unfuse_qkv_projections()
    assert torch.equal(grafted(sd15), expected)


def test_freeu_and_vae_tiling_compose(sd15):
    sd15.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    sd15.vae.enable_tiling()
    assert torch.equal(grafted(sd15, NoOp()), tiny.sample(sd15))
    assert grafted(sd15).isfinite().all()


# -- refusals -------------------------------------------------------------------------------------------------------


def test_what_would_skip_edits_is_refused_with_its_fix(sd15):
    sd15.enable_attention_slicing(1)
    with pytest.raises(dg.UnsupportedPipelineError, match="disable_attention_slicing"), dg.graft(sd15, Scaled(0.5)):
        pass
    sd15.disable_attention_slicing()
    with dg.graft(sd15, Scaled(0.5)), pytest.raises(dg.UnsupportedPipelineError, match="disable_attention_slicing"):
        sd15.enable_attention_slicing(1)
        tiny.sample(sd15)
    sd15.disable_attention_slicing()
    sd15.unet.set_default_attn_processor()  # installs the processor that builds the matrix itself
    with dg.graft(sd15, Scaled(0.5)), pytest.raises(dg.AttentionNotReachedError, match="AttnProcessor2_0"):
        tiny.sample(sd15)


def test_caches_and_merged_tokens_are_refused(sd15):
    from diffusers import PyramidAttentionBroadcastConfig
    from diffusers.hooks import apply_pyramid_attention_broadcast

    twin = copy.deepcopy(sd15.unet)
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: 500, spatial_attention_block_identifiers=("transformer_blocks",),
    )  # fmt: skip
    apply_pyramid_attention_broadcast(twin, config)
    with pytest.raises(dg.UnsupportedPipelineError, match="cache"), dg.graft(tiny.sd15(unet=twin), Scaled(0.5)):
        pass

    class ToMeBlock(type(sd15.unet.mid_block.attentions[0].transformer_blocks[0])):
        """tomesd swaps the class of the blocks for one of this name."""

    sd15.unet.mid_block.attentions[0].transformer_blocks[0].__class__ = ToMeBlock
    with pytest.raises(dg.UnsupportedPipelineError, match="tomesd.remove_patch"), dg.graft(sd15, Scaled(0.5)):
        pass


def test_other_pipelines_are_named():
    pipe = diffusers.DDIMPipeline(unet=diffusers.UNet2DModel(sample_size=8, block_out_channels=(32,),
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)), scheduler=tiny.ddim())  # fmt: skip
    with pytest.raises(dg.UnsupportedPipelineError, match="DDIMPipeline with UNet2DModel"):
        dg.graft(pipe, Scaled(0.5))
    pix = tiny.sd15(cls=diffusers.StableDiffusionInstructPix2PixPipeline, in_channels=8)
    with dg.graft(pix, Scaled(0.5)), pytest.raises(dg.UnsupportedPipelineError, match="InstructPix2Pix"):
        tiny.sample(pix, image=IMAGE)
    sem = tiny.sd15(cls=diffusers.SemanticStableDiffusionPipeline)
    edits = {"editing_prompt": ["star", "ball"], "edit_guidance_scale": 5.0, "edit_warmup_steps": 0}
    with dg.graft(sem, Scaled(0.5)), pytest.raises(dg.UnsupportedPipelineError, match="SemanticStableDiffusion"):
        tiny.sample(sem, **edits)
    sag = tiny.sd15(cls=diffusers.StableDiffusionSAGPipeline)
    with dg.graft(sag, dg.NegativeAway("cat")):
        tiny.sample(sag, guidance_scale=1.0, output_type="pil")
        with pytest.raises(dg.UnsupportedPipelineError, match="guidance_scale=1"):
            tiny.sample(sag)


def test_an_edit_without_layers_is_refused(sd15):
    class Nowhere(dg.Edit):
        def selects(self, layer):
            return layer.kind == "joint"

    class Lost(dg.Plugin):
        def edits(self):
            return [Nowhere()]

    with pytest.raises(dg.UnsupportedPipelineError, match="found no layer"), dg.graft(sd15, Lost()):
        pass


# -- compile, offload, backends ---------------------------------------------------------------------------------------


@pytest.fixture
def shallow():
    """One level and one layer: torch takes its time to compile each."""
    level = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    return tiny.sd15(unet=tiny.unet(layers_per_block=1, block_out_channels=(32,), **level))


@pytest.mark.parametrize("how", ["regional", "module", "wrapped"])
def test_compiled_models_run_what_cannot_be_traced_eager_and_exact(shallow, how):
    torch.compiler.reset()
    plain, expected = tiny.sample(shallow), grafted(shallow)
    if how == "regional":
        for block in shallow.unet.modules():
            if type(block).__name__ == "BasicTransformerBlock":
                block.compile(backend="eager", fullgraph=True)
    elif how == "module":
        shallow.unet.compile(backend="eager")
    else:
        shallow.unet = torch.compile(shallow.unet, backend="eager")
    for _ in range(2):
        assert torch.equal(tiny.sample(shallow), plain)
        assert torch.equal(grafted(shallow), expected)
    torch.compiler.reset()


def test_compiled_inside_the_block(shallow):
    torch.compiler.reset()
    expected = grafted(shallow, num_inference_steps=2)
    with dg.graft(shallow, *plugins()):
        shallow.unet.compile(backend="eager")
        assert torch.equal(tiny.sample(shallow, num_inference_steps=2), expected)
    torch.compiler.reset()


@pytest.mark.parametrize("order", ["offload first", "plugin first"])
@pytest.mark.parametrize("how", ["model", "sequential", "group"])
def test_offload_in_both_orders(sd15, order, how):
    expected, plain = grafted(sd15), tiny.sample(sd15)

    def offload():
        if how == "model":
            sd15.enable_model_cpu_offload(device="cpu")
        elif how == "sequential":
            accelerate.cpu_offload(sd15.unet, execution_device=torch.device("cpu"))
        else:
            sd15.unet.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")

    g = dg.graft(sd15, *plugins())
    if order == "offload first":
        offload()
        g.attach()
    else:
        g.attach()
        offload()
    trained = [parameter.requires_grad for parameter in sd15.unet.parameters()]
    for _ in range(2):  # model offload takes its hooks off and on again after every call
        assert torch.equal(tiny.sample(sd15), expected)
    g.detach()
    assert torch.equal(tiny.sample(sd15), plain)
    assert [parameter.requires_grad for parameter in sd15.unet.parameters()] == trained  # sequential: new objects


def test_xformers_falls_back_once_with_the_reason(sd15):
    with pytest.warns(UserWarning, match="xformers does not run here") as seen:
        g = dg.graft(sd15, Scaled(0.5), backend="xformers")
    assert sum("xformers" in str(w.message) for w in seen) == 1 and g.report().backend == "sdpa"
    with pytest.raises(dg.BackendError, match="sdpa"):
        dg.graft(sd15, Scaled(0.5), backend="xformers", strict=True)
    with pytest.raises(ValueError, match="auto, sdpa, xformers"):
        dg.graft(sd15, Scaled(0.5), backend="flash")


# -- a user's ways in -------------------------------------------------------------------------------------------------


def test_embeddings_clip_skip_prompt_lists_and_callbacks(sd15):
    # diffusers 0.42 looks for the final norm where transformers 4 had it
    sd15.text_encoder.__dict__["text_model"] = sd15.text_encoder
    text, empty = sd15.encode_prompt("a red ball and a blue star", "cpu", 1, True)
    expected = grafted(sd15)
    by_embedding = grafted(sd15, prompt=None, prompt_embeds=text, negative_prompt_embeds=empty)
    assert torch.equal(by_embedding, expected)
    assert not torch.equal(grafted(sd15, clip_skip=1), expected)
    assert grafted(sd15, prompt=["a red ball", "a blue star"], num_images_per_prompt=2).shape[0] == 4
    seen = []
    grafted(sd15, callback_on_step_end=lambda p, i, t, k: seen.append(i) or k)
    assert seen == [0, 1, 2]

    def interrupt(pipe, i, t, kwargs):
        pipe._interrupt = True
        return kwargs

    plugin = Climb()
    with dg.graft(sd15, plugin):
        tiny.sample(sd15, callback_on_step_end=interrupt)
        assert plugin.indices == [0]
        assert torch.equal(tiny.sample(sd15), grafted_climb(sd15))


def grafted_climb(pipe):
    with warnings.catch_warnings():
        return grafted(tiny.sd15(unet=copy.deepcopy(pipe.unet)), Climb())


def test_a_scheduler_swapped_inside_is_followed(sd15):
    with dg.graft(sd15, *plugins()):
        sd15.scheduler = diffusers.EulerDiscreteScheduler.from_config(sd15.scheduler.config)
        inside = tiny.sample(sd15)
    assert "step" not in sd15.scheduler.__dict__ and torch.equal(inside, grafted(sd15))


def test_edits_as_classic_processors(sd15):
    from plugins_for_tests import Everywhere, Scale

    before, plain = dict(sd15.unet.attn_processors), tiny.sample(sd15, guidance_scale=1.0)
    sd15.unet.set_attn_processor(dg.edit_processors(sd15.unet, Everywhere()))
    assert torch.equal(tiny.sample(sd15, guidance_scale=1.0), plain)
    sd15.unet.set_attn_processor(dict(before))
    step = dg.Step(rows={"cond": slice(0, 1)})
    sd15.unet.set_attn_processor(dg.edit_processors(sd15.unet, Scale(0.5), step=step))
    by_processor = tiny.sample(sd15, guidance_scale=1.0)
    sd15.unet.set_attn_processor(dict(before))
    assert torch.equal(by_processor, grafted(sd15, Scaled(0.5), guidance_scale=1.0))
    load_ip_adapter(sd15)
    import inspect

    for name, processor in dg.edit_processors(sd15.unet, Everywhere()).items():
        inner = sd15.unet.attn_processors[name]
        assert inspect.signature(processor.__call__) == inspect.signature(inner.__call__)


def test_ip_adapter_masks_reach_the_processor(sd15):
    """A wrapper with bare keyword arguments drops them silently; the seam wraps no processor."""
    load_ip_adapter(sd15)
    embeds = [torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(5))]
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    call = {"ip_adapter_image_embeds": embeds, "cross_attention_kwargs": {"ip_adapter_masks": [mask]}}
    masked = tiny.sample(sd15, **call)
    assert not torch.equal(masked, tiny.sample(sd15, ip_adapter_image_embeds=embeds))
    assert torch.equal(grafted(sd15, NoOp(), **call), masked)
    assert grafted(sd15, **call).isfinite().all()


def test_layerwise_casting(sd15):
    expected = grafted(sd15, Scaled(0.5), Guide())
    sd15.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    out = grafted(sd15, Scaled(0.5), Guide())
    assert torch.equal(grafted(sd15, NoOp()), tiny.sample(sd15))
    assert out.isfinite().all() and (out - expected).abs().mean() < 0.2 * expected.abs().mean()
    with pytest.raises(dg.UnsupportedPipelineError, match="layerwise casting"):
        grafted(sd15, Climb())


@pytest.mark.parametrize("first", ["graft", "hook"])
def test_hooks_of_diffusers_come_and_go(sd15, first):
    """Removing one of diffusers' own hooks in any order leaves the graft, and the other way round."""
    from diffusers.hooks import HookRegistry, ModelHook

    class Double(ModelHook):
        def post_forward(self, module, output):
            return output * 2

    plain, expected = tiny.sample(sd15), grafted(sd15)
    attention = sd15.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    registry = HookRegistry.check_if_exists_or_initialize(attention)
    g = dg.graft(sd15, *plugins())
    if first == "hook":
        registry.register_hook(Double(), "double")
        g.attach()
        g.detach()
        registry.remove_hook("double")
    else:
        g.attach()
        registry.register_hook(Double(), "double")
        assert not torch.equal(tiny.sample(sd15), expected)
        registry.remove_hook("double")
        assert torch.equal(tiny.sample(sd15), expected)
        registry.register_hook(Double(), "double")
        g.detach()
        registry.remove_hook("double")
    assert torch.equal(tiny.sample(sd15), plain)
    with g:
        assert torch.equal(tiny.sample(sd15), expected)


def test_an_exception_under_pag_leaves_the_layers_editable():
    unet = tiny.unet_xl()
    pipe = tiny.sdxl(cls=diffusers.StableDiffusionXLPAGPipeline, unet=unet, pag_applied_layers="mid")
    with dg.graft(pipe, Scaled(0.5)):
        expected = tiny.sample(pipe, pag_scale=2.0)

        def stop(pipe, i, t, kwargs):
            raise RuntimeError("boom")

        with pytest.raises(RuntimeError, match="boom"):
            tiny.sample(pipe, pag_scale=2.0, callback_on_step_end=stop)
        assert torch.equal(tiny.sample(pipe, pag_scale=2.0), expected)


def test_textual_inversion_words_are_several_columns(sd15):
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(4))
    sd15.load_textual_inversion(vectors, token="<concept>")
    seen = {}

    class Look(Scaled):
        def begin(self, session, step):
            seen["spans"] = session.token_spans(session.prompt.texts[0], "<concept>")
            seen["text"] = session.encode_text(["<concept>"])

    tokens = {}
    hook = sd15.text_encoder.register_forward_pre_hook(
        lambda m, args, kwargs: tokens.update(ids=args[0] if args else kwargs["input_ids"]), with_kwargs=True
    )
    with dg.graft(sd15, Look(0.5)):
        tiny.sample(sd15, "a <concept> and a ball", guidance_scale=1.0)
    hook.remove()
    ids = sd15.tokenizer.convert_tokens_to_ids(["<concept>", "<concept>_1"])
    assert seen["spans"] == [[2, 3]] and tokens["ids"][0, 1:3].tolist() == ids

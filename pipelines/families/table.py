"""Every denoiser class of diffusers that paints or films from text: declared, or refused with the reason."""

from __future__ import annotations

from ...attention.errors import SettingTypeError
from . import odd, solve
from .family import TEXT, Alone, Along, Family, Latent, Meet, Refused
from .solve import Solve
from .unet import UNetAdapter

_ROPE = (Along("image_rotary_emb"),)
_MASK4 = (Along("attention_mask", 3),)
_FILM = Latent("film")
_EMBEDS = {TEXT: "prompt_embeds"}
_POOLED = _EMBEDS | {"pooled_projections": "pooled_prompt_embeds"}
_REFINED: tuple[tuple[str, Alone], ...] = (("context_refiner", "text"), ("noise_refiner", "self"))
_CONTEXT: tuple[tuple[str, Alone], ...] = (("context_embedder", "text"),)


def _two(along: tuple[Along, ...] = (), later: str | None = TEXT) -> tuple[Meet, Meet]:
    """Blocks with two streams, then blocks with one."""
    return Meet("transformer_blocks", along=along), Meet("single_transformer_blocks", text=later, along=along)


def _across(path: str, along: tuple[Along, ...] = (), **more: object) -> tuple[Meet]:
    return (Meet(path, "cross", along=along, **more),)  # pyright: ignore[reportArgumentType]


_M = "encoder_attention_mask"
_TEXT_MASK = (Along(_M, 2),)
_WAN = _across("blocks", own=odd.second_if_picture)
_EXPERTS = ("transformer", "transformer_2")

FAMILIES: dict[str, Family | Refused] = {
    # -- pictures ------------------------------------------------------------------------------------------------
    "UNet2DConditionModel": Family(
        "unet", sample="sample", denoisers=("unet",), adapter=UNetAdapter,
        modular=_EMBEDS | {"text_embeds": "pooled_prompt_embeds"},
    ),
    "FluxTransformer2DModel": Family(
        "flux", _two(_ROPE), ids=("txt_ids", ()), encode=odd.with_lora(2, 1), guidance="apart", flag="do_true_cfg",
        modular=_POOLED, rewords=True, tokenizer="tokenizer_2", prompt="prompt_2",
        latent=Latent("packed"), rotary=("axes_dims_rope", 10000.0),
        solve=Solve(
            solve.flux, shift=solve.by_cells, handed="packed", pipelines=("FluxPipeline",), guided_by="true_cfg_scale"
        ),
    ),
    "SD3Transformer2DModel": Family(
        "sd3", (Meet("transformer_blocks", layers=(".attn",)),), text_first=False, encode=odd.with_lora(3, 2),
        modular=_POOLED,
        solve=Solve(
            solve.sd3, "steps", sigmas=False, shift=solve.by_cells_if_dynamic, pipelines=("StableDiffusion3Pipeline",)
        ),
    ),
    "QwenImageTransformer2DModel": Family(
        "qwen",
        (Meet("transformer_blocks", along=(Along("image_rotary_emb", 0, 1, "text"),
                                           Along("encoder_hidden_states_mask", 1, of="text"))),),
        mask="encoder_hidden_states_mask", encoded={TEXT: 0, "encoder_hidden_states_mask": 1},
        modular=_EMBEDS | {"encoder_hidden_states_mask": "prompt_embeds_mask"},
        settings={"image": "prompt_image|condition_images"}, guidance="apart", flag="do_true_cfg",
        wrap=odd.template, dropped="prompt_template_encode_start_idx", rewords=True,
        latent=Latent("packed", cells=True, scale="channel"), rotary=("axes_dims_rope", 10000.0),
        solve=Solve(
            solve.qwen, shift=solve.by_cells, handed="packed", pipelines=("QwenImagePipeline",),
            guided_by="true_cfg_scale",
        ),
    ),
    "PixArtTransformer2DModel": Family(
        "pixart", _across("transformer_blocks", _TEXT_MASK), mask=_M, rewords=True,
        encoded={TEXT: 0, "encoder_attention_mask": 1}, solve=Solve(solve.pixart, "steps", sigmas=False),
    ),
    "SanaTransformer2DModel": Family(
        "sana", _across("transformer_blocks", _TEXT_MASK), mask="encoder_attention_mask", rewords=True,
        encoded={TEXT: 0, "encoder_attention_mask": 1}, linear=True,
        solve=Solve(solve.masked, "scaled", sigmas=False),
    ),
    "ZImageTransformer2DModel": Family(
        "z-image",
        (Meet("layers", text=None, sequence="x", along=(Along("freqs_cis", 1, rope=True), Along("attn_mask", 1))),),
        sample="x", timestep="t", text="cap_feats", text_first=False, alone=_REFINED, guidance="cond, uncond",
        flag="apply_cfg", encode=odd.z_image_encode, modular={"cap_feats": "prompt_embeds"},
        place=odd.z_image_place, lengths=odd.z_image_lengths, tokens=odd.z_image_tokens,
        wrap=odd.chat(True), rewords=True, latent=Latent("list"), residuals=("controlnet_block_samples",),
        rotary=("axes_dims", "rope_theta"),
        refuse=((odd.nested, "mixes several texts and pictures in its omni mode: use ZImagePipeline"),),
        solve=Solve(
            solve.z_image, "rising", negated=True, shift=solve.by_cells, pipelines=("ZImagePipeline",), unguided=0.0
        ),
    ),
    "Flux2Transformer2DModel": Family(
        "flux2", _two(_ROPE, None), ids=("txt_ids", (3,)), cut=True, guidance="apart", modular=_EMBEDS,
        wrap=odd.chat(False), rewords=True, latent=Latent("tokens", scale="batch norm"),
        rotary=("axes_dims_rope", "rope_theta"),
        refuse=((odd.keeps_keys, "keeps keys of its references from step to step, where a negative would go wrong in "
                                 "silence: use Flux2KleinPipeline"),),
        solve=Solve(solve.flux2, shift=solve.empirical, pipelines=("Flux2KleinPipeline", "Flux2Pipeline")),
    ),
    "Flux3Transformer2DModel": Family(
        "flux3", (Meet("single_transformer_blocks", along=(*_ROPE, Along("temb_mod_context", 1, of="text"))),),
        ids=("txt_ids", (3,)), still=False, guidance="apart", modular=_EMBEDS, columns=False, latent=Latent("tokens"),
        # Reference pictures are no part of the picture that is made.
        alone=(("txt_mode_blocks", "text"), ("mode_blocks.image_cond", "text"), ("mode_blocks", "self")),
    ),
    "ChromaTransformer2DModel": Family(
        "chroma", _two((*_ROPE, Along("attention_mask", 1)), None), mask="attention_mask",
        encoded={TEXT: 0, "attention_mask": 2}, place=odd.chroma_place, guidance="apart", latent=Latent("packed"),
        rewords=True, rotary=("axes_dims_rope", 10000.0),
        solve=Solve(solve.chroma, shift=solve.by_cells, handed="packed", pipelines=("ChromaPipeline",)),
    ),
    "Lumina2Transformer2DModel": Family(
        "lumina2",
        (Meet("layers", text=None, along=(Along("image_rotary_emb", 1, rope=True), Along("attention_mask", 1))),),
        mask="encoder_attention_mask", encoded={TEXT: 2, "encoder_attention_mask": 3}, as_negative=True, cut=True,
        alone=_REFINED, guidance="apart", lengths=odd.mask_lengths, tokens=odd.patches, masked=True,
        rotary=("axes_dim_rope", 10000.0), wrap=odd.system_prompt, rewords=True, solve=Solve(
            solve.masked, "rising", negated=True, shift=solve.by_channels,
            pipelines=("Lumina2Pipeline", "Lumina2Text2ImgPipeline"),
        ),
    ),
    "Krea2Transformer2DModel": Family(
        "krea2", (Meet("transformer_blocks", text=None, along=(*_ROPE, Along("attention_mask", 3))),),
        mask="encoder_attention_mask", encoded={TEXT: 0, "encoder_attention_mask": 1}, cut=True,
        alone=(("text_fusion", "text"),), rewords=True, place=odd.krea_place, guidance="apart", wrap=odd.template,
        dropped="prompt_template_encode_start_idx", latent=Latent("packed", scale="channel"),
    ),
    "AuraFlowTransformer2DModel": Family(
        "auraflow", (Meet("joint_transformer_blocks"), Meet("single_transformer_blocks", text=None)), registers=8
    ),
    "CogView3PlusTransformer2DModel": Family("cogview3", (Meet("transformer_blocks"),)),
    "CogView4Transformer2DModel": Family("cogview4", (Meet("transformer_blocks"),), guidance="apart"),
    "HunyuanImageTransformer2DModel": Family(
        "hunyuan-image", _two(_MASK4), mask=_M, encoded={TEXT: 0, _M: 1, f"{TEXT}_2": 2, f"{_M}_2": 3},
        guidance="apart", text_first=False, alone=_CONTEXT, still=False, columns=False, lengths=odd.all_texts,
    ),
    "HunyuanDiT2DModel": Family(
        "hunyuan-dit", _across("blocks", whole=True), encode=odd.clip_and_t5,
    ),
    "BriaTransformer2DModel": Family("bria", _two(_ROPE), ids=("txt_ids", ()), latent=Latent("packed")),
    "OvisImageTransformer2DModel": Family(
        "ovis", _two(_ROPE), ids=("txt_ids", (1, 2)), guidance="apart", latent=Latent("packed")
    ),
    "LongCatImageTransformer2DModel": Family(
        "longcat", _two(_ROPE), ids=("txt_ids", (1, 2)), guidance="apart", latent=Latent("packed")
    ),
    "GlmImageTransformer2DModel": Family("glm-image", (Meet("transformer_blocks"),), guidance="apart", columns=False),
    "Kandinsky5Transformer3DModel": Family(
        "kandinsky5", (Meet("visual_transformer_blocks", "cross", text="text_embed", layers=("cross_attention",)),),
        alone=(("text_transformer_blocks", "text"),), still=False, guidance="apart",
        negative="negative_prompt_embeds_qwen", place=odd.kandinsky_place, latent=_FILM,
    ),
    "LuminaNextDiT2DModel": Family(
        "lumina", _across("layers", (Along("encoder_mask", 1),), through="norm1_context", whole=True),
        mask="encoder_mask", encoded={TEXT: 0, "encoder_mask": 1}, guidance="cond, uncond", masked=True,
    ),
    "PRXTransformer2DModel": Family(
        "prx", (Meet("blocks", "keys", layers=("attention",), along=(Along("attention_mask", 1),)),),
        mask="attention_mask", encoded={TEXT: 0, "attention_mask": 1},
    ),
    "NucleusMoEImageTransformer2DModel": Family(
        "nucleus", (Meet("transformer_blocks", "keys", layers=("attn",), through="encoder_proj",
                          along=(Along("image_rotary_emb"), Along("attention_kwargs"))),), text_first=False,
        mask="encoder_hidden_states_mask", encoded={TEXT: 0, "encoder_hidden_states_mask": 1}, guidance="apart",
        latent=Latent("packed", cells=True),
    ),
    "HiDreamImageTransformer2DModel": Family(
        "hidream", (Meet("double_stream_blocks"), Meet("single_stream_blocks")), rows_only=True, timestep="timesteps",
        text="encoder_hidden_states_t5", rows_at={"encoder_hidden_states_llama3": 1}, text_first=False, columns=False,
        encode=odd.hidream_encode, place=odd.hidream_place, lengths=odd.hidream_lengths, tokens=odd.patches,
    ),
    "ErnieImageTransformer2DModel": Family(
        "ernie-image", (Meet("layers", text=None, sequence="x"),), rows_only=True, text="text_bth", widens=True,
        texts=("text_lens",), text_first=False, encode=odd.ernie_encode, place=odd.ernie_place, columns=False,
    ),
    # -- films ---------------------------------------------------------------------------------------------------
    "WanTransformer3DModel": Family("wan", _WAN, _EXPERTS, guidance="apart", latent=_FILM),
    "WanVACETransformer3DModel": Family("wan-vace", _WAN, _EXPERTS, guidance="apart", latent=_FILM),
    "ChronoEditTransformer3DModel": Family("chronoedit", _WAN, guidance="apart", latent=_FILM),
    "SkyReelsV2Transformer3DModel": Family("skyreels", _WAN, guidance="apart", latent=_FILM),
    "AnyFlowTransformer3DModel": Family("anyflow", _WAN, latent=_FILM),
    "HeliosTransformer3DModel": Family("helios", _across("blocks"), guidance="apart", latent=_FILM),
    "LTXVideoTransformer3DModel": Family(
        "ltx", _across("transformer_blocks", _TEXT_MASK), mask=_M, encoded={TEXT: 0, _M: 1}, latent=_FILM
    ),
    "SanaVideoTransformer3DModel": Family(
        "sana-video", _across("transformer_blocks", _TEXT_MASK), mask=_M, encoded={TEXT: 0, _M: 1}, latent=_FILM
    ),
    "AllegroTransformer3DModel": Family(
        "allegro", _across("transformer_blocks", _TEXT_MASK, whole=True), mask=_M, encoded={TEXT: 0, _M: 1},
        latent=_FILM,
    ),
    "LatteTransformer3DModel": Family("latte", _across("transformer_blocks"), latent=_FILM),
    "CosmosTransformer3DModel": Family("cosmos", _across("transformer_blocks"), guidance="apart", latent=_FILM),
    "HunyuanVideoTransformer3DModel": Family(
        "hunyuan-video", _two(_MASK4), mask=_M, encoded={TEXT: 0, _M: 2}, guidance="apart", text_first=False,
        alone=_CONTEXT, still=False, columns=False, latent=_FILM,
    ),
    "HunyuanVideo15Transformer3DModel": Family(
        "hunyuan-video-1.5", (Meet("transformer_blocks", along=(Along("attention_mask", 1, of="text"),)),), mask=_M,
        encoded={TEXT: 0, _M: 1, f"{TEXT}_2": 2, f"{_M}_2": 3}, guidance="apart", text_first=False, alone=_CONTEXT,
        still=False, columns=False, lengths=odd.all_texts, latent=_FILM,
    ),
    "CogVideoXTransformer3DModel": Family("cogvideox", (Meet("transformer_blocks"),), latent=_FILM),
    "ConsisIDTransformer3DModel": Family("consisid", (Meet("transformer_blocks"),), cut=True, latent=_FILM),
    "MotifVideoTransformer3DModel": Family(
        "motif", _two(_MASK4), mask=_M, encoded={TEXT: 0, _M: 2}, guidance="apart", text_first=False, still=False,
        columns=False, latent=_FILM,
    ),
    "UNetMotionModel": Family(
        "animatediff", sample="sample", denoisers=("unet",), latent=_FILM, adapter=UNetAdapter
    ),
    # -- refused, with the reason ----------------------------------------------------------------------------------
    "BriaFiboTransformer2DModel": Refused(
        "it gives each block another layer of its language model's text; use negative_prompt and guidance"
    ),
    "BriaFibo2Transformer2DModel": Refused(
        "it condenses its text to tokens whose number depends on its length; use negative_prompt and guidance"
    ),
    "LTX2VideoTransformer3DModel": Refused(
        "it scales its text inside of each block by the step; use LTXPipeline, or negative_prompt and guidance"
    ),
    "QwenImage21Transformer2DModel": Refused(
        "its text is a causal prefix whose keys are kept from the first step on; use QwenImagePipeline"
    ),
    "Ideogram4Transformer2DModel": Refused(
        "text and image share one packed sequence, and guidance is a second model without text"
    ),
    "OmniGenTransformer2DModel": Refused("its language model is the denoiser, pictures stand inside of the text"),
    "Cosmos3OmniTransformer": Refused("its language model is the denoiser, pictures stand inside of the text"),
    "MochiTransformer3DModel": Refused(
        "it attends row by row to texts of which the padding was taken out; use negative_prompt and guidance"
    ),
    "EasyAnimateTransformer3DModel": Refused("its second text encoder's tokens follow the first's inside of the model"),
    "JoyImageEditTransformer3DModel": Refused(
        "its pictures stand inside of the prompt; use negative_prompt and guidance"
    ),
    "JoyImageEditPlusTransformer3DModel": Refused(
        "its pictures stand inside of the prompt; use negative_prompt and guidance"
    ),
    "DreamLiteUNetModel": Refused(
        "it puts the picture to edit beside the latent and guides by three rows; use StableDiffusionXLPipeline, or its "
        "own negative_prompt"
    ),
    "Kandinsky3UNet": Refused(
        "its self-attention and its pooling look like attention to text; use Kandinsky5T2IPipeline"
    ),
    "Kandinsky6Transformer3DModel": Refused(
        "film, sound and text are packed into one sequence; use Kandinsky5T2VPipeline"
    ),
    "Kandinsky6SRTransformer3DModel": Refused("it enlarges films; graft the pipeline that made them"),
    "PriorTransformer": Refused("it makes an image embedding; graft a pipeline whose UNet attends to text"),
    "StableCascadeUNet": Refused("text and image embeddings are keys of one attention; use StableDiffusionXLPipeline"),
    "HunyuanVideoFramepackTransformer3DModel": Refused(
        "it packs the film's past in front of the latent; use HunyuanVideoPipeline"
    ),
    "AnyFlowFARTransformer3DModel": Refused("it attends causally by flex attention; use AnyFlowPipeline"),
    "WanAnimateTransformer3DModel": Refused(
        "it films by a driving film, its face blocks attend to that; use WanPipeline or WanImageToVideoPipeline"
    ),
    "WanAnimate2Transformer3DModel": Refused("it films by a driving film; use WanPipeline"),
    "SanaWMTransformer3DModel": Refused("it films by camera paths; use SanaVideoPipeline"),
    "MiniMaxH3Transformer3DModel": Refused("film, sound and text are packed into one sequence; use WanPipeline"),
    "UNet3DConditionModel": Refused(
        "it is from before films had motion modules; use AnimateDiffPipeline or WanPipeline"
    ),
    "I2VGenXLUNet": Refused("its text stands beside embeddings of its picture; use WanImageToVideoPipeline"),
    "UNetSpatioTemporalConditionModel": Refused("it takes no text: there is no negative to steer away from"),
    "UNetControlNetXSModel": Refused("UNet and ControlNet are one module; use a pipeline with a ControlNetModel"),
    "UVit2DModel": Refused("it draws tokens instead of a latent; use a diffusion pipeline"),
    "UniDiffuserModel": Refused("it draws texts and pictures at once; use StableDiffusionPipeline"),
    "Transformer2DModel": Refused("it draws tokens, or by classes; use a pipeline of PixArt"),
    "DiTTransformer2DModel": Refused("it draws by classes: there is no text to steer away from"),
}  # fmt: skip


def declare_family(class_name: str, family: Family | Refused) -> None:
    """Make a denoiser class known, or say something else about a known one.

    Args:
        class_name: the class's name, as `type(pipe.transformer).__name__`.
        family: see `Family`.
    Raises:
        SettingTypeError: not a name and a `Family`.
    Example:
        A model whose blocks `blocks` attend from the image to the text that they get as `context`:

        >>> import diffgraft as dg
        >>> dg.declare_family(
        ...     "MyTransformer2DModel",
        ...     dg.Family("mine", (dg.Meet("blocks", "cross", text="context"),), guidance="apart"),
        ... )
    """
    if not isinstance(class_name, str) or not isinstance(family, (Family, Refused)):
        raise SettingTypeError(f"declare_family({class_name!r}, ...): a class name and a Family are needed")
    FAMILIES[class_name] = family

"""What the fields of a family cannot say: texts that are lists, masks that cover the image too, lengths of rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ...attention.errors import SettingError, UnsupportedPipelineError
from ...plugins.base import Text
from .modular import is_modular, stacked, text_block

Inputs = dict[str, Any]

_STEP = 32
"""Z-Image pads text and image to a multiple of it, with a learned token that is seen."""


# -- Z-Image: lists of tensors, one a row ----------------------------------------------------------------------------


def z_image_place(inputs: Inputs, text: Text) -> Inputs:
    """A text as Z-Image takes it: a list, each row cut to its length."""
    masks = [None] * len(text.embeddings) if text.mask is None else text.mask
    rows = [row if mask is None else row[mask] for row, mask in zip(text.embeddings, masks, strict=True)]
    return {**inputs, "cap_feats": rows}


def z_image_lengths(adapter: Any, inputs: Mapping[str, Any]) -> list[int]:
    """Columns of each row's text."""
    return [-(-len(row) // _STEP) * _STEP for row in inputs["cap_feats"]]


def z_image_tokens(adapter: Any, inputs: Mapping[str, Any]) -> int:
    """Columns of the image."""
    frames, height, width = inputs["x"][0].shape[-3:]
    patch = inputs.get("patch_size") or 2
    return -(-(frames * (height // patch) * (width // patch)) // _STEP) * _STEP


def z_image_encode(adapter: Any, texts: list[str], running: Any) -> Text:
    """The pipeline's list of rows of several lengths."""
    return stacked(adapter.encode_prompt(running, texts)[0])


# -- masks -------------------------------------------------------------------------------------------------------------


def chroma_place(inputs: Inputs, text: Text) -> Inputs:
    """Chroma's mask covers text and image; its padding is seen, with other weights, and stays so."""
    n, image = text.embeddings.shape[1], inputs["hidden_states"].shape[1]
    given = {**inputs, "encoder_hidden_states": text.embeddings, "txt_ids": inputs["txt_ids"].new_zeros(n, 3)}
    mask = inputs.get("attention_mask")
    if mask is not None:
        own = mask.new_ones(len(text.embeddings), n) if text.mask is None else text.mask.to(mask)
        given["attention_mask"] = torch.cat([own, own.new_ones(len(own), image)], 1)
    return given


def krea_place(inputs: Inputs, text: Text) -> Inputs:
    """Krea 2's positions cover text, all at 0, and image."""
    ids, image = inputs["position_ids"], inputs["hidden_states"].shape[1]
    mask = text.mask
    if mask is None and inputs.get("encoder_attention_mask") is not None:
        mask = torch.ones(text.embeddings.shape[:2], dtype=torch.bool, device=text.embeddings.device)
    place = torch.cat([ids.new_zeros(text.embeddings.shape[1], ids.shape[-1]), ids[-image:]])
    name = "encoder_hidden_states"
    return {**inputs, name: text.embeddings, "encoder_attention_mask": mask, "position_ids": place}


def ernie_place(inputs: Inputs, text: Text) -> Inputs:
    """ERNIE-Image is told how long its texts are; shorter ones are padded."""
    words = text.embeddings
    lengths = torch.full((len(words),), words.shape[1]) if text.mask is None else text.mask.sum(1)
    words = F.pad(words, (0, 0, 0, max(0, inputs["text_bth"].shape[1] - words.shape[1])))
    return {**inputs, "text_bth": words, "text_lens": lengths.to(inputs["text_lens"])}


def ernie_encode(adapter: Any, texts: list[str], running: Any) -> Text:
    """The pipeline's list of rows of several lengths."""
    found = adapter.encode_prompt(running, texts)
    return stacked([row.squeeze(1) if row.ndim == 3 else row for row in found])


def hidream_place(inputs: Inputs, text: Text) -> Inputs:
    """HiDream's language model gives a text for each block, whose rows are the second dimension."""
    llama = text.more.get("encoder_hidden_states_llama3")
    if llama is None:
        raise SettingError(
            "HiDream takes texts of several encoders: give the negative as a string, not as the embeddings of one"
        )
    words = {"encoder_hidden_states_t5": text.embeddings, "encoder_hidden_states_llama3": llama.transpose(0, 1)}
    return {**inputs, **words}


def hidream_encode(adapter: Any, texts: list[str], running: Any) -> Text:
    """All four encoders' texts."""
    t5, _, llama, _, pooled, _ = adapter.encode_prompt(running, *[texts] * 4)
    return Text(t5, None, {"encoder_hidden_states_llama3": llama.transpose(0, 1)}, {"pooled_embeds": pooled})


def hidream_lengths(adapter: Any, inputs: Mapping[str, Any]) -> list[int]:
    """T5's columns, the language model's last layer's and the block's own."""
    llama = inputs["encoder_hidden_states_llama3"]
    return [inputs["encoder_hidden_states_t5"].shape[1] + 2 * llama.shape[2]] * len(inputs["hidden_states"])


def kandinsky_place(inputs: Inputs, text: Text) -> Inputs:
    """Kandinsky 5 is told the places of its text."""
    places = torch.arange(text.embeddings.shape[1], device=text.embeddings.device)
    return {**inputs, "encoder_hidden_states": text.embeddings, "text_rope_pos": places}


def mask_lengths(adapter: Any, inputs: Mapping[str, Any]) -> list[int]:
    """Text tokens of each row, where a model cuts the padding off by its mask."""
    return [int(n) for n in inputs["encoder_attention_mask"].sum(1).tolist()]


def all_texts(adapter: Any, inputs: Mapping[str, Any]) -> list[int]:
    """Text tokens where a second text and a picture's tokens stand with the first."""
    names = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
    total = sum(inputs[name].shape[1] for name in names if inputs.get(name) is not None)
    return [total] * len(inputs["hidden_states"])


def patches(adapter: Any, inputs: Mapping[str, Any]) -> int:
    """Image tokens of a latent [B, C, h, w] cut in patches."""
    height, width = inputs["hidden_states"].shape[-2:]
    return (height // adapter.denoiser.config.patch_size) * (width // adapter.denoiser.config.patch_size)


# -- encoders that are asked in another way ---------------------------------------------------------------------------


def with_lora(prompts: int, pooled: int, name: str = "joint_attention_kwargs") -> Any:
    """Encoding by `encode_prompt` with as many prompts, at the LoRA scale that the call has under `name`.

    Args:
        prompts: how many. pooled: place of the pooled text in the answer.
    """

    def encode(adapter: Any, texts: list[str], running: Any) -> Text:
        scale = (running.arguments.get(name) or {}).get("scale")
        found = adapter.encode_prompt(running, *[texts] * prompts, lora_scale=scale)
        return Text(found[0], pooled={"pooled_projections": found[pooled]})

    return encode


def clip_and_t5(adapter: Any, texts: list[str], running: Any) -> Text:
    """HunyuanDiT asks its encoders one after the other; the texts of both are the denoiser's."""
    clip, t5 = (adapter.encode_prompt(running, texts, text_encoder_index=index) for index in (0, 1))
    more = {"text_embedding_mask": clip[2], "encoder_hidden_states_t5": t5[0], "text_embedding_mask_t5": t5[2]}
    return Text(clip[0], None, more)


def second_if_picture(module: Any) -> int:
    """Which attention call is the text's, where pictures may be attended to first."""
    return int(getattr(module, "add_k_proj", None) is not None)


# -- templates ----------------------------------------------------------------------------------------------------


def chat(thinking: bool) -> Any:
    """A prompt as the only message of a chat."""

    def wrap(pipe: Any, prompt: str, told: Mapping[str, Any]) -> str:
        if getattr(pipe.tokenizer, "chat_template", None) is None or hasattr(pipe, "system_message"):
            raise UnsupportedPipelineError(
                f"{type(pipe).__name__} reads its prompt in a form that diffgraft does not know: give no words here"
            )
        messages = [{"role": "user", "content": prompt}]
        return pipe.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )

    return wrap


def template(pipe: Any, prompt: str, told: Mapping[str, Any]) -> str:
    """Qwen-Image's and Krea 2's template, which may stand in two parts."""
    form: Any = text_block(pipe) if is_modular(pipe) else pipe
    if getattr(pipe, "processor", None) is not None or not hasattr(form, "prompt_template_encode_start_idx"):
        raise UnsupportedPipelineError(
            f"{type(pipe).__name__} reads pictures with its prompt, so that words have no columns of their own: give "
            "no words to a plugin here"
        )
    if hasattr(form, "prompt_template_encode_prefix"):
        return form.prompt_template_encode_prefix + prompt
    return form.prompt_template_encode.format(prompt)


def system_prompt(pipe: Any, prompt: str, told: Mapping[str, Any]) -> str:
    """Lumina 2's prompt behind the call's system prompt, or the pipeline's."""
    given = told.get("system_prompt")
    return f"{pipe.system_prompt if given is None else given} <Prompt Start> {prompt}"


def nested(pipe: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether Z-Image runs in its omni mode."""
    return isinstance((inputs.get("x") or [None])[0], list) or type(pipe).__name__ == "ZImageOmniPipeline"


def keeps_keys(pipe: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether FLUX.2 keeps keys of its reference pictures."""
    return inputs.get("kv_cache_mode") is not None or type(pipe).__name__ == "Flux2KleinKVPipeline"

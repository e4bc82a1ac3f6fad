"""How a sampling loop of our own calls a denoiser: what the pipelines do around theirs, by family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...attention.errors import UnsupportedPipelineError
from ...attention.layer import find_layers
from ...plugins.startpoint import pack, unpack
from .base import Inputs, has_ip_adapter
from .family import names_of
from .modular import is_modular
from .words import own_words


class Loop:
    """UNet2DConditionModel; other families override what differs. Latents are always [B, C, h, w] here.

    Args:
        pipe: the pipeline whose encoders, denoiser and sizes are used.
        denoiser: its UNet or transformer.

    Attributes:
        layers: the denoiser's attention layers in execution order.
        packed: latents that go into one token of the denoiser's input.
    """

    packed = 1

    def __init__(self, pipe: Any, denoiser: Any) -> None:
        self.pipe, self.denoiser = pipe, denoiser
        self.layers = find_layers(denoiser)

    def conditions(self, texts: Sequence[str], size: tuple[int, int]) -> Inputs:
        """What the denoiser takes besides latents of `size` (h, w) and timestep, one row a text."""
        encoded = self._encode(texts, do_classifier_free_guidance=False)
        inputs: Inputs = {"encoder_hidden_states": encoded[0]}
        if self.denoiser.config.addition_embed_type == "text_time":  # SDXL: pooled text, and sizes in pixels
            height, width = (self.pipe.vae_scale_factor * side for side in size)
            refiner = self.pipe.config.get("requires_aesthetics_score")  # which takes its default, 6
            told = [height, width, 0, 0, *([6] if refiner else [height, width])]
            sizes = torch.tensor([told] * len(texts)).to(encoded[2])
            inputs["added_cond_kwargs"] = {"text_embeds": encoded[2], "time_ids": sizes}
        width = self.denoiser.config.time_cond_proj_dim
        if width is not None:  # LCM: guidance 1 is 0 here
            zero = torch.zeros(len(texts))
            inputs["timestep_cond"] = self.pipe.get_guidance_scale_embedding(zero, width).to(encoded[0])
        return inputs

    def with_images(self, inputs: Inputs, pictures: Sequence[Any] | None) -> Inputs:
        """Adds what a loaded IP-Adapter wants: a picture for each row, or zeros where nothing of it will be used."""
        if not has_ip_adapter(self.denoiser):
            return inputs
        layers = self.denoiser.encoder_hid_proj.image_projection_layers
        if pictures is None:
            text = inputs["encoder_hidden_states"]
            embeds = [text.new_zeros(len(text), 1, *_image_shape(layer)) for layer in layers]
        else:
            device, encode = self.pipe._execution_device, self.pipe.prepare_ip_adapter_image_embeds
            rows = [encode([picture] * len(layers), None, device, 1, False) for picture in pictures]
            embeds = [torch.cat([row[i] for row in rows]) for i in range(len(layers))]
        return {**inputs, "added_cond_kwargs": {**inputs.get("added_cond_kwargs", {}), "image_embeds": embeds}}

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        """The denoiser's prediction, [B, C, h, w]."""
        return self.denoiser(latents, timestep, **inputs, return_dict=False)[0]

    def timing(self, size: tuple[int, int], steps: int, scheduler: Any) -> dict[str, Any]:
        """What the pipeline adds to `set_timesteps` for latents of this size."""
        return {}

    def hand_over(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the pipeline's `latents=` takes them."""
        return latents

    def _encode(self, texts: Sequence[str], **options: Any) -> Any:
        device = self.pipe._execution_device
        with own_words(self.pipe) as pipe:
            return pipe.encode_prompt(list(texts), device=device, num_images_per_prompt=1, **options)


class PixArtLoop(Loop):
    """PixArt: a text mask, one timestep a row, and a learned variance behind the prediction."""

    def conditions(self, texts: Sequence[str], size: tuple[int, int]) -> Inputs:
        embeddings, mask, *_ = self._encode(texts, do_classifier_free_guidance=False)
        sizes: Inputs = {"resolution": None, "aspect_ratio": None}
        if getattr(self.denoiser, "use_additional_conditions", False):
            pixels = torch.tensor([[self.pipe.vae_scale_factor * side for side in size]] * len(texts))
            ratio = torch.full((len(texts), 1), size[0] / size[1])
            sizes = {"resolution": pixels.to(embeddings), "aspect_ratio": ratio.to(embeddings)}
        return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask, "added_cond_kwargs": sizes}

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        output = self.denoiser(latents, timestep=timestep.expand(len(latents)), **inputs, return_dict=False)[0]
        return output[:, : latents.shape[1]]


class SD3Loop(Loop):
    """Stable Diffusion 3: flow matching on spatial latents."""

    def conditions(self, texts: Sequence[str], size: tuple[int, int]) -> Inputs:
        encoded = self._encode(texts, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": encoded[0], "pooled_projections": encoded[2]}

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        return self.denoiser(latents, timestep=timestep.expand(len(latents)), **inputs, return_dict=False)[0]

    def timing(self, size: tuple[int, int], steps: int, scheduler: Any) -> dict[str, Any]:
        if not scheduler.config.get("use_dynamic_shifting"):
            return {}
        patch = self.denoiser.config.patch_size
        return {"mu": dynamic_shift((size[0] // patch) * (size[1] // patch), scheduler, 1.16)}


class FluxLoop(Loop):
    """FLUX.1: packed latents. A guidance-distilled model runs at guidance 1, where inversion is stable."""

    packed = 4

    def conditions(self, texts: Sequence[str], size: tuple[int, int]) -> Inputs:
        embeddings, pooled, text_ids = self._encode(texts)
        device, grid = self.pipe._execution_device, (size[0] // 2, size[1] // 2)
        ids = self.pipe._prepare_latent_image_ids(1, *grid, device, embeddings.dtype)
        guided = self.denoiser.config.guidance_embeds
        guidance = torch.ones(len(texts), device=device) if guided else None
        return {
            "encoder_hidden_states": embeddings,
            "pooled_projections": pooled,
            "txt_ids": text_ids,
            "img_ids": ids,
            "guidance": guidance,
        }

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        height, width = latents.shape[-2:]
        time = timestep.expand(len(latents)).to(latents.dtype) / 1000
        output = self.denoiser(hidden_states=pack(latents), timestep=time, **inputs, return_dict=False)[0]
        return unpack(output, (height // 2, width // 2))

    def timing(self, size: tuple[int, int], steps: int, scheduler: Any) -> dict[str, Any]:
        sigmas = [1 - i / steps for i in range(steps)]
        return {"sigmas": sigmas, "mu": dynamic_shift((size[0] // 2) * (size[1] // 2), scheduler, 1.15)}

    def hand_over(self, latents: torch.Tensor) -> torch.Tensor:
        return pack(latents)


LOOPS: dict[str, type[Loop]] = {
    "UNet2DConditionModel": Loop,
    "PixArtTransformer2DModel": PixArtLoop,
    "SD3Transformer2DModel": SD3Loop,
    "FluxTransformer2DModel": FluxLoop,
}


def loop_for(pipe: Any) -> Loop:
    """The loop of the family of a pipeline's denoiser.

    Raises:
        UnsupportedPipelineError: a family without one, or a model for inpainting and the like.
    """
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    denoiser = getattr(denoiser, "_orig_mod", denoiser)
    if is_modular(pipe):
        raise UnsupportedPipelineError(
            f"{type(pipe).__name__} is a modular pipeline, which graft() edits but no loop of ours runs: load it with "
            "diffusers.DiffusionPipeline.from_pretrained"
        )
    for name in names_of(denoiser):
        if name in LOOPS:
            loop = LOOPS[name](pipe, denoiser)
            taken, channels = loop.denoiser.config.in_channels, loop.packed * pipe.vae.config.latent_channels
            if taken != channels:
                raise UnsupportedPipelineError(
                    f"the {name} takes {taken} channels where latents have {channels}, so it wants a mask or "
                    "a picture besides: invert with a text-to-image model"
                )
            return loop
    raise UnsupportedPipelineError(f"{type(denoiser).__name__} cannot be inverted; {', '.join(LOOPS)} can")


def dynamic_shift(tokens: int, scheduler: Any, most: float) -> float:
    """The time shift `mu` of the pipelines: linear in the number of image tokens."""
    config = scheduler.config
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", most)
    return low + (high - low) * (tokens - few) / (many - few)


def _image_shape(projection: torch.nn.Module) -> tuple[int, ...]:
    """Shape of one picture's embedding for an IP-Adapter's projection: pooled, or 257 tokens for the larger kinds."""
    width = next(m.in_features for m in projection.modules() if isinstance(m, torch.nn.Linear))
    return (width,) if type(projection).__name__ == "ImageProjection" else (257, width)

"""How a sampling loop of our own calls a denoiser: what the pipelines do around theirs, by family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...attention.errors import UnsupportedPipelineError
from ...attention.layer import find_layers
from ...plugins.startpoint import unpack
from .base import Inputs, has_ip_adapter
from .declared import DeclaredAdapter
from .family import Family, names_of
from .latents import channels_of, pixels_of
from .modular import is_modular
from .solve import Solve
from .table import FAMILIES
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


class DeclaredLoop(Loop):
    """A transformer, as its family's `solve` describes it."""

    def __init__(self, pipe: Any, denoiser: Any, family: Family, solve: Solve) -> None:
        super().__init__(pipe, denoiser)
        self.adapter, self.solve = DeclaredAdapter(pipe, denoiser, family), solve
        self.layers = self.adapter.layers
        self.packed = 4 if family.latent.layout == "packed" else 1

    @property
    def pixels(self) -> int:
        """Pixels, in each direction, of a latent."""
        return pixels_of(self.pipe)

    def conditions(self, texts: Sequence[str], size: tuple[int, int]) -> Inputs:
        return self.solve.inputs(self.pipe, self.denoiser, texts, size)

    def with_images(self, inputs: Inputs, pictures: Sequence[Any] | None) -> Inputs:
        if has_ip_adapter(self.denoiser):  # FLUX.1; SD3's may be left out
            raise UnsupportedPipelineError(
                f"the IP-Adapter of {type(self.denoiser).__name__} wants a picture at every call, which an inversion "
                "does not give: call pipe.unload_ip_adapter() first"
            )
        return inputs

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        spec, sample = self.adapter.spec, self.adapter.as_sample(latents)
        given: Inputs = {spec.sample: sample, spec.timestep: self._time(timestep.expand(len(latents)), latents)}
        if spec.latent.layout == "list":
            given[spec.sample] = list(latents[:, :, None])
        output = self.denoiser(**given, **inputs, return_dict=False)[0]
        return self._latent(output, latents) * (-1 if self.solve.negated else 1)

    def _time(self, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        how = self.solve.time
        if how == "unit":
            return timestep.to(latents.dtype) / 1000
        if how == "rising":
            return (1000 - timestep) / 1000
        return timestep * self.denoiser.config.timestep_scale if how == "scaled" else timestep

    def _latent(self, output: Any, latents: torch.Tensor) -> torch.Tensor:
        """A prediction as [B, C, h, w]."""
        height, width = latents.shape[-2:]
        layout = self.adapter.spec.latent.layout
        if layout == "packed":
            return unpack(output, (height // 2, width // 2))
        if layout == "tokens":
            return output.mT.unflatten(-1, (height, width))
        return torch.stack(output)[:, :, 0] if layout == "list" else output[:, : latents.shape[1]]

    def timing(self, size: tuple[int, int], steps: int, scheduler: Any) -> dict[str, Any]:
        solve = self.solve
        given: dict[str, Any] = {"sigmas": [1 - i / steps for i in range(steps)]} if solve.sigmas else {}
        shift = None if solve.shift is None else solve.shift(self.pipe, scheduler, size, steps)
        return given if shift is None else given | {"mu": shift}

    def hand_over(self, latents: torch.Tensor) -> torch.Tensor:
        return self.adapter.as_sample(latents) if self.solve.handed == "packed" else latents


def loop_for(pipe: Any) -> Loop:
    """The loop of the family of a pipeline's denoiser.

    Raises:
        UnsupportedPipelineError: a family without one, or a model for inpainting and the like.
    """
    if is_modular(pipe):
        raise UnsupportedPipelineError(
            f"{type(pipe).__name__} is a modular pipeline, which graft() edits but no loop of ours runs: load it with "
            "diffusers.DiffusionPipeline.from_pretrained"
        )
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    denoiser = getattr(denoiser, "_orig_mod", denoiser)
    for name in filter(can_loop, names_of(denoiser)):
        said: Any = FAMILIES[name]
        loop = Loop(pipe, denoiser) if said.solve is None else DeclaredLoop(pipe, denoiser, said, said.solve)
        taken, channels = loop.denoiser.config.in_channels, loop.packed * channels_of(pipe)
        if taken != channels:
            raise UnsupportedPipelineError(
                f"the {name} takes {taken} channels where latents have {channels}, so it wants a mask or "
                "a picture besides: invert with a text-to-image model"
            )
        return loop
    able = ", ".join(filter(can_loop, FAMILIES))
    raise UnsupportedPipelineError(f"{type(denoiser).__name__} cannot be inverted; {able} can")


def solve_of(denoiser: Any) -> Solve | None:
    """How the loop of a transformer's pipelines calls it; None where that is not known."""
    said = (FAMILIES.get(name) for name in names_of(getattr(denoiser, "_orig_mod", denoiser)))
    return next((one.solve for one in said if isinstance(one, Family) and one.solve is not None), None)


def can_loop(name: str) -> bool:
    """Whether a loop of our own can call the denoiser class of this name."""
    said = FAMILIES.get(name)
    return isinstance(said, Family) and (said.solve is not None or name == "UNet2DConditionModel")


def _image_shape(projection: torch.nn.Module) -> tuple[int, ...]:
    """Shape of one picture's embedding for an IP-Adapter's projection: pooled, or 257 tokens for the larger kinds."""
    width = next(m.in_features for m in projection.modules() if isinstance(m, torch.nn.Linear))
    return (width,) if type(projection).__name__ == "ImageProjection" else (257, width)

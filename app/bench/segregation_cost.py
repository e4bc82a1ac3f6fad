"""What attention guidance costs: FLOPs and saved activations on published shapes, beside diffusers' own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.pipelines.deprecated.stable_diffusion_attend_and_excite import (
    pipeline_stable_diffusion_attend_and_excite as excite,
)
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ... import AttentionSegregation, graft
from ...attention.step import Step
from ...plugins.base import Probe
from ...plugins.segregation import Call
from .configs import SD15, SDXL, meta_inputs, meta_pipe

STEPS = 50


@contextmanager
def saved_bytes(model: torch.nn.Module) -> Generator[Callable[[], int]]:
    """Inside, what autograd keeps for a backward pass, each storage once, weights left out."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in weights:
            kept[key] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield lambda: sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


class Flash(TorchFunctionMode):
    """Attention that keeps no probabilities, as on any GPU; a tensor without storage would be given the plain one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        scale = (kwargs or {}).get("scale")
        q, k, v = args if args else (kwargs[name] for name in ("query", "key", "value"))
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]


class Counted(AttentionSegregation):
    """Counts its update instead of making it; a tensor without storage has no values to look at."""

    def __init__(self, denoiser: torch.nn.Module) -> None:
        super().__init__([2, 5], end=1.0)
        self.denoiser, self.flops, self.saved = denoiser, 0, 0

    def latent(self, step: Step, latent: torch.Tensor, probe: Probe) -> None:
        with FlopCounterMode(display=False) as counter:
            super().latent(step, latent, probe)
        with Flash(), saved_bytes(self.denoiser) as saved:
            super().latent(step, latent, probe)
        self.flops, self.saved = counter.get_total_flops(), saved()

    def usable(self, call: Call, gradient: torch.Tensor) -> list[bool]:
        return [True] * len(gradient)


def call_flops(pipe: Any, latent: int) -> int:
    """FLOPs (two for each multiply-add) of one row through the denoiser."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        pipe.unet(**meta_inputs(pipe.unet, 1, (latent, latent)))
    return counter.get_total_flops()


def update_cost(pipe: Any, latent: int) -> tuple[int, int]:
    """FLOPs and saved bytes of one update."""
    plugin = Counted(pipe.unet)
    pipe.scheduler.set_timesteps(STEPS)
    inputs = meta_inputs(pipe.unet, 1, (latent, latent)) | {"timestep": pipe.scheduler.timesteps[0]}
    with graft(pipe, plugin), torch.no_grad():
        pipe.unet(**_half(inputs))
    return plugin.flops, plugin.saved


def excite_cost(pipe: Any, latent: int) -> tuple[int, int, int]:
    """FLOPs of forward and backward and saved bytes of diffusers' Attend-and-Excite, with its own processors."""
    store = excite.AttentionStore((16, 16))
    processors = {
        name: excite.AttendExciteAttnProcessor(store, name.split("_", 1)[0]) for name in pipe.unet.attn_processors
    }
    store.num_att_layers = len(processors)
    pipe.unet.set_attn_processor(processors)
    inputs = _half(meta_inputs(pipe.unet, 1, (latent, latent)))
    inputs["sample"].requires_grad_()
    with FlopCounterMode(display=False) as forward, saved_bytes(pipe.unet) as saved:
        pipe.unet(**inputs)
        loss = store.aggregate_attention(["up", "down", "mid"]).softmax(-1).amax()
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(loss, inputs["sample"])
    return forward.get_total_flops(), backward.get_total_flops(), saved()


def _half(inputs: dict[str, Any]) -> dict[str, Any]:
    return inputs | {name: inputs[name].half() for name in ("sample", "encoder_hidden_states")}


def run(full: bool) -> None:
    """Print the table; quick and full are the same."""
    sys.stdout.write(f"| model | method | {STEPS} guided steps | ratio to plain | saved activations, float16 |\n")
    sys.stdout.write("|---|---|---|---|---|\n")
    for name, config, latent in (("SD1.5 512", SD15, 64), ("SDXL 1024", SDXL, 128)):
        pipe = meta_pipe(config)
        plain = 2 * STEPS * call_flops(pipe, latent)
        pipe.unet.half()
        update, saved = update_cost(pipe, latent)
        rows: list[tuple[str, int, int]] = [("plain", plain, 0)]
        rows.append(("AttentionSegregation, default (40% of the steps)", plain + STEPS * 2 // 5 * update, saved))
        rows.append(('AttentionSegregation, preset="paper" (every step)', plain + STEPS * update, saved))
        rows += [] if config is SDXL else _excite_rows(pipe, latent, plain)
        _write(name, rows)


def _excite_rows(pipe: Any, latent: int, plain: int) -> Sequence[tuple[str, int, int]]:
    forward, backward, saved = excite_cost(pipe, latent)
    total = plain + STEPS * forward + STEPS // 2 * backward
    refined = total + 3 * (20 * (forward + backward) + forward)
    name = "diffusers' Attend-and-Excite"
    return [(f"{name}, without refinement", total, saved), (f"{name}, refinement to its limit", refined, saved)]


def _write(model: str, rows: Sequence[tuple[str, int, int]]) -> None:
    plain = rows[0][1]
    for method, flops, saved in rows:
        memory = f"{saved / 2**20:.0f} MiB" if saved else "-"
        sys.stdout.write(f"| {model} | {method} | {flops / 1e12:.1f} T | {flops / plain:.3f} | {memory} |\n")

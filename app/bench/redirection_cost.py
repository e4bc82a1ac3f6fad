"""What object removal costs: FLOPs on published shapes, and the memory of one redirected layer."""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ... import SelfAttentionRedirection, graft
from ...attention.call import AttentionCall
from ...attention.edit import attend
from ...attention.layer import AttentionLayer
from ...attention.step import Step
from ...pipelines.grafting import fold
from .configs import SD15, SDXL, meta_inputs, meta_pipe
from .negative_cost import SHAPES, Shape, count

MODELS = {"SD1.5 512": (SD15, 64), "SD1.5 768": (SD15, 96), "SDXL 1024": (SDXL, 128)}


def square(side: int, share: float) -> np.ndarray:
    """A square hole in the middle that covers `share` of `side` x `side`."""
    mask = np.zeros((side, side), bool)
    edge = round(side * share**0.5)
    start = (side - edge) // 2
    mask[start : start + edge, start : start + edge] = True
    return mask


def denoiser_flops(pipe: Any, rows: int, latent: int, *plugins: Any) -> int:
    """FLOPs (two for each multiply-add) of one denoiser call with `rows` rows under these plugins."""
    pipe.scheduler.set_timesteps(10)
    inputs = meta_inputs(pipe.unet, rows, (latent, latent)) | {"timestep": pipe.scheduler.timesteps[0]}
    with graft(pipe, *plugins), torch.no_grad(), FlopCounterMode(display=False) as counter:
        pipe.unet(**inputs)
    return counter.get_total_flops()


class Recorder(TorchDispatchMode):
    """Notes what operations allocate: bytes in all, and the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in known:
                self.bytes += t.numel() * t.element_size()
                self.largest = max(self.largest, t.numel())
        return out


def joint_flops(shape: Shape, share: float) -> dict[str, float]:
    """FLOPs of a step under a hole of this share, over the plain one's: at scale 1, where one row is all, and with a
    branch in every layer, both while masked queries are suppressed.
    """
    pipe, mask = shape.make(), square(1024, share)
    (plain, *_) = count(shape, pipe)
    ours = {name: count(shape, pipe, SelfAttentionRedirection(mask, scale=scale))[0] for name, scale in ROWS.items()}
    return {"plain": plain} | {name: found / plain for name, found in ours.items()}


def candidate_flops(shape: Shape, share: float, candidates: int = 4) -> float:
    """FLOPs of a step of candidates that share what is outside of a hole of this share, over those of one."""
    pipe, plugin = shape.make(), SelfAttentionRedirection(square(1024, share), scale=1.0)
    (one, *_) = count(shape, pipe, plugin)
    with mock.patch.object(fold, "_alike", return_value=True):  # tensors without storage cannot be compared
        (several, *_) = count(shape, pipe, plugin, rows=candidates)
    return several / one


ROWS = {"one row": 1.0, "branch": 9.0}


def joint_layer_memory(heads: int, side: int, text: int, width: int, share: float, dtype: torch.dtype) -> Recorder:
    """Allocations of one redirected layer of a transformer at a suppressed step: one row, text before the image."""
    layer = AttentionLayer("transformer_blocks.0.attn", None, "joint", "block", 0)
    step = Step(0, 50, size=(side, side), rows={"cond": slice(0, 1)})
    q, k, v = (torch.randn(1, heads, text + side * side, width).to(dtype) for _ in "qkv")
    plugin = SelfAttentionRedirection(square(side * 16, share), scale=1)
    call = AttentionCall(layer, q, k, v, None, width**-0.5, 0, step, slice(0, text))
    return _recorded(call, plugin)


def layer_memory(heads: int, side: int, width: int, share: float, dtype: torch.dtype) -> Recorder:
    """Allocations of one redirected layer at a suppressed step: a plain row and a redirected one, real tensors."""
    layer = AttentionLayer("up_blocks.1.attentions.0.attn1", None, "self", "up", 0)
    rows = {"cond": slice(0, 1), "redirected": slice(1, 2)}
    step = Step(0, 50, size=(side, side), rows=rows, likes={"redirected": "cond"})
    q, k, v = (torch.randn(2, heads, side * side, width).to(dtype) for _ in "qkv")
    call = AttentionCall(layer, q, k, v, None, width**-0.5, 0, step)
    return _recorded(call, SelfAttentionRedirection(square(side * 8, share)))


def _recorded(call: AttentionCall, plugin: SelfAttentionRedirection) -> Recorder:
    edits = [edit for edit in plugin.edits() if edit.active(call.layer, call.step)]
    with torch.no_grad():
        attend(call, edits)  # the tokens of each level are found once a run
        with Recorder() as recorder:
            attend(call, edits)
    return recorder


def run(full: bool) -> None:
    """Print all tables."""
    write = sys.stdout.write
    write("| model | hole | plain row | two rows | with redirection | ratio |\n|---|---|---|---|---|---|\n")
    for name, (config, latent) in MODELS.items():
        pipe = meta_pipe(config)
        plain = denoiser_flops(pipe, 1, latent)
        for share in (0.1, 0.3, 0.5) if full else (0.1,):
            ours = denoiser_flops(pipe, 1, latent, SelfAttentionRedirection(square(latent * 8, share)))
            costs = " | ".join(f"{flops / 1e9:.0f} G" for flops in (plain, 2 * plain, ours))
            write(f"| {name} | {share:.0%} | {costs} | {ours / (2 * plain):.3f} |\n")
    write(
        "\n| redirected layer, 10% hole, bfloat16 | allocated | largest tensor | heads x N x N |\n|---|---|---|---|\n"
    )
    for name, heads, side, width in (("SDXL 1024, 64x64", 10, 64, 64), ("SD1.5 768, 96x96", 8, 96, 40)):
        seen = layer_memory(heads, side, width, 0.1, torch.bfloat16)
        write(f"| {name} | {seen.bytes / 2**20:.0f} MiB | {seen.largest:,} | {heads * side**4:,} |\n")
    seen = joint_layer_memory(24, 64, 512, 128, 0.1, torch.bfloat16)
    write(f"| FLUX.1 1024, 512 + 64x64 | {seen.bytes / 2**20:.0f} MiB | {seen.largest:,} | {24 * 4608**2:,} |\n")
    write("\n| transformer, 10% hole | plain row | one row (`scale=1`) | with a branch | 4 candidates |\n")
    write("|---|---|---|---|---|\n")
    for shape in (one for one in SHAPES if one.name.startswith(("FLUX", "SD3"))):  # lists of rows have no meta form
        found = joint_flops(shape, 0.1)
        ratios = " | ".join(f"{found[name]:.3f}" for name in ROWS)
        several = f"{candidate_flops(shape, 0.1):.3f}" if shape.name.startswith("FLUX") else ""
        write(f"| {shape.name} | {found['plain'] / 1e12:.2f} T | {ratios} | {several} |\n")

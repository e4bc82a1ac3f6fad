"""What a search for a startpoint costs: peak bytes and FLOPs of an update on published shapes, and passes as counted.

No weights are needed for the first two; the third runs the embedded student.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F  # noqa: N812
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ... import colour_loss, picturebook
from ...pipelines.tasks.optimise import initial_noise
from ...pipelines.tasks.search import Objective, OnMaps, OnPictures, Surrogate, prepared
from .configs import SD15, SDXL, meta_inputs, meta_pipe

SHAPES = {"SD1.5 512": (SD15, 64), "SDXL 1024": (SDXL, 128)}
FULL = 25
"""Steps of the sampler that a surrogate spares, with guidance."""
ASKED, WORDS = "a red ball and a blue star , sky", ["ball", "star"]


@dataclass
class Peak(TorchDispatchMode):
    """Bytes of the tensors that were made inside and are alive at once, at most; weights are not made inside."""

    peak: int = 0
    alive: dict[int, tuple[StorageWeakRef, int]] = field(default_factory=dict[int, Any])
    bound: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        reference, size = StorageWeakRef(storage), storage.nbytes()
        known = self.alive.get(reference.cdata)
        if known is not None and not known[0].expired():
            return
        self.alive[reference.cdata] = reference, size
        self.bound += size
        if self.bound > self.peak:  # the bound counts what is gone too
            self.alive = {key: pair for key, pair in self.alive.items() if not pair[0].expired()}
            self.bound = sum(size for _, size in self.alive.values())
            self.peak = max(self.peak, self.bound)


class Calls:
    """Runs of a denoiser's forward, those for the gradient included."""

    def __init__(self, denoiser: Any) -> None:
        self.count, self._first = 0, next(denoiser.children())
        self._hook = self._first.register_forward_pre_hook(self)

    def __call__(self, module: Any, args: Any) -> None:
        self.count += 1

    def close(self) -> None:
        self._hook.remove()


def flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
    """Attention that keeps no probabilities; put in by name, as a mode is off while a backward pass runs forwards."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=more.get("scale"))[0]


def update(pipe: Any, latent: int, steps: int, rows: int, checkpointed: bool) -> None:
    """The gradient of a number with respect to the noise, through `steps` calls of a meta denoiser."""
    inputs = meta_inputs(pipe.unet, rows, (latent, latent))
    noise = torch.zeros(1, 4, latent, latent, device="meta", dtype=pipe.unet.dtype, requires_grad=True)
    given = {name: value.to(pipe.unet.dtype) if torch.is_tensor(value) else value for name, value in inputs.items()}
    at = Surrogate(pipe, [""], steps, None, checkpointed=checkpointed)
    with prepared(at), mock.patch.object(F, "scaled_dot_product_attention", flash), torch.enable_grad():
        z = noise
        for _ in range(steps):
            found = pipe.unet(**given | {"sample": z.expand(rows, -1, -1, -1)}, return_dict=False)[0]
            z = z - 0.1 * found.mean(0, keepdim=True)
        torch.autograd.grad(z.square().sum(), noise)


def memory(pipe: Any, latent: int, steps: int, checkpointed: bool) -> int:
    """Peak bytes of one update."""
    with Peak() as counted:
        update(pipe, latent, steps, 1, checkpointed)
    return counted.peak


def flops(pipe: Any, latent: int, steps: int, rows: int) -> int:
    """Of one update, as the search runs it."""
    with FlopCounterMode(display=False) as counter:
        update(pipe, latent, steps, rows, True)
    return counter.get_total_flops()


def shapes() -> None:
    """Peak bytes by steps, with and without checkpointing; FLOPs on one step and through the whole sampler."""
    say("| model, float16 | steps of the surrogate | peak, everything kept | run again (default) |\n|---|---|---|---|")
    pipes = {name: meta_pipe(config) for name, (config, _) in SHAPES.items()}
    for name, pipe in pipes.items():
        pipe.unet.half()
        for steps in (1, 4):
            kept, again = (memory(pipe, SHAPES[name][1], steps, on) / 2**20 for on in (False, True))
            say(f"| {name} | {steps} | {kept:.0f} MiB | {again:.0f} MiB |")
    say(f"\n| model | TFLOP an update, one step | through {FULL} guided steps | times as much |\n|---|---|---|---|")
    for name, pipe in pipes.items():
        one, guided = (flops(pipe, SHAPES[name][1], 1, rows) / 1e12 for rows in (1, 2))
        say(f"| {name} | {one:.1f} | {FULL * guided:.0f} | {FULL * guided / one:.0f} |")


def counted(objective: Objective, noise: torch.Tensor, denoiser: Any) -> tuple[int, int]:
    """(runs of the denoiser's forward, FLOPs) of one measurement with its gradient."""
    calls = Calls(denoiser)
    try:
        with FlopCounterMode(display=False) as counter:
            objective(noise)
    finally:
        calls.close()
    return calls.count, counter.get_total_flops()


def passes() -> None:
    """What one update of one picture runs, on the embedded student."""
    student: Any = picturebook(one_step=True)
    student.set_progress_bar_config(disable=True)
    noise, denoiser = initial_noise(student, [0], None, None), student.unet
    text = student.encode_prompt(ASKED, "cpu", 1, False)[0]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        denoiser(noise, 999, text)
    one = counter.get_total_flops()
    say("\n| an update of one picture, student | forwards begun | FLOPs, in forwards of the denoiser |\n|---|---|---|")
    for again in (True, False):
        for steps in (1, 4):
            at = Surrogate(student, [ASKED], steps, 0.0, checkpointed=again)
            rows = {"maps": OnMaps(at, WORDS, "a-star")} if steps == 1 else {}
            for name, objective in (rows | {"picture": OnPictures(at, colour_loss((0, 0, 1)))}).items():
                runs, cost = counted(objective, noise, denoiser)
                how = "run again" if again else "kept"
                say(f"| loss of the {name}, steps: {steps}, {how} | {runs} | {cost / one:.1f} |")


def say(line: str) -> None:
    """Print a line now."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def run(full: bool) -> None:
    """Print the tables; quick and full are the same."""
    shapes()
    passes()

"""What a graft costs, as the ratio of its process time to the plain pipeline's, side by side in one run."""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from ... import Edit, NegativeAway, Plugin, SelfAttentionRedirection, StyleInjection, graft, picturebook
from ...attention.layer import AttentionLayer, find_layers

Way = tuple[str, Callable[[], AbstractContextManager[Any]], float]
"""Name, what is entered, and the guidance scale."""
STEPS = 12


class _Everywhere(Edit):
    def selects(self, layer: AttentionLayer) -> bool:
        return True


class _Waiting(Plugin):
    """On every layer, but never within its window."""

    def edits(self) -> list[Edit]:
        return [_Everywhere()]


class _ByHand:
    """A layer's processor that does what NASA needs and nothing else: the floor of what a graft may cost."""

    def __init__(self, layer: Any, negative: torch.Tensor, scale: float) -> None:
        self.scale = scale
        with torch.no_grad():
            self.kept = [_heads(part(negative), layer.heads) for part in (layer.to_k, layer.to_v)]

    def __call__(
        self, layer: Any, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **rest: Any
    ) -> torch.Tensor:
        parts = ((layer.to_q, hidden_states), (layer.to_k, encoder_hidden_states), (layer.to_v, encoder_hidden_states))
        q, k, v = (_heads(part(given), layer.heads) for part, given in parts)
        out = F.scaled_dot_product_attention(q, k, v)
        out = torch.sub(out, F.scaled_dot_product_attention(q, *self.kept), alpha=self.scale)
        return layer.to_out[0](out.transpose(1, 2).flatten(2))


def _heads(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)


@contextmanager
def _by_hand(pipe: Any) -> Generator[None]:
    before = pipe.unet.attn_processors
    negative = pipe.encode_prompt("red", "cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]
    cross = {f"{layer.name}.processor": layer.module for layer in find_layers(pipe.unet) if layer.kind == "cross"}
    ours = {name: _ByHand(module, negative.detach(), 0.2) for name, module in cross.items()}
    pipe.unet.set_attn_processor(before | ours)
    try:
        yield
    finally:
        pipe.unet.set_attn_processor(before)


def tiny() -> Any:
    """The small models of random weights that the tests use; they are in a checkout, not in a wheel."""
    path = Path(__file__).parents[2] / "tests" / "tiny.py"
    spec = importlib.util.spec_from_file_location("diffgraft_tiny", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(full: bool) -> None:
    """Print the ratios of sampling runs of 12 steps, nothing decoded, on two models; guidance is there to compare."""
    rounds = 60 if full else 15
    sys.stdout.write(f"| {STEPS} steps, one thread, process time | plain, ms a step | ratio to plain, quartiles |\n")
    sys.stdout.write("|---|---|---|\n")
    for name, pipe, prompt in models():
        _table(name, pipe, prompt, rounds)


def models() -> Iterator[tuple[str, Any, str]]:
    """What is measured: a name, the pipeline, and a prompt that it knows."""
    for name, make, prompt in (
        ("SDXL of random weights", tiny().sdxl, "a red ball"),
        ("picture book", picturebook, "a red ball , sky"),
    ):
        pipe = make()
        pipe.set_progress_bar_config(disable=True)
        yield name, pipe, prompt


def _table(model: str, pipe: Any, prompt: str, rounds: int) -> None:
    every = ways(pipe)
    times: list[list[float]] = []
    for turn in range(rounds + 1):
        found = [seconds(pipe, prompt, way) for way in every]
        if turn:
            times.append(found)
    plain = statistics.median(row[0] for row in times) / STEPS * 1000
    for i, (name, _, _) in enumerate(every[1:], 1):
        low, middle, high = statistics.quantiles([row[i] / row[0] for row in times], n=4)
        sys.stdout.write(f"| {model}, {name} | {plain:.2f} | {low:.3f} {middle:.3f} {high:.3f} |\n")


def ways(pipe: Any) -> Sequence[Way]:
    """Everything that is measured on a pipeline, the plain one first."""
    picture = Image.new("RGB", (64, 64), "teal")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 30, 30))

    def on(plugin: Plugin) -> Callable[[], AbstractContextManager[Any]]:
        one = graft(pipe, plugin)  # entered for each run, as on a server: it encodes its text in the first, untimed
        return lambda: one

    return [
        ("plain", nullcontext, 0.0),
        ("with guidance", nullcontext, 3.0),
        ("nothing active yet, on every layer", on(_Waiting(start=1.0)), 0.0),
        ("neutral settings", on(NegativeAway("red", scale=0)), 0.0),
        ("NASA by hand, the floor", lambda: _by_hand(pipe), 0.0),
        *((f"NegativeAway {rule}", on(NegativeAway("red", rule=rule)), 0.0) for rule in ("nasa", "nag", "vsf")),
        ("SelfAttentionRedirection", on(SelfAttentionRedirection(mask)), 0.0),
        ("StyleInjection", on(StyleInjection(picture)), 0.0),
    ]


def seconds(pipe: Any, prompt: str, way: Way) -> float:
    """Process time of one sampling run."""
    _, enter, guidance = way
    side = 16 * pipe.vae_scale_factor  # cells of the latent
    with enter():
        start = time.process_time()
        pipe(
            prompt, num_inference_steps=STEPS, guidance_scale=guidance, output_type="latent", height=side, width=side,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        return time.process_time() - start

"""What a graft costs, as the ratio of its process time to the plain pipeline's, side by side in one run."""

from __future__ import annotations

import gc
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
from torch.utils._pytree import tree_map

from ... import Edit, NegativeAway, Plugin, SelfAttentionRedirection, StyleInjection, graft, picturebook
from ...attention.layer import AttentionLayer, find_layers

Way = tuple[str, Callable[[], AbstractContextManager[Any]], float]
"""Name, what is entered, and the guidance scale."""
STEPS = 12
TWO = "two pictures, plain"


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


def _by_hand(pipe: Any) -> Callable[[], AbstractContextManager[None]]:
    """Makes what sets those processors for a while."""
    before = pipe.unet.attn_processors
    negative = pipe.encode_prompt("red", "cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]
    cross = {f"{layer.name}.processor": layer.module for layer in find_layers(pipe.unet) if layer.kind == "cross"}
    ours = {name: _ByHand(module, negative.detach(), 0.2) for name, module in cross.items()}

    @contextmanager
    def on() -> Generator[None]:
        pipe.unet.set_attn_processor(before | ours)
        try:
            yield
        finally:
            pipe.unet.set_attn_processor({**before})  # which empties what it is given

    return on


@contextmanager
def _rows(pipe: Any) -> Generator[None]:
    """The decoder computes two rows instead of one, and nothing else: what a redirection's rows cost by themselves."""

    def two(value: Any) -> Any:
        single = isinstance(value, torch.Tensor) and value.ndim and len(value) == 1
        return value.repeat(2, *[1] * (value.ndim - 1)) if single else value

    def widen(block: Any, args: Any, kwargs: Any) -> Any:
        return tree_map(two, args), tree_map(two, kwargs)

    first = next(layer for layer in find_layers(pipe.unet) if layer.kind == "self" and layer.place == "up")
    joined = pipe.unet.up_blocks[int(first.name.split(".")[1]) :]
    handles = [block.register_forward_pre_hook(widen, with_kwargs=True) for block in joined]
    handles.append(pipe.unet.register_forward_hook(lambda unet, args, output: (output[0][:1],)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
    rounds = 30 if full else 8
    sys.stdout.write(f"| {STEPS} steps, one thread, process time | plain, ms a step | ratio to plain, quartiles |\n")
    sys.stdout.write("|---|---|---|\n")
    for name, pipe, prompt in models():
        _table(name, pipe, prompt, rounds)
        once = entering(pipe, rounds)
        sys.stdout.write(f"| {name}, making a graft, putting it on and off | {once:.2f} ms once | |\n")


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
    plain, *others = ways(pipe)
    for way in (plain, *others):
        seconds(pipe, prompt, way)
    gc.collect()
    gc.freeze()  # or the collector walks through all of torch in the middle of somebody's run
    found: dict[str, list[float]] = {way[0]: [] for way in others}
    before = [seconds(pipe, prompt, plain)]
    for _ in range(rounds):
        for way in others:  # each between two plain runs: a neighbour on the machine slows all three
            own = seconds(pipe, prompt, way)
            before.append(seconds(pipe, prompt, plain))
            found[way[0]].append(2 * own / (before[-2] + before[-1]))
    gc.unfreeze()
    step = statistics.median(before) / STEPS * 1000
    for name, ratios in found.items():
        low, middle, high = statistics.quantiles(ratios, n=4)
        sys.stdout.write(f"| {model}, {name} | {step:.2f} | {low:.3f} {middle:.3f} {high:.3f} |\n")
    sys.stdout.flush()


def ways(pipe: Any) -> Sequence[Way]:
    """Everything that is measured on a pipeline, the plain one first."""
    picture = Image.new("RGB", (64, 64), "teal")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 30, 30))
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))

    def on(plugin: Plugin) -> Callable[[], AbstractContextManager[Any]]:
        one = graft(pipe, plugin)  # entered for each run, as on a server: it encodes its text in the first, untimed
        return lambda: one

    return [
        ("plain", nullcontext, 0.0),
        ("with guidance", nullcontext, 3.0),
        ("nothing active yet, on every layer", on(_Waiting(start=1.0)), 0.0),
        ("neutral settings", on(NegativeAway("red", scale=0)), 0.0),
        ("NASA by hand, the floor", _by_hand(pipe), 0.0),
        *((f"NegativeAway {rule}", on(NegativeAway("red", rule=rule)), 0.0) for rule in ("nasa", "nag", "vsf")),
        ("a decoder of two rows by hand", lambda: _rows(pipe), 0.0),
        ("SelfAttentionRedirection", on(SelfAttentionRedirection(mask)), 0.0),
        (TWO, nullcontext, 0.0),
        ("StyleInjection of latents", on(StyleInjection(latents)), 0.0),
        ("StyleInjection", on(StyleInjection(picture)), 0.0),
    ]


def seconds(pipe: Any, prompt: str, way: Way) -> float:
    """Process time of one sampling run under what is entered before."""
    name, enter, guidance = way
    side = 16 * pipe.vae_scale_factor  # cells of the latent
    with enter():
        start = time.process_time()
        pipe(
            prompt, num_inference_steps=STEPS, guidance_scale=guidance, output_type="latent", height=side, width=side,
            generator=torch.Generator().manual_seed(0), num_images_per_prompt=1 + (name == TWO),
        )  # fmt: skip
        return time.process_time() - start


def entering(pipe: Any, rounds: int) -> float:
    """Process time in ms of making a graft, putting it on and taking it off, which a request of its own pays once."""
    negative, found = NegativeAway("red"), list[float]()
    for _ in range(rounds):
        start = time.process_time()
        with graft(pipe, negative):
            pass
        found.append(1000 * (time.process_time() - start))
    return statistics.median(found)

"""Eight threads, mixed plugins, one shared UNet: every byte as if the requests were made one after the other."""

from __future__ import annotations

import random
import sys
from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import tiny
import torch
from plugins_for_tests import Guide, Scaled, fingerprint

import diffgraft as dg

THREADS, REQUESTS = 8, 64


class Boom(Exception):
    pass


def kinds():
    """What a request puts on; made anew for each, but for the ones that all share."""
    style = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(8))
    mask = torch.zeros(8, 8)
    mask[2:5, 2:5] = 1
    return [
        lambda: [],
        lambda: [dg.NegativeAway("red", scale=0.5)],
        lambda: [dg.NegativeAway({"red": 1.0, "cat": 0.5}, rule="nag"), Scaled(0.7, start=0.5)],
        lambda: [dg.AttentionSegregation(["ball", "star"], end=1.0)],
        lambda: [dg.SelfAttentionRedirection(mask, scale=2.0), dg.StartpointFilter(0.8)],
        lambda: [dg.StyleInjection(style), dg.StartpointFilter(0.5)],
        lambda: [dg.AttentionDistillation(style)],
        lambda: [Guide(), Scaled(0.5)],
    ]


@pytest.fixture
def impatient():
    """Threads take turns a hundred times as often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 100)
    yield
    sys.setswitchinterval(before)


def test_eight_threads_of_mixed_requests(impatient):
    base, plugins = tiny.sd15(), kinds()
    parts, before = base.components, fingerprint(base)
    shared = [make() for make in plugins]  # one plugin object in many grafts at once
    numbers = list(range(REQUESTS))
    random.Random(7).shuffle(numbers)

    def stop(pipe, i, t, tensors):
        raise Boom

    def request(number):
        own = {"scheduler": tiny.ddim(), "tokenizer": tiny.tokenizer()}
        pipe = tiny.quiet(diffusers.StableDiffusionPipeline(**(parts | own), requires_safety_checker=False))
        kind, seed = number % len(plugins), number // len(plugins) % 2
        used = shared[kind] if number % 3 else plugins[kind]()
        call = {"callback_on_step_end": stop} if number % 11 == 10 else {}
        call |= {"generator": torch.Generator().manual_seed(seed), "height": 16, "width": 16}
        try:
            if not used:
                return tiny.sample(pipe, num_inference_steps=2, **call)
            with dg.graft(pipe, *used):
                return tiny.sample(pipe, num_inference_steps=2, **call)
        except Boom:
            return None

    alone = [request(number) for number in numbers]
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(request, numbers))
    wrong = [n for n, one, other in zip(numbers, alone, found, strict=True) if (one is None) is not (other is None)]
    wrong += [
        n for n, one, other in zip(numbers, alone, found, strict=True)
        if one is not None and other is not None and not torch.equal(one, other)
    ]  # fmt: skip
    assert not wrong and fingerprint(base) == before

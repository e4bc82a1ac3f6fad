"""Grafts among threads that share a model: every picture is the one made alone, and nobody is harmed or kept."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import pickle
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from plugins_for_tests import Guide, Scaled, fingerprint

import diffgraft as dg
from diffgraft.attention.hook import frames_of_threads, in_use
from diffgraft.attention.seam import seam_on

SIZE = {"height": 16, "width": 16}


@pytest.fixture(scope="module")
def base():
    """The shared parts; every request makes its own pipeline and scheduler of them."""
    return tiny.sd15(unet=tiny.unet(layers_per_block=1))


@pytest.fixture(autouse=True)
def _nothing_is_left(base):
    before = fingerprint(base)
    yield
    assert fingerprint(base) == before and "_encode_plus" not in base.tokenizer.__dict__


def of(base, words=False):
    """A request's own pipeline and scheduler; its words go through the shared tokenizer unless nobody guards that."""
    own = {"scheduler": tiny.ddim()} | ({"tokenizer": tiny.tokenizer()} if words else {})
    return tiny.quiet(diffusers.StableDiffusionPipeline(**(base.components | own), requires_safety_checker=False))


def draw(pipe, seed=0, **call):
    generator = torch.Generator().manual_seed(seed)
    call = {"num_inference_steps": 2, "guidance_scale": 1.0, "generator": generator} | SIZE | call
    if "prompt_embeds" in call:
        call["prompt"] = None
    return tiny.sample(pipe, **call)


def at_once(*works):
    """Their results; all begin together."""
    gate = threading.Barrier(len(works), timeout=60)

    def begin(work):
        gate.wait()
        return work()

    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(begin, work) for work in works]]


# -- one graft, many threads ---------------------------------------------------------------------------------------


def test_two_threads_use_one_graft(base):
    """As a server's that holds one at its top; a call's windows are its own, though the scheduler is shared."""
    plain = [draw(base, seed) for seed in (1, 2)]
    g = dg.graft(base, Scaled(0.5, start=0.5), dg.NegativeAway("red", scale=0.5))
    with g:
        alone = [draw(base, seed) for seed in (1, 2)]
    turns = threading.Barrier(2, timeout=60)

    def work(seed):
        def taking_turns(pipe, i, t, tensors):
            turns.wait()
            return tensors

        with g:
            return draw(base, seed, callback_on_step_end=taking_turns)

    for _ in range(3):
        both = at_once(lambda: work(1), lambda: work(2))
        assert all(map(torch.equal, both, alone)) and not any(map(torch.equal, both, plain))
    assert not g.attached
    with g:  # also where one is done before the other
        assert torch.equal(at_once(lambda: draw(base, 1))[0], plain[0])
        assert torch.equal(draw(base, 2), alone[1])


@pytest.mark.parametrize("words", [False, True], ids=["embeddings", "words"])
def test_eighty_requests_on_four_threads(base, words):
    """Two of three with a graft of their own; their words go through the shared tokenizer."""
    given = {} if words else {"prompt_embeds": base.encode_prompt("a red ball and a blue star", "cpu", 1, False)[0]}

    def request(number):
        pipe, plugins = (
            of(base, words and number % 3 == 2),
            [Scaled(0.5), dg.NegativeAway(["red", "blue cat", "a"][number % 3], scale=0.5)],
        )
        if number % 3 == 2:
            return draw(pipe, number % 10, **given)
        with dg.graft(pipe, plugins[number % 3]):
            return draw(pipe, number % 10, **given)

    alone = [request(number) for number in range(30)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(request, range(80)))
    assert all(torch.equal(one, alone[number % 30]) for number, one in enumerate(found))


def test_words_of_a_graft_leave_the_shared_tokenizer_as_it_is(base):
    words = base.tokenizer
    words("a cat", padding="max_length", max_length=20, truncation=True)
    before = words.backend_tokenizer.truncation, words.backend_tokenizer.padding
    embeds = torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(1))
    away, concepts = dg.NegativeAway("a blue cat"), dg.AttentionSegregation([1, 2], end=1.0)
    with dg.graft(of(base), away, concepts) as g:
        draw(g.pipe, prompt_embeds=embeds)
        assert g.texts.spans("a red ball", "red") == [[2]]
        for twin in (copy.deepcopy(words), pickle.loads(pickle.dumps(words))):
            assert twin._encode_plus.__self__ is twin
            assert twin("a cat").input_ids == tiny.tokenizer()("a cat").input_ids
    assert (words.backend_tokenizer.truncation, words.backend_tokenizer.padding) == before


def tasks(base):
    """(name, function of a number) -> array."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    style = Image.fromarray(np.random.default_rng(1).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    mask = np.zeros((32, 32), bool)
    mask[10:20, 8:18] = True

    def pipe():
        return of(base)

    return {
        "generate": lambda seed: dg.generate(
            pipe(), "a red ball", plugins=[dg.NegativeAway("red", scale=0.5)], seed=seed, steps=2, **SIZE
        )[0],
        "erase": lambda seed: dg.erase(pipe(), picture, mask, seed=seed, steps=3),
        "stylize": lambda seed: dg.stylize(pipe(), picture, style, seed=seed, steps=2, iterations=1),
        "maps": lambda seed: dg.attention_maps(pipe(), "a red ball", ["ball"], seed=seed, steps=2, **SIZE)["ball"],
    }


def test_tasks_on_four_threads(base):
    works = tasks(base)
    alone = {name: np.asarray(work(1)) for name, work in works.items()}
    jobs = [*works] * 2
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda name: np.asarray(works[name](1)), jobs))
    for name, one in zip(jobs, found, strict=True):
        assert np.array_equal(one, alone[name]), name


# -- gradients -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["kept", "checkpointed"])
def remembering(base, request):
    """Gradient checkpointing off and on; on a GPU it runs layers again on autograd's threads."""
    if request.param:
        base.unet.enable_gradient_checkpointing()
        base.unet.train()
    yield
    base.unet.disable_gradient_checkpointing()
    base.unet.eval()


def segregated(base, words, seed, **call):
    with dg.graft(of(base, words=True), dg.AttentionSegregation(words, end=1.0)) as g:
        return draw(g.pipe, seed, **call)


def test_two_segregations_at_once(base, remembering):
    wanted = [(["ball", "star"], 1), (["red", "blue"], 2)]
    alone = [segregated(base, *of_one) for of_one in wanted]
    x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor(5)
    words = torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(2))

    def neighbour():
        """Somebody else's gradients, with no graft."""
        z = x.clone().requires_grad_()
        return torch.autograd.grad(base.unet(z, t, encoder_hidden_states=words).sample.square().sum(), z)[0]

    expected = neighbour()
    for _ in range(2):
        *both, gradient = at_once(*(lambda one=one: segregated(base, *one) for one in wanted), neighbour)
        assert all(map(torch.equal, both, alone)) and torch.equal(gradient, expected)
    assert all(parameter.requires_grad for parameter in base.unet.parameters())


def test_layers_run_again_on_autograds_own_threads(base, remembering, monkeypatch):
    """What a GPU does: the backward pass belongs to a thread that has no context of ours."""
    wanted = [(["ball", "star"], 1), (["red", "blue"], 2)]
    alone = [segregated(base, *of_one) for of_one in wanted]
    engine, pool = torch.autograd._engine_run_backward, ThreadPoolExecutor(2)
    monkeypatch.setattr(torch.autograd, "_engine_run_backward", lambda *a, **k: pool.submit(engine, *a, **k).result())
    both = at_once(*(lambda one=one: segregated(base, *one) for one in wanted))
    pool.shutdown()
    assert all(map(torch.equal, both, alone))


# -- nothing is kept -----------------------------------------------------------------------------------------------


class Keeper(Scaled):
    """Keeps something large for its call."""

    kept: list[weakref.ref[torch.Tensor]] = []

    def begin(self, session, step):
        large = torch.zeros(1000)
        step.notes[self] = large
        self.kept.append(weakref.ref(large))


class Boom(Exception):
    pass


def explode(*args):
    raise Boom


def test_memory_is_flat_over_two_hundred_requests_with_a_thread_each(base):
    """Half of them end by an exception in a callback; every one has a pipeline and a scheduler of its own."""
    g = dg.graft(base, Keeper(0.5), dg.NegativeAway("red", scale=0.5)).attach()
    embeds = torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(1))
    counts = []

    def request(number):
        call = {"callback_on_step_end": explode} if number % 2 else {}
        with contextlib.suppress(Boom):
            draw(of(base), prompt_embeds=embeds, num_inference_steps=1 + number % 2, **call)

    for number in range(200):
        thread = threading.Thread(target=request, args=(number,))
        thread.start()
        thread.join()
        assert len(g.runs) <= 2
        if number in (40, 199):
            gc.collect()
            counts.append(sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()))
            assert not any(ref() is not None for ref in Keeper.kept)
    assert abs(counts[1] - counts[0]) < 20
    assert g.report().calls == 200  # those that ended are counted
    g.detach()


def test_an_aborted_call_is_forgotten_at_once(base):
    """In a thread that lives on, without waiting for the next call or for the garbage collector."""
    plugin = Keeper(0.5)
    g = dg.graft(base, plugin, dg.NegativeAway("red", scale=0.5)).attach()
    gc.disable()
    try:
        with pytest.raises(Boom) as caught:
            draw(base, callback_on_step_end=explode)
        assert g.run.notes
        del caught
        gc.collect(0)  # pytest's own
        assert not g.run.notes and Keeper.kept[-1]() is None
    finally:
        gc.enable()
        g.detach()


# -- hooks that come and go ----------------------------------------------------------------------------------------


def test_grafts_come_and_go_while_a_neighbour_runs(base):
    """Late joins hook blocks too; and the neighbour's errors stay its own."""
    embeds = torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(1))
    x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor(5)
    done, results, errors = threading.Event(), [], []

    def neighbour():
        with torch.no_grad():
            while not done.is_set():
                results.append(base.unet(x, t, encoder_hidden_states=embeds).sample)
                try:
                    base.unet(x, t, encoder_hidden_states=embeds[..., :5])
                except RuntimeError as error:
                    errors.append(str(error))

    with torch.no_grad():
        expected = base.unet(x, t, encoder_hidden_states=embeds).sample
    threads = [threading.Thread(target=neighbour) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(60):
        with dg.graft(of(base), Guide(), Scaled(0.5)) as g:
            if i % 20 == 0:
                draw(g.pipe, prompt_embeds=embeds, num_inference_steps=1)
    done.set()
    for thread in threads:
        thread.join()
    assert results and all(torch.equal(one, expected) for one in results)
    assert errors and all("shapes cannot be multiplied" in error for error in errors)
    with torch.no_grad():  # a hook that somebody was inside of goes with the next call
        base.unet(x, t, encoder_hidden_states=embeds)


def test_nothing_is_collected_while_the_threads_are_listed():
    """Python 3.11.7 stands still for ever if a collection lets a thread start meanwhile: seen once in 64 requests."""
    collects, here = [], threading.get_ident()

    def heard(event, args):
        if event == "sys._current_frames" and threading.get_ident() == here:
            collects.append(gc.isenabled())

    sys.addaudithook(heard)
    assert here in frames_of_threads() and collects == [False] and gc.isenabled()
    gc.disable()
    try:
        assert frames_of_threads() and not gc.isenabled()  # it was off, and stays so
    finally:
        gc.enable()


def test_a_neighbour_with_gradients_comes_by_while_a_graft_goes_on(base):
    """A seam is on a moment before its graft has noted it: seen as a KeyError in another thread's probe."""
    g = dg.graft(base, Scaled(0.5))
    layer, embeds = g.layers[0], torch.zeros(1, 77, base.unet.config.cross_attention_dim)
    x = torch.ones(1, 4, 8, 8, requires_grad=True)
    plain = base.unet(x, 1, encoder_hidden_states=embeds).sample
    with seam_on(layer.module, functools.partial(g._again, layer.name)):
        assert torch.equal(base.unet(x, 1, encoder_hidden_states=embeds).sample, plain)


class Wait(Scaled):
    """Stops in the middle of a call until it is told to go on."""

    def __init__(self, factor):
        super().__init__(factor)
        self.inside, self.on = threading.Event(), threading.Event()

    def branches(self, step):
        self.inside.set()
        assert self.on.wait(60)
        return ()


def test_detach_lets_a_running_call_end(base):
    with dg.graft(base, Scaled(0.5)):
        expected = draw(base, num_inference_steps=1)
    plugin = Wait(0.5)
    g = dg.graft(base, plugin).attach()
    with ThreadPoolExecutor(2) as pool:
        call = pool.submit(draw, base, num_inference_steps=1)
        assert plugin.inside.wait(60) and in_use(base.unet)
        off = pool.submit(g.detach)
        assert not off.done()
        plugin.on.set()
        off.result()
        assert torch.equal(call.result(), expected)
    assert not g.attached


def test_a_neighbours_call_that_outlives_the_last_graft_takes_the_hook_off(base):
    """And plain it is."""
    plain, before = draw(base, num_inference_steps=1), fingerprint(base)
    inside, on = threading.Event(), threading.Event()

    def stop(module, args):
        inside.set()
        assert on.wait(60)

    with ThreadPoolExecutor(1) as pool:
        g = dg.graft(of(base), Scaled(0.5))
        g.__enter__()
        handle = base.unet.conv_in.register_forward_pre_hook(stop)
        call = pool.submit(draw, base, num_inference_steps=1)
        assert inside.wait(60)
        g.__exit__(None, None, None)
        handle.remove()
        assert base.unet._forward_hooks  # never removed under a thread that runs
        on.set()
        assert torch.equal(call.result(), plain)
    assert fingerprint(base) == before

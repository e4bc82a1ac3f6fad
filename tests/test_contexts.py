"""A graft holds where its block is: entered again, across generators and contexts, among threads; or it says so."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from plugins_for_tests import Climb, Guide, Scaled, fingerprint

import diffgraft as dg


@pytest.fixture(scope="module")
def pipe():
    """Shared by the tests here: every one of them must leave it as it was."""
    return tiny.sd15()


@pytest.fixture(scope="module")
def pictures(pipe):
    """(plain, edited with Scaled(0.5))."""
    plain = draw(pipe)
    with dg.graft(pipe, Scaled(0.5)):
        edited = draw(pipe)
    assert not torch.equal(plain, edited)
    return plain, edited


@pytest.fixture(autouse=True)
def _nothing_is_left(pipe):
    before = fingerprint(pipe)
    yield
    assert fingerprint(pipe) == before


def draw(pipe, **call):
    return tiny.sample(pipe, num_inference_steps=2, guidance_scale=1.0, height=16, width=16, **call)


def elsewhere(function, *args):
    """In a fresh context, as a framework calls each `next()` of a generator."""
    return contextvars.Context().run(function, *args)


def in_thread(function, *args):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


# -- again, and overlapping ----------------------------------------------------------------------------------------


def test_a_function_uses_its_callers_graft(pipe, pictures):
    plain, edited = pictures
    g = dg.graft(pipe, Scaled(0.5))

    def helper():
        with g:
            return draw(pipe)

    with g as same:
        assert same is g and torch.equal(helper(), edited)
        with pytest.raises(RuntimeError, match="boom"), g:
            raise RuntimeError("boom")
        assert g.attached and torch.equal(draw(pipe), edited)
        assert g.report().calls == 4
    assert not g.attached and torch.equal(draw(pipe), plain)


def test_attached_stays_attached(pipe, pictures):
    plain, edited = pictures
    g = dg.graft(pipe, Scaled(0.5)).attach()
    with g:
        assert torch.equal(draw(pipe), edited)
    assert g.attached and torch.equal(in_thread(draw, pipe), edited)
    g.detach()
    assert not g.attached
    with g:
        g.attach()
    assert g.attached and torch.equal(draw(pipe), edited)
    with g:
        g.detach()
        assert not g.attached and torch.equal(draw(pipe), plain)


def test_a_loop_that_enters_its_callers_graft_at_every_step_is_one_run(pipe):
    """Its windows count over the whole loop."""
    plugin = Scaled(0.5, start=0.5)
    g, embeds = dg.graft(pipe, plugin), torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(3))

    def denoise(x, t):
        with g, torch.no_grad():
            return pipe.unet(pipe.scheduler.scale_model_input(x, t), t, encoder_hidden_states=embeds).sample

    with g:
        by_hand(pipe, denoise, 4)
    assert plugin.steps == ["begin", (2, 4), (3, 4)]


def by_hand(pipe, denoise, steps, stop=None):
    pipe.scheduler.set_timesteps(steps)
    return loop(pipe, denoise, stop)


def loop(pipe, denoise, stop=None):
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    for i, t in enumerate(pipe.scheduler.timesteps):
        noise = denoise(x, t)
        if stop == (i, "before the step"):
            break
        x = pipe.scheduler.step(noise, t, x).prev_sample
        if stop == (i, "behind the step"):
            break
    return x


def test_blocks_of_two_grafts_overlap_without_nesting(pipe, pictures):
    plain, edited = pictures
    other = tiny.sd15(seed=4)
    first, second = dg.graft(other, Scaled(0.2)), dg.graft(pipe, Scaled(0.5))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not first.attached and second.attached
    assert torch.equal(draw(pipe), edited)
    first.__enter__()
    second.__exit__(None, None, None)
    assert first.attached and torch.equal(draw(pipe), plain)
    changed = draw(other)
    first.__exit__(None, None, None)
    assert not torch.equal(changed, draw(other)) and not fingerprint(other)["own forwards"]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_blocks_of_one_graft_close_in_any_order(pipe, pictures, order):
    plain, edited = pictures
    g = dg.graft(pipe, Scaled(0.5))
    stacks = [contextlib.ExitStack(), contextlib.ExitStack()]
    for stack in stacks:
        stack.enter_context(g)
    stacks[order[0]].close()
    assert torch.equal(draw(pipe), edited)
    stacks[order[1]].close()
    assert torch.equal(draw(pipe), plain)


# -- generators ----------------------------------------------------------------------------------------------------


def streaming(pipe, count=3):
    with dg.graft(pipe, Scaled(0.5)):
        for _ in range(count):
            yield draw(pipe)


@contextlib.contextmanager
def steered(pipe):
    with contextlib.ExitStack() as stack:
        yield stack.enter_context(dg.graft(pipe, Scaled(0.5)))


def streaming_by_a_manager(pipe, count=3):
    with steered(pipe):
        for _ in range(count):
            yield draw(pipe)


@pytest.mark.parametrize("make", [streaming, streaming_by_a_manager])
@pytest.mark.parametrize("how", [elsewhere, in_thread])
def test_a_generator_is_steered_in_whatever_context_it_goes_on(pipe, pictures, make, how, recwarn):
    plain, edited = pictures
    stream = make(pipe)
    for _ in range(3):
        assert torch.equal(how(next, stream), edited)
        assert torch.equal(draw(pipe), plain)  # whoever reads it is not in the block
    with pytest.raises(StopIteration):
        how(next, stream)
    assert torch.equal(draw(pipe), plain)
    assert not [x for x in recwarn if issubclass(x.category, UserWarning)]


@pytest.mark.parametrize("how", ["close", "throw", "garbage"])
def test_closing_a_generator_in_another_context_never_raises(pipe, pictures, how, recwarn):
    stream = streaming(pipe)
    elsewhere(next, stream)
    if how == "close":
        elsewhere(stream.close)
    elif how == "throw":
        with pytest.raises(KeyError, match="mine"):
            elsewhere(stream.throw, KeyError("mine"))
    del stream
    assert torch.equal(draw(pipe), pictures[0])
    assert not [x for x in recwarn if issubclass(x.category, (UserWarning, pytest.PytestUnraisableExceptionWarning))]


def test_a_generator_that_is_collected_inside_of_a_call_leaves_the_call_alone(pipe, pictures):
    """As the garbage collector does it, in whatever thread and place it runs."""
    g = dg.graft(pipe, Scaled(0.5))

    def holding():
        with g:
            yield

    streams = [holding() for _ in range(2)]
    for stream in streams:
        elsewhere(next, stream)
    handle = pipe.unet.mid_block.register_forward_pre_hook(lambda *args: streams and streams.pop() and None)
    del stream
    with g:
        assert torch.equal(draw(pipe), pictures[1])
    handle.remove()
    assert not streams and not g.attached


def test_two_generators_interleave(pipe, pictures):
    other = tiny.sd15(unet=pipe.unet)
    with dg.graft(other, Scaled(0.2)):
        faint = draw(other)

    def weak():
        with dg.graft(other, Scaled(0.2)):
            for _ in range(2):
                yield draw(other)

    streams = [streaming(pipe), weak()]
    for _ in range(2):
        assert torch.equal(elsewhere(next, streams[0]), pictures[1])
        assert torch.equal(elsewhere(next, streams[1]), faint)
    for stream in streams:  # the first one first: not nested
        elsewhere(stream.close)
    assert torch.equal(draw(pipe), pictures[0])


def test_a_loop_by_hand_in_a_generator_counts_its_windows_over_all_contexts(pipe):
    plugin = Scaled(0.5, start=0.5)
    embeds = torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(3))

    def steps():
        pipe.scheduler.set_timesteps(4)
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
        with dg.graft(pipe, plugin), torch.no_grad():
            for t in pipe.scheduler.timesteps:
                x = pipe.scheduler.step(pipe.unet(x, t, encoder_hidden_states=embeds).sample, t, x).prev_sample
                yield x

    stream = steps()
    while in_thread(next, stream, None) is not None:
        pass
    assert plugin.steps == ["begin", (2, 4), (3, 4)]


async def apart(coroutine):
    """Awaited by a task of its own, in an empty context."""
    return await asyncio.get_running_loop().create_task(coroutine, context=contextvars.Context())


def test_an_async_generator_is_steered_by_whichever_task_asks(pipe, pictures, recwarn):
    async def pictures_of():
        with dg.graft(pipe, Scaled(0.5)):
            for _ in range(2):
                await asyncio.sleep(0)
                yield draw(pipe)

    async def main():
        stream = pictures_of()
        found = [await apart(anext(stream, None)) for _ in range(2)]
        plain = draw(pipe)
        await apart(stream.aclose())
        return *found, plain

    first, second, plain = asyncio.run(main())
    assert torch.equal(first, pictures[1]) and torch.equal(second, pictures[1]) and torch.equal(plain, pictures[0])
    assert not [x for x in recwarn if issubclass(x.category, UserWarning)]


def test_two_async_tasks_with_a_graft_each(pipe, pictures):
    other = tiny.sd15(unet=pipe.unet)
    with dg.graft(other, Scaled(0.2)):
        faint = draw(other)

    async def work(own, factor, waits):
        with dg.graft(own, Scaled(factor)):
            for _ in range(waits):
                await asyncio.sleep(0)
            return await asyncio.to_thread(draw, own)

    async def main():
        return await asyncio.gather(work(pipe, 0.5, 1), work(other, 0.2, 3))

    first, second = asyncio.run(main())
    assert torch.equal(first, pictures[1]) and torch.equal(second, faint)


def test_an_async_generator_whose_work_leaves_its_block_says_so(pipe):
    """In another task `to_thread` takes another context along, and no frame of the block is on that thread's stack."""

    async def pictures_of():
        with dg.graft(pipe, Scaled(0.5)):
            yield 0
            yield await asyncio.to_thread(draw, pipe)

    async def main(end):
        stream = pictures_of()
        for _ in range(2):
            await apart(anext(stream))
        await apart(end(stream))

    with pytest.raises(dg.GraftError, match=r"attach\(\)"):
        asyncio.run(main(lambda stream: anext(stream, None)))
    with pytest.warns(UserWarning, match=r"attach\(\)"):
        asyncio.run(main(lambda stream: stream.aclose()))


@pytest.mark.parametrize("attached", [False, True])
def test_an_interrupt_inside_the_denoiser(pipe, pictures, attached):
    """Ctrl-C passes by torch's hooks without a word."""

    def interrupt(*args):
        raise KeyboardInterrupt

    g = dg.graft(pipe, Scaled(0.5))
    with contextlib.ExitStack() as stack:
        g.attach() if attached else stack.enter_context(g)
        handle = pipe.unet.mid_block.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            draw(pipe)
        handle.remove()
        assert torch.equal(draw(pipe), pictures[1])
        assert dg.invert(pipe, torch.zeros(1, 4, 16, 16), steps=2, iterations=0).latents.isfinite().all()
    in_thread(g.detach)
    assert not g.attached and torch.equal(draw(pipe), pictures[0])


def test_an_async_generator_whose_work_leaves_its_block_later_says_so(pipe, pictures):
    """The first picture is made in the context in which the block began, and the second one is not."""

    async def pictures_of():
        with dg.graft(pipe, Scaled(0.5)):
            for _ in range(2):
                yield await asyncio.to_thread(draw, pipe)

    async def main():
        stream = pictures_of()
        found = [await apart(anext(stream)) for _ in range(2)]
        await apart(stream.aclose())
        return found

    with pytest.warns(UserWarning, match=r"attach\(\)"):
        first, second = asyncio.run(main())
    assert torch.equal(first, pictures[1]) and torch.equal(second, pictures[0])


# -- what is said at the end ---------------------------------------------------------------------------------------


def test_a_replaced_denoiser_is_told(pipe):
    own = tiny.sd15(unet=pipe.unet)
    with pytest.warns(UserWarning, match="replaced"), dg.graft(own, Scaled(0.5)):
        own.unet = tiny.unet(seed=7)
        draw(own)
    own.unet, g = pipe.unet, dg.graft(own, Scaled(0.5)).attach()
    own.unet = tiny.unet(seed=7)
    draw(own)
    with pytest.warns(UserWarning, match="replaced"):
        g.detach()


def test_work_that_went_to_a_pool_is_told(pipe, pictures):
    with pytest.warns(UserWarning, match=r"attach\(\)"), dg.graft(pipe, Scaled(0.5)):
        assert torch.equal(in_thread(draw, pipe), pictures[0])


def test_nothing_is_said_without_need(pipe):
    other = tiny.sd15(unet=pipe.unet)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with dg.graft(pipe, Scaled(0.5)):
            pass
        with dg.graft(pipe, dg.NegativeAway("red", scale=0)):
            draw(pipe)
        with dg.graft(pipe, dg.NegativeAway("red", scale=0)):
            in_thread(draw, pipe)
        with dg.graft(pipe, Scaled(0.5, start=0.9)):
            draw(pipe)
        with dg.graft(pipe, Scaled(0.5)):  # a neighbour's own pipeline
            in_thread(draw, other)
        with dg.graft(pipe, Scaled(0.5)):  # plain by intent
            dg.invert(pipe, torch.randn(1, 4, 16, 16), steps=2, iterations=0)
        with dg.graft(pipe, Scaled(0.5)):
            draw(pipe)
            in_thread(draw, pipe)
        with pytest.raises(KeyError), dg.graft(pipe, Scaled(0.5)):
            in_thread(draw, pipe)
            raise KeyError
        dg.graft(pipe, Scaled(0.5)).attach().detach()


# -- loops by hand -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [(0, "behind the step"), (2, "behind the step"), (2, "before the step")])
@pytest.mark.parametrize("whole", [False, True], ids=["unguided", "with a moved latent"])
def test_a_loop_broken_off_and_begun_again_counts_from_its_new_start(pipe, stop, whole):
    embeds = torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(3))

    def denoise(x, t):
        with torch.no_grad():
            return pipe.unet(x, t, encoder_hidden_states=embeds).sample

    plugin, climb = Scaled(0.5, start=0.5), [Climb()] if whole else []
    with dg.graft(pipe, plugin, *climb):
        expected = by_hand(pipe, denoise, 4)
        again = []
        for _ in range(2):
            loop(pipe, denoise, stop)
            plugin.steps.clear()
            again.append(loop(pipe, denoise))
            assert plugin.steps == ["begin", (2, 4), (3, 4)]
    assert all(torch.equal(one, expected) for one in again)


# -- one plugin object, two grafts ---------------------------------------------------------------------------------


def every_plugin():
    style = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(8))
    mask = torch.zeros(8, 8)
    mask[2:5, 2:5] = 1
    return {
        "away": dg.NegativeAway("red", scale=0.5),
        "vsf": dg.NegativeAway("red", rule="vsf", scale=0.5),
        "segregation": dg.AttentionSegregation(["ball", "star"], end=1.0),
        "attencraft": dg.AttentionSegregation(["ball", "star"], end=1.0, threshold="attencraft", level=0.01),
        "redirection": dg.SelfAttentionRedirection(mask, scale=2.0),
        "startpoint": dg.StartpointFilter(0.5),
        "styleid": dg.StyleInjection(style),
        "stylealigned": dg.StyleInjection(style, method="stylealigned"),
        "distillation": dg.AttentionDistillation(style, content=style.flip(-1)),
        "block": dg.ConceptBlock("star"),
        "guide": Guide(),
    }


def test_every_plugin_is_among_them():
    public = {found for name in dg.__all__ if isinstance(found := getattr(dg, name), type)}
    techniques = {found for found in public if issubclass(found, dg.Plugin)} - {dg.Plugin}
    assert len(techniques) >= 7 and techniques <= {type(plugin) for plugin in every_plugin().values()}


@pytest.mark.parametrize("name", list(every_plugin()))
def test_one_plugin_object_in_two_grafts(pipe, name):
    """Two models with other layers and prompts, step by step in turn."""
    plugin, pipes = every_plugin()[name], [tiny.sd15(unet=pipe.unet), tiny.sd2(seed=3)]
    prompts = ["a red ball and a blue star", "a blue star and a red ball"]

    def call(own, prompt, **more):
        return tiny.sample(own, prompt, height=16, width=16, num_inference_steps=2, guidance_scale=2.0, **more)

    alone = []
    for own, prompt in zip(pipes, prompts, strict=True):
        with dg.graft(own, every_plugin()[name]):
            alone.append(call(own, prompt))
    turns = threading.Barrier(2, timeout=60)

    def work(own, prompt):
        def taking_turns(pipe, i, t, tensors):
            turns.wait()
            return tensors

        with dg.graft(own, plugin) as g:
            turns.wait()
            return call(own, prompt, callback_on_step_end=taking_turns), str(g.report())

    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(work, pipes, prompts))
    assert all(torch.equal(one, found) for one, (found, _) in zip(alone, both, strict=True))
    with dg.graft(pipes[0], plugin) as outer:  # one inside of the other
        first, said = call(pipes[0], prompts[0]), outer.report().plugins
        with dg.graft(pipes[1], plugin):
            second = call(pipes[1], prompts[1])
        assert outer.report().plugins == said
        third = call(pipes[0], prompts[0])
    assert torch.equal(first, alone[0]) and torch.equal(second, alone[1]) and torch.equal(third, alone[0])

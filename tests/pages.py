"""Waiting for a served page, and closing it while clients still listen to it."""

from __future__ import annotations

import time


def comes_true(what, seconds):
    """Whether it does within so many seconds."""
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.01)
    return what()


def close(page):
    """Gradio wakes those who listen from the thread that closes: "deque mutated during iteration", now and then.

    An asyncio event belongs to its loop; once it is set there, what Gradio does is nothing.
    """
    stop = page.app.stop_event
    loop = getattr(stop, "_loop", None)
    if loop is not None:
        loop.call_soon_threadsafe(stop.set)
        comes_true(stop.is_set, 5)
    page.close()

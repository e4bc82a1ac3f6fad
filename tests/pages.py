"""Closing a served page while clients still listen to it."""

from __future__ import annotations

import time


def close(page):
    """Gradio wakes those who listen from the thread that closes: "deque mutated during iteration", now and then.

    An asyncio event belongs to its loop; once it is set there, what Gradio does is nothing.
    """
    stop = page.app.stop_event
    loop = getattr(stop, "_loop", None)
    if loop is not None:
        loop.call_soon_threadsafe(stop.set)
        deadline = time.monotonic() + 5
        while not stop.is_set() and time.monotonic() < deadline:
            time.sleep(0.01)
    page.close()

"""The example pictures that come with the package."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

EXAMPLES = Path(__file__).parents[2] / "assets" / "examples"
gr.set_static_paths([EXAMPLES])  # served as they are; copies in the cache would be gone after a day


def example(name: str) -> str:
    """The file of an example picture."""
    return str(EXAMPLES / f"{name}.png")

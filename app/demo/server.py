"""The page: laid out, queued and served on this machine only, unless asked otherwise."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when Gradio is imported

import gradio as gr

from ..extras import need
from ..models import PICTUREBOOK
from . import looks
from .checks import UPLOADS
from .parts import stopper, visitor
from .studio import Studio
from .tab_compose import ComposeTab
from .tab_erase import EraseTab
from .tab_generate import GenerateTab
from .tab_one_step import OneStepTab
from .tab_style import StyleTab
from .told import told

WAITING = 20
LOCAL = ("127.0.0.1", "localhost", "::1")
_HOUR = 3600
TABS = {
    "Generate": GenerateTab, "One step": OneStepTab, "Erase": EraseTab, "Style": StyleTab, "Compose": ComposeTab,
}  # fmt: skip


def page(studio: Studio) -> gr.Blocks:
    """The whole page on one studio."""
    with gr.Blocks(title="diffgraft", analytics_enabled=False, delete_cache=(_HOUR, 24 * _HOUR)) as blocks:
        gr.HTML(looks.HEADER, padding=False)
        with gr.Tabs():
            for title, tab in TABS.items():
                with gr.Tab(title):
                    tab(studio).build()
        stop = gr.Button(visible=False)
        stop.click(told(stopper(studio)), None, None, queue=False, api_name="stop")

        def leave(request: gr.Request) -> None:
            studio.stop(visitor(request))

        blocks.unload(leave)
    return blocks.queue(max_size=WAITING)


def serve(studio: Studio, *, host: str = "127.0.0.1", port: int | None = None, **options: Any) -> gr.Blocks:
    """Serve the page; `options` go to Gradio's `launch`."""
    blocks = page(studio)
    blocks.launch(
        server_name=host, server_port=port, theme=looks.theme(), css=looks.CSS, footer_links=["api"],
        run_history=False, enable_monitoring=False, max_file_size=UPLOADS.file_bytes, strict_cors=True, ssr_mode=False,
        favicon_path=looks.FAVICON, show_error=True,
        quiet=True, **options,
    )  # fmt: skip
    return blocks


def launch(
    *, model: str = PICTUREBOOK, device: str = "auto", host: str = "127.0.0.1", port: int = 7860, share: bool = False,
    mcp: bool = False,
) -> None:  # fmt: skip
    """Open the demo and serve it until Ctrl-C.

    Args:
        model: what the page runs where a visitor names none.
        device: where models go.
        host: 127.0.0.1 is this machine only. Visitors from elsewhere cannot choose another model.
        port: where to listen.
        share: a public link through Gradio's servers.
        mcp: also offer the functions as MCP tools.
    Raises:
        MissingExtraError: MCP without its package.
    """
    if mcp:
        need("mcp", "mcp")
    studio = Studio(model, device, fixed=share or host not in LOCAL)
    serve(studio, host=host, port=port, share=share, mcp_server=mcp)

"""The page: laid out, queued and served on this machine only, unless asked otherwise."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when Gradio is imported

import gradio as gr

from ...attention.errors import SettingError
from ..console import say
from ..extras import need
from ..models import PICTUREBOOK, open_model
from . import looks, menu, visit
from .checks import UPLOADS
from .parts import Laid, visitor
from .studio import Studio
from .tab_compose import ComposeTab
from .tab_erase import EraseTab
from .tab_generate import GenerateTab
from .tab_one_step import OneStepTab
from .tab_style import StyleTab

WAITING = 20
LOCAL = ("127.0.0.1", "localhost", "::1")
_HOUR = 3600
TABS = {
    "Generate": GenerateTab, "One step": OneStepTab, "Erase": EraseTab, "Style": StyleTab, "Compose": ComposeTab,
}  # fmt: skip


def page(studio: Studio) -> gr.Blocks:
    """The whole page on one studio."""
    with gr.Blocks(title="diffgraft", analytics_enabled=False, delete_cache=(_HOUR, 24 * _HOUR)) as blocks:
        with gr.Row(equal_height=False, elem_classes="dg-top"):
            gr.HTML(looks.HEADER, padding=False, min_width=300)
            model = menu.menu(studio)
        laid: list[Laid] = []
        with gr.Tabs() as switch:
            for title, tab in TABS.items():
                with gr.Tab(title, id=tab.name):
                    laid.append(tab(studio).build(model))
        menu.wire(model, studio, laid)
        visit.strip(laid, switch)

        def stop(request: gr.Request) -> str:
            """Stop what you are running here; a call of the model that has begun is finished first.

            Returns:
                Whether there was something to stop.
            """
            return "stopped" if studio.stop(visitor(request)) else "nothing of yours is running"

        gr.Button(visible=False).click(stop, None, gr.Textbox(visible=False), queue=False, api_name="stop")

        def leave(request: gr.Request) -> None:
            studio.stop(visitor(request))

        blocks.unload(leave)
    return blocks.queue(max_size=WAITING)


def serve(studio: Studio, *, host: str = "127.0.0.1", port: int | None = None, **options: Any) -> gr.Blocks:
    """Serve the page; `options` go to Gradio's `launch`."""
    blocks = page(studio)
    head = f"<style>{looks.CSS}</style><script>{looks.DROPS}</script>"
    blocks.launch(
        server_name=host, server_port=port, theme=looks.theme(), head=head,
        favicon_path=looks.FAVICON, footer_links=["api"], run_history=False, enable_monitoring=False, ssr_mode=False,
        max_file_size=UPLOADS.file_bytes, strict_cors=True, show_error=True, quiet=True, **options,
    )  # fmt: skip
    return blocks


def launch(
    *, model: str = PICTUREBOOK, device: str = "auto", host: str = "127.0.0.1", port: int = 7860, share: bool = False,
    mcp: bool = False, dtype: str = "auto", revision: str | None = None, variant: str | None = None,
) -> None:  # fmt: skip
    """Open the demo and serve it until Ctrl-C.

    Args:
        model: what the page runs where a visitor names none.
        device: where models go.
        host: 127.0.0.1 is this machine only. Visitors from elsewhere cannot choose another model.
        port: where to listen.
        share: a public link through Gradio's servers.
        mcp: also offer the functions as MCP tools.
        dtype: of every model. revision, variant: of the page's own.
    Raises:
        MissingExtraError: MCP without its package. ModelLoadError: the model cannot be loaded.
        SettingError: the port is taken, or there is no such device.
    """
    if mcp:
        need("mcp", "mcp")

    def opened(name: str, device: str) -> Any:
        own = {"revision": revision, "variant": variant} if name == model else {}
        return open_model(name, device=device, dtype=dtype, **own)

    studio = Studio(model, device, fixed=share or host not in LOCAL, opener=opened)
    studio.open()
    try:
        blocks = serve(studio, host=host, port=port, share=share, mcp_server=mcp, prevent_thread_lock=True)
    except OSError:
        raise SettingError(f"nothing can listen on {host}, port {port}: choose another with --port") from None
    say(f"the demo is on {blocks.local_url}" + (f" and {blocks.share_url}" if blocks.share_url else ""))
    blocks.block_thread()

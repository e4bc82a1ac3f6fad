"""How a handler talks to a visitor: what went wrong and what to do, and never more than that."""

from __future__ import annotations

import functools
import html
import logging
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr
import torch

from ...attention.errors import GraftError
from ..console import one_line

log = logging.getLogger(__name__)


def told(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose errors are messages; an unexpected one is a number here and a traceback in the log."""

    @functools.wraps(handler)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return handler(*args, **kwargs)
        except GraftError as error:
            raise message(one_line(error)) from error
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise message("the device is out of memory: choose a smaller size or fewer pictures") from error
        except gr.Error:
            raise
        except Exception as error:
            number = secrets.token_hex(3)
            log.exception("request %s failed", number)
            raise message(f"something unexpected happened; the terminal has the details under {number}") from error

    return run


def message(text: str) -> gr.Error:
    """A message box that shows `text` as text, whatever a prompt or a file name holds."""
    return gr.Error(escaped(text), title="That did not work", print_exception=False)


def escaped(text: str) -> str:
    """`text` for a place that reads HTML."""
    return html.escape(text[:1].upper() + text[1:], quote=False)


def warn(texts: Sequence[str]) -> None:
    """Show what the library warned of."""
    for text in texts[:3]:
        gr.Warning(escaped(" ".join(text.split())[:400]))

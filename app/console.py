"""How a command talks: one line for an error, one for a warning, and an exit code that says which kind it was."""

from __future__ import annotations

import io
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import typer

from ..attention.errors import GraftError, ModelLoadError
from .errors import MissingExtraError, OutputError

OK, FAILED, USAGE, NOT_STARTED, INTERRUPTED = 0, 1, 2, 3, 130


@contextmanager
def reported(verbose: bool) -> Iterator[None]:
    """Turn what a command raises into one line on stderr and its exit code; a traceback only if `verbose`."""
    quiet_libraries(verbose)
    try:
        yield
    except KeyboardInterrupt:
        say("interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except typer.Exit:
        raise
    except Exception as error:
        if verbose:
            traceback.print_exc()
        hint = "" if isinstance(error, GraftError) or verbose else " (unexpected; -v shows where)"
        say(f"error: {one_line(error)}{hint}")
        raise typer.Exit(exit_code(error)) from None


def exit_code(error: Exception) -> int:
    """2 for what the caller can write differently, 3 where nothing could start, 1 for what failed while running."""
    if isinstance(error, (ModelLoadError, MissingExtraError, OutputError)):
        return NOT_STARTED
    return USAGE if isinstance(error, GraftError) and isinstance(error, (ValueError, TypeError)) else FAILED


def one_line(error: BaseException) -> str:
    """An error as one short line."""
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, GraftError) and text else f"{type(error).__name__}: {text}"


def encodable() -> None:
    """Let results be printed whatever they hold: a file name that is no text, or letters that a console lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="surrogateescape" if "utf" in stream.encoding.lower() else "backslashreplace")


def say(text: str) -> None:
    """A line for a person, on stderr: stdout holds results only."""
    typer.echo(f"diffgraft: {text}", err=True)


def quiet_libraries(verbose: bool = False) -> None:
    """Loading bars and advice about other packages are not what the person asked for."""
    warnings.showwarning = _show_warning
    if verbose:
        logging.basicConfig(level=logging.INFO)
        return
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if not issubclass(category, (DeprecationWarning, FutureWarning, PendingDeprecationWarning)):
        say(f"warning: {' '.join(str(message).split())[:500]}")


def progress(total: int, what: str, quiet: bool) -> Any:
    """A bar on a terminal, plain lines elsewhere are the caller's."""
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=what, unit="picture", disable=quiet or not sys.stderr.isatty())

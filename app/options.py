"""Options that several commands share, declared once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import reported

if TYPE_CHECKING:
    from .tasks import Wish

Model = Annotated[
    str,
    typer.Option(
        help="picturebook, picturebook-one-step, picturebook-transformer, picturebook-transformer-few-steps, a folder, "
        "a .safetensors file or a Hub id."
    ),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")]
Variant = Annotated[str | None, typer.Option(help="Of the weights' files, such as fp16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, mps ...")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
NoMetadata = Annotated[bool, typer.Option("--no-metadata", help="PNGs hold the pixels only.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log, and tracebacks for errors.")]


@dataclass(frozen=True)
class Shared:
    """What generate, erase and stylize all take."""

    n: Annotated[int, typer.Option("-n", "--number", min=1, max=10_000, help="Pictures (of each input).")] = 1
    seed: Annotated[
        int | None, typer.Option(help="Picture i gets seed+i; -1 or none: a random one, recorded in the PNG.")
    ] = None
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 switches it off.")] = None
    model: Model = "picturebook"
    revision: Revision = None
    variant: Variant = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    no_metadata: NoMetadata = False
    quiet: Quiet = False
    verbose: Verbose = False

    def wish(self) -> Wish:
        """Model and output."""
        from .tasks import Wish

        told = self.quiet, not self.no_metadata
        return Wish(self.model, self.device, self.dtype, self.revision, *told, self.variant)

    def settings(self) -> dict[str, Any]:
        """What goes to the task."""
        return {"n": self.n, "seed": self.seed, "steps": self.steps, "guidance": self.guidance}


def sharing(command: Callable[..., Iterable[Path]]) -> Callable[..., None]:
    """Give a command the options of `Shared`, as its argument `shared`; its paths are printed, its errors reported."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "shared"]
    common = inspect.signature(Shared, eval_str=True).parameters

    @functools.wraps(command)
    def run(**given: Any) -> None:
        shared = Shared(**{name: given.pop(name) for name in common})
        with reported(shared.verbose):
            for path in command(**given, shared=shared):
                typer.echo(path)

    run.__signature__ = inspect.Signature([*own, *common.values()])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in (*own, *common.values())}
    return run

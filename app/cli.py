"""The `diffgraft` command. Heavy imports wait until a command has understood its arguments."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, cast

import typer

from ..attention.errors import SettingError
from .batch.command import batch
from .console import encodable, reported, say
from .evaluate.command import evaluate
from .options import Device, Dtype, Model, Revision, Shared, Variant, Verbose, sharing

app = typer.Typer(
    name="diffgraft",
    help="Training-free techniques grafted onto diffusers pipelines.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Out = Annotated[Path, typer.Option(help="A .png; several pictures get -0, -1 ...; a folder where the input is one.")]


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Training-free techniques grafted onto diffusers pipelines."""
    if show:
        from .. import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command()
@sharing
def generate(
    prompt: Annotated[str, typer.Argument(help='Such as "a red ball and a blue star , night".')],
    negative: Annotated[
        str | None, typer.Option(help="What to keep away (NegativeAway; works without guidance).")
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="The pipeline's own negative prompt; needs guidance.")
    ] = None,
    plugin: Annotated[
        list[str] | None,
        typer.Option(help='Repeatable: {"plugin": "NegativeAway", "negative": "red"}; paths in it start from here.'),
    ] = None,
    out: Out = Path("out.png"),
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    *,
    shared: Shared,
) -> list[Path]:
    """Make pictures of a prompt."""
    from . import tasks
    from .techniques import parse

    specs = [{"plugin": "NegativeAway", "negative": negative}] if negative else []
    specs += [parse(text) for text in plugin or ()]
    settings = shared.settings() | {"negative_prompt": negative_prompt, "width": width, "height": height}
    return tasks.generate(shared.wish(), prompt, specs, out, **settings)


@app.command()
@sharing
def optimise(
    prompt: Annotated[str, typer.Argument(help='Such as "a red ball , sky".')],
    loss: Annotated[
        str,
        typer.Option(
            help='{"loss": "colour", "colour": "blue", "region": "left"}; "intensity" with a mask, "histogram" with an '
            'image; {"loss": "a-star", "concepts": ["ball", "star"]}.'
        ),
    ],
    iterations: Annotated[int, typer.Option(min=0, max=10_000, help="Updates of the noise.")] = 20,
    one_step: Annotated[
        bool, typer.Option("--one-step", help="Search on the one-step student, draw with the model.")
    ] = False,
    plugin: Annotated[list[str] | None, typer.Option(help="Repeatable, as for generate.")] = None,
    out: Out = Path("out.png"),
    *,
    shared: Shared,
) -> list[Path]:
    """Search the noise whose picture has a small loss, and draw it. Ctrl-C draws the best so far."""
    from . import tasks
    from .techniques import parse

    specs = [parse(text) for text in plugin or ()]
    settings = shared.settings() | {"iterations": iterations, "one_step": one_step}
    return tasks.optimise(shared.wish(), prompt, loss, specs, out, **settings)


@app.command()
@sharing
def erase(
    image: Annotated[Path, typer.Argument(help="A picture, or a folder of pictures.")],
    mask: Annotated[
        Path | None, typer.Argument(help="White is removed; or a folder: the mask of a.jpg is a.png there.")
    ] = None,
    mask_option: Annotated[Path | None, typer.Option("--mask", help="The mask, given by name.")] = None,
    out: Out = Path("out.png"),
    invert: Annotated[bool, typer.Option("--invert", help="Black is removed.")] = False,
    prompt: Annotated[str | None, typer.Option(help="What is to be there instead, such as the background.")] = None,
    grow: Annotated[int | None, typer.Option(min=0, help="Pixels by which the mask is grown first.")] = None,
    *,
    shared: Shared,
) -> list[Path]:
    """Remove what a mask covers and continue the background."""
    if (mask is None) == (mask_option is None):
        raise SettingError("give one mask: diffgraft erase photo.png --mask mask.png --out out.png")
    from . import tasks

    hole = cast("Path", mask or mask_option)
    settings = shared.settings() | {"prompt": prompt, "grow": grow}
    return tasks.erase(shared.wish(), image, hole, out, invert=invert, **settings)


@app.command()
@sharing
def stylize(
    content: Annotated[Path, typer.Argument(help="A picture, or a folder of pictures.")],
    style: Annotated[Path, typer.Argument(help="The picture whose style is wanted.")],
    out: Out = Path("out.png"),
    strength: Annotated[float | None, typer.Option(help="0 ... 1: how much of the style.")] = None,
    structure: Annotated[float | None, typer.Option(help="0 ... 1: how firmly the layout is held.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What the content shows; nothing works.")] = None,
    *,
    shared: Shared,
) -> list[Path]:
    """Repaint a picture in the style of another one, keeping its layout."""
    from . import tasks

    settings = shared.settings() | {"strength": strength, "structure": structure, "prompt": prompt}
    return tasks.stylize(shared.wish(), content, style, out, **settings)


@app.command()
def show(picture: Annotated[Path, typer.Argument(help="A PNG that diffgraft wrote.")]) -> None:
    """Print the settings that a picture carries, as JSON."""
    with reported(verbose=False):
        import json

        from .metadata import read_settings

        wide = sys.stdout.encoding.lower().startswith("utf")
        typer.echo(json.dumps(read_settings(picture), indent=2, ensure_ascii=not wide))


@app.command()
def demo(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Where to listen.")] = 7860,
    host: Annotated[str, typer.Option(help="127.0.0.1 is this machine only.")] = "127.0.0.1",
    share: Annotated[bool, typer.Option("--share", help="A public link through Gradio's servers.")] = False,
    mcp: Annotated[bool, typer.Option("--mcp", help="Also serve the functions as MCP tools.")] = False,
    model: Model = "picturebook",
    revision: Revision = None,
    variant: Variant = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    verbose: Verbose = False,
) -> None:
    """Open the demo in a browser."""
    with reported(verbose):
        from .extras import need

        need("gradio", "demo")
        from .demo import launch

        how = {"revision": revision, "variant": variant, "device": device, "dtype": dtype}
        launch(model=model, host=host, port=port, share=share, mcp=mcp, **how)


app.command()(batch)
app.command()(evaluate)


def main() -> None:
    """The console script."""
    encodable()
    try:
        app()
    except KeyboardInterrupt:
        say("interrupted")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()

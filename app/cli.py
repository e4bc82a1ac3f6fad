"""The `diffgraft` command. Heavy imports wait until a command has understood its arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from ..attention.errors import SettingError
from .batch.command import batch
from .console import reported, say

app = typer.Typer(
    name="diffgraft",
    help="Training-free techniques grafted onto diffusers pipelines.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Option(help="The embedded 'picturebook', a folder, a .safetensors file or a Hub id.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, mps ...")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
Seed = Annotated[int | None, typer.Option(help="Picture i gets seed+i; -1 or none: a random one, recorded in the PNG.")]
Number = Annotated[int, typer.Option("-n", "--number", min=1, max=10_000, help="Pictures (of each input).")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.")]
Guidance = Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 switches it off.")]
Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin", help='Repeatable: {"plugin": "NegativeAway", "negative": "red"}; paths in it start from here.'
    ),
]
NoMetadata = Annotated[bool, typer.Option("--no-metadata", help="Write the pixels only.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log, and tracebacks for errors.")]


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Training-free techniques grafted onto diffusers pipelines."""
    if show:
        from .. import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help='Such as "a red ball and a blue star , night".')],
    negative: Annotated[
        str | None, typer.Option(help="What to keep away (NegativeAway; works without guidance).")
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="The pipeline's own negative prompt; needs guidance.")
    ] = None,
    plugin: Plugins = None,
    out: Annotated[Path, typer.Option(help="A .png; several pictures get -0, -1 ...")] = Path("out.png"),
    n: Number = 1,
    seed: Seed = None,
    steps: Steps = None,
    guidance: Guidance = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    model: Model = "picturebook",
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    no_metadata: NoMetadata = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make pictures of a prompt."""
    with reported(verbose):
        from . import tasks

        specs = ([{"plugin": "NegativeAway", "negative": negative}] if negative else []) + _specs(plugin)
        settings = {"steps": steps, "guidance": guidance, "width": width, "height": height, "n": n, "seed": seed}
        wish = tasks.Wish(model, device, dtype, revision, quiet, not no_metadata)
        _tell(tasks.generate(wish, prompt, specs, out, negative_prompt=negative_prompt, **settings))


@app.command()
def erase(
    image: Annotated[Path, typer.Argument(help="A picture, or a folder of pictures.")],
    mask: Annotated[
        Path | None, typer.Argument(help="White is removed; or a folder: the mask of a.jpg is a.png there.")
    ] = None,
    mask_option: Annotated[Path | None, typer.Option("--mask", help="The mask, given by name.")] = None,
    out: Annotated[Path, typer.Option(help="A .png; a folder where IMAGE is one.")] = Path("out.png"),
    invert: Annotated[bool, typer.Option("--invert", help="Black is removed.")] = False,
    prompt: Annotated[str | None, typer.Option(help="What is to be there instead, such as the background.")] = None,
    grow: Annotated[int | None, typer.Option(min=0, help="Pixels by which the mask is grown first.")] = None,
    n: Number = 1,
    seed: Seed = None,
    steps: Steps = None,
    guidance: Guidance = None,
    model: Model = "picturebook",
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    no_metadata: NoMetadata = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Remove what a mask covers and continue the background."""
    with reported(verbose):
        if (mask is None) == (mask_option is None):
            raise SettingError("give one mask: diffgraft erase photo.png --mask mask.png --out out.png")
        from . import tasks

        wish = tasks.Wish(model, device, dtype, revision, quiet, not no_metadata)
        settings = {"steps": steps, "guidance": guidance, "prompt": prompt, "grow": grow}
        hole = cast("Path", mask or mask_option)
        _tell(tasks.erase(wish, image, hole, out, invert=invert, n=n, seed=seed, **settings))


@app.command()
def stylize(
    content: Annotated[Path, typer.Argument(help="A picture, or a folder of pictures.")],
    style: Annotated[Path, typer.Argument(help="The picture whose style is wanted.")],
    out: Annotated[Path, typer.Option(help="A .png; a folder where CONTENT is one.")] = Path("out.png"),
    strength: Annotated[float | None, typer.Option(help="0 ... 1: how much of the style.")] = None,
    structure: Annotated[float | None, typer.Option(help="0 ... 1: how firmly the layout is held.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What the content shows; nothing works.")] = None,
    n: Number = 1,
    seed: Seed = None,
    steps: Steps = None,
    guidance: Guidance = None,
    model: Model = "picturebook",
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    no_metadata: NoMetadata = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Repaint a picture in the style of another one, keeping its layout."""
    with reported(verbose):
        from . import tasks

        wish = tasks.Wish(model, device, dtype, revision, quiet, not no_metadata)
        settings = {"steps": steps, "guidance": guidance, "strength": strength, "structure": structure}
        _tell(tasks.stylize(wish, content, style, out, n=n, seed=seed, prompt=prompt, **settings))


@app.command()
def show(picture: Annotated[Path, typer.Argument(help="A PNG that diffgraft wrote.")]) -> None:
    """Print the settings that a picture carries, as JSON."""
    with reported(verbose=False):
        import json

        from .metadata import read_settings

        typer.echo(json.dumps(read_settings(picture), indent=2, ensure_ascii=False))


@app.command()
def demo(
    port: Annotated[int, typer.Option(help="Where to listen.")] = 7860,
    host: Annotated[str, typer.Option(help="127.0.0.1 is this machine only.")] = "127.0.0.1",
    share: Annotated[bool, typer.Option("--share", help="A public link through Gradio's servers.")] = False,
    mcp: Annotated[bool, typer.Option("--mcp", help="Also serve the functions as MCP tools.")] = False,
    model: Model = "picturebook",
    device: Device = "auto",
    verbose: Verbose = False,
) -> None:
    """Open the demo in a browser."""
    with reported(verbose):
        from .extras import need

        need("gradio", "demo")
        from .demo import launch

        launch(model=model, device=device, host=host, port=port, share=share, mcp=mcp)


app.command()(batch)


def _specs(texts: list[str] | None) -> list[dict[str, Any]]:
    from .techniques import parse

    return [parse(text) for text in texts or ()]


def _tell(paths: list[Path]) -> None:
    for path in paths:
        typer.echo(path)


def main() -> None:
    """The console script."""
    try:
        app()
    except KeyboardInterrupt:
        say("interrupted")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()

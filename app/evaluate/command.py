"""`diffgraft evaluate`: from command-line words to a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...attention.errors import SettingError
from ..console import FAILED, reported, say
from ..options import Device, Dtype, Model, NoMetadata, Quiet, Revision, Variant, Verbose

if TYPE_CHECKING:
    from .run import Pair
    from .techniques import Technique


def evaluate(
    technique: Annotated[str, typer.Argument(help="segregation, negative, concept, redirection or style.")],
    model: Model = "picturebook",
    data: Annotated[Path | None, typer.Option(help="Prompts or pictures: a file or folder, see app/evaluate.")] = None,
    scorer: Annotated[
        list[str] | None,
        typer.Option(help="Repeatable: clip, open_clip, lpips, detector or judge; clip=PATH_OR_ID says which model."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of pictures, rows, sheets and table.")] = None,
    settings: Annotated[str, typer.Option(help='Of the technique, as JSON: {"segregation": 0.5}.')] = "{}",
    limit: Annotated[int | None, typer.Option(min=1, help="So many rows, evenly spread over the benchmark.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each row.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="The first of them.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 switches it off.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, of generated pictures.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, of generated pictures.")] = None,
    revision: Revision = None,
    variant: Variant = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    no_metadata: NoMetadata = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure a technique on a model: the same rows and seeds with it and without it, scored, as a table."""
    with reported(verbose):
        from ..models import EMBEDDED, open_model, shown_name, suits
        from ..outputs import output_folder, write_whole
        from .cases import spread
        from .run import Evaluation
        from .scorers import check
        from .scorers import scorer as named
        from .techniques import technique as known

        chosen, own = known(technique), _object(settings)
        for text in scorer or ():
            check(text)
        cases, left_out = chosen.cases(data, model in EMBEDDED)
        if left_out:
            say(f"{left_out} rows are left out: {chosen.needs}")
        cases = spread(cases, limit)
        folder = output_folder(out or Path("outputs/evaluate") / f"{technique}-{_slug(shown_name(model))}")
        asked = {"steps": steps, "guidance": guidance} | ({} if chosen.task else {"width": width, "height": height})
        call = ({} if chosen.task else suits(model)) | {k: v for k, v in asked.items() if v is not None}
        pipe = open_model(model, device=device, dtype=dtype, revision=revision, variant=variant)
        pipe.set_progress_bar_config(disable=True)
        scorers = [named("pixels"), *(named(text, pipe.device) for text in scorer or ())]
        evaluation = Evaluation(chosen, pipe, folder, own, call, shown_name(model), not no_metadata)
        pairs = evaluation.run(cases, range(seed, seed + seeds), scorers, (lambda text: None) if quiet else say)
        text = "\n".join(_told(chosen, pairs, folder, {"model": shown_name(model), **call, **own})) + "\n"
        write_whole(folder / "table.md", text.encode())
        typer.echo(text)
        if any(pair.error for pair in pairs):
            raise typer.Exit(FAILED)


def _told(chosen: Technique, pairs: Sequence[Pair], folder: Path, how: Mapping[str, Any]) -> list[str]:
    """The table with what stands around it; the sheets are drawn."""
    from ..batch.sheet import COLUMNS, write_sheets
    from .run import records, tiles
    from .table import table

    each = tiles(pairs[0].case)
    sheets = write_sheets(folder, records(pairs, folder), max(1, COLUMNS // each) * each)
    made = [pair for pair in pairs if not pair.error]
    changed = sum(_bytes(folder, pair, "plain") != _bytes(folder, pair, "grafted") for pair in made)
    failed = [f"failed: {pair.case.id}, seed {pair.seed}: {pair.error}" for pair in pairs if pair.error]
    return [
        f"{chosen.plugin} on {', '.join(f'{name} {value}' for name, value in how.items())}", "",
        *table(pairs, chosen.plugin), "",
        f"The plugin changed {changed} of {len(made)} pictures. In brackets: 95% intervals; shares change by points.",
        *failed, f"Sheets: {', '.join(path.name for path in sheets)} in {folder}",
    ]  # fmt: skip


def _bytes(folder: Path, pair: Pair, arm: str) -> bytes:
    from ..images import load_image

    return load_image(folder / pair.files[arm]).tobytes()


def _object(text: str) -> dict[str, Any]:
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SettingError(f"--settings {text[:80]!r} is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise SettingError(f'--settings {text[:80]!r}: must be an object such as {{"scale": 2}}')
    return given


def _slug(name: str) -> str:
    return name.replace("/", "-").removesuffix(".safetensors")

"""`diffgraft batch`: from command-line words to a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ...attention.pictures import expanded
from ..console import reported, say
from ..errors import ManifestError
from ..extras import need
from ..options import Device, Dtype, NoMetadata, Quiet, Revision, Variant, Verbose


def batch(
    manifest: Annotated[Path, typer.Argument(help="Rows as .jsonl, .csv or .yaml; paths in it start from its folder.")],
    out: Annotated[Path, typer.Option(help="Folder for DIR/<id>.png, metadata.jsonl, results and summary.")],
    model: Annotated[str, typer.Option(help="For rows that name none.")] = "picturebook",
    seed: Annotated[int, typer.Option(min=0, help="The run's; rows without a seed get one from it and their id.")] = 0,
    steps: Annotated[int | None, typer.Option(help="For rows that name none.")] = None,
    guidance: Annotated[float | None, typer.Option(help="For rows that name none.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any other default: --set width=128.")] = None,
    engine: Annotated[str, typer.Option(help="local, processes or ray.")] = "local",
    workers: Annotated[int, typer.Option(min=1, help="Processes or Ray actors.")] = 2,
    threads: Annotated[
        int, typer.Option(min=1, help="Torch threads of every worker; another number, other bytes.")
    ] = 1,
    batch_size: Annotated[int, typer.Option(min=1, max=1024, help="Pictures at once; bytes are promised at 1.")] = 1,
    shard: Annotated[str | None, typer.Option(help="i/n: only this part of the rows; same folder or another.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check every row and file, make nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Make finished rows again.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try failed rows again.")] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop at the first failed row.")] = False,
    max_failures: Annotated[int | None, typer.Option(min=1, help="Stop after this many failed rows.")] = None,
    revision: Revision = None,
    variant: Variant = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    no_metadata: NoMetadata = False,
    no_sheet: Annotated[bool, typer.Option("--no-contact-sheet", help="No contact sheet.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The summary as JSON on stdout.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make a picture of every row; run it again and it goes on where it stopped."""
    with reported(verbose):
        need("pydantic", "batch")
        need("yaml", "batch")
        from . import run
        from .plan import Setup

        given = _defaults(set_) | {k: v for k, v in {"steps": steps, "guidance": guidance}.items() if v is not None}
        manifest, out = expanded(manifest), expanded(out)
        setup = Setup(
            out=out, base=manifest.parent.resolve(), model=model, device=device, dtype=dtype, revision=revision,
            variant=variant,
            threads=threads, batch_size=batch_size, metadata=not no_metadata,
        )  # fmt: skip
        options = run.Options(
            defaults=given, seed=seed, engine=engine, workers=workers, overwrite=overwrite, retry_failed=retry_failed,
            shard=run.parse_shard(shard) if shard else None, max_failures=1 if fail_fast else max_failures,
            sheet=not no_sheet, quiet=quiet,
        )  # fmt: skip
        if dry_run:
            code, errors, summary = run.dry_run(manifest, setup, options)
            for line in errors:
                typer.echo(line, err=True)
        else:
            code, summary = run.run_batch(manifest, setup, options)
        _tell(summary, as_json, quiet)
        raise typer.Exit(code)


def _defaults(pairs: list[str] | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pair in pairs or ():
        name, equals, text = pair.partition("=")
        if not equals:
            raise ManifestError(f"--set {pair!r}: write NAME=VALUE, such as width=128")
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


def _tell(summary: dict[str, Any], as_json: bool, quiet: bool) -> None:
    if as_json:
        typer.echo(json.dumps(summary))
    elif not quiet or summary.get("stopped"):
        counts = {name.replace("_", " "): value for name, value in summary.items() if isinstance(value, int)}
        counts.pop("exit code", None)
        say(f"{counts.pop('rows')} rows: " + ", ".join(f"{value} {name}" for name, value in counts.items() if value))
        if summary.get("stopped"):
            say(str(summary["stopped"]))

"""`python -m diffgraft.app.bench [TABLE ...] [--full]`: print the benchmark tables of the README again."""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
import time
from pathlib import Path

from ...attention.errors import ModelLoadError, UnsupportedPipelineError

TABLES = {
    "optimise_effect": "startpoints found on the student, drawn by the many-step model",
    "optimise_cost": "peak bytes and passes of a search for a startpoint",
    "overhead": "what a graft costs in Python",
    "compiled": "what a graft costs on a compiled model",
    "negative_cost": "FLOPs of negatives inside attention",
    "negative_effect": "what a negative removes from one-step and guided pictures",
    "concept_effect": "whether a blocked concept stays out, and everything else in",
    "concept_cost": "FLOPs of a blocked concept",
    "segregation_cost": "FLOPs and saved activations of attention guidance",
    "segregation_choice": "settings of attention guidance, on captions not reported",
    "segregation_effect": "whether every object appears, with its colour",
    "segregation_predict": "which loss tells a seed that will fail",
    "localisation": "in which layers and steps words are found",
    "redirection_cost": "FLOPs and memory of object removal",
    "redirection_effect": "holes against the true background",
    "startpoint_cost": "denoiser passes of inversions",
    "inversion_effect": "round trips of inversion",
    "style_effect": "style transfer against the true re-rendering",
    "style_choice": "style pictures on other backgrounds, and extra iterations",
    "model_card": "what the embedded model draws, judged",
}
"""Module of this package with `run(full: bool) -> None`, and what its table shows. Tables of what a model draws take a
`model` too: a folder, or None for the embedded one."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="diffgraft.app.bench", description=__doc__)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"some of: {', '.join(TABLES)} (default: all)")
    parser.add_argument("--full", action="store_true", help="every sample of the table, for hours, resumable")
    parser.add_argument("--model", type=Path, metavar="DIR", help="of this diffusers model, or embedded one by name")
    options = parser.parse_args()
    unknown = [name for name in options.tables if name not in TABLES]
    if unknown:
        parser.error(f"no table {', '.join(unknown)}; there are: {', '.join(TABLES)}")
    for name in options.tables or TABLES:
        start = time.monotonic()
        sys.stdout.write(f"\n## {name}: {TABLES[name]} ({'full' if options.full else 'quick'} mode)\n\n")
        run = importlib.import_module(f"{__package__}.{name}").run
        own = {"model": options.model} if options.model and "model" in inspect.signature(run).parameters else {}
        try:
            run(options.full, **own)
        except (ModelLoadError, UnsupportedPipelineError) as error:
            parser.error(str(error))
        sys.stdout.write(f"\n({time.monotonic() - start:.0f} s)\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What runs on which model, printed from the declarations: `python -m diffgraft.pipelines.families.support`."""

from __future__ import annotations

import sys

from .family import Family, Refused
from .table import FAMILIES

_HOW = {
    "joint": "one sequence", "cross": "across", "keys": "keys of both", None: "across",
}  # fmt: skip
_GUIDANCE = {"apart": "two calls", "uncond, cond": "[uncond, cond]", "cond, uncond": "[cond, uncond]"}


def support_table() -> str:
    """Markdown tables of every class: those that are declared, and those that are refused with the reason."""
    lines = [
        "| denoiser | in defaults | text meets image | guidance | negative heard | words, maps | latents |",
        "|" + "---|" * 7,
    ]
    lines += [_row(name, said) for name, said in sorted(FAMILIES.items()) if isinstance(said, Family)]
    lines += ["", "| refused | why, and what to use |", "|---|---|"]
    lines += [f"| {name} | {said.reason} |" for name, said in sorted(FAMILIES.items()) if isinstance(said, Refused)]
    return "\n".join(lines) + "\n"


def _row(name: str, family: Family) -> str:
    film = family.latent.layout == "film"
    cells = (
        name, family.name, _HOW[family.how], _GUIDANCE[family.guidance],
        "once a call" if family.still else "once a step", "yes" if family.columns and not film else "no",
        "film: NegativeAway only" if film else family.latent.layout,
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.stdout.write(support_table())

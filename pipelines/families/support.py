"""What runs on which model, printed from the declarations: `python -m diffgraft.pipelines.families.support`."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from .family import Family, Refused
from .table import FAMILIES

_HOW = {
    "joint": "one sequence", "cross": "across", "keys": "keys of both", None: "across",
}  # fmt: skip
_GUIDANCE = {"apart": "two calls", "uncond, cond": "[uncond, cond]", "cond, uncond": "[cond, uncond]"}


_WORDS = ("AttentionSegregation", "attention_maps")
_STYLE = ("StyleInjection", "AttentionDistillation", "stylize")
_REMOVAL = ("SelfAttentionRedirection", "erase")
_ALL = ("NegativeAway", *_WORDS, "ConceptBlock", *_REMOVAL, *_STYLE, "StartpointFilter", "invert")


def unable(denoiser: str) -> dict[str, str]:
    """What cannot be done on a denoiser class, as its family says: {plugin or task: the reason}, empty if all can be.

    A yes is no promise: a single model may lack what its family has.
    """
    said = FAMILIES.get(denoiser)
    if not isinstance(said, Family):
        reason = said.reason if said else f"nobody has declared how {denoiser} is called"
        return dict.fromkeys(_ALL, reason)
    return dict(_refusals(denoiser, said))


def _refusals(denoiser: str, family: Family) -> Iterator[tuple[str, str]]:
    """(plugin or task, reason); what is said last of one counts."""
    unet, across = family.name == "unet", family.how in (None, "cross")
    if not family.columns:
        yield from dict.fromkeys(_WORDS, f"{denoiser} puts its text in another order, so words have no columns").items()
    if not across and not family.rewords:
        yield "ConceptBlock", "a word of its prompt is more than columns of one text, or nobody has looked"
    if not (unet or family.solve):
        yield from dict.fromkeys(("stylize", "invert"), f"how its pipeline loops is not known of {denoiser}").items()
    if not (unet or (family.solve and family.solve.pipelines)):
        yield "erase", f"no pipeline of {denoiser} is known that hands out its latents while it samples"
    if family.how == "keys":
        yield from dict.fromkeys(_STYLE, "its image attends to itself and the text over keys of both at once").items()
    if family.linear:
        yield from dict.fromkeys((*_REMOVAL, *_STYLE), "its image attends to itself linearly, without logits").items()
    if family.latent.layout == "film":
        others = [name for name in _ALL if name != "NegativeAway"]
        yield from dict.fromkeys(others, "it works on pictures, and this family makes films").items()


def support_table() -> str:
    """Markdown tables of every class: those that are declared, and those that are refused with the reason."""
    lines = [
        "| denoiser | in defaults | text meets image | guidance | negative heard | words, maps | latents "
        "| erase | stylize | invert |",
        "|" + "---|" * 10,
    ]
    lines += [_row(name, said) for name, said in sorted(FAMILIES.items()) if isinstance(said, Family)]
    lines += ["", "| refused | why, and what to use |", "|---|---|"]
    lines += [f"| {name} | {said.reason} |" for name, said in sorted(FAMILIES.items()) if isinstance(said, Refused)]
    return "\n".join(lines) + "\n"


def _row(name: str, family: Family) -> str:
    film = family.latent.layout == "film"
    cells = (
        name, family.name, _HOW[family.how], _GUIDANCE[family.guidance],
        "rows only" if family.rows_only else "once a call" if family.still else "once a step",
        "yes" if family.columns and not film else "no",
        "film: NegativeAway only" if film else family.latent.layout,
        *("no" if task in unable(name) else "yes" for task in ("erase", "stylize", "invert")),
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.stdout.write(support_table())

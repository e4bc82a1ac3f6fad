"""One row of a manifest: its fields, their ranges, and which of them each task takes."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

import diffgraft

from ...attention.errors import GraftError
from ...pipelines.tasks.generate import LONGEST_PROMPT, SEEDS
from .. import losses, techniques
from ..errors import ManifestError

FILES = ("image", "mask", "content", "style")
REQUIRED: Mapping[str, tuple[str, ...]] = {
    "generate": ("prompt",),
    "erase": ("image", "mask"),
    "stylize": ("content", "style"),
    "optimise": ("prompt",),
}
FUNCTIONS: Mapping[str, str] = {"optimise": "optimise_startpoint"}
"""Tasks whose function has another name."""
_IN_PYTHON = ("concepts", "surrogate", "callback")  # objects of Python, or said by the loss
_COMMON = {"id", "task", "seed", "n", "model", "dtype", "variant"}

Text = Field(default=None, max_length=LONGEST_PROMPT)
Path = Field(default=None, min_length=1, max_length=4096)


class Row(BaseModel):
    """What to make. Everything but what the task needs may be left out."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)

    id: str = Field(min_length=1, max_length=1000)
    """Names the pictures: DIR/<id>.png. Default: the row's line."""
    task: Literal["generate", "erase", "stylize", "optimise"] = "generate"
    prompt: str | None = Text
    negative: str | None = Text
    """Kept away by `NegativeAway`, with or without guidance."""
    negative_prompt: str | None = Text
    """The pipeline's own negative prompt, for classifier-free guidance."""
    seed: int | None = Field(default=None, ge=-1, lt=SEEDS)
    """Of the first picture. None and -1: from the run's seed and the id."""
    steps: int | None = Field(default=None, ge=1, le=1000)
    guidance: float | None = Field(default=None, ge=-100, le=100)
    n: int = Field(default=1, ge=1, le=1000)
    """Pictures: DIR/<id>-0.png ... with the seeds seed, seed + 1 ..."""
    width: int | None = Field(default=None, ge=16, le=8192)
    height: int | None = Field(default=None, ge=16, le=8192)
    image: str | None = Path
    mask: str | None = Path
    content: str | None = Path
    style: str | None = Path
    model: str | None = Field(default=None, min_length=1, max_length=1000)
    """Default: the run's."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] | None = None
    variant: str | None = Field(default=None, min_length=1, max_length=100)
    """Of the weights' files, such as "fp16"."""
    plugins: list[dict[str, Any]] = Field(default_factory=list, max_length=20)
    """Such as {"plugin": "NegativeAway", "negative": "red"}."""
    settings: dict[str, Any] = Field(default_factory=dict, max_length=50)
    """Further arguments of `diffgraft.erase` or `diffgraft.stylize`, such as {"strength": 0.8}; of "optimise" its loss
    too: {"loss": {"loss": "colour", "colour": "blue"}, "iterations": 20}."""

    @field_validator("id", mode="before")
    @classmethod
    def _number_is_a_name(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    def specs(self) -> list[dict[str, Any]]:
        """Plugin specs, `negative` included."""
        away = [{"plugin": "NegativeAway", "negative": self.negative}] if self.negative else []
        return away + self.plugins if self.task == "generate" else list(self.plugins)


def make_row(given: Mapping[str, Any], defaults: Mapping[str, Any], line: int, *, strict: bool) -> Row:
    """A checked row.

    Args:
        given: what the manifest says.
        defaults: for fields that it does not; those that the task cannot take are left out.
        line: the default id.
        strict: False reads numbers out of text (CSV).

    Raises:
        ManifestError: everything that is wrong with the row, in one line.
    """
    given, defaults = _said_fields(given), _said_fields(defaults)
    task = given.get("task", defaults.get("task", "generate"))
    takes = fields_of(task) if isinstance(task, str) and task in REQUIRED else set(Row.model_fields)
    merged = {name: value for name, value in defaults.items() if name in takes} | given
    merged.setdefault("id", str(line))
    try:
        row = Row.model_validate(merged, strict=strict)
    except ValidationError as error:
        raise ManifestError("; ".join(_said(e) for e in error.errors(include_url=False))) from None
    wrong = [*_fits_task(row, given, takes), *_fits_loss(row), *_fits_plugins(row)]
    if wrong:
        raise ManifestError("; ".join(wrong))
    return row


def _said_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A null says nothing, in a row, in its settings and in the defaults."""
    said = {name: value for name, value in fields.items() if value is not None}
    if isinstance(said.get("settings"), Mapping):
        said["settings"] = {name: value for name, value in said["settings"].items() if value is not None}
    return said


@cache
def fields_of(task: str) -> set[str]:
    """The fields that rows of a task may have."""
    if task == "generate":
        return set(Row.model_fields) - {*FILES, "settings"}
    own = set(Row.model_fields) & set(_arguments(task)) - set(FILES)
    return _COMMON | {"settings"} | set(REQUIRED[task]) | own


def _arguments(task: str) -> list[str]:
    """Keyword arguments of a task's function."""
    parameters = inspect.signature(getattr(diffgraft, FUNCTIONS.get(task, task))).parameters.values()
    named = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    return [*(name for name in named if name not in _IN_PYTHON), "loss"] if task == "optimise" else named


def _fits_task(row: Row, given: Mapping[str, Any], takes: set[str]) -> Iterator[str]:
    missing = [name for name in REQUIRED[row.task] if getattr(row, name) is None]
    if missing:
        yield f"task {row.task!r} needs {', '.join(missing)}"
    foreign = [name for name in given if name not in takes]
    if foreign:
        yield f"task {row.task!r} takes no {', '.join(foreign)}"
        return
    further = [name for name in _arguments(row.task) if name not in Row.model_fields] if row.settings else []
    strange = [name for name in row.settings if name not in further]
    if strange:
        yield f"settings: {row.task} has no {', '.join(strange)}; there are {', '.join(further)}"


def _fits_loss(row: Row) -> Iterator[str]:
    if row.task == "optimise":
        loss = row.settings.get("loss")
        try:
            losses.check(loss)
            if {"mask", "image"} & {*cast("Mapping[str, Any]", loss)}:
                yield "settings: a loss in a manifest takes no files: give a colour, a region, or concepts"
        except GraftError as error:
            yield f"settings: {error}"


def _fits_plugins(row: Row) -> Iterator[str]:
    for spec in row.specs():
        try:
            techniques.check(spec)
        except GraftError as error:
            yield f"plugins: {error}"


def _said(error: Any) -> str:
    field = ".".join(str(part) for part in error["loc"]) or "row"
    return unknown(field) if error["type"] == "extra_forbidden" else f"{field}: {error['msg']}"


def unknown(name: str) -> str:
    """That there is no such field, and which one may be meant."""
    near = difflib.get_close_matches(name, list(Row.model_fields), n=1)
    return f"unknown field {name[:60]!r}" + (f", did you mean {near[0]!r}?" if near else "")

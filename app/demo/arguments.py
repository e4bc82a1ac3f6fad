"""What a technique's arguments are, read from its signature and its docstring, so that a form can be made of them."""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ...attention.errors import SettingError
from ..techniques import techniques
from .specs import NEVER, PICTURES

Kind = Literal["words", "text", "number", "whole", "switch", "choice"]
_LONGEST = 170
_NOT_HERE = (*NEVER, *PICTURES, "attributes", "refine")


@dataclass(frozen=True)
class Argument:
    """One field of a form.

    Attributes:
        default: what an empty field stands for. about: the docstring's first sentence on it.
        choices: of a "choice". needed: it has no default.
    """

    name: str
    kind: Kind
    default: Any
    about: str
    choices: tuple[str, ...] = ()
    needed: bool = False


@functools.cache
def arguments(plugin: str) -> tuple[Argument, ...]:
    """The arguments of a technique that a field can hold; the others are for JSON and Python."""
    kind = techniques()[plugin]
    hints, told = typing.get_type_hints(kind.__init__), documented(inspect.getdoc(kind) or "")
    found = [
        _argument(one, hints.get(one.name), told.get(one.name, ""))
        for one in inspect.signature(kind).parameters.values()
        if one.name not in _NOT_HERE
    ]
    return tuple(one for one in found if one is not None)


def documented(text: str) -> dict[str, str]:
    """The Args section of a docstring: name -> what is said of it, in one line."""
    section = re.search(r"^Args:\n((?:    .*\n?|\n)+)", text, re.M)
    told: dict[str, str] = {}
    names: list[str] = []
    for line in section.group(1).splitlines() if section else ():
        begun = re.match(r"    (?! )(.*)", line)
        for part in re.split(r"(?<=\.) (?=[a-z_]+: )", begun.group(1)) if begun else ():
            head, _, rest = part.partition(": ")
            names = [name.strip() for name in head.split(",")]
            told |= dict.fromkeys(names, rest)
        if not begun:
            told |= {name: f"{told[name]} {line.strip()}" for name in names}
    return told


def _argument(one: inspect.Parameter, hint: Any, about: str) -> Argument | None:
    needed = one.default is inspect.Parameter.empty
    default = None if needed else one.default
    said = _first_sentence(about)
    members = [member for member in typing.get_args(hint) or (hint,) if member is not type(None)]
    choices = _choices(hint, default, about)
    if one.name in ("concepts", "negative"):
        return Argument(one.name, "words" if one.name == "concepts" else "text", default, said, needed=needed)
    if choices:
        return Argument(one.name, "choice", default, said, choices)
    simple: dict[Any, Kind] = {bool: "switch", int: "whole", float: "number", str: "text"}
    kind = simple.get(members[0]) if len(members) == 1 else None
    return None if kind is None else Argument(one.name, kind, default, said, needed=needed)


def _choices(hint: Any, default: Any, about: str) -> tuple[str, ...]:
    """The words of a Literal, or of a text whose docstring names them in quotes."""
    literal = [word for part in (hint, *typing.get_args(hint)) for word in _words_of(part)]
    if literal:
        return tuple(dict.fromkeys(literal))
    texts = str in (hint, *typing.get_args(hint))
    quoted = tuple(dict.fromkeys(re.findall(r'"([\w-]+)"', about)))
    return quoted if texts and default in quoted else ()


def _words_of(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def _first_sentence(about: str) -> str:
    sentence = re.split(r"(?<=[a-z)\"'0-9])[.:;] (?=[A-Z])", about, maxsplit=1)[0].strip().rstrip(".")
    return sentence if len(sentence) <= _LONGEST else sentence[: _LONGEST - 1].rsplit(" ", 1)[0] + " …"


def written(value: Any, argument: Argument) -> Any:
    """What a field's value is in a spec; None where the field is empty, so that the default holds.

    Raises:
        SettingError: not of the argument's kind.
    """
    if value is None or value == "" or value == argument.default:
        return [] if argument.needed and argument.kind == "words" else "" if argument.needed else None
    if argument.kind == "words":
        return [part.strip() for part in str(value).split(",") if part.strip()]
    if argument.kind == "whole":
        if float(value) != int(value):
            raise SettingError(f"{argument.name} is {value:g}: a whole number is needed")
        return int(value)
    return value


def shown(spec: Mapping[str, Any], argument: Argument) -> Any:
    """What a field shows of a spec."""
    value = spec.get(argument.name, argument.default)
    if argument.kind == "words" and isinstance(value, list):
        return ", ".join(map(str, value))
    return value

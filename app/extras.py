"""Optional dependencies: present, or an error that names the extra to install."""

from __future__ import annotations

from importlib.util import find_spec

from .errors import MissingExtraError


def need(module: str, extra: str) -> None:
    """Raise unless `module` can be imported.

    Raises:
        MissingExtraError: it is not installed; the message is the command that installs it.
    """
    if find_spec(module) is None:
        raise MissingExtraError(f'{module} is not installed; run: pip install "diffgraft[{extra}]"')

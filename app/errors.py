"""Errors about what a person handed in: pictures, manifests, places to write to."""

from __future__ import annotations

from ..attention.errors import GraftError
from ..attention.errors import ImageError as ImageError
from ..attention.errors import ImageWarning as ImageWarning


class ManifestError(GraftError, ValueError):
    """A batch manifest, or one row of it, cannot be understood."""


class DataError(GraftError, ValueError):
    """A folder or file of benchmark rows cannot be understood."""


class OutputError(GraftError, RuntimeError):
    """A result cannot be written where it was asked for."""


class MetadataError(GraftError, ValueError):
    """A picture carries no settings, or unreadable ones."""


class MissingExtraError(GraftError, RuntimeError):
    """A command needs an optional dependency that is not installed."""


class WorkerError(GraftError, RuntimeError):
    """The workers of a batch run cannot be started."""

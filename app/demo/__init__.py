"""The demo: a page where each technique can be tried with a mouse, and an API with the same functions."""

from __future__ import annotations

from .server import launch as launch

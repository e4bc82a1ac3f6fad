"""Training-free techniques grafted onto diffusers pipelines: put on, used, and taken off without a trace."""

from __future__ import annotations

__version__ = "0.1.0"

"""Shared set-up: two threads, no network, and tiny real pipelines."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")

import diffusers
import pytest
import tiny
import torch

diffusers.utils.logging.set_verbosity_error()


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(min(2, os.cpu_count() or 1))


FAMILIES = {"sd15": tiny.sd15, "sd2": tiny.sd2, "sdxl": tiny.sdxl}


@pytest.fixture
def sd15():
    return tiny.sd15()


@pytest.fixture(params=list(FAMILIES))
def family(request):
    """A fresh tiny pipeline of each UNet family."""
    return FAMILIES[request.param]()

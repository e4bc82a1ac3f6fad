"""Shared set-up: one thread (tiny models gain nothing from two, and lose much on a busy machine), no network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import diffusers
import pytest
import tiny
import torch

diffusers.utils.logging.set_verbosity_error()


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(1)


FAMILIES = {"sd15": tiny.sd15, "sd2": tiny.sd2, "sdxl": tiny.sdxl}


@pytest.fixture
def sd15():
    return tiny.sd15()


@pytest.fixture(params=list(FAMILIES))
def family(request):
    """A fresh tiny pipeline of each UNet family."""
    return FAMILIES[request.param]()


@pytest.fixture(scope="session")
def picturebook():
    """The embedded model."""
    import diffgraft as dg

    return tiny.quiet(dg.picturebook())

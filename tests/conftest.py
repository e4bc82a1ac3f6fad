"""Shared set-up: one thread (tiny models gain nothing from two, and lose much on a busy machine), no network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import diffusers
import pytest
import tiny
import torch

from diffgraft.pipelines.families.table import FAMILIES as DECLARED

diffusers.utils.logging.set_verbosity_error()


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _declarations() -> Iterator[None]:
    """What a test (or a document's example) declares is not known to the next one, whatever order they run in."""
    with mock.patch.dict(DECLARED):
        yield


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

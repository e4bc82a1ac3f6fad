"""Time, memory and kernels of a call, on a GPU or not."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from .training import TimeBox

Call = Callable[[], Any]


def settle(device: torch.device) -> None:
    """Wait until the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Call, device: torch.device) -> float:
    """Of one call."""
    settle(device)
    start = time.perf_counter()
    call()
    settle(device)
    return time.perf_counter() - start


def ratios(
    plain: Callable[[], float], other: Callable[[], float], box: TimeBox, most: int, least: int = 3
) -> list[float]:
    """Seconds of `other` to those of `plain`, taken in turns, so that a machine that slows down slows both.

    Args:
        box: measuring stops when it is over, but not before `least` pairs. most: pairs.
    """
    found = list[float]()
    while len(found) < min(least, most) or (len(found) < most and box.fraction < 1):
        before = plain()
        found.append(other() / before)
    return found


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Of two values or more."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def peak(call: Call, device: torch.device) -> int | None:
    """Bytes that a call takes beyond what is there before it; None where the device does not say."""
    if device.type != "cuda":
        return None
    settle(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    settle(device)
    return torch.cuda.max_memory_allocated(device) - before


def kernels(call: Call, device: torch.device) -> dict[str, int]:
    """How often each attention kernel ran, by torch's name for it."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as profile:
        call()
        settle(device)
    head = "aten::_scaled_dot_product_"
    return {
        event.key.removeprefix(head).removesuffix("_attention"): event.count
        for event in profile.key_averages()
        if event.key.startswith(head)
    }

"""Which kernel computes attention, chosen by a probe."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .call import Kernel
from .dispatched import backend_of
from .errors import BackendError, SettingError

NAMES = ("auto", "sdpa", "xformers")


@dataclass(frozen=True)
class Backend:
    """A kernel with the signature of `scaled_dot_product_attention`, and its name for reports."""

    name: str
    kernel: Kernel

    def seen(self, modules: Sequence[Any]) -> str:
        """Its name, or those of the backends that these layers have of diffusers' dispatcher."""
        held = {str(getattr(found, "value", found)) for module in modules if (found := backend_of(module)) is not None}
        return ", ".join(sorted(held)) if held and self.kernel is F.scaled_dot_product_attention else self.name


def _torchs_own(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **rest: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, **rest)


_SDPA = Backend("sdpa", F.scaled_dot_product_attention)
_TORCHS_OWN = Backend("sdpa", _torchs_own)
"""The same by another name, by which it is not taken for "whatever the pipeline has set"."""


def select(name: str = "auto", *, device: torch.device | str = "cpu", strict: bool = False) -> Backend:
    """The backend of that name if it runs on `device`, else sdpa with one warning.

    Args:
        name: "auto" (what `set_attention_backend` has set, else sdpa), "sdpa" or "xformers". On torch >= 2.10 xformers
            picks the same ATen kernels as sdpa.
        device: where attention will run.
        strict: raise instead of falling back.
    Raises:
        SettingError: unknown name.
        BackendError: `strict`, and the backend does not run here.
    """
    if name not in NAMES:
        raise SettingError(f"backend={name!r}: choose one of {', '.join(NAMES)}")
    if name != "xformers":
        return _SDPA if name == "auto" else _TORCHS_OWN
    try:
        return _probe_xformers(torch.device(device))
    except Exception as error:
        reason = f"xformers does not run here ({type(error).__name__}: {str(error).splitlines()[0]})"
        if strict:
            raise BackendError(f"{reason}; use backend='sdpa' or install a matching xformers with CUDA") from error
        warnings.warn(f"{reason}; using sdpa", stacklevel=2)
        return _SDPA


def _probe_xformers(device: torch.device) -> Backend:
    import xformers.ops as xops  # pyright: ignore

    if device.type != "cuda":
        raise BackendError(f"it needs CUDA, the model is on {device.type}")

    def kernel(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None = None, **rest: Any
    ) -> torch.Tensor:
        if attn_mask is not None or rest.get("is_causal") or rest.get("enable_gqa"):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **rest)
        swapped = (t.transpose(1, 2) for t in (q, k, v))  # xformers wants [B, L, H, D]
        return xops.memory_efficient_attention(*swapped, scale=rest.get("scale")).transpose(1, 2)  # pyright: ignore

    sample = torch.zeros(1, 1, 8, 64, device=device, dtype=torch.float16, requires_grad=True)
    torch.autograd.grad(kernel(sample, sample, sample).sum(), sample)
    return Backend("xformers", kernel)

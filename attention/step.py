"""Where in a sampling run a denoiser call is, and which batch rows mean what."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Phase = Literal["latent", "predict", "listen"]
Rows = dict[str, slice]


@dataclass
class Step:
    """One denoiser call as edits and plugins see it.

    Attributes:
        index: step of this pipeline call, 0-based; both stages of a second-order step share it.
        total: steps of this pipeline call (img2img counts the steps it really runs).
        timestep: the scheduler's own timestep, unit untouched.
        time: the same as the scheduler counts it, 1000 (noise) to 0, whatever the model is told; None without a
            schedule.
        size: (height, width) of the token grid at the denoiser's full resolution.
        rows: batch rows by group: "cond", "uncond" under guidance, and a group a branch.
        likes: for a branch, the group that it copies.
        phase: "latent" while a plugin probes for a gradient, "predict" in the call that the pipeline made, "listen"
            while another text is heard.
        probing: True while a probe's own forward runs; False when gradient checkpointing runs a layer again.
        may_stop: whether an edit may end that forward early, see `diffgraft.attention.seam.stop_probe`.
        device: of the latents.
        heard: further texts of this call, by the identity of what their plugin gave, as the blocks get them whose
            layers attend across, each with the other arguments of the layer that go with it, its mask among them.
        notes: what plugins keep of this pipeline call, each under itself; emptied when the call is over.
        tail: tokens behind the image's that other candidates have in its hole; nothing attends to them.
    """

    index: int = 0
    total: int = 1
    timestep: torch.Tensor | float = 0.0
    size: tuple[int, int] = (0, 0)
    time: float | None = None
    rows: Rows = field(default_factory=dict[str, slice])
    likes: dict[str, str] = field(default_factory=dict[str, str])
    phase: Phase = "predict"
    probing: bool = False
    may_stop: bool = True
    device: torch.device | None = None
    heard: dict[int, tuple[torch.Tensor, dict[str, Any]]] = field(default_factory=dict[int, Any])
    notes: dict[Any, Any] = field(default_factory=dict[Any, Any])
    tail: int = 0

    def within(self, start: float, end: float) -> bool:
        """Whether this step lies in [start, end), fractions of the run's steps."""
        tiny = 1e-6  # 0.3 * 10 must be step 3
        return start * self.total - tiny <= self.index < end * self.total - tiny

    def select(self, group: str, batch: int) -> slice | list[int]:
        """Rows of `group` and of the branches that copy it, among the first `batch` rows.

        Branches join late (at the first layer that needs them), so a layer may see fewer rows than `rows` names.
        """
        members = [
            rows for name, rows in self.rows.items() if rows.stop <= batch and group in (name, self.likes.get(name))
        ]
        indices = [i for rows in members for i in range(rows.start, rows.stop)]
        contiguous = bool(indices) and indices == list(range(indices[0], indices[-1] + 1))
        return slice(indices[0], indices[-1] + 1) if contiguous else indices

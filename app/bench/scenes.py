"""Random batches of encoded scenes, as both denoisers' trainers want them."""

from __future__ import annotations

from pathlib import Path

import torch

from . import latents
from .vocabulary import LENGTH


class Scenes:
    """The encoded scenes of a folder, on the CPU; a batch travels."""

    def __init__(self, work: Path) -> None:
        self.data = latents.load(work)
        self.easy = self.data["easy"].nonzero()[:, 0]
        self.plain = self.data["plain"].nonzero()[:, 0]
        things = self.data["masks"].flatten(2).any(-1).sum(1)
        self.single = (things == 1).nonzero()[:, 0]

    def rows(self, size: int, easy: float, singles: float) -> torch.Tensor:
        """Which scenes: a share `easy` of single plain things, half as many plain ones, `singles` of single things in
        any style, the rest as the world draws them.
        """
        luck = torch.rand(size)
        rows = torch.randint(len(self.data["latents"]), (size,))
        rows = torch.where(luck > 1 - singles, self.single[torch.randint(len(self.single), (size,))], rows)
        rows = torch.where(luck < 1.5 * easy, self.plain[torch.randint(len(self.plain), (size,))], rows)
        return torch.where(luck < easy, self.easy[torch.randint(len(self.easy), (size,))], rows)

    def batch(self, size: int, easy: float, singles: float = 0.0) -> dict[str, torch.Tensor]:
        """`size` random scenes, one caption in ten empty.

        Returns:
            latent [B, 4, h, w] and noise of that shape; masks [B, 3, 16, 16], 0 ... 1; tokens [B, 20], the caption;
            columns [B, 3, 2], where it names each thing's colour and kind (0: nowhere); things [B, 3, 2], those two
            words whether the caption says them or not (0: no such thing).
        """
        rows = self.rows(size, easy, singles)
        variant = (torch.rand(size) < 0.45).long() * torch.randint(1, latents.VARIANTS, (size,))
        tokens, columns = self.data["tokens"][rows, variant].long(), self.data["columns"][rows, variant].long()
        whole, named = self.data["tokens"][rows, 0].long(), self.data["columns"][rows, 0].long()
        dropped = torch.rand(size) < 0.1
        tokens[dropped] = torch.tensor([1, 2] + [0] * (LENGTH - 2))
        columns[dropped] = 0
        return {
            "latent": self.data["latents"][rows].float(),
            "masks": self.data["masks"][rows].float() / 255,
            "tokens": tokens,
            "columns": columns,
            "things": whole.gather(1, named.flatten(1)).view_as(named) * (named > 0),
            "noise": torch.randn(size, *self.data["latents"].shape[1:]),
        }

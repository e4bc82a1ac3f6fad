"""The judge of pictures: which kinds are there and in which colour, which background, which style.

It serves the benchmarks, whose pictures are never selected by it; the demo's first examples are: they say what a
technique is for, not how often it helps. `train_judge` is its recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from .backgrounds import BACKGROUNDS
from .shapes import COLOURS, SHAPES
from .styles import STYLES
from .training import to_tensor
from .world import Scene

WEIGHTS = Path(__file__).with_name("judge.safetensors")
KINDS, PAINTS, PLACES, MANNERS = list(SHAPES), list(COLOURS), list(BACKGROUNDS), list(STYLES)


@dataclass(frozen=True)
class Verdict:
    """What the judge sees: a colour for each kind that is there, the background, the style."""

    colours: dict[str, str]
    background: str
    style: str

    def exact(self, truth: Scene) -> bool:
        """Exactly the scene's kinds, each in its colour."""
        return self.colours == {thing.kind: thing.colour for thing in truth.things}

    def kinds(self, truth: Scene) -> bool:
        """Exactly the scene's kinds, in any colours."""
        return set(self.colours) == {thing.kind for thing in truth.things}


class Judge(nn.Module):
    """A convolutional network on [B, 3, 128, 128] pictures (-1 ... 1) that looks for each kind where its own map
    says it is.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 128, 128)
        layers: list[nn.Module] = []
        for i in range(5):
            conv = nn.Conv2d(widths[i], widths[i + 1], 3, stride=2 if i < 3 else 1, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(widths[i + 1]), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.where = nn.Conv2d(128, len(KINDS), 1)
        self.paint = nn.Parameter(torch.zeros(len(KINDS), 129, len(PAINTS) + 1))
        self.place = nn.Linear(256, len(PLACES))
        self.manner = nn.Linear(256, len(MANNERS))

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scores: kind maps [B, 10, 16, 16], colour of each kind (0: absent) [B, 10, 9], background [B, 6], style
        [B, 5].
        """
        features = self.trunk(pictures)
        maps = self.where(features)
        focus = maps.flatten(2).softmax(-1)
        looked = torch.cat([focus @ features.flatten(2).mT, maps.flatten(2).amax(-1)[..., None]], -1)
        colours = torch.einsum("bkf,kfc->bkc", looked, self.paint.to(looked.dtype))
        whole = torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1)
        return maps, colours, self.place(whole), self.manner(whole)


def load_judge(path: Path = WEIGHTS) -> Judge:
    """The trained judge, float32, in evaluation mode."""
    judge = Judge()
    judge.load_state_dict(
        {name: part.float() if part.is_floating_point() else part for name, part in load_file(path).items()}
    )
    return judge.eval()


@torch.no_grad()
def look(judge: Judge, pictures: Sequence[Image.Image] | torch.Tensor) -> list[Verdict]:
    """A verdict on each picture (PIL, 128 x 128; or a tensor [B, 3, 128, 128] in -1 ... 1)."""
    tensor = pictures if isinstance(pictures, torch.Tensor) else to_tensor([p.convert("RGB") for p in pictures])
    found: list[Verdict] = []
    for part in tensor.split(64):
        _, colours, places, manners = judge(part)
        for paint, place, manner in zip(
            colours.argmax(-1).tolist(), places.argmax(-1), manners.argmax(-1), strict=True
        ):
            present = {kind: PAINTS[i - 1] for kind, i in zip(KINDS, paint, strict=True) if i}
            found.append(Verdict(present, PLACES[place], MANNERS[manner]))
    return found

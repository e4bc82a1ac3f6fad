"""LPIPS (Zhang et al., 1801.03924) by torchmetrics: how different two pictures look."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ...attention.errors import ModelLoadError
from ..bench.training import to_tensor
from .cases import Case, opened

NETS = ("alex", "vgg", "squeeze")


class Lpips:
    """Distance to the truth, and of a stylised picture to its content.

    Args:
        model: "alex", "vgg" or "squeeze"; or "NET:FOLDER", where FOLDER/checkpoints holds torchvision's weights.
    """

    def __init__(self, model: str, device: Any) -> None:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        net, _, folder = model.partition(":")
        if net not in NETS:
            raise ModelLoadError(f"--scorer lpips={model}: must be {', '.join(NETS)}, or one of them and :FOLDER")
        if folder and not (Path(folder) / "checkpoints").is_dir():
            raise ModelLoadError(f"--scorer lpips={model}: {folder!r} has no folder checkpoints/")
        self.key, self.device, before = {"scorer": "lpips", "model": net}, device, torch.hub.get_dir()
        torch.hub.set_dir(folder or before)
        try:
            self.metric = LearnedPerceptualImagePatchSimilarity(net).to(device)
        except (OSError, RuntimeError, ValueError) as error:
            raise ModelLoadError(f"--scorer lpips={model}: {str(error)[:200]}") from None
        finally:
            torch.hub.set_dir(before)

    def score(self, case: Case, picture: Image.Image) -> dict[str, float]:
        pairs = {"truth": case.truth, "content picture": case.image if case.style is not None else None}
        return {f"lpips, {name} ↓": self._distance(picture, opened(other)) for name, other in pairs.items() if other}

    @torch.no_grad()
    def _distance(self, picture: Image.Image, other: Image.Image) -> float:
        tensors = [to_tensor([one.convert("RGB")]).to(self.device) for one in (picture, other.resize(picture.size))]
        return float(self.metric(*tensors))


def open_scorer(model: str, device: Any) -> Lpips:
    return Lpips(model, device)

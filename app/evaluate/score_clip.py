"""CLIPScore (Hessel et al., 2104.08718) by torchmetrics: how well picture and words, or two pictures, agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from ...attention.errors import ModelLoadError
from .agreement import Agreement


class _Features(torch.nn.Module):
    """Gives plain feature tensors, which torchmetrics expects and transformers 5 wraps."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return _tensor(self.model.get_image_features(pixels))

    def get_text_features(self, words: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return _tensor(self.model.get_text_features(words, mask))


def _tensor(found: Any) -> torch.Tensor:
    return found if isinstance(found, torch.Tensor) else found.pooler_output


class Clip(Agreement):
    """`max(100 cos, 0)` of CLIP's features.

    Args:
        model: a folder or Hub id of a `CLIPModel` with its processor (PickScore and other tuned ones are such too).
    """

    def __init__(self, model: str, device: Any) -> None:
        self.key, self.device = {"scorer": "clip", "model": model}, device
        try:
            self.parts = _Features(CLIPModel.from_pretrained(model).eval()), CLIPProcessor.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"--scorer clip={model}: no CLIP model there: {str(error)[:200]}") from None
        self.parts[0].to(device)

    @torch.no_grad()
    def agree(self, picture: Image.Image, other: str | Image.Image) -> float:
        from torchmetrics.functional.multimodal import clip_score

        pixels = self._pixels(picture)
        target: Any = other if isinstance(other, str) else self._pixels(other)
        return float(clip_score(pixels, target, model_name_or_path=lambda: self.parts))

    def _pixels(self, picture: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).to(self.device)


def open_scorer(model: str, device: Any) -> Clip:
    return Clip(model, device)

"""The same agreement by open_clip's models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ...attention.errors import ModelLoadError
from .agreement import Agreement


class OpenClip(Agreement):
    """`max(100 cos, 0)` of features of an open_clip model.

    Args:
        model: "ARCHITECTURE/PRETRAINED" as open_clip names them, "hf-hub:ID", or a folder that open_clip reads.
    """

    def __init__(self, model: str, device: Any) -> None:
        import open_clip

        self.key, self.device = {"scorer": "open_clip", "model": model}, device
        local = f"local-dir:{model}" if Path(model).is_dir() else model
        name, _, weights = (local, "", "") if ":" in local else local.partition("/")
        try:
            self.model, self.prepare = open_clip.create_model_from_pretrained(name, weights or None, device=device)
            self.words = open_clip.get_tokenizer(name)
        except (OSError, RuntimeError, ValueError) as error:
            raise ModelLoadError(f"--scorer open_clip={model}: {str(error)[:200]}") from None
        self.model.eval()

    @torch.no_grad()
    def agree(self, picture: Image.Image, other: str | Image.Image) -> float:
        features = [self._features(one) for one in (picture, other)]
        return max(0.0, 100 * float(torch.cosine_similarity(*features)))

    def _features(self, one: str | Image.Image) -> torch.Tensor:
        if isinstance(one, str):
            return self.model.encode_text(self.words([one]).to(self.device)).float()
        return self.model.encode_image(self.prepare(one.convert("RGB"))[None].to(self.device)).float()


def open_scorer(model: str, device: Any) -> OpenClip:
    return OpenClip(model, device)

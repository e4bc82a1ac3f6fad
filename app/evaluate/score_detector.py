"""What a detector of transformers finds: every concept, as often as GenEval asks; or what should be gone."""

from __future__ import annotations

from typing import Any

from PIL import Image

from ...attention.errors import ModelLoadError
from .cases import Case

SURE = 0.3
"""Boxes below this score are not counted (GenEval's threshold)."""


class Detector:
    """Counts boxes.

    Args:
        model: a folder or Hub id for a detection pipeline: open vocabulary (OWL, Grounding DINO) or of fixed classes
            (DETR and such; a word that is no class of it is never found).
    """

    def __init__(self, model: str, device: Any) -> None:
        from transformers import AutoConfig, pipeline
        from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES as OPEN

        self.key = {"scorer": "detector", "model": model}
        try:
            self.open = AutoConfig.from_pretrained(model).model_type in OPEN
            task: Any = "zero-shot-object-detection" if self.open else "object-detection"
            self.find: Any = pipeline(task, model=model, device=device)
        except (OSError, ValueError, KeyError) as error:
            raise ModelLoadError(f"--scorer detector={model}: no detector there: {str(error)[:200]}") from None

    def score(self, case: Case, picture: Image.Image) -> dict[str, bool]:
        wanted = case.counts or tuple((concept, 1) for concept in case.concepts)
        words = [*(word for word, _ in (*wanted, *case.limits)), *filter(None, (case.negative, case.gone))]
        seen = self.count(picture, list(dict.fromkeys(words))) if words else {}
        found = dict[str, bool]()
        if wanted and case.style is None:
            enough = all(seen[word] >= least for word, least in wanted)
            found["detector, all found ↑"] = enough and all(seen[word] < most for word, most in case.limits)
        for name, word in (("negative", case.negative), ("what was to go", case.gone)):
            if word:
                found[f"detector, {name} found ↓"] = seen[word] > 0
        return found

    def count(self, picture: Image.Image, words: list[str]) -> dict[str, int]:
        """Boxes of each word."""
        options = {"candidate_labels": words} if self.open else {}
        boxes = self.find(picture.convert("RGB"), threshold=SURE, **options)
        return {word: sum(box["label"].lower() == word.lower() for box in boxes) for word in words}


def open_scorer(model: str, device: Any) -> Detector:
    return Detector(model, device)

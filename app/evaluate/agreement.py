"""What every model of pictures and words says of a case: how far the picture agrees with what was asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from PIL import Image

from .cases import Case, opened


class Agreement(ABC):
    """A scorer by agreement, 0 ... 100, as CLIPScore has it."""

    key: Mapping[str, str]

    @abstractmethod
    def agree(self, picture: Image.Image, other: str | Image.Image) -> float:
        """How much a picture and a text, or two pictures, are of one thing."""

    def score(self, case: Case, picture: Image.Image) -> dict[str, float]:
        """To the prompt; the concept that agrees least (as Attend-and-Excite measures); to the negative; to the style,
        to the content and to the truth.
        """
        name, found = self.key["scorer"], dict[str, float]()
        if case.prompt:
            found[f"{name}, prompt ↑"] = self.agree(picture, case.prompt)
        if len(case.concepts) > 1 and case.prompt:
            found[f"{name}, least concept ↑"] = min(self.agree(picture, f"a photo of a {c}") for c in case.concepts)
        for told, word in (("negative", case.negative), ("what was to go", case.gone)):
            if word:
                found[f"{name}, {told} ↓"] = self.agree(picture, word)
        if case.style is not None:
            found[f"{name}, style picture ↑"] = self.agree(picture, opened(case.style))
            found[f"{name}, content picture ↑"] = self.agree(picture, opened(case.image))
        if case.truth is not None:
            found[f"{name}, truth ↑"] = self.agree(picture, opened(case.truth))
        return found

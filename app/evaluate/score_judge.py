"""The picture book's judge as a scorer: for pictures of the embedded model, which are 128 x 128."""

from __future__ import annotations

from typing import Any

from PIL import Image

from ..bench.judge import load_judge, look
from ..bench.negative_effect import shows
from .cases import Case


class JudgeScorer:
    """Whether every thing is there in its colour, the negative absent, the thing gone."""

    key = {"scorer": "judge"}

    def __init__(self) -> None:
        self.judge = load_judge()

    def score(self, case: Case, picture: Image.Image) -> dict[str, bool]:
        [seen] = look(self.judge, [picture.resize((128, 128))])
        found = dict[str, bool]()
        if case.concepts:
            found["judge, every object ↑"] = set(case.concepts) <= set(seen.colours)
        if case.attributes:
            found["judge, every object in its colour ↑"] = all(seen.colours.get(k) == c for k, c in case.attributes)
        if case.negative:
            found["judge, shows the negative ↓"] = shows(seen, case.negative)
        if case.gone:
            found["judge, still sees it ↓"] = case.gone in seen.colours
        return found


def open_scorer(model: None, device: Any) -> JudgeScorer:
    return JudgeScorer()

"""Plugins as they are written down: paths become pictures through the one safe loader."""

from __future__ import annotations

import pytest
from PIL import Image

from diffgraft.app.errors import ImageError
from diffgraft.app.techniques import build

BALL, STAR = (0, 0, 16, 16), (16, 16, 32, 32)


@pytest.fixture
def folder(tmp_path):
    for name, box in (("ball", BALL), ("star", STAR)):
        mask = Image.new("L", (32, 32))
        mask.paste(255, box)
        mask.save(tmp_path / f"{name}.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "eps.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n")
    return tmp_path


@pytest.mark.parametrize("layout", [["ball.png", "star.png"], {"star": "star.png", "ball": "ball.png"}])
def test_paths_start_from_the_folder_wherever_they_stand(folder, layout):
    plugin = build({"plugin": "AttentionSegregation", "concepts": ["ball", "star"], "layout": layout}, folder)
    ball, star = plugin.layout if isinstance(layout, list) else (plugin.layout[name] for name in ("ball", "star"))
    assert ball.getbbox() == BALL and star.getbbox() == STAR
    union = build({"plugin": "SelfAttentionRedirection", "mask": ["ball.png", "star.png"]}, folder)
    assert type(union).__name__ == "SelfAttentionRedirection"
    auto = build({"plugin": "AttentionSegregation", "concepts": ["ball", "star"], "layout": "auto"}, folder)
    assert auto.layout == "auto"


@pytest.mark.parametrize("name", ["text.png", "eps.png", "missing.png", "/dev/zero", "https://host/a.png"])
@pytest.mark.parametrize(
    "spec",
    [
        {"plugin": "AttentionSegregation", "concepts": ["ball"], "layout": ["PATH"]},
        {"plugin": "AttentionDistillation", "style": "ball.png", "content": "PATH"},
        {"plugin": "StyleInjection", "style": ["PATH"]},
        {"plugin": "SelfAttentionRedirection", "mask": ["PATH", "ball.png"]},
    ],
    ids=lambda spec: spec["plugin"],
)
def test_no_path_goes_round_the_safe_loader(folder, spec, name):
    def put(value):
        return [put(one) for one in value] if isinstance(value, list) else name if value == "PATH" else value

    with pytest.raises(ImageError):
        build({key: put(value) for key, value in spec.items()}, folder)

"""The documents: their Python runs as it stands, their links lead somewhere, the README stays short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("[!.]*/**/*.md")]
    if "outputs" not in path.parts
)
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
ELSEWHERE = ("pipelines/RECIPES.md",)  # test_recipes.py runs it: it opens checkpoints
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def text(name):
    return (ROOT / name).read_text("utf-8")


def anchors(name):
    """Of every heading, as code hosts make them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text(name), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", [n for n in DOCUMENTS if BLOCK.search(text(n)) and n not in ELSEWHERE])
def test_the_blocks_run_in_order(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    names = {"__name__": "document"}
    for number, block in enumerate(BLOCK.findall(text(name))):
        exec(compile(block, f"{name} block {number}", "exec"), names)
        assert "report()" not in block or "layers edited" in capsys.readouterr().out


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_links_lead_somewhere(name):
    for link in LINK.findall(text(name)):
        if link.startswith(("https://", "http://127.0.0.1")):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert target.exists(), f"{name}: {link}"
        if anchor:
            assert anchor in anchors(target.relative_to(ROOT)), f"{name}: {link}"


def test_the_readme_is_read_in_ten_minutes():
    readme = text("README.md")
    assert len(readme.splitlines()) <= 200 and len(readme.encode()) <= 16 * 1024


def test_every_folder_explains_itself():
    for folder in ("plugins", "pipelines", "attention", "app", "app/bench", "app/evaluate", "tests"):
        assert f"{folder}/README.md" in DOCUMENTS

"""Names, whole files, and what a picture says about itself."""

from __future__ import annotations

import io
import json
import os
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffgraft.app.errors import MetadataError, OutputError
from diffgraft.app.metadata import encode_png, read_settings
from diffgraft.app.outputs import LONGEST_NAME, output_folder, safe_name, same_file_key, write_whole

SETTINGS = {
    "task": "generate",
    "prompt": "a röd ball, \u202eemoji 🎈\nsecond line",
    "negative_prompt": "green",
    "seed": 7,
    "steps": 4,
    "guidance": 1.0,
    "width": 32,
    "height": 24,
    "model": "picturebook",
    "scheduler": "DDIMScheduler",
    "plugins": [{"plugin": "NegativeAway", "negative": "green"}],
}
PICTURE = Image.new("RGB", (32, 24), "orange")


@pytest.mark.parametrize("name", ["7", "row-7", "a red ball", "été", "x.y", "A_1 (2)", "猫"])
def test_ordinary_names_stay(name):
    assert safe_name(name) == unicodedata.normalize("NFC", name)


BAD = [
    "../../x",
    "/etc/passwd",
    "..",
    ".",
    ".hidden",
    "~",
    "a/b",
    "C:\\x",
    "\\\\host\\share",
    "a:",
    "CON",
    "nul.txt",
    "dot.",
]
BAD += [
    "a\0b",
    "a\nb",
    "\u202etxt.exe",
    "x" * 300,
    "é" * 120,
    " lead",
    "",
    "contact-sheet",
    "-rf",
    "<script>",
    "a*?",
    "\ud800",
]


@pytest.mark.parametrize("name", BAD)
def test_dangerous_names_become_a_slug_with_a_hash(name, tmp_path):
    safe = safe_name(name)
    assert safe != name and len(safe.encode()) <= LONGEST_NAME
    path = (tmp_path / f"{safe}.png").resolve()
    assert path.parent == tmp_path.resolve()
    path.write_bytes(b"")


@given(st.text(max_size=300))
def test_any_text_is_one_plain_file_name(name):
    safe = safe_name(name)
    assert os.path.basename(safe) == safe and safe not in ("", ".", "..") and "\0" not in safe
    assert len(safe.encode()) <= LONGEST_NAME and safe == safe_name(name) and not safe.startswith((".", "-", "~"))


def test_names_that_are_one_file_on_some_systems():
    assert same_file_key("Ball") == same_file_key("bALL")
    assert same_file_key("é") == same_file_key("e\u0301")
    assert same_file_key("a") != same_file_key("b")


def test_a_write_is_whole_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    write_whole(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="disk is full"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_output_folder(tmp_path):
    assert output_folder(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_bytes(b"")
    for bad in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="is a file"):
            output_folder(bad)
    with pytest.raises(OutputError, match="nothing can be written"):
        output_folder("/proc/nothing")


def test_settings_come_back(tmp_path):
    data = encode_png(PICTURE, SETTINGS)
    assert data == encode_png(PICTURE, SETTINGS)
    (tmp_path / "a.png").write_bytes(data)
    found = read_settings(tmp_path / "a.png")
    assert found == read_settings(data)
    assert {"diffgraft", "diffusers", "torch"} == set(found.pop("versions"))
    assert found == SETTINGS


def test_text_that_other_tools_read():
    info = Image.open(io.BytesIO(encode_png(PICTURE, SETTINGS))).info
    lines = info["parameters"].split("\n")
    assert "\n".join(lines[:2]) == SETTINGS["prompt"] and lines[2] == "Negative prompt: green"
    assert lines[3].startswith(
        "Steps: 4, Sampler: DDIMScheduler, CFG scale: 1.0, Seed: 7, Size: 32x24, Model: picturebook"
    )
    assert "digitalsourcetype/trainedAlgorithmicMedia" in info["XML:com.adobe.xmp"]
    edited = Image.open(io.BytesIO(encode_png(PICTURE, SETTINGS | {"task": "erase"}))).info
    assert "compositeWithTrainedAlgorithmicMedia" in edited["XML:com.adobe.xmp"]


def test_no_metadata_and_nothing_of_the_source():
    picture = PICTURE.copy()
    picture.info.update(parameters="of the source", exif=b"Exif")
    image = Image.open(io.BytesIO(encode_png(picture, None)))
    assert image.info == {}
    assert b"of the source" not in encode_png(picture, SETTINGS)


def test_objects_are_named_without_their_address():
    found = read_settings(encode_png(PICTURE, {"plugins": [{"plugin": "X", "mask": PICTURE}]}))
    assert "0x" not in json.dumps(found) and "size=32x24" in json.dumps(found)


@pytest.mark.parametrize("data", [b"junk", encode_png(PICTURE, None)])
def test_pictures_without_settings(data):
    with pytest.raises(MetadataError):
        read_settings(data)

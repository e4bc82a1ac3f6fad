"""Tables as people's programs write them come in whole or not at all; what goes out is read by `datasets`."""

from __future__ import annotations

import json
import unicodedata

import datasets
import numpy as np
import pytest
import tiny
from PIL import Image

from diffgraft.app.batch.manifest import read_manifest
from diffgraft.app.batch.plan import Setup
from diffgraft.app.batch.run import Options, run_batch
from diffgraft.app.errors import ImageError, ManifestError
from diffgraft.app.tasks import matching, pictures_of

FIELDS = ["id", "prompt", "steps", "guidance"]
ROWS = [["a", "a red ball, night", "4", "2.5"], ["b", "étoile; bleue", "", ""], ["c", 'a "star"', "9", "1"]]


def csv(separator=",", header=FIELDS, end="\n", rows=ROWS):
    def cell(text):
        return '"' + text.replace('"', '""') + '"' if {'"', ",", ";", separator} & set(text) else text

    return "".join(separator.join(map(cell, line)) + end for line in [header, *rows])


@pytest.fixture
def write(tmp_path):
    def write(text, name="jobs.csv"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def read(path, **defaults):
    manifest = read_manifest(path, defaults)
    assert not manifest.bad, manifest.bad
    return [(row.id, row.prompt, row.steps, row.guidance) for _, row in manifest.rows]


EXPECTED = [("a", "a red ball, night", 4, 2.5), ("b", "étoile; bleue", None, None), ("c", 'a "star"', 9, 1.0)]


@pytest.mark.parametrize(
    "text",
    [
        csv(),
        csv(";"),
        csv("\t"),
        csv("|"),
        csv(end="\r\n"),
        "sep=;\r\n" + csv(";", end="\r\n"),
        "sep=,\n" + csv(),
        "\ufeff" + csv(";"),
        csv(header=[" id ", "prompt ", " steps", "guidance"]),
        csv().replace("a,", "a , ", 1).replace("id,prompt", "id, prompt", 1),
    ],
    ids=["commas", "semicolons", "tabs", "bars", "CRLF", "sep=;", "sep=,", "BOM", "blanks in the header", "blanks"],
)
def test_what_a_spreadsheet_writes(write, text):
    assert read(write(text)) == EXPECTED


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig"])
@pytest.mark.parametrize("name", ["jobs.csv", "jobs.jsonl", "jobs.json", "jobs.yaml"])
def test_every_unicode_file(write, encoding, name):
    rows = [dict(zip(FIELDS, row, strict=True)) for row in EXPECTED]
    as_json = json.dumps(rows, ensure_ascii=False)
    text = {
        "jobs.csv": csv(),
        "jobs.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        "jobs.json": as_json,
        "jobs.yaml": as_json,
    }[name]
    assert read(write(text.encode(encoding), name)) == EXPECTED


@pytest.mark.parametrize("name", ["jobs.csv", "jobs.yaml", "jobs.json"])
def test_another_encoding_is_named(write, name):
    text = csv() if name.endswith("csv") else '[{"prompt": "a"},\n {"prompt": "étoile"}]'
    with pytest.raises(ManifestError, match=rf"{name}:[23]: not UTF-8.*0xe9 \('é' if this is Windows-1252\)"):
        read_manifest(write(text.encode("cp1252"), name), {})


def test_a_header_that_is_not_ours_names_what_was_found(write):
    with pytest.raises(ManifestError, match="unknown field 'id;promt'.*read with commas; there are semicolons in it"):
        read_manifest(write("id;promt\na;b\n"), {})


@pytest.mark.parametrize("at", [2, 150, 303])
def test_an_unclosed_quote_makes_nothing(write, at):
    lines = ["id,prompt", *(f'r{i},"a ball, {i}"' if i % 3 else f"r{i},a ball {i}" for i in range(303))]
    lines[at - 1] = f'r{at - 2},"a ball'
    with pytest.raises(ManifestError, match=rf"jobs\.csv:{at}: a quote is opened and not closed.*lines {at} to "):
        read_manifest(write("\n".join(lines)), {})


@pytest.mark.parametrize("field", ["steps", "guidance", "negative", "seed", "n", "model", "plugins", "settings", "id"])
def test_null_is_not_said(write, field):
    row = json.dumps({"prompt": "a", field: None})
    default = {"steps": 3, "guidance": 2.0, "negative": "red", "seed": 4, "n": 2, "model": "m", "plugins": []}
    default |= {"settings": {}}
    for name, text in (
        ("a.jsonl", row),
        ("a.json", f"[{row}]"),
        ("a.yaml", f"- {row}"),
        ("a.csv", f"prompt,{field}\na,\n"),
    ):
        given = {} if field == "id" else {field: default[field]}
        [(line, found)] = read_manifest(write(text, name), given).rows
        assert getattr(found, field) == (str(line) if field == "id" else default[field])


def test_null_is_not_said_in_settings_and_defaults(write):
    row = {"task": "erase", "image": "a", "mask": "b", "prompt": None, "content": None, "settings": {"grow": None}}
    [(_, found)] = read_manifest(write(json.dumps(row), "a.jsonl"), {"steps": None}).rows
    assert found.settings == {} and found.steps is None


def test_an_array_in_a_json_file(write):
    text = '[\n  {"prompt": "a"},\n\n  {"prompt": "b",\n   "steps": 2}, {"prompt": NaN}, 7, {"id": "a", "id": "b"}\n]\n'
    manifest = read_manifest(write(text, "a.json"), {})
    assert [(line, row.prompt, row.steps) for line, row in manifest.rows] == [(2, "a", None), (4, "b", 2)]
    assert [(bad.line, bad.message) for bad in manifest.bad] == [
        (5, "NaN is not a number that can be used"),
        (5, "a row is an object with named fields, not int"),
        (5, "a field is given twice"),
    ]
    lines = write('{"prompt": "a"}\n{"prompt": "b"}\n', "b.json")
    assert len(read_manifest(lines, {}).rows) == 2


def test_letters_in_two_halves_are_whole_in_every_format(write):
    row = json.dumps({"prompt": "a \U0001f388 ball"})
    for name, text in (("a.jsonl", row), ("a.json", f"[{row}]"), ("a.yaml", f"- {row}")):
        assert read_manifest(write(text, name), {}).rows[0][1].prompt == "a \U0001f388 ball"


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('[{"prompt": "a"},\n{"prompt": "b"', 2),
        ('[{"prompt": "a"}\n{"prompt": "b"}]', 2),
        ("[{},\n{}\n", 3),
        ("[1] x", 1),
    ],
)
def test_an_array_that_does_not_end_makes_nothing(write, text, where):
    with pytest.raises(ManifestError, match=rf"a\.json:{where}: not JSON"):
        read_manifest(write(text, "a.json"), {})


def test_what_a_mac_leaves_beside_pictures(tmp_path):
    images, masks = tmp_path / "images", tmp_path / "masks"
    for folder, form in ((images, "NFC"), (masks, "NFD")):
        folder.mkdir()
        for name in ("café.png", "b.png"):
            Image.new("L", (16, 16)).save(folder / unicodedata.normalize(form, name))
        (folder / "._b.png").write_bytes(b"\0\5\x16\7")
        (folder / ".hidden.jpg").write_bytes(b"")
        (folder / "folder.png").mkdir()
    pairs = matching(images, masks, "mask")
    assert [unicodedata.normalize("NFC", mask.name) for _, mask in pairs] == ["b.png", "café.png"]
    assert len(pictures_of(images)) == 2
    Image.new("L", (16, 16)).save(masks / "b.bmp")
    with pytest.raises(ImageError, match="which is the mask of b.png"):
        matching(images, masks, "mask")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with rows of every task."""
    root = tmp_path_factory.mktemp("run")
    tiny.sd15().save_pretrained(root / "model")
    Image.effect_mandelbrot((32, 32), (-2, -1, 1, 1), 20).convert("RGB").save(root / "a.png")
    mask = np.zeros((32, 32), np.uint8)
    mask[8:16, 8:16] = 255
    Image.fromarray(mask).save(root / "mask.png")
    away = [{"plugin": "NegativeAway", "negative": negative} for negative in ("red", {"red": 1.0}, ["blue"])]
    rows = [
        {"id": f"g{i}", "prompt": "a ball", "plugins": [spec], "width": 32, "height": 32} for i, spec in enumerate(away)
    ]
    rows += [
        {"id": "e", "task": "erase", "image": "a.png", "mask": "mask.png", "settings": {"grow": 1, "layers": "up"}},
        {"id": "f", "task": "erase", "image": "a.png", "mask": "mask.png", "settings": {"layers": ["up", "mid"]}},
        {"id": "s", "task": "stylize", "content": "a.png", "style": "a.png", "settings": {"iterations": 0}},
    ]
    (root / "jobs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    setup = Setup(out=root / "made", base=root, model=str(root / "model"), device="cpu")
    options = Options(defaults={"steps": 2, "guidance": 1.0}, quiet=True)
    code, summary = run_batch(root / "jobs.jsonl", setup, options)
    assert code == 0, summary
    return root / "made"


def test_image_folder_reads_a_run(made, tmp_path):
    table = datasets.load_dataset("imagefolder", data_dir=str(made), cache_dir=str(tmp_path), split="train")
    assert len(table) == 6 and {"image", "input_image", "input_mask", "input_content", "seed"} <= set(
        table.column_names
    )
    for row in table:
        with Image.open(made / f"{row['id']}.png") as expected:
            assert np.array_equal(row["image"], expected)
        assert row["input_image"] == ("a.png" if row["task"] == "erase" else None)
    assert [json.loads(row["plugins"])[0]["negative"] for row in table if row["id"].startswith("g")] == [
        "red",
        {"red": 1.0},
        ["blue"],
    ]
    assert json.loads(next(row for row in table if row["id"] == "f")["settings"]) == {"layers": ["up", "mid"]}


def test_results_keep_the_structure(made):
    records = {record["id"]: record for record in map(json.loads, (made / "results.jsonl").read_text().splitlines())}
    assert records["g1"]["pictures"][0]["plugins"][0]["negative"] == {"red": 1.0}
    assert records["e"]["pictures"][0]["image"] == "a.png" and records["e"]["pictures"][0]["grow"] == 1

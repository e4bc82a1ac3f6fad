"""The command line as a person meets it: what it prints, writes and returns."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import tiny
from PIL import Image
from typer.testing import CliRunner

import diffgraft
from diffgraft.app import extras
from diffgraft.app.cli import app
from diffgraft.app.errors import MissingExtraError
from diffgraft.app.metadata import read_settings


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny.sd15().save_pretrained(path)
    return str(path)


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def call(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert "Traceback" not in result.output
    return result


def generate(model, *words):
    return call("generate", *words, "--model", model, "--device", "cpu", "--steps", 1, "--guidance", 1, "-q")


def test_help_names_every_command():
    said = call("--help").output
    assert all(name in said for name in ("generate", "erase", "stylize", "batch", "demo", "show"))
    assert call("--version").output.strip() == diffgraft.__version__
    assert call().exit_code == 2 or "Usage" in call().output


def test_one_picture_and_what_it_says(model, tmp_path):
    result = generate(model, "a red ball", "--negative", "blue", "--seed", 7)
    assert result.exit_code == 0 and result.stdout == "out.png\n"
    said = read_settings("out.png")
    assert (said["prompt"], said["seed"], said["steps"]) == ("a red ball", 7, 1)
    assert said["plugins"][0]["plugin"] == "NegativeAway" and said["plugins"][0]["negative"] == "blue"
    assert str(tmp_path) not in json.dumps(said) and said["model"] in model
    assert json.loads(call("show", "out.png").stdout) == said


def test_several_pictures_are_the_single_ones(model):
    assert (
        generate(model, "a cat", "--seed", 3, "-n", 2, "--out", "made/a.png").stdout == "made/a-0.png\nmade/a-1.png\n"
    )
    generate(model, "a cat", "--seed", 4, "--out", "b.png")
    assert Image.open("made/a-1.png").tobytes() == Image.open("b.png").tobytes()
    generate(model, "a cat", "--seed", 4, "--out", "c.png", "--no-metadata")
    assert Image.open("c.png").info == {} and Image.open("c.png").tobytes() == Image.open("b.png").tobytes()


BAD = {
    ("a ball", "--steps", "0"): (2, "steps=0"),
    ("a ball", "--steps", "many"): (2, "--steps"),
    ("a ball", "--seed", "3.5"): (2, "--seed"),
    ("a ball", "--seed", "99999999999999999999"): (2, "2^63-1"),
    ("a ball", "--guidance", "nan"): (2, "finite"),
    ("a ball", "--width", "33"): (2, "multiples of"),
    ("a ball", "-n", "0"): (2, "-n"),
    ("a ball", "--out", "a.jpg"): (2, "written as .png"),
    ("a ball", "--plugin", "NegativAway"): (2, "did you mean 'NegativeAway'"),
    ("a ball", "--plugin", '{"plugin": "NegativeAway", "negative": "x", "scal": 2}'): (2, "did you mean 'scale'"),
    ("a ball", "--plugin", '{"plugin": "NegativeAway"'): (2, "is not JSON"),
    ("a ball", "--plugin", "[1]"): (2, "no plugin"),
    ("a ball", "--device", "abacus"): (2, "device 'abacus'"),
    ("a ball", "--dtype", "int3"): (2, "dtype 'int3'"),
    ("a ball", "--model", "/no/such/model"): (3, "does not exist"),
    ("a ball", "--model", "owner/no-such-model"): (3, "Hub cannot be reached"),
    ("a ball", "--model", "weights.ckpt"): (3, "is a pickle"),
    ("a ball", "--out", "/proc/x/a.png"): (3, "nothing can be written"),
    (): (2, "prompt"),
}


@pytest.mark.parametrize("words", BAD)
def test_a_mistake_is_one_line_and_its_exit_code(model, words):
    code, message = BAD[words]
    options = {"--model": model, "--device": "cpu", "--steps": "1"}
    given = [part for name, value in options.items() if name not in words for part in (name, value)]
    result = call("generate", *words, *given, "-q")
    assert result.exit_code == code
    assert message in re.sub(r"\s+", " ", result.stderr) and not result.stdout
    if "Usage" not in result.stderr:
        assert result.stderr.startswith("diffgraft: error: ") and result.stderr.count("\n") == 1


def pictures(folder, mask_suffix=".png"):
    for part in ("in", "masks"):
        (folder / part).mkdir()
    for name, size in (("a.png", (64, 64)), ("b.jpg", (48, 64))):
        Image.effect_mandelbrot(size, (-2, -1, 1, 1), 20).convert("RGB").save(folder / "in" / name)
        mask = Image.new("L", size)
        mask.paste(255, (16, 16, 32, 32))
        mask.save((folder / "masks" / name).with_suffix(mask_suffix))


def edit(model, *words):
    return call(*words, "--model", model, "--device", "cpu", "--steps", 2, "--seed", 1, "-q")


def test_erase_one_and_a_folder(model, tmp_path):
    pictures(tmp_path)
    assert edit(model, "erase", "in/a.png", "masks/a.png", "-n", 2).stdout == "out-0.png\nout-1.png\n"
    said = read_settings("out-1.png")
    assert (said["task"], said["seed"], said["steps"]) == ("erase", 2, 2)
    assert Image.open("out-0.png").size == (64, 64)
    assert edit(model, "erase", "in", "--mask", "masks", "--out", "made").stdout == "made/a.png\nmade/b.png\n"
    assert Image.open("made/a.png").tobytes() == Image.open("out-0.png").tobytes()
    (tmp_path / "masks" / "b.png").unlink()
    result = edit(model, "erase", "in", "masks", "--out", "made")
    assert result.exit_code == 2 and "no mask of the same name for b.jpg" in result.stderr


def test_stylize_one_and_a_folder(model, tmp_path):
    pictures(tmp_path)
    assert edit(model, "stylize", "in/a.png", "in/b.jpg", "--strength", 0.5).stdout == "out.png\n"
    said = read_settings("out.png")
    assert (said["task"], said["strength"]) == ("stylize", 0.5) and Image.open("out.png").size == (64, 64)
    assert edit(model, "stylize", "in", "in/a.png", "--out", "made").stdout == "made/a.png\nmade/b.png\n"


def test_edits_that_cannot_be_made(model, tmp_path):
    pictures(tmp_path)
    Image.new("L", (64, 64)).save("empty.png")
    for words, code, message in [
        (["erase", "in/a.png"], 2, "give one mask"),
        (["erase", "in/a.png", "empty.png", "--mask", "empty.png"], 2, "give one mask"),
        (["erase", "in/a.png", "empty.png"], 2, "nothing to remove"),
        (["erase", "in/a.png", "masks/b.png"], 2, "another aspect"),
        (["erase", "no.png", "masks/b.png"], 2, "does not exist"),
        (["erase", "in/a.png", "https://host/mask.png"], 2, "does not exist"),
        (["stylize", "in/a.png", "in/b.jpg", "--strength", "7"], 2, "strength"),
        (["stylize", "masks", "in/b.jpg", "--out", "in/a.png"], 3, "is a file"),
        (["erase", "/proc/self/task", "masks/a.png", "--out", "x"], 2, "holds no pictures"),
    ]:
        result = edit(model, *words)
        assert (result.exit_code, result.stderr.count("\n")) == (code, 1) and message in result.stderr, result.stderr


def test_show_on_a_picture_without_settings():
    Image.new("RGB", (32, 32)).save("plain.png")
    result = call("show", "plain.png")
    assert result.exit_code == 2 and "carries no diffgraft settings" in result.stderr
    assert call("show", "missing.png").exit_code == 2


def test_a_missing_extra_names_the_command_that_installs_it():
    with pytest.raises(MissingExtraError, match=r'pip install "diffgraft\[demo\]"'):
        extras.need("a_module_that_is_not_there", "demo")


def test_batch(model):
    with open("jobs.jsonl", "w") as file:
        file.write('{"prompt": "a ball"}\n{"prompt": "a star", "stepz": 1}\n')
    words = ["batch", "jobs.jsonl", "--out", "made", "--model", model, "--device", "cpu", "--steps", 1, "--guidance", 1]
    checked = call(*words, "--dry-run", "--json")
    assert checked.exit_code == 2 and json.loads(checked.stdout)["errors"] == 1
    assert "jobs.jsonl:2: unknown field 'stepz', did you mean 'steps'?" in checked.stderr
    made = call(*words, "--json")
    assert made.exit_code == 1 and json.loads(made.stdout)["done"] == 1
    for words, message in [
        (["batch", "no.jsonl", "--out", "x"], "cannot be read"),
        (["batch", "jobs.jsonl", "--out", "jobs.jsonl"], "is a file"),
        (["batch", "jobs.jsonl", "--out", "x", "--engine", "steam"], "must be local, processes, ray"),
        (["batch", "jobs.jsonl", "--out", "x", "--shard", "5/2"], "write i/n"),
        (["batch", "jobs.jsonl", "--out", "x", "--set", "steps"], "NAME=VALUE"),
    ]:
        result = call(*words)
        assert result.exit_code in (2, 3) and message in result.stderr and result.stderr.count("\n") == 1


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
LATIN = {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "cp1252"}


@pytest.mark.skipif(os.name == "nt", reason="file names are bytes on Unix only")
@pytest.mark.parametrize("locale", [ASCII, LATIN], ids=["C", "cp1252"])
def test_any_console_and_any_file_name(model, tmp_path, locale):
    """The manifest is read as UTF-8 whatever the locale is, and nothing that is printed stops a command."""
    row = {"prompt": "a ball", "id": "\u732b", "negative_prompt": "\u732b \U0001f388"}
    (tmp_path / "jobs.jsonl").write_text(json.dumps(row, ensure_ascii=False) + '\n{"stepz": "\u732b"}\n', "utf-8")
    pictures(tmp_path)
    (tmp_path / "in" / "b.jpg").unlink()
    os.rename(os.fsencode(tmp_path / "in" / "a.png"), os.fsencode(tmp_path / "in") + b"/\xff-\xe7\x8c\xab.png")
    ours = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))} | ours | locale

    def run(*words):
        command = [sys.executable, "-m", "diffgraft.app.cli", *words]
        done = subprocess.run(command, capture_output=True, env=env, timeout=250)
        assert b"Unicode" not in done.stderr and b"Traceback" not in done.stderr, done.stderr
        return done

    quick = ["--model", model, "--device", "cpu", "--steps", "2", "-q"]
    assert run("batch", "jobs.jsonl", "--out", "made", "--guidance", "1", *quick).returncode == 1
    [made] = [path for path in (tmp_path / "made").glob("*.png") if "contact" not in path.name]
    shown = run("show", str(made))
    assert json.loads(shown.stdout.decode("utf-8"))["negative_prompt"] == row["negative_prompt"]
    erased = run("erase", "in", "masks/a.png", "--out", "erased", *quick)
    assert erased.returncode == 0 and erased.stdout.startswith(b"erased/")
    assert os.listdir(os.fsencode(tmp_path / "erased")) == [b"\xff-\xe7\x8c\xab.png"]


def test_every_line_of_a_manifest_that_cannot_be_used():
    with open("jobs.jsonl", "w") as file:
        file.write('{"prompt": "a", "id": "x"}\n' * 3)
    result = call("batch", "jobs.jsonl", "--out", "made")
    assert result.exit_code == 2 and result.stderr.count("already on line 1") == 2

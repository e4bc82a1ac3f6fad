"""The package as it is shipped: its public names, what importing it costs, and the wheel."""

from __future__ import annotations

import ast
import json
import os
import re
import statistics
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import diffgraft
from diffgraft.plugins import defaults

ROOT = Path(diffgraft.__file__).parent
INVENTORY = Path(__file__).parent / "api.json"


def run(*words, **options):
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_public_names_are_those_of_the_inventory():
    """A name that vanishes breaks somebody (deprecation rule: CONTRIBUTING.md); a new one is added to the inventory."""
    expected = json.loads(INVENTORY.read_text())
    assert sorted(diffgraft.__all__) == expected
    for name in expected:
        assert getattr(diffgraft, name) is not None and name in dir(diffgraft)


def test_there_is_nothing_else():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        diffgraft.nothing  # noqa: B018


def test_importing_it_costs_next_to_nothing_beyond_torch():
    code = (
        "import time, torch; start = time.perf_counter(); import diffgraft; spent = time.perf_counter() - start\n"
        "import json, sys; print(json.dumps([spent, torch.cuda.is_initialized(), sorted(sys.modules)]))"
    )
    spent, cuda, modules = json.loads(run(sys.executable, "-c", code))
    assert spent < 1.5 and not cuda
    assert not {"diffusers", "transformers", "gradio", "ray", "pydantic", "matplotlib"} & set(modules)


@pytest.fixture(scope="module")
def trees():
    """The syntax of each file of the package."""
    files = [path for room in ("attention", "plugins", "pipelines", "app") for path in (ROOT / room).rglob("*.py")]
    return {path: ast.parse(path.read_text("utf-8")) for path in files}


def _imports(path, tree):
    """Modules of the package that a file imports, as paths without suffix; in functions and for types only, too."""
    home = ("diffgraft", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".") for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*home[: len(home) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            yield from ([*base, name.name] for name in node.names)


def _module(parts):
    """The file of the package that a dotted name leads to; None for others'."""
    for length in range(len(parts), 1, -1):
        path = ROOT.joinpath(*parts[1:length])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if parts[0] == "diffgraft" and file.is_file():
                return file
    return None


@pytest.fixture(scope="module")
def imports(trees):
    """Of each file of the package, the files that it imports."""
    return {
        path: {file for parts in _imports(path, tree) if (file := _module(parts)) and file != path}
        for path, tree in trees.items()
    }


def test_no_two_files_import_each_other_in_a_circle(imports):
    left = dict(imports)
    while free := [path for path, seen in left.items() if not seen & left.keys()]:
        for path in free:
            del left[path]
    assert not left, sorted(str(path.relative_to(ROOT)) for path in left)


def _length(function):
    """Lines of a function, the docstrings in it not counted."""
    holders = [x for x in ast.walk(function) if isinstance(x, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    texts = [x.body[0] for x in holders if ast.get_docstring(x, clean=False) is not None]
    return function.end_lineno - function.lineno + 1 - sum(text.end_lineno - text.lineno + 1 for text in texts)


def test_functions_and_files_are_short(trees):
    """Functions hardly ever over 40 lines and none over 60, files at the median under 130."""
    functions = {
        f"{path.relative_to(ROOT)} {node.name}": _length(node)
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert not {name: lines for name, lines in functions.items() if lines > 60}
    assert sum(lines > 40 for lines in functions.values()) <= len(functions) / 200
    files = {str(path.relative_to(ROOT)): path.read_text("utf-8").count("\n") for path in trees}
    assert statistics.median(files.values()) < 130
    assert not {name: lines for name, lines in files.items() if lines > 450}


def test_numbers_by_family_stand_in_one_table():
    """Nothing else asks for a family's name in order to choose a number."""
    asking = r"\bfamily\s*(==|!=|in\b)|\"picturebook\""
    rooms = (ROOT / "plugins", ROOT / "pipelines" / "tasks", ROOT / "pipelines" / "grafting")
    found = {p.name for room in rooms for p in room.glob("*.py") if re.search(asking, p.read_text(encoding="utf-8"))}
    assert found == {"defaults.py"}
    tables = [*defaults.DEFAULTS.values(), *defaults.NUMBERS.values(), *defaults.CHOICES.values()]
    assert all("other" in rows for rows in tables) and defaults.measured("attention_masks: power", "picturebook") == 1
    assert defaults.measured("stylize: strength of styleid", "sdxl") == 1.0


def test_arrows_go_down_only(imports):
    """app -> pipelines -> plugins -> attention, and inside pipelines/ tasks -> grafting -> families."""
    rooms = ["attention", "plugins", "pipelines/families", "pipelines/grafting", "pipelines/tasks", "pipelines", "app"]
    assert all((ROOT / room).is_dir() for room in rooms) and sum(map(len, imports.values())) > 300

    def level(path):
        return next(i for i, room in enumerate(rooms) if path.is_relative_to(ROOT / room))

    upward = [(path, other) for path, seen in imports.items() for other in seen if level(other) > level(path)]
    assert not upward


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of what git would give a stranger (and of files that are not committed yet)."""
    source = tmp_path_factory.mktemp("source")
    names = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT).split("\0")
    for name in filter(lambda name: name and (ROOT / name).is_file(), names):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(ROOT / name, target) if _same_device(source) else target.write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", source / "dist", source)
    [path] = (source / "dist").glob("*.whl")
    return path


def _same_device(path):
    return os.stat(path).st_dev == os.stat(ROOT).st_dev


def test_the_wheel_holds_the_package_and_the_model_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    inside = [name for name in names if not name.startswith("diffgraft-")]
    assert all(name.startswith("diffgraft/") for name in inside)
    assert "diffgraft/py.typed" in names and "diffgraft/assets/picturebook/model_index.json" in names
    assert not [name for name in inside if "/tests/" in name or "/.venv/" in name or name.endswith((".ipynb", ".log"))]
    packaged = {
        f"diffgraft/{p.relative_to(ROOT)}"
        for d in ("attention", "plugins", "pipelines", "app")
        for p in (ROOT / d).rglob("*.py")
    }
    assert packaged <= set(names)
    assert wheel.name.startswith(f"diffgraft-{diffgraft.__version__}-py3")


def test_an_index_takes_the_wheel(wheel):
    assert "PASSED" in run(sys.executable, "-m", "twine", "check", "--strict", wheel)
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        said = archive.read(name).decode()
    assert "dg.graft(pipe" in said and "](assets/" not in said  # text, and no picture that an index could not show


def test_the_wheel_works_where_there_is_no_checkout(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "env")}))
    run(sys.executable, "-m", "pip", "--quiet", "install", "--no-deps", "--no-index", "--target", site, wheel)
    # torch and the rest are taken from the environment of the tests; its editable diffgraft is not on this path
    (site / "dependencies.pth").write_text(f"import sys; sys.path.append({sysconfig.get_path('purelib')!r})\n")
    python = tmp_path / "env" / "bin" / "python"
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    where = run(python, "-c", "import diffgraft; print(diffgraft.__file__)", cwd=tmp_path, env=bare).strip()
    assert Path(where).is_relative_to(site)
    said = run(
        python, "-m", "diffgraft.app.cli", "generate", "a red ball , night", "--negative", "green",
        "--steps", "2", "--seed", "1", "--device", "cpu", "-q", cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert said == "out.png\n" and (tmp_path / "out.png").stat().st_size > 1000

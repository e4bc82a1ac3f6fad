"""Batch runs on a tiny real model: what is on disk afterwards, whatever happened in between."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny
import torch
from deadly import OUT, PARENT, Deadly
from PIL import Image

from diffgraft.app.batch.engines import ENGINES
from diffgraft.app.batch.plan import Setup, make_job
from diffgraft.app.batch.run import Options, dry_run, parse_shard, run_batch
from diffgraft.app.batch.schema import make_row
from diffgraft.app.batch.sheet import write_sheets
from diffgraft.app.batch.store import Store
from diffgraft.app.batch.worker import Worker, failed
from diffgraft.app.errors import ManifestError, OutputError
from diffgraft.app.metadata import read_settings
from diffgraft.attention.errors import ModelLoadError, SettingError

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.timeout(900)  # processes that import torch start slowly on a busy machine


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny.sd15().save_pretrained(path)
    return str(path)


@pytest.fixture
def folder(tmp_path, model):
    return Folder(tmp_path, model)


class Folder:
    """A manifest and where its pictures go."""

    def __init__(self, root, model):
        self.root, self.model, self.out = root, model, root / "out"
        self.manifest = root / "jobs.jsonl"

    def write(self, rows):
        self.manifest.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return self

    def setup(self, **options):
        given = {"model": self.model, "device": "cpu", "metadata": True} | options
        return Setup(out=self.out, base=self.root, **given)

    def run(self, setup=None, **options):
        given = {"defaults": {"steps": 1, "guidance": 1.0}, "quiet": True, "sheet": False} | options
        return run_batch(self.manifest, self.setup(**(setup or {})), Options(**given))

    def jobs(self, count, setup):
        rows_ = (make_row(row, {"steps": 1, "guidance": 1.0}, i, strict=True) for i, row in enumerate(rows(count)))
        return [make_job(row, i, setup, 0) for i, row in enumerate(rows_)]

    def command(self, *words):
        words = ["batch", str(self.manifest), "--out", str(self.out), "--model", self.model, "--device", "cpu", *words]
        words += ["--steps", "1", "--guidance", "1", "--no-contact-sheet"]
        return [sys.executable, "-m", "diffgraft.app.cli", *words]

    def bytes(self):
        """What is promised to be equal: pictures and metadata."""
        paths = [*self.out.glob("*.png"), self.out / "metadata.jsonl"]
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}

    def lines(self, name):
        return [json.loads(line) for line in (self.out / name).read_text().splitlines()]


def rows(count, **more):
    return [{"id": f"row-{i}", "prompt": f"a red ball {i}"} | more for i in range(count)]


def test_a_run_and_what_it_leaves(folder):
    given = rows(3) + [{"prompt": "a blue star", "n": 2, "negative": "red", "seed": 5}]
    code, summary = folder.write(given).run(sheet=True)
    assert code == 0 and summary["done"] == 4 and summary["pictures"] == 5
    pictures = {"row-0.png", "row-1.png", "row-2.png", "4-0.png", "4-1.png"}
    names = {path.name for path in folder.out.iterdir()}
    assert names == pictures | {"metadata.jsonl", "results.jsonl", "summary.json", "contact-sheet.png"}
    lines = folder.lines("metadata.jsonl")
    assert [line["file_name"] for line in lines] == ["row-0.png", "row-1.png", "row-2.png", "4-0.png", "4-1.png"]
    assert all(next(iter(line)) == "file_name" for line in lines)
    assert [line["seed"] for line in lines[3:]] == [5, 6]
    said = read_settings(folder.out / "4-1.png")
    assert said["seed"] == 6 and said["plugins"][0] | {"negative": "red"} == said["plugins"][0]
    assert said["model"] == os.path.basename(folder.model) and str(folder.root) not in json.dumps(said)
    assert json.loads((folder.out / "summary.json").read_text())["exit_code"] == 0


def test_pictures_of_a_row_are_those_of_the_library(folder):
    import diffgraft

    folder.write([{"id": "a", "prompt": "a red ball", "seed": 3, "n": 2}]).run()
    torch.set_num_threads(1)
    pictures = diffgraft.generate(diffgraft.load(folder.model), "a red ball", seed=3, n=2, steps=1, guidance=1.0)
    for i, picture in enumerate(pictures):
        assert Image.open(folder.out / f"a-{i}.png").tobytes() == picture.tobytes()


def test_rows_that_edit_pictures(folder):
    Image.effect_mandelbrot((64, 64), (-2, -1, 1, 1), 20).convert("RGB").save(folder.root / "a.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 32, 32))
    mask.save(folder.root / "mask.png")
    erase = {
        "id": "e",
        "task": "erase",
        "image": "a.png",
        "mask": "mask.png",
        "seed": 1,
        "n": 2,
        "settings": {"grow": 0},
    }
    style = {"id": "s", "task": "stylize", "content": "a.png", "style": "a.png", "settings": {"strength": 0.5}}
    code, summary = folder.write([erase, style]).run(defaults={"steps": 2, "guidance": 1.0, "width": 32})
    assert code == 0, summary
    assert all(Image.open(folder.out / name).size == (64, 64) for name in ("e-0.png", "e-1.png", "s.png"))
    assert read_settings(folder.out / "e-1.png")["seed"] == 2 and read_settings(folder.out / "s.png")["strength"] == 0.5
    told = folder.lines("metadata.jsonl")
    assert told[1]["input_image"] == "a.png" and told[2]["steps"] == 2
    mask.paste(255, (0, 0, 8, 8))
    mask.save(folder.root / "mask.png")
    assert folder.run(defaults={"steps": 2, "guidance": 1.0})[1]["done"] == 1  # the mask has changed


POISON = {
    "not JSON": '{"prompt": ',
    "unknown field": {"prompt": "a", "colour": "red"},
    "missing file": {"prompt": "a", "plugins": [{"plugin": "NegativeAway", "negative": "x", "mask": "no.png"}]},
    "refused by the plugin": {"prompt": "a", "plugins": [{"plugin": "NegativeAway", "negative": "x", "scale": "much"}]},
    "refused by the pipeline": {"prompt": "a", "width": 33},
    "model that is not there": {"prompt": "a", "model": "/no/such/model"},
    "text that is no text": '{"prompt": "\\ud800"}',
}


@pytest.mark.parametrize("kind", POISON)
def test_a_bad_row_never_kills_the_run(folder, kind):
    code, summary = folder.write([*rows(2), POISON[kind], *rows(4)[2:]]).run()
    assert code == 1 and summary["done"] == 4 and summary["failed"] == 1
    assert len(list(folder.out.glob("*.png"))) == 4
    [failure] = summary["failures"]
    assert failure["line"] == 3 and failure["message"] and "\n" not in failure["message"]
    assert [r["id"] for r in folder.lines("results.jsonl") if r["status"] == "failed"] == [failure["id"]]


def test_a_second_run_makes_only_what_is_missing(folder):
    folder.write(rows(5)).run()
    before, made = folder.bytes(), {p.name: p.stat().st_mtime_ns for p in folder.out.glob("*.png")}
    (folder.out / "row-1.png").unlink()
    (folder.out / "row-2.png").write_bytes((folder.out / "row-2.png").read_bytes()[:100])
    code, summary = folder.run()
    assert (code, summary["done"], summary["already_done"]) == (0, 2, 3)
    assert folder.bytes() == before
    again = {p.name for p in folder.out.glob("*.png") if p.stat().st_mtime_ns != made[p.name]}
    assert again == {"row-1.png", "row-2.png"}
    assert [r["id"] for r in folder.lines("results.jsonl")].count("row-1") == 1


def test_a_changed_row_is_made_again_and_its_old_pictures_go(folder):
    folder.write([*rows(2), {"id": "x", "prompt": "a", "n": 3}]).run()
    code, summary = folder.write([*rows(2), {"id": "x", "prompt": "b"}]).run()
    assert (code, summary["done"]) == (0, 1)
    assert {p.name for p in folder.out.glob("*.png")} == {"row-0.png", "row-1.png", "x.png"}
    assert folder.run(overwrite=True)[1]["done"] == 3


def test_old_pictures_stay_until_the_new_ones_are_there(folder):
    """A mistake in the command, or a folder of inputs that is not mounted, costs nothing that was made."""
    Image.new("RGB", (32, 32), "red").save(folder.root / "style.png")
    drawn = {"id": "s", "prompt": "a", "plugins": [{"plugin": "StyleInjection", "style": "style.png"}]}
    folder.write([*rows(2, n=2), drawn]).run()
    before = folder.bytes()
    assert folder.run(setup={"model": "/no/such/model"})[0] == 3 and folder.bytes() == before
    for wrong in ({"device": "abacus"}, {"dtype": "int3"}):
        with pytest.raises(SettingError):
            folder.run(setup=wrong)
    code, summary = folder.run(defaults={"steps": 0, "guidance": 1.0})
    assert (code, summary["failed"], summary["folder"]["failed"]) == (1, 3, 0) and folder.bytes() == before
    (folder.root / "style.png").rename(folder.root / "away.png")
    code, summary = folder.run()
    assert (code, summary["failed"], summary["already_done"]) == (1, 1, 2) and folder.bytes() == before
    (folder.root / "away.png").rename(folder.root / "style.png")
    assert folder.run()[1]["already_done"] == 3 and folder.run()[0] == 0


def test_an_old_picture_that_is_now_another_rows_stays(folder):
    folder.write([{"id": "a", "prompt": "a", "n": 3}]).run()
    given = [{"id": "a-1", "prompt": "b"}, {"id": "a", "prompt": "a"}]
    assert folder.write(given).run()[0] == 0
    assert {path.name for path in folder.out.glob("*.png")} == {"a.png", "a-1.png"}
    assert folder.run()[1]["already_done"] == 2


def test_failed_rows_are_tried_again_only_when_asked_and_speak_for_the_folder(folder, model):
    other = folder.root / "later"
    folder.write([*rows(2), {"id": "x", "prompt": "a", "model": "../later-model"}])
    assert folder.run()[0] == 1
    code, summary = folder.run()
    assert (code, summary["done"], summary["failed_before"], summary["folder"]["failed"]) == (1, 0, 1, 1)
    assert folder.write([*rows(2), {"id": "x", "prompt": "a", "width": 33}]).run()[1]["failed"] == 1
    assert folder.run(retry_failed=True)[1]["failed"] == 1
    assert folder.lines("results.jsonl")[-1]["attempt"] == 3
    assert folder.write([*rows(2), {"id": "x", "prompt": "a"}]).run()[0] == 0
    assert not other.exists()


def test_a_mended_line_takes_its_failure_along(folder):
    assert folder.write([*rows(1), '{"prompt": ']).run()[0] == 1
    assert folder.write([*rows(1), {"id": "mended", "prompt": "a"}]).run()[0] == 0
    broken = [*rows(1), '{"prompt": ', {"id": "mended", "prompt": "a"}]
    assert sorted(folder.write(broken).run(shard=(i, 2))[0] for i in (0, 1))[1] == 1
    assert folder.write([*rows(1), {"id": "mended", "prompt": "a"}]).run()[0] == 0  # another run of shards had noted it


@pytest.mark.parametrize(("options", "done"), [({"max_failures": 1}, 2), ({"max_failures": 2}, 3)])
def test_stopping_after_failures(folder, options, done):
    bad = {"prompt": "a", "model": "/no/such/model", "steps": 1}
    given = [*rows(2), {"id": "x"} | bad, {"id": "row-8", "prompt": "a", "steps": 2}, {"id": "y"} | bad]
    code, summary = folder.write([*given, {"id": "z"} | bad]).run(**options)
    assert code == 1 and summary["failed"] == options["max_failures"] and "stopped after" in summary["stopped"]


def test_shards_and_a_whole_run_are_the_same_files(folder, model, tmp_path):
    folder.write(rows(10)).run()
    parts = Folder(tmp_path / "parts", model)
    parts.root.mkdir()
    parts.write(rows(10))
    done = [parts.run(shard=parse_shard(f"{i}/2"))[1]["done"] for i in (0, 1)]
    assert sum(done) == 10 and all(done)
    assert parts.bytes() == folder.bytes()
    assert len(parts.lines("results-0of2.jsonl")) == done[0]


def test_a_shard_that_ends_while_another_one_sums_up_is_not_forgotten(folder, monkeypatch):
    folder.write(rows(6))
    write, ran = Store.write_metadata, []

    def meanwhile(store, records):
        if not ran:
            ran.append(store.part)
            assert folder.run(shard=(1, 2))[0] == 0
        write(store, records)

    monkeypatch.setattr(Store, "write_metadata", meanwhile)
    assert folder.run(shard=(0, 2))[0] == 0
    assert [line["id"] for line in folder.lines("metadata.jsonl")] == [f"row-{i}" for i in range(6)]


@pytest.mark.parametrize("text", ["2", "3/2", "a/b", "-1/2", "1/0", "1/2/3"])
def test_shards_that_are_none(text):
    with pytest.raises(ManifestError, match="write i/n"):
        parse_shard(text)


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "local"])
def test_every_engine_gives_the_same_bytes(folder, model, tmp_path, monkeypatch, engine):
    monkeypatch.setenv("RAY_worker_niceness", "0")  # Ray's workers step back behind everything else on the machine
    given = [*rows(5), {"id": "steered", "prompt": "a blue star", "negative": "red", "n": 2}]
    folder.write(given).run()
    other = Folder(tmp_path / engine, model)
    other.root.mkdir()
    code, summary = other.write(given).run(engine=engine, workers=2)
    assert (code, summary["done"]) == (0, 6)
    assert other.bytes() == folder.bytes()


def test_a_ray_cluster_that_loses_a_node(folder, monkeypatch):
    """Two nodes with room for one worker each: the third waits for room, and the run outlives a node."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_worker_niceness", "0")
    folder.write(rows(6)).run()
    before = {path.name: path.read_bytes() for path in folder.out.glob("*.png")}
    setup = folder.setup()
    jobs = folder.jobs(6, setup)
    for path in folder.out.glob("*.png"):
        path.unlink()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        lost = cluster.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        records = ENGINES["ray"](setup, [[job] for job in jobs], 3)
        made = [next(records)]
        cluster.remove_node(lost)
        made += records
    finally:
        cluster.shutdown()
    assert {record["id"] for record in made if record["status"] == "ok"} == {job.id for job in jobs}
    assert {path.name: path.read_bytes() for path in folder.out.glob("*.png")} == before


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_row_has_one_prompt_whichever_rows_are_sampled_with_it(folder, batch_size):
    away = {"plugin": "NegativeAway", "negative": ["red", "blue"]}
    code, _ = folder.write([row | {"plugins": [away]} for row in rows(2)]).run(setup={"batch_size": batch_size})
    assert code == 1 and not list(folder.out.glob("*.png"))


@pytest.mark.parametrize("batch_size", [2, 3])
def test_batches_start_from_the_same_noise(folder, model, tmp_path, batch_size):
    folder.write(rows(5, n=2)).run()
    other = Folder(tmp_path / "batched", model)
    other.root.mkdir()
    other.write(rows(5, n=2)).run(setup={"batch_size": batch_size})
    for path in folder.out.glob("*.png"):
        first, second = (torch.tensor(list(Image.open(d / path.name).tobytes())) for d in (folder.out, other.out))
        assert (first - second).abs().max() <= 1


def start(command):
    def listen():  # a shell's background jobs are started deaf to SIGINT, and children inherit that
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, preexec_fn=listen)


def wait_for_pictures(process, out, count):
    while len(list(out.glob("*.png"))) < count:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def test_kill_9_and_resume(folder, model, tmp_path):
    folder.write(rows(60))
    process = start(folder.command())
    wait_for_pictures(process, folder.out, random.Random(time.time()).randint(1, 40))
    process.kill()
    process.wait()
    assert (folder.out / ".diffgraft-lock").exists() and len(list(folder.out.glob("*.png"))) < 60
    (folder.out / ".diffgraft-1-row-9.png.tmp").write_bytes(b"half a pic")
    with (folder.out / "results.jsonl").open("a") as file:
        file.write('{"id": "row-59", "status": "o')
    code, summary = folder.run()
    assert code == 0 and summary["already_done"] > 0 and summary["done"] + summary["already_done"] == 60
    assert not list(folder.out.glob(".diffgraft*"))
    whole = Folder(tmp_path / "whole", model)
    whole.root.mkdir()
    whole.write(rows(60)).run()
    assert folder.bytes() == whole.bytes()
    ids = [record["id"] for record in folder.lines("results.jsonl")]
    assert len(ids) == len(set(ids)) == 60


def interrupt_workers(process):
    """At a terminal Ctrl-C reaches them too, from their first moment, while they still import."""
    workers = []
    while len(workers) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
        workers = [c for c in psutil.Process(process.pid).children() if "spawn_main" in " ".join(c.cmdline())]
    for _ in range(5):
        time.sleep(0.2)
        for worker in workers:
            worker.send_signal(signal.SIGINT)
    return workers


@pytest.mark.parametrize("engine", ["local", "processes"])
def test_ctrl_c(folder, engine):
    """The command stops; its workers are deaf to it and finish what they are at."""
    folder.write(rows(200))
    process = start(folder.command("--engine", engine))
    deaf = interrupt_workers(process) if engine == "processes" else []
    wait_for_pictures(process, folder.out, 3)
    assert all(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in deaf)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130 and "Traceback" not in said and "interrupted" in said
    done = folder.lines("results.jsonl")
    assert 0 < len(done) < 200 and len(folder.lines("metadata.jsonl")) == len(done)
    for path in folder.out.glob("*.png"):
        Image.open(path).load()
    assert not list(folder.out.glob(".diffgraft*"))
    assert json.loads((folder.out / "summary.json").read_text())["stopped"] == "interrupted"


def test_a_row_that_kills_its_worker_fails_and_the_rest_is_made(folder, monkeypatch):
    monkeypatch.setenv(PARENT, str(os.getpid()))
    monkeypatch.setenv(OUT, str(folder.out))
    folder.out.mkdir()
    setup = folder.setup()
    made = folder.jobs(4, setup)
    made[1] = Deadly(**vars(made[1]))
    records = {r["id"]: r for r in ENGINES["processes"](setup, [made[:3], made[3:]], 1)}
    assert {name: record["status"] for name, record in records.items()} == {
        "row-0": "ok", "row-1": "failed", "row-2": "ok", "row-3": "ok",
    }  # fmt: skip
    assert records["row-1"]["error_type"] == "WorkerDied" and len(list(folder.out.glob("*.png"))) == 3
    assert not list(folder.out.glob("*.tmp"))


def test_what_was_written_of_a_row_that_killed_its_worker_goes(folder, monkeypatch):
    def dying(setup, batches, workers):
        for [job] in batches:
            (setup.out / job.files[0]).write_bytes(b"whole picture")
            yield failed(job, "WorkerDied", "the worker process died at this row, twice")

    monkeypatch.setitem(ENGINES, "processes", dying)
    code, summary = folder.write(rows(1, n=3)).run(engine="processes")
    assert (code, summary["failed"]) == (1, 1) and not list(folder.out.glob("*.png"))


def test_a_ray_cluster_that_is_not_there_is_exit_3(folder, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    code, summary = folder.write(rows(1)).run(engine="ray")
    assert code == 3 and "RAY_ADDRESS=127.0.0.1:1 cannot be reached" in summary["stopped"]


def test_out_of_memory_halves_the_batch_and_goes_on(folder):
    folder.out.mkdir()
    setup = folder.setup(batch_size=8)
    worker, pipe, made = Worker(setup), tiny.sd15(), folder.jobs(8, setup)
    worker._model = (made[0].opened, pipe)
    tried = []

    def too_many(module, args, kwargs):
        tried.append(len(args[0]))
        if len(args[0]) > 3:
            raise torch.OutOfMemoryError("out of memory")

    pipe.unet.register_forward_pre_hook(too_many, with_kwargs=True)
    records = worker.run(made)
    assert [record["status"] for record in records] == ["ok"] * 8
    assert tried == [8, 4, 2, 2, 2, 2] and worker.batch_size == 2

    def always(module, args, kwargs):
        raise torch.OutOfMemoryError("out of memory")

    hook = pipe.unet.register_forward_pre_hook(always, with_kwargs=True)
    assert [record["error_type"] for record in worker.run(made[:2])] == ["OutOfMemoryError"] * 2
    hook.remove()
    assert worker.run(made[:1])[0]["status"] == "ok"


def test_two_runs_in_one_folder(folder):
    folder.write(rows(2)).run()
    lock = folder.out / ".diffgraft-lock"
    me = psutil.Process()
    owner = {"pid": me.pid, "started": me.create_time(), "host": socket.gethostname()}
    for live in (owner, owner | {"host": "another-machine", "pid": 1}):
        lock.write_text(json.dumps(live))
        with pytest.raises(OutputError, match=f"process {live['pid']} on {live['host']}.* is writing"):
            folder.run()
        with pytest.raises(OutputError, match="is writing"):
            folder.run(shard=(0, 2))
    for dead in (json.dumps(owner | {"started": 1.0}), json.dumps(owner | {"pid": 2**22 + 5}), "torn"):
        lock.write_text(dead)
        assert folder.run()[0] == 0 and not lock.exists()


def test_pictures_of_somebody_else_are_not_overwritten(folder):
    folder.out.mkdir()
    Image.new("RGB", (16, 16)).save(folder.out / "row-0.png")
    with pytest.raises(OutputError, match="row-0.png .* was not made by diffgraft"):
        folder.write(rows(2)).run()
    assert [path.name for path in folder.out.iterdir()] == ["row-0.png"] or not (folder.out / "row-1.png").exists()


def test_dry_run_lists_everything_and_writes_nothing(folder):
    Image.new("L", (32, 32)).save(folder.root / "empty.png")
    (folder.root / "broken.png").write_bytes(b"no picture")
    erase = {"task": "erase", "image": "broken.png", "mask": "empty.png"}
    folder.write([*rows(2), "{", {"prompt": 3}, erase, {"prompt": "a", "negative": "b", "seed": 1}])
    options = Options(defaults={"steps": 1}, quiet=True)
    code, errors, counts = dry_run(folder.manifest, folder.setup(), options)
    assert code == 2 and [line.split(": ")[0] for line in errors] == [f"jobs.jsonl:{i}" for i in (3, 4, 5, 5)]
    assert "not a supported image" in errors[2] and "mask is empty" in errors[3]
    assert (counts["rows"], counts["to_do"], counts["errors"]) == (6, 4, 4) and not folder.out.exists()
    lost = [rows(1)[0] | {"model": "/no/such"}, {"task": "erase", "image": "no.png", "mask": "none.png"}]
    code, errors, _ = dry_run(folder.write(lost).manifest, folder.setup(), options)
    assert code == 2 and len(errors) == 2 and "'/no/such' does not exist" in errors[0]
    assert "no.png" in errors[1] and "none.png" in errors[1]
    with pytest.raises(ModelLoadError, match="does not exist"):
        dry_run(folder.write(rows(2)).manifest, folder.setup(model="/no/such"), options)
    assert dry_run(folder.write(rows(2)).manifest, folder.setup(), options)[:2] == (0, [])


def test_the_example_in_the_repository_is_right(tmp_path):
    path = ROOT / "assets" / "examples" / "jobs.jsonl"
    setup = Setup(out=tmp_path / "out", base=path.parent, model="picturebook")
    code, errors, counts = dry_run(path, setup, Options())
    assert (code, errors) == (0, []) and counts["to_do"] == len(path.read_text().splitlines())


def test_the_runs_own_model_missing_is_exit_3(folder):
    code, summary = folder.write(rows(2)).run(setup={"model": "/no/such/model"})
    assert code == 3 and "does not exist" in summary["stopped"] and not list(folder.out.glob("*.png"))


def test_sheets(tmp_path):
    Image.new("RGB", (64, 32), "orange").save(tmp_path / "a.png")
    pictures = [{"file_name": "a.png", "seed": i} for i in range(81)]
    records = [{"id": "x" * 90, "status": "ok", "pictures": pictures}, {"id": "bad <script>\ud800", "status": "failed"}]
    assert [path.name for path in write_sheets(tmp_path, records)] == ["contact-sheet.png", "contact-sheet-2.png"]
    assert Image.open(tmp_path / "contact-sheet.png").size == (1352, 1988)
    assert Image.open(tmp_path / "contact-sheet-2.png").size == (344, 206)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:40] + b"damaged")
    assert len(write_sheets(tmp_path, records)) == 2
    assert write_sheets(tmp_path, records[1:]) == [tmp_path / "contact-sheet.png"]
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_no_metadata(folder):
    folder.write(rows(1)).run(setup={"metadata": False})
    assert Image.open(folder.out / "row-0.png").info == {}

"""`make gpu-check`, tried on the CPU with tiny shapes of the same classes."""

from __future__ import annotations

import json

import pytest
import torch

from diffgraft.app.bench import gpu_check, gpu_rows, gpu_shapes
from diffgraft.app.bench.gpu_measure import kernels, quartiles, ratios
from diffgraft.app.bench.training import TimeBox

CPU = torch.device("cpu")


def check(tmp_path, *words):
    assert gpu_check.main(["--tiny", "--most", "2", "--backend", "eager", "--out", str(tmp_path), *words]) == 0
    return json.loads((tmp_path / "gpu-check.json").read_text())["rows"]


def test_every_row_is_measured_or_says_why_not(tmp_path, capsys):
    rows = check(tmp_path, "--only", "sdxl-512", "--modes", "eager", "CUDA graphs")
    costs = {row["what"]: row for row in rows if row["mode"] == "eager"}
    assert set(costs) == {"plain", "guidance", *gpu_rows.PLUGINS}
    for row in costs.values():
        assert row["note"] if row["seconds"] is None else row["restored"] and row["kernels"]
        assert (row["ratio"] is None) == (row["seconds"] is None or row["what"] == "plain")
    for what in ("NegativeAway, nasa", "AttentionSegregation", "SelfAttentionRedirection", "StartpointFilter"):
        assert costs[what]["seconds"] > 0, costs[what]["note"]
    assert "flash_attention_for_cpu_backward" in costs["AttentionSegregation"]["kernels"]
    [graphs] = [row for row in rows if row["mode"] == "CUDA graphs"]
    assert graphs["note"] == "cpu has no CUDA graphs"
    exact = {row["what"]: row for row in rows if row["mode"] == "exactness"}
    assert 0 < exact["plain"]["error"] < 0.05
    assert exact["NegativeAway, nasa"]["error"] < 3 * exact["plain"]["error"]
    table = capsys.readouterr().out
    assert table == (tmp_path / "gpu-check.md").read_text()
    assert "| SDXL 512 | eager | NegativeAway, nasa | 1 |" in table and "guidance costs 2" in table


@pytest.mark.parametrize(("name", "mode"), [("flux-1024", "compiled"), ("z-image-1024", "eager")])
def test_other_models(name, mode, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_rows, "PLUGINS", {"NegativeAway, nasa": gpu_rows.PLUGINS["NegativeAway, nasa"]})
    monkeypatch.setattr(gpu_check, "exactness", lambda *given: iter(()))  # the first test has it
    rows = check(tmp_path, "--only", name, "--modes", mode)
    plain, guided, negative = rows
    assert plain["restored"] and guided["seconds"] > 0
    assert negative["seconds"] or negative["note"]
    if mode == "compiled":
        assert plain["graphs"] > 0 and plain["breaks"] == 0


def test_it_stops_when_its_time_is_over(tmp_path, monkeypatch):
    rows = check(tmp_path, "--only", "flux-1024", "--modes", "eager", "--minutes", "0")
    assert {row["note"] for row in rows if row["mode"] == "eager"} == {"left out: the time is over"}


def test_real_shapes_are_refused_without_a_gpu(capsys):
    assert gpu_check.main(["--device", "cpu"]) == 3
    assert "--tiny tries the script" in capsys.readouterr().err


def test_a_small_memory_gets_fewer_layers_and_is_told(monkeypatch):
    shape = gpu_shapes.SHAPES["flux-1024"]
    whole = gpu_shapes.weight_bytes(shape, shape.config, torch.bfloat16)
    assert 23e9 < whole < 25e9  # 12 billion parameters
    monkeypatch.setattr(gpu_shapes, "free_bytes", lambda device: 16 * 2**30)
    config, note = gpu_shapes._chosen(shape, CPU, torch.bfloat16, little=False, fewest=False)
    assert "of the layers: 24 GiB do not fit into 10" in note
    assert 0 < gpu_shapes.weight_bytes(shape, config, torch.bfloat16) < 10 * 2**30
    assert gpu_shapes.SHAPES["sdxl-1024"].cut(0.5)["transformer_layers_per_block"] == (1, 1, 5)


def test_measures():
    pairs = iter([1.0, 2.0, 2.0, 2.0, 1.0, 3.0])
    assert ratios(lambda: next(pairs), lambda: next(pairs), TimeBox(0), 15) == [2.0, 1.0, 3.0]
    assert quartiles([1.0, 2.0, 3.0]) == (1.5, 2.0, 2.5)
    q = torch.randn(1, 2, 8, 16)
    found = kernels(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q), CPU)
    assert found == {"flash_attention_for_cpu": 1}

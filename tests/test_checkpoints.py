"""Checkpoints as people have them: variants, home folders, single files, models without a backward pass."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import diffgraft as dg
from diffgraft.app.batch.manifest import read_manifest
from diffgraft.app.batch.plan import Setup, batches, make_job
from diffgraft.app.batch.run import Options, dry_run, run_batch
from diffgraft.app.cli import app
from diffgraft.app.images import load_image

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A home folder with one model in three forms."""
    home = tmp_path_factory.mktemp("home")
    tiny.sd15().save_pretrained(home / "half", variant="fp16")
    shutil.copytree(home / "half", home / "two")
    for path in list((home / "two").glob("*/*.fp16.safetensors")):
        shutil.copy(path, path.with_name(path.name.replace("fp16", "ema")))
    shutil.copytree(home / "half", home / "both")
    for path in list((home / "both").glob("*/*.fp16.safetensors")):
        shutil.copy(path, path.with_name(path.name.replace(".fp16", "")))
    Image.effect_mandelbrot((32, 32), (-2, -1, 1, 1), 20).convert("RGB").save(home / "a.png")
    mask = np.zeros((32, 32), np.uint8)
    mask[8:16, 8:16] = 255
    Image.fromarray(mask).save(home / "mask.png")
    return home


def test_the_only_variant_is_opened(saved):
    assert dg.load(saved / "half").unet.dtype is torch.float32
    assert dg.load(saved / "half", variant="fp16").vae.config.latent_channels == 4
    assert dg.load(saved / "both") is not None


def test_a_choice_of_variants_is_named(saved):
    with pytest.raises(dg.ModelLoadError, match=r"variants 'ema', 'fp16' only.*variant='ema' \(--variant ema\)"):
        dg.load(saved / "two")
    assert dg.load(saved / "two", variant="ema") is not None
    with pytest.raises(dg.ModelLoadError, match="has no variant 'fp8'; there is 'fp16'"):
        dg.load(saved / "half", variant="fp8")


def test_a_home_folder(saved, monkeypatch):
    monkeypatch.setenv("HOME", str(saved))
    assert dg.load("~/half") is not None
    with pytest.raises(dg.ModelLoadError, match="'~/no-model' does not exist"):
        dg.load("~/no-model")


def test_commands_take_variants_and_home_folders(saved, monkeypatch):
    monkeypatch.setenv("HOME", str(saved))
    common = ["--model", "~/two", "--variant", "ema", "--dtype", "bfloat16", "--device", "cpu", "--steps", "2", "-q"]
    for words in (
        ["generate", "a ball", "--out", "~/g.png", "--width", "32", "--height", "32"],
        ["erase", "~/a.png", "~/mask.png", "--out", "~/e.png"],
        ["stylize", "~/a.png", "~/a.png", "--out", "~/s.png"],
    ):
        result = CliRunner().invoke(app, [*words, *common])
        assert result.exit_code == 0, result.output
    assert all((saved / name).is_file() for name in ("g.png", "e.png", "s.png"))
    result = CliRunner().invoke(app, ["generate", "a ball", "--out", "~/g.png", "--model", "~/two"])
    assert result.exit_code == 3 and "--variant ema" in result.output
    assert CliRunner().invoke(app, ["show", "~/g.png"]).exit_code == 0


def test_rows_take_variants_dtypes_and_home_folders(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(saved))
    rows = [
        {"id": "a", "prompt": "a ball", "width": 32, "height": 32},
        {
            "id": "b",
            "prompt": "a ball",
            "width": 32,
            "height": 32,
            "model": "~/two",
            "variant": "ema",
            "dtype": "bfloat16",
        },
        {"id": "c", "task": "erase", "image": "~/a.png", "mask": "~/mask.png", "variant": "fp8"},
        {"id": "d", "task": "erase", "image": "~/a.png", "mask": "~/mask.png", "dtype": "float32"},
    ]
    path = tmp_path / "jobs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    setup = Setup(out=tmp_path / "out", base=tmp_path, model="~/half", device="cpu")
    options = Options(defaults={"steps": 2, "guidance": 1.0}, quiet=True, sheet=False)
    code, lines, _ = dry_run(path, setup, options)
    assert code == 2 and len(lines) == 1 and "jobs.jsonl:3" in lines[0] and "no variant 'fp8'" in lines[0]
    jobs = [make_job(row, line, setup, 0) for line, row in read_manifest(path, {}).rows]
    assert [[job.id for job in batch] for batch in batches(jobs, 4)] == [["a"], ["b"], ["c"], ["d"]]
    code, summary = run_batch(path, setup, options)
    assert code == 1 and summary["done"] == 3 and [one["id"] for one in summary["failures"]] == ["c"]


def test_a_row_without_variant_keeps_its_hash(saved, tmp_path):
    """A folder that an earlier version made is still finished."""
    path = tmp_path / "jobs.jsonl"
    path.write_text('{"id": "a", "prompt": "b"}\n{"id": "b", "prompt": "b", "variant": "ema"}\n')
    plain, other = (
        make_job(row, 1, Setup(out=tmp_path, base=tmp_path, model="m"), 0) for _, row in read_manifest(path, {}).rows
    )
    assert plain.opened == ("m", "auto", None) and other.opened == ("m", "auto", "ema") and plain.hash != other.hash


FILES = {
    "xl": {
        "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": [4],
        "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight": [4, 4],
        "model.diffusion_model.input_blocks.0.0.weight": [4, 4, 1, 1],
        "first_stage_model.encoder.conv_in.weight": [4, 4, 1, 1],
    },
    "sd3": {
        "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias": [9216],
        "model.diffusion_model.pos_embed": [1, 36864, 4],
    },
    "flux": {
        "double_blocks.0.img_attn.norm.key_norm.scale": [4],
        "img_in.weight": [4, 4],
        "guidance_in.in_layer.bias": [3],
    },
    "lora": {"lora_unet_down_blocks_0_attentions_0_proj_in.alpha": []},
    "vae": {"encoder.conv_in.weight": [4, 4, 1, 1]},
}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("xl", "holds weights only.*'stabilityai/stable-diffusion-xl-base-1.0'.*go online once, or give config="),
        ("sd3", "has no text encoders and no autoencoder: .*transformer=SD3Transformer2DModel.*text_encoder="),
        ("flux", "has no text encoders and no autoencoder: .*transformer=FluxTransformer2DModel.*text_encoder="),
        ("lora", "is a LoRA.*load_lora_weights"),
        ("vae", "say what it is with pipeline="),
    ],
)
def test_a_single_file_says_what_is_missing(name, message, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path = tmp_path / f"{name}.safetensors"
    save_file({key: torch.zeros(shape) for key, shape in FILES[name].items()}, path)
    with pytest.raises(dg.ModelLoadError, match=message) as caught:
        dg.load(path)
    assert "\n" not in str(caught.value)
    if name == "xl":
        with pytest.raises(dg.ModelLoadError, match=message):
            dg.load(path, pipeline=StableDiffusionXLPipeline)


class Rounded(nn.Linear):
    """A layer in eight bits, as quantisers make them for inference: integers, and no backward pass."""

    def forward(self, x):
        with torch.no_grad():
            step = self.weight.abs().max() / 127
            return nn.functional.linear(x, (self.weight / step).round() * step, self.bias)


def quantised(where):
    """A model of which some layers have no backward pass."""
    pipe = tiny.sd15()
    for name, module in pipe.unet.named_modules():
        if isinstance(module, nn.Linear) and re.search(where, name):
            module.__class__ = Rounded
    return pipe


@pytest.mark.parametrize("where", ["attn|ff|proj|time", r"up_blocks.1.*attn2.to_[qk]"], ids=["all of it", "one block"])
def test_segregation_without_a_backward_pass_is_an_error(where):
    pipe = quantised(where)
    with pytest.raises(dg.UnsupportedPipelineError, match="float16, bfloat16 or float32"):
        dg.generate(
            pipe, "a ball and a star", plugins=[dg.AttentionSegregation(["ball", "star"])], steps=2, width=32, height=32
        )
    dg.generate(pipe, "a ball", steps=1, width=32, height=32)


@pytest.mark.parametrize("where", ["attn|ff|proj|time", r"up_blocks.1.*attn1.to_[qv]"], ids=["all of it", "one block"])
def test_distillation_without_a_backward_pass_is_an_error(where):
    style = Image.effect_mandelbrot((32, 32), (-2, -1, 1, 1), 20).convert("RGB")
    with pytest.raises(dg.UnsupportedPipelineError, match="float16, bfloat16 or float32"):
        dg.generate(quantised(where), "a ball", plugins=[dg.AttentionDistillation(style)], steps=2, width=32, height=32)


def test_dip_without_an_inverse_says_so_in_its_own_words(saved):
    pipe = tiny.sd15(scheduler=EulerAncestralDiscreteScheduler())
    picture, mask = load_image(saved / "a.png"), saved / "mask.png"
    with pytest.raises(dg.UnsupportedSchedulerError, match="method='dip'.*EulerAncestral.*from_config.*method='sip'"):
        dg.erase(pipe, picture, mask, method="dip", steps=3)
    assert dg.erase(pipe, picture, mask, steps=3).size == (32, 32)


def test_python_m_diffgraft():
    env = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(
        [sys.executable, "-m", "diffgraft", "--version"], capture_output=True, text=True, env=env, cwd="/"
    )
    assert run.returncode == 0 and run.stdout.strip() == dg.__version__, run.stderr
    assert (ROOT / "__main__.py").is_file()

"""The recipes with real checkpoints: every block runs as it stands on a tiny pipeline of the same class.

Only loading is answered here, since the weights are elsewhere; what is loaded is of diffusers' own classes.
"""

from __future__ import annotations

import re
from pathlib import Path

import diffusers
import pytest
import tiny
import tiny_family_pipelines
import tiny_transformers
import torch
from peft import LoraConfig

import diffgraft

ROOT = Path(__file__).parent.parent
SECTIONS = re.split(r"^## ", (ROOT / "pipelines/RECIPES.md").read_text("utf-8"), flags=re.MULTILINE)[1:]
BLOCKS = {s.splitlines()[0]: re.findall(r"```python\n(.*?)```", s, re.DOTALL) for s in SECTIONS}
CASES = [(title, block) for title, blocks in BLOCKS.items() for block in blocks]


def z_image():
    """Its autoencoder makes pictures smaller by 16, so that 512 pixels are few tokens."""
    pipe = tiny_family_pipelines.z_image()
    vae = tiny.vae(levels=5)
    vae.register_to_config(shift_factor=0.1)
    return tiny.quiet(type(pipe)(**(pipe.components | {"vae": vae})))


def klein():
    """With as many layers of text as the checkpoint's call reads."""
    pipe = tiny_family_pipelines.klein()
    return tiny.quiet(type(pipe)(**(pipe.components | {"text_encoder": tiny_family_pipelines.qwen3(8, layers=28)})))


MODELS = {
    "stabilityai/stable-diffusion-xl-base-1.0": tiny.sdxl,
    "stabilityai/sd-turbo": tiny.sd2,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": tiny.sd15,
    "black-forest-labs/FLUX.1-schnell": tiny_transformers.flux,
    "black-forest-labs/FLUX.2-klein-4B": klein,
    "Tongyi-MAI/Z-Image-Turbo": z_image,
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": lambda: tiny_family_pipelines.wan(second=True, boundary=0.5),
}


def loaded(cls, name, **options):
    """What `from_pretrained` would give: the class that the checkpoint's own index names."""
    pipe = MODELS[name]()
    assert isinstance(pipe, cls) or issubclass(cls, diffusers.AutoPipelineForText2Image)
    return pipe


def tuned(pipe, name, *, weight_name, adapter_name="default_0", load_into_transformer_2=False):
    """What `load_lora_weights` would do, with the weights of an adapter that has learned nothing yet."""
    part = "transformer_2" if load_into_transformer_2 else "unet" if hasattr(pipe, "unet") else "transformer"
    getattr(pipe, part).add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name)


@pytest.mark.parametrize("title, block", CASES, ids=[title for title, _ in CASES])
def test_a_recipe_runs(title, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    for owner in (diffusers.DiffusionPipeline, diffusers.AutoPipelineForText2Image):
        monkeypatch.setattr(owner, "from_pretrained", classmethod(loaded))
    for owner in (diffusers.StableDiffusionXLPipeline, diffusers.WanPipeline):
        monkeypatch.setattr(owner, "load_lora_weights", tuned)
    monkeypatch.setattr(diffgraft, "load", lambda name, **options: loaded(diffusers.DiffusionPipeline, name))
    names = {"__name__": "recipe"}
    exec(compile(block, title, "exec"), names)
    if "app" in names:
        from fastapi.testclient import TestClient

        names["pipe"].to(torch.bfloat16)
        answer = TestClient(names["app"]).get("/picture", params={"prompt": "a red ball", "seed": 3})
        assert answer.status_code == 200 and answer.content.startswith(b"\x89PNG")
        assert names["pipe"].unet.dtype == torch.bfloat16  # a request leaves the shared weights as they are

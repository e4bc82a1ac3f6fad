"""A picture that the model's own safety checker blanks is an error, never a black picture."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor

import diffgraft as dg
from diffgraft.app.batch.plan import Setup
from diffgraft.app.batch.run import Options, run_batch
from diffgraft.app.console import exit_code


def checker(finds: bool) -> StableDiffusionSafetyChecker:
    """diffusers' own, small, with thresholds that everything or nothing passes."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision | {"image_size": 32, "patch_size": 16}))
    model.concept_embeds_weights.fill_(-2.0 if finds else 2.0)
    model.special_care_embeds_weights.fill_(2.0)
    return model.eval()


def pipe(finds: bool):
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    return tiny.sd15(
        safety_checker=checker(finds), feature_extractor=CLIPImageProcessor(**size), requires_safety_checker=True
    )


def tasks(model):
    picture = Image.effect_mandelbrot((32, 32), (-2, -1, 1, 1), 20).convert("RGB")
    mask = np.zeros((32, 32), bool)
    mask[8:16, 8:16] = True
    return {
        "generate": lambda: dg.generate(model, "a ball", seed=3, steps=2, width=32, height=32)[0],
        "erase": lambda: dg.erase(model, picture, mask, seed=3, steps=2, strength=1.0),
        "stylize": lambda: dg.stylize(model, picture, picture, seed=3, steps=2, iterations=0),
    }


@pytest.mark.parametrize("task", ["generate", "erase", "stylize"])
def test_a_blanked_picture_is_an_error(task):
    with pytest.raises(dg.SafetyCheckerError, match="seed 3 for unsafe.*another seed or prompt") as caught:
        tasks(pipe(finds=True))[task]()
    assert exit_code(caught.value) == 1
    made = tasks(pipe(finds=False))[task]()
    assert np.asarray(made).any() and (task == "erase" or made.info["diffgraft"]["nsfw_content_detected"] is False)


def test_in_a_batch_it_is_a_failed_row(tmp_path):
    model = pipe(finds=True)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "jobs.jsonl").write_text(json.dumps({"id": "a", "prompt": "a ball", "width": 32, "height": 32}))
    setup = Setup(out=tmp_path / "out", base=tmp_path, model=str(tmp_path / "model"), device="cpu")
    code, summary = run_batch(tmp_path / "jobs.jsonl", setup, Options(defaults={"steps": 1}, quiet=True, sheet=False))
    assert code == 1 and summary["failures"][0]["error_type"] == "SafetyCheckerError"
    assert not list((tmp_path / "out").glob("*.png"))

"""load() and picturebook(): nothing but safetensors, and one line for whatever is wrong."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import warnings

import numpy as np
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

import diffgraft as dg
from diffgraft.app.models import check_model, open_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    tiny.sd15().save_pretrained(path)
    return path


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def test_a_folder(saved):
    pipe = dg.load(saved, dtype=torch.bfloat16)
    assert type(pipe) is StableDiffusionPipeline and pipe.unet.dtype is torch.bfloat16
    assert dg.load(str(saved), pipeline=StableDiffusionPipeline, device="cpu").device.type == "cpu"


def refused(model, message, **options):
    with pytest.raises(dg.ModelLoadError, match=message) as caught:
        dg.load(model, **options)
    assert "\n" not in str(caught.value) and isinstance(caught.value, RuntimeError)


def test_another_class(saved):
    refused(
        saved,
        "is a StableDiffusionPipeline; this needs a StableDiffusionXLPipeline",
        pipeline=StableDiffusionXLPipeline,
    )


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model.pt", "model.pth", "model.pkl"])
def test_pickled_files_are_not_opened(tmp_path, name):
    class Boom:
        def __reduce__(self):
            return (exec, ("raise SystemExit('opened')",))

    (tmp_path / name).write_bytes(pickle.dumps(Boom()))
    refused(tmp_path / name, "is a pickle")


def test_pickled_weights_in_a_folder(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save({}, weights.with_suffix(".bin"))
    refused(folder, "unet/diffusion_pytorch_model.bin only as a pickle")


def test_remote_code_is_refused_and_needs_a_pinned_commit(folder):
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": ["pipeline", "Mine"]}))
    (folder / "pipeline.py").write_text("raise SystemExit('ran')")
    refused(folder, "code of its own|trust_remote_code")
    with pytest.raises(dg.SettingError, match="40-digit commit"):
        dg.load("owner/name", trust_remote_code=True)
    with pytest.raises(dg.SettingError, match="40-digit commit"):
        dg.load("owner/name", trust_remote_code=True, revision="main")


def test_missing_things(tmp_path, saved):
    refused("/no/such/folder", "does not exist")
    refused("./no-such-folder", "does not exist")
    refused("model.safetensors", "does not exist")
    refused("what is this?", "neither a folder here nor a Hub id")
    refused("owner/no-such-model", "Hub cannot be reached")
    refused(tmp_path, "model_index.json is missing")
    refused(saved / "unet", "it is a single UNet2DConditionModel")
    (tmp_path / "notes.md").write_text("x")
    refused(tmp_path / "notes.md", "is not a checkpoint")


def test_damaged_things(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    refused(folder, "damaged weights")
    weights.unlink()
    refused(folder, "lacks a file|cannot be loaded")
    (folder / "model_index.json").write_text("{")
    refused(folder, "does not name a pipeline class")


def test_a_class_that_diffusers_does_not_have(folder):
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "NoSuchPipeline"}))
    refused(folder, "NoSuchPipeline")


@pytest.fixture(scope="module")
def book():
    pipe = dg.picturebook()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_picture_book_is_plain_diffusers(book, tmp_path):
    assert type(book) is StableDiffusionPipeline and book.unet.dtype is torch.float32
    assert all("diffgraft" not in type(part).__module__ for part in book.components.values())
    book.save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "output_type": "latent"}
    first, second = (p("a red ball", generator=torch.Generator().manual_seed(1), **call).images for p in (book, again))
    assert torch.equal(first, second)


def test_a_picture_shows_what_was_asked_for(book):
    [picture] = dg.generate(book, "a red ball , night", seed=1, steps=12, guidance=4.0)
    red, green, blue = np.asarray(picture, float).reshape(-1, 3).T
    assert picture.size == (128, 128)
    assert ((red > 1.6 * green) & (red > 1.3 * blue) & (red > 90)).mean() > 0.05  # a red thing
    assert np.median(blue) > np.median(red) and np.median(red) < 90  # on a dark blue sky


@pytest.mark.parametrize("way", ["as it is", "deepcopy", "pickle"])
def test_unknown_words_are_told_with_the_known_ones(book, way):
    pipe = copy.deepcopy(book) if way == "deepcopy" else book
    if way == "pickle":
        pipe = StableDiffusionPipeline(
            **(book.components | {"text_encoder": pickle.loads(pickle.dumps(book.text_encoder))})
        )
    with pytest.warns(UserWarning, match="reads 'a red ___ and a ball', not knowing .* it knows: a .*ball.*night"):
        pipe.encode_prompt("a red zebra and a ball", "cpu", 1, False)


def test_known_words_are_silent(book):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        book.encode_prompt(["A red ball, night", ""], "cpu", 1, True)


def test_what_is_no_path_is_told_so():
    with pytest.raises(dg.SettingTypeError, match="no path"):
        dg.load(5)


def test_the_one_step_book_needs_one_step():
    student, book = dg.picturebook(one_step=True), dg.picturebook()
    assert type(student) is StableDiffusionPipeline and student.scheduler.config.set_alpha_to_one
    assert torch.equal(student.vae.encoder.conv_in.weight, book.vae.encoder.conv_in.weight)
    assert not torch.equal(student.unet.conv_in.weight, book.unet.conv_in.weight)
    [picture] = dg.generate(student, "a red ball , night", seed=1, steps=1, guidance=0.0)
    red, green, blue = np.asarray(picture, float).reshape(-1, 3).T
    assert ((red > 1.6 * green) & (red > 1.3 * blue) & (red > 90)).mean() > 0.05  # a red thing
    assert np.median(blue) > np.median(red) and np.median(red) < 90  # on a dark blue sky


def test_an_installation_without_the_one_step_book_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("diffgraft.pipelines.picturebook.ONE_STEP", tmp_path / "none")
    with pytest.raises(dg.ModelLoadError, match="one-step"):
        dg.picturebook(one_step=True)


@pytest.mark.parametrize("opening", [check_model, open_model])
@pytest.mark.parametrize("slip", ["picturebook-transformer-fewsteps", "picturebook_one_step", "Picturebook"])
def test_a_mistyped_embedded_model_is_told_which_there_are(opening, slip, tmp_path, monkeypatch):
    with pytest.raises(dg.ModelLoadError, match=f"no model '{slip}'; did you mean picturebook.*Embedded: .*few-steps"):
        opening(slip)
    monkeypatch.chdir(tmp_path)  # a folder of that name is meant where there is one
    (tmp_path / slip).mkdir()
    with pytest.raises(dg.ModelLoadError, match="is not a pipeline folder"):
        opening(slip)


@pytest.mark.parametrize("given", [{"transformer": "yes"}, {"one_step": 1}])
def test_a_flag_of_the_picture_book_is_true_or_false(given):
    with pytest.raises(dg.SettingTypeError, match="give True or False"):
        dg.picturebook(**given)

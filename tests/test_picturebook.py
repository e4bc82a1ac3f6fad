"""The embedded model as it ships: what it draws under the common schedulers, what it takes up, what its card prints."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch

import diffgraft as dg
from diffgraft.app import models, tasks
from diffgraft.app.bench.autoencoder import measure
from diffgraft.app.bench.judge import look
from diffgraft.app.bench.model_card import ASSETS, cells, held_out
from diffgraft.app.bench.rows import drawing
from diffgraft.app.bench.styles import STYLES
from diffgraft.app.metadata import read_settings

CAPTIONS = ["a red ball , sky", "a yellow house , snow", "a blue star , desert", "a purple fish , sea , dots style"]
WANTED = [{"ball": "red"}, {"house": "yellow"}, {"star": "blue"}, {"fish": "purple"}]


@pytest.fixture(scope="module")
def judge():
    from diffgraft.app.bench.judge import load_judge

    return load_judge()


def draws_what_it_is_told(pipe, judge, steps: int, guidance: float) -> None:
    """Asserts that at least three of four captions come out right, all on the right background."""
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(i) for i in range(len(CAPTIONS))]
    verdicts = look(judge, pipe(CAPTIONS, generator=generators, **drawing(pipe, steps, guidance)).images)
    assert sum(v.colours == wanted for v, wanted in zip(verdicts, WANTED, strict=True)) >= 3, verdicts
    assert [v.background for v in verdicts] == ["sky", "snow", "desert", "sea"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDIMScheduler", {}),
        ("EulerDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {}),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": False}),
    ],
)
def test_draws_what_was_asked_for_under_every_common_scheduler(judge, name, options):
    pipe = dg.picturebook()
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **options)
    draws_what_it_is_told(pipe, judge, 25, 4.0)


def test_the_student_draws_in_one_step(judge):
    draws_what_it_is_told(dg.picturebook(one_step=True), judge, 1, 0.0)


def size(*files: Path) -> int:
    return sum(path.stat().st_size for path in files)


def test_all_models_fit_and_hold_half_precision_numbers_only():
    weights = list(ASSETS.rglob("*.safetensors"))
    assert size(*(path for path in ASSETS.rglob("*") if path.is_file())) < 90_000_000
    flows = [path for path in weights if path.parent.name in ("transformer", "few-steps")]
    assert flows and size(*flows) <= 38_000_000
    from safetensors import safe_open

    for path in weights:
        with safe_open(path, "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} <= {"F16", "I64"}, path  # noqa: SIM118


def test_plain_diffusers_loads_it_from_its_folder(tmp_path: Path):
    pipe = diffusers.DiffusionPipeline.from_pretrained(ASSETS / "picturebook")
    assert type(pipe) is diffusers.StableDiffusionPipeline
    assert all(type(part).__module__.split(".")[0] != "diffgraft" for part in pipe.components.values())


def test_the_card_prints_the_autoencoder_and_the_judge_on_held_out_renders(judge, picturebook):
    found = held_out(picturebook.vae, judge, renders=4, verdicts=10)
    assert found["autoencoder, dB"]["all"] > 25
    assert 0.9 <= found["autoencoder, hue kept"]["all"] <= 1
    assert set(found["judge, exact"]) == set(STYLES) and found["judge, exact"]["plain"] == 1
    assert cells({"plain": 27.123, "all": 26.0}, ".1f") == "| 27.1 |  |  |  |  | 26.0 |"


def test_the_transformer_edition_is_a_plain_z_image_pipeline_that_draws_what_it_is_told(judge):
    pipe = dg.picturebook(transformer=True)
    assert type(pipe) is diffusers.ZImagePipeline
    assert pipe.vae.config.shift_factor == 0  # the pipeline adds it
    found = measure(pipe.vae, 2)
    assert found["all"] > 30.5 and found["hue kept"] == 1
    draws_what_it_is_told(pipe, judge, 25, 2.5)


def test_the_transformers_student_draws_what_it_is_told_in_four_steps(judge):
    draws_what_it_is_told(dg.picturebook(transformer=True, one_step=True), judge, 4, 0.0)


@pytest.fixture
def student(monkeypatch, tmp_path: Path) -> Path:
    """The folder of a student, as the trainer writes one: the present transformer, one of its weights doubled."""
    folder, teacher = tmp_path / "few-steps", ASSETS / "picturebook-transformer" / "transformer"
    network = diffusers.ZImageTransformer2DModel.from_pretrained(teacher, torch_dtype=torch.float16)
    next(network.parameters()).data.mul_(2)
    network.save_pretrained(folder, max_shard_size="15MB")
    monkeypatch.setattr("diffgraft.pipelines.picturebook.FEW_STEPS", folder)
    monkeypatch.setattr("diffgraft.app.models.STUDENT", folder)
    return folder


def test_the_transformers_student_has_a_denoiser_of_its_own(student):
    pipe, teacher = dg.picturebook(transformer=True, one_step=True), dg.picturebook(transformer=True)
    assert type(pipe) is diffusers.ZImagePipeline and pipe.transformer.dtype is torch.float32
    own, other = (next(one.transformer.parameters()) for one in (pipe, teacher))
    assert torch.equal(own, 2 * other)
    assert torch.equal(pipe.vae.decoder.conv_in.weight, teacher.vae.decoder.conv_in.weight)
    assert pipe.scheduler.config == teacher.scheduler.config
    with pytest.warns(UserWarning, match="not knowing"):
        pipe.encode_prompt(["a red zebra"], "cpu", do_classifier_free_guidance=False)


def test_the_student_runs_by_its_name_at_its_own_pace(student, tmp_path: Path):
    assert models.embedded()[-1] == models.FEW_STEPS and models.denoiser_of(models.FEW_STEPS).startswith("ZImage")
    wish, out = tasks.Wish(models.FEW_STEPS, quiet=True), tmp_path / "made.png"
    tasks.generate(wish, "a red ball , sky", [], out, seed=1, n=1)
    told = read_settings(out)
    assert (told["steps"], told["guidance"], told["width"]) == (4, 0, 128) and told["model"] == models.FEW_STEPS


def test_an_installation_without_the_transformers_student_says_so(monkeypatch, tmp_path: Path):
    monkeypatch.setattr("diffgraft.pipelines.picturebook.FEW_STEPS", tmp_path)
    monkeypatch.setattr("diffgraft.app.models.STUDENT", tmp_path)
    assert models.FEW_STEPS not in models.embedded()
    with pytest.raises(dg.ModelLoadError, match="few-step student is not part of this installation"):
        dg.picturebook(transformer=True, one_step=True)


def test_an_installation_without_the_transformer_edition_says_so(monkeypatch, tmp_path: Path):
    monkeypatch.setattr("diffgraft.pipelines.picturebook.TRANSFORMER", tmp_path)
    with pytest.raises(dg.ModelLoadError, match="not part of this installation"):
        dg.picturebook(transformer=True)

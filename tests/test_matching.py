"""Distribution matching: where the student is pulled, and what a run leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffgraft.app.bench import matching
from diffgraft.app.bench.autoencoder import build
from diffgraft.app.bench.denoiser import build_text_encoder, build_unet, pipeline
from diffgraft.app.bench.flow_student import STEPS
from diffgraft.app.bench.matching import EARLIEST, LATEST, Matching, OneStep, captions, moved
from diffgraft.app.bench.matching_flow import FewSteps
from diffgraft.app.bench.model_card import ASSETS


def posterior(noisy: torch.Tensor, alpha: float, mean: float) -> torch.Tensor:
    """The clean value that is expected behind a noisy one, where clean values are normal with variance 1."""
    return mean + alpha**0.5 * (noisy - alpha**0.5 * mean)


def test_the_pull_is_the_difference_of_the_two_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = 2 + torch.randn(64, 4, 16, 16, generator=generator, dtype=torch.float64)
    noise, alpha = torch.randn(drawn.shape, generator=generator, dtype=torch.float64), 0.4
    noisy = alpha**0.5 * drawn + (1 - alpha) ** 0.5 * noise
    real, fake = posterior(noisy, alpha, 0.0), posterior(noisy, alpha, 2.0)
    score = lambda mean: -(noisy - alpha**0.5 * mean)  # noqa: E731 of noisy values, whose variance is 1
    wanted = (1 - alpha) / alpha**0.5 * (score(0.0) - score(2.0))
    pull = (moved(drawn, real, fake) - drawn) * (drawn - real).abs().mean((1, 2, 3), keepdim=True)
    assert torch.allclose(pull, wanted, atol=1e-12)
    assert (pull < 0).all(), "from drawings around 2 toward the teacher's around 0"


def test_where_both_agree_nothing_moves() -> None:
    drawn, seen = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    assert torch.equal(moved(drawn, seen, seen), drawn)


def test_captions_are_of_kinds_that_training_has() -> None:
    found = captions(7, 300)
    assert found == captions(7, 100) + captions(107, 200)
    things = [text.split(" ,")[0].count("a ") for text in found]
    assert {1, 2, 3} == set(things) and 20 <= things.count(3) <= 65


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained picture book and a student of it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teacher")
    pipe = pipeline(build().eval(), build_unet().eval(), build_text_encoder().eval())
    pipe.save_pretrained(folder)
    pipe.unet.save_pretrained(folder / "one-step" / "unet")
    return folder


def one_step(tmp_path: Path, teacher: Path) -> OneStep:
    return OneStep(tmp_path, teacher, teacher / "one-step", "cpu")


def few_steps(tmp_path: Path, cells: int = 32) -> FewSteps:
    """The transformer edition with small latents."""
    folder = ASSETS / "picturebook-transformer"
    return FewSteps(tmp_path, folder, folder / "few-steps", "cpu", cells)


def pulls(run: Matching, size: int) -> None:
    """The gradient of the student's loss is the disagreement of the guided teacher and the critic."""
    words, blank = run.encode(captions(0, 2)), run.encode([""] * 2)
    drawn = torch.randn(2, 4, size, size, requires_grad=True)
    torch.manual_seed(5)
    run.student_loss(drawn, words, blank).backward()
    torch.manual_seed(5)
    with torch.no_grad():
        times = EARLIEST + (LATEST - EARLIEST) * torch.rand(2)
        noisy, _ = run.noised(drawn.detach(), times)
        plain, guided, fake = (
            run.clean(name, noisy, times, text)
            for name, text in (("teacher", blank), ("teacher", words), ("critic", words))
        )
    real = plain + matching.GUIDANCE * (guided - plain)
    unit = (drawn.detach() - real).abs().mean((1, 2, 3), keepdim=True)
    assert drawn.grad is not None
    assert torch.allclose(drawn.grad * drawn.numel(), (fake - real) / unit, atol=1e-4)
    assert all(p.grad is None for network in run.networks.values() for p in network.parameters())


def test_the_students_gradient_is_the_disagreement(tmp_path: Path, teacher: Path) -> None:
    pulls(one_step(tmp_path, teacher), 16)


def test_the_same_on_the_transformer(tmp_path: Path) -> None:
    pulls(few_steps(tmp_path, 8), 8)


def test_what_the_critic_should_say_leads_back_to_the_drawing(tmp_path: Path, teacher: Path, monkeypatch) -> None:
    clean, times = torch.randn(3, 4, 16, 16), torch.tensor([0.1, 0.5, 0.9])
    for run in (one_step(tmp_path, teacher), few_steps(tmp_path, 16)):
        noisy, noise = run.noised(clean, times)
        answer = run.wanted(clean, noise, times)
        monkeypatch.setattr(run, "velocity", lambda *given, answer=answer: answer)
        assert torch.allclose(run.clean("critic", noisy, times, []), clean, atol=1e-5)


def test_drawings_are_the_pipelines_own(tmp_path: Path, teacher: Path) -> None:
    texts = ["a red ball , sky", "a blue star and a green fish , night"]
    unet, flow = one_step(tmp_path, teacher), few_steps(tmp_path, 16)
    unet.networks["student"].load_state_dict(unet.networks["teacher"].state_dict())
    flow.pipe.transformer = flow.networks["student"]
    for run in (unet, flow):
        run.pipe.set_progress_bar_config(disable=True)
    how = {"output_type": "latent", "guidance_scale": 0.0}
    with torch.no_grad():
        torch.manual_seed(3)
        found = unet.drawn(unet.encode(texts))
        torch.manual_seed(3)
        wanted = unet.pipe(texts, latents=torch.randn(2, 4, 16, 16), num_inference_steps=1, **how).images
        assert torch.allclose(found, wanted, atol=1e-4)
        noise = torch.randn(2, 4, 16, 16)
        found = flow.seen(noise, flow.encode(texts), STEPS - 1)
        wanted = flow.pipe(texts, latents=noise, height=64, width=64, num_inference_steps=STEPS, **how).images
    assert torch.allclose(found, wanted, atol=1e-4)


def test_a_run_trains_both_and_goes_on_where_it_stopped(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matching, "WARM", 1)
    monkeypatch.setattr(matching, "RATE", 1.0)  # so far that float16 shows it, at the end of a time box too
    run = one_step(tmp_path, teacher)
    student, critic = (next(run.networks[name].parameters()).clone() for name in ("student", "critic"))
    lost, _ = run.advance(2, 1.0)
    assert lost == 0 and torch.equal(student, next(run.networks["student"].parameters())), "the critic learns alone"
    assert not torch.equal(critic, next(run.networks["critic"].parameters()))
    run.run(0.001, batch=2)
    assert not torch.equal(student.half(), next(run.networks["student"].parameters())), "it is saved in float16"
    assert (tmp_path / "one-step" / "unet" / "config.json").is_file()
    again = one_step(tmp_path, teacher)
    assert again.step == run.step > 1
    assert torch.equal(again.ema.average[0], torch.load(tmp_path / "matching.pt", weights_only=True)["ema"][0])


def test_gradients_are_the_mean_of_all_processes(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = one_step(tmp_path, teacher)
    parameters = list(run.networks["student"].parameters())
    other = [torch.randn_like(p) for p in parameters]

    def all_reduce(flat: torch.Tensor) -> None:
        """What a second process adds, in the order of the parameters."""
        flat += torch.cat([gradient.flatten() for gradient in other])

    seen: list[torch.Tensor] = []
    monkeypatch.setattr(matching.dist, "all_reduce", all_reduce)
    keep = lambda given, most: seen.extend(p.grad.clone() for p in given)  # noqa: E731 what is clipped is the mean
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", keep)
    run.world = 2
    run.descend("student", sum((p * p).sum() for p in parameters), 0.0)
    for p, gradient, mean in zip(parameters, other, seen, strict=True):
        assert torch.allclose(mean, (2 * p.detach() + gradient) / 2, atol=1e-5)


def test_the_transformers_student_is_trained_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "WARM", 0)
    monkeypatch.setattr(matching, "RATE", 1.0)
    run = few_steps(tmp_path, 8)
    before = [p.clone() for p in run.networks["student"].parameters()]
    run.run(0.0001, batch=2)
    changed = [not torch.equal(a, b) for a, b in zip(before, run.networks["student"].parameters(), strict=True)]
    assert run.step == 1 and sum(changed) > len(changed) / 2
    assert (tmp_path / "few-steps" / "config.json").is_file() and (tmp_path / "few-steps.png").is_file()

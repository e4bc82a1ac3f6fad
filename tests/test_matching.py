"""Distribution matching: where the student is pulled, and what a run leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffgraft.app.bench import matching
from diffgraft.app.bench.autoencoder import build
from diffgraft.app.bench.denoiser import build_text_encoder, build_unet, pipeline
from diffgraft.app.bench.matching import Matching, captions, moved


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


def test_the_students_gradient_is_the_disagreement(tmp_path: Path, teacher: Path) -> None:
    run = Matching(tmp_path, teacher, teacher / "one-step", "cpu")
    words, blank = run.words(2).chunk(2)
    drawn = torch.randn(2, 4, 16, 16, requires_grad=True)
    torch.manual_seed(5)
    run.student_loss(drawn, words, blank).backward()
    torch.manual_seed(5)
    with torch.no_grad():
        noisy, times, _ = run.noised(drawn.detach(), matching.EARLIEST, matching.LATEST)
        plain, guided, fake = (
            run.clean(network, noisy, times, text)
            for network, text in ((run.teacher, blank), (run.teacher, words), (run.critic, words))
        )
    real = plain + matching.GUIDANCE * (guided - plain)
    unit = (drawn.detach() - real).abs().mean((1, 2, 3), keepdim=True)
    assert drawn.grad is not None
    assert torch.allclose(drawn.grad * drawn.numel(), (fake - real) / unit, atol=1e-4)
    assert all(p.grad is None for p in (*run.teacher.parameters(), *run.critic.parameters()))


def test_a_run_trains_both_and_goes_on_where_it_stopped(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matching, "WARM", 1)
    run = Matching(tmp_path, teacher, teacher / "one-step", "cpu")
    student, critic = (next(network.parameters()).clone() for network in (run.student, run.critic))
    lost, _ = run.advance(2, 1.0)
    assert lost == 0 and torch.equal(student, next(run.student.parameters())), "the critic learns alone at first"
    assert not torch.equal(critic, next(run.critic.parameters()))
    run.run(0.001, batch=2)
    assert not torch.equal(student, next(run.student.parameters()))
    assert (tmp_path / "one-step" / "unet" / "config.json").is_file()
    again = Matching(tmp_path, teacher, teacher / "one-step", "cpu")
    assert again.step == run.step > 1
    assert torch.equal(again.ema.average[0], torch.load(tmp_path / "matching.pt", weights_only=True)["ema"][0])

"""The trainers' parts: schedule, averages, Muon, checkpoints that go on exactly where they were cut, the losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffgraft.app.bench import latents
from diffgraft.app.bench.autoencoder import build, hue_error, whiten
from diffgraft.app.bench.denoiser import (
    build_scheduler,
    build_text_encoder,
    build_unet,
    draw_times,
    grounding_loss,
    watch_decoder,
)
from diffgraft.app.bench.muon import Muon, orthogonalize
from diffgraft.app.bench.student import end_of
from diffgraft.app.bench.train import Trainer
from diffgraft.app.bench.training import (
    Ema,
    TimeBox,
    arguments,
    folder,
    load_checkpoint,
    save_checkpoint,
    to_images,
    to_tensor,
)
from diffgraft.app.bench.world import caption, render, scene


def test_learning_rate_rises_holds_and_falls_to_almost_nothing() -> None:
    box = TimeBox(minutes=1, spent=12)
    assert box.rate(0) == pytest.approx(0.01)
    assert box.rate(500) == 1
    assert TimeBox(1, spent=42).rate(500) == pytest.approx(0.5, abs=0.01)
    assert TimeBox(1, spent=70).rate(500) == 0.01


def test_average_and_swap() -> None:
    p = torch.nn.Parameter(torch.zeros(3))
    ema = Ema([p], decay=0.5)
    with torch.no_grad():
        p.fill_(1.0)
    ema.update()
    expected = 1 - 2 / 11
    assert ema.average[0].tolist() == pytest.approx([expected] * 3)
    ema.swap()
    assert p.tolist() == pytest.approx([expected] * 3)
    ema.swap()
    assert p.tolist() == [1.0] * 3


def test_orthogonalize_against_the_singular_vectors() -> None:
    matrices = torch.randn(3, 24, 60, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrices.double(), full_matrices=False)
    found = orthogonalize(matrices).double()
    assert torch.linalg.svdvals(found).sub(0.95).abs().max() < 0.35
    agreement = (found * (u @ v)).sum((1, 2)) / 24
    assert agreement.min() > 0.75
    assert torch.allclose(orthogonalize(matrices.mT), orthogonalize(matrices).mT)


def test_muon_goes_downhill() -> None:
    torch.manual_seed(0)
    target, p = torch.randn(8, 5, 3, 3), torch.nn.Parameter(torch.zeros(8, 5, 3, 3))
    optimizer = Muon([p], lr=0.6)
    for _ in range(50):
        loss = (p - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2 * target.square().sum()


def test_a_checkpoint_brings_the_random_stream_back(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c.pt", {"step": 3})
    expected = torch.rand(4)
    torch.rand(10)
    state = load_checkpoint(tmp_path / "c.pt")
    assert state is not None and state["step"] == 3
    assert torch.equal(torch.rand(4), expected)
    assert load_checkpoint(tmp_path / "none.pt") is None
    assert [file.name for file in tmp_path.iterdir()] == ["c.pt"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    torch.save(latents.encode(build().eval(), 0, 40), folder / "latents-0.pt")
    return folder


def test_encoded_scenes_tell_where_each_word_is(work: Path) -> None:
    data = latents.load(work)
    assert data["latents"].shape == (40, 4, 16, 16)
    for row in range(40):
        drawn = scene(row)
        words = caption(drawn).split()
        for thing, (colour, kind), cover in zip(
            drawn.things, data["columns"][row, 0].tolist(), data["masks"][row], strict=False
        ):
            assert (words[colour - 1], words[kind - 1]) == (thing.colour, thing.kind)
            y, x = divmod(int(cover.argmax()), 16)
            assert abs((x + 0.5) / 16 - thing.x) < thing.radius and abs((y + 0.5) / 16 - thing.y) < 1.2 * thing.radius


def test_training_goes_on_from_a_checkpoint_as_if_never_cut(work: Path) -> None:
    torch.manual_seed(1)
    whole = Trainer(work, "cpu", None)
    whole.load_data()
    whole.advance(4, 0.4, 1.0)
    whole.save(spent=5.0)
    straight = whole.advance(4, 0.4, 1.0)
    again = Trainer(work, "cpu", None)
    again.load_data()
    again.resume(fresh_box=False)
    assert (again.step, again.spent, again.ema.steps) == (1, 5.0, 1)
    assert torch.equal(again.advance(4, 0.4, 1.0), straight)
    for ours, theirs in zip(again.ema.average, whole.ema.average, strict=True):
        assert torch.equal(ours, theirs)


def test_the_denoiser_alone_is_trained_where_the_words_are_kept(work: Path) -> None:
    trainer = Trainer(work, "cpu", None, keep_text=True)
    trainer.singles = 1.0
    trainer.load_data()
    before = [p.clone() for p in trainer.text.parameters()], trainer.unet.conv_in.weight.clone()
    trainer.advance(4, 0.0, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before[0], trainer.text.parameters(), strict=True))
    assert not torch.equal(before[1], trainer.unet.conv_in.weight)
    assert (trainer.batch(64, 0.0)["masks"][:, 1:] == 0).all()


def test_times_reach_both_ends_of_the_schedule() -> None:
    torch.manual_seed(0)
    drawn = draw_times(20_000)
    assert drawn.min() >= 0 and drawn.max() <= 999
    assert (drawn > 900).float().mean() > 0.015
    assert (drawn - 500).abs().lt(250).float().mean() > 0.6  # 0.5 if they were drawn evenly


def test_training_attention_is_attention() -> None:
    torch.manual_seed(2)
    unet, text = build_unet().eval(), build_text_encoder().eval()
    with torch.no_grad():
        words = text(torch.tensor([[1, 4, 9, 16, 2] + [0] * 15]))[0]
        noisy = torch.randn(1, 4, 16, 16)
        before = unet(noisy, 500, words).sample
        watched = watch_decoder(unet)
        after = unet(noisy, 500, words).sample
    assert torch.allclose(before, after, atol=1e-5)
    assert [layer.maps.shape for layer in watched] == [(1, 4, 256, 20)] * 2


def test_grounding_loss_by_hand() -> None:
    masks = torch.zeros(1, 3, 256)
    masks[0, 0, :64], masks[0, 1, 64:128] = 1, 1
    columns = torch.tensor([[[2, 3], [0, 6], [0, 0]]])
    maps = torch.full((1, 1, 256, 8), 1e-9)
    maps[0, 0, :64, 2] = 1  # all inside
    maps[0, 0, :128, 3] = 1  # half inside
    maps[0, 0, 128:, 6] = 1  # all outside
    assert grounding_loss(maps, masks, columns).item() == pytest.approx((0 + 0.25 + 1) / 3, abs=1e-4)
    assert grounding_loss(maps, masks, torch.zeros_like(columns)).item() == 0


def test_whitening_changes_the_latents_and_not_the_picture() -> None:
    torch.manual_seed(3)
    vae, pictures = build().eval(), to_tensor([render(scene(i)) for i in range(6)])
    with torch.no_grad():
        before = vae.decode(vae.encode(pictures).latent_dist.mean).sample
        whiten(vae, pictures)
        latent = vae.encode(pictures).latent_dist.mean
        after = vae.decode(latent).sample
    assert torch.allclose(before, after, atol=1e-3)
    covariance = torch.cov(latent.movedim(1, -1).flatten(0, -2).T)
    assert torch.allclose(covariance, torch.eye(4), atol=1e-3)


def test_pictures_and_tensors_are_inverse() -> None:
    picture = render(scene(5))
    assert to_images(to_tensor([picture]))[0].tobytes() == picture.tobytes()


def test_hue_error() -> None:
    assert hue_error((1, 0, 0), (1, 0, 0)) == 0
    assert hue_error((1, 0, 0), (0, 1, 0)) == pytest.approx(120)
    assert hue_error((1, 0, 0.05), (1, 0.05, 0)) == pytest.approx(6, abs=0.2)
    assert hue_error((0.9, 0.9, 0.88), (0.8, 0.8, 0.8)) == 0
    assert hue_error((0.9, 0.9, 0.88), (0.9, 0.2, 0.2)) == 180


def test_where_a_velocity_points() -> None:
    alpha, clean, noise = (
        build_scheduler().alphas_cumprod[600].double(),
        torch.randn(2, 4, 4, 4).double(),
        torch.randn(2, 4, 4, 4).double(),
    )
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
    assert torch.allclose(end_of(velocity, noisy, alpha), clean)


def test_a_folder_that_is_not_there_is_said(tmp_path, capsys):
    parser = arguments("", minutes=1)
    parser.add_argument("--teacher", type=folder)
    assert parser.parse_args(["--teacher", str(tmp_path)]).teacher == tmp_path
    with pytest.raises(SystemExit):
        parser.parse_args(["--teacher", str(tmp_path / "nowhere")])
    assert f"there is no folder {tmp_path / 'nowhere'}" in capsys.readouterr().err

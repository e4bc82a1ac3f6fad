"""The one-step student: what is collected from the teacher, and where the loss pulls."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from diffgraft.app.bench.autoencoder import build
from diffgraft.app.bench.denoiser import build_text_encoder, build_unet, pipeline
from diffgraft.app.bench.student import (
    GUIDANCE,
    KEPT,
    STEPS,
    Student,
    collect,
    distance,
    student_scheduler,
    teacher_scheduler,
    times,
)
from diffgraft.app.bench.training import autocast, narrow


def test_collected_points_lie_on_the_teachers_trajectory() -> None:
    torch.manual_seed(0)
    pipe = pipeline(build().eval(), build_unet().eval(), build_text_encoder().eval())
    pipe.scheduler = teacher_scheduler()
    pipe.set_progress_bar_config(disable=True)
    found = collect(pipe, first=5, count=2, batch=2)
    assert found["points"].shape == (2, len(KEPT), 4, 16, 16)
    assert found["ends"].shape == (2, 4, 16, 16) and found["tokens"].shape == (2, 20)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    assert torch.equal(found["points"][:, 0], noise.half())
    with torch.no_grad():
        words = pipe.text_encoder(torch.cat([torch.tensor([[1, 2] + [0] * 18] * 2), found["tokens"].long()]))[0]
        pipe.scheduler.set_timesteps(STEPS)
        latents, points = noise, []
        for t in pipe.scheduler.timesteps:
            points.append(latents)
            blank, guided = pipe.unet(torch.cat([latents] * 2), t, words).sample.chunk(2)
            latents = pipe.scheduler.step(blank + GUIDANCE * (guided - blank), t, latents).prev_sample
    assert torch.allclose(latents, found["ends"].float(), atol=0.02)
    for kept, step in enumerate(KEPT):
        assert torch.allclose(points[step], found["points"][:, kept].float(), atol=0.02)


def test_times_are_those_of_the_points_and_the_first_is_the_students() -> None:
    assert times()[0] == 999
    scheduler = student_scheduler()
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [999]
    assert scheduler.final_alpha_cumprod == 1


def test_distance_is_squared_near_and_absolute_far() -> None:
    zero, one = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
    near, far = distance(0.001 * one, zero).item(), distance(10 * one, zero).item()
    assert near == pytest.approx(0.001**2 / 0.2, rel=0.05)
    assert far == pytest.approx(9.9, rel=0.001)
    assert distance(one, one).item() == pytest.approx(0, abs=1e-6)


def test_half_precision_is_taken_where_it_is_fast(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    assert narrow("cpu") is torch.float32 and narrow("cuda") is torch.bfloat16
    with autocast("cpu"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    with autocast("cpu"):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16


def test_a_student_learns_and_says_how_far_it_lands_where_it_never_was(tmp_path: Path, caplog):
    caplog.set_level(logging.INFO)
    torch.manual_seed(0)
    teacher = pipeline(build().eval(), build_unet().eval(), build_text_encoder().eval())
    teacher.save_pretrained(tmp_path / "teacher")
    teacher.scheduler = teacher_scheduler()
    teacher.set_progress_bar_config(disable=True)
    torch.save(collect(teacher, first=0, count=4, batch=4), tmp_path / "paths-0.pt")
    student = Student(tmp_path, tmp_path / "teacher", "cpu")
    before = [mean.clone() for mean in student.ema.average]
    student.load_data()
    student.run(0.01, batch=2)
    told = [line.getMessage() for line in caplog.records if "never seen" in line.getMessage()]
    assert len(told) == 1 and "on 1 trajectories" in told[0] and 0 < float(told[0].split()[-1]) < 10
    assert any(not torch.equal(a, b) for a, b in zip(before, student.ema.average, strict=True))
    assert (tmp_path / "one-step" / "unet" / "config.json").is_file()

"""The transformer edition's parts: a plain pipeline around them, training as if never cut, the losses by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, ZImageImg2ImgPipeline, ZImageInpaintPipeline, ZImagePipeline
from PIL import Image

import diffgraft as dg
from diffgraft.app.bench import flow, flow_student, latents, model_card
from diffgraft.app.bench.autoencoder import adopt, build
from diffgraft.app.bench.train_flow import FlowTrainer, export
from diffgraft.app.bench.training import HalfCopy, to_tensor
from diffgraft.app.bench.vocabulary import LENGTH, WORDS
from diffgraft.app.bench.world import caption, scene

CAPTIONS = ["a red ball and a blue star , night , sketch style", "a moon", ""]


def networks():
    """Transformer and text encoder with weights everywhere: trained ones start at zero where they end a layer."""
    torch.manual_seed(0)
    transformer, text = flow.build_transformer().eval(), flow.build_text_encoder().eval()
    for p in transformer.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    return transformer, text


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(1)
    made = flow.pipeline(build(fine=True).eval(), *networks())
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("flow")
    vae = build(fine=True).eval()
    vae.save_pretrained(folder / "vae")
    torch.save(latents.encode(vae, 0, 30), folder / "latents-0.pt")
    return folder


def tokens(texts):
    return flow.chat_tokenizer()(texts, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids


def draw(pipe, **settings):
    settings = {"height": 64, "width": 96, "num_inference_steps": 2, "guidance_scale": 1.5} | settings
    return pipe(CAPTIONS[0], generator=torch.Generator().manual_seed(0), **settings).images[0]


def test_it_is_saved_and_loaded_as_a_plain_pipeline(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again) is ZImagePipeline
    picture = draw(pipe)
    assert picture.size == (96, 64) and draw(again).tobytes() == picture.tobytes()


def test_tasks_and_tables_tell_it_its_size_and_count_guidance_as_it_does(pipe):
    [picture] = dg.generate(pipe, CAPTIONS[0], steps=2, guidance=1.5, seed=0)
    assert picture.size == (128, 128)
    drawn = model_card.draw(pipe, CAPTIONS[:1], steps=2, guidance=2.5, seed=0)
    assert torch.equal(drawn, to_tensor([picture]))
    [wide] = dg.generate(pipe, CAPTIONS[0], steps=1, width=160)
    assert wide.size == (160, 128)


def test_the_sibling_pipelines_take_its_parts(pipe):
    picture, mask = Image.new("RGB", (96, 64), "teal"), Image.new("L", (96, 64))
    mask.paste(255, (30, 20, 60, 40))
    for sibling, given in ((ZImageImg2ImgPipeline, {}), (ZImageInpaintPipeline, {"mask_image": mask})):
        made = sibling(**pipe.components)
        made.set_progress_bar_config(disable=True)
        assert draw(made, image=picture, strength=0.5, num_inference_steps=4, **given).size == (96, 64)


def test_training_reads_what_the_pipeline_encodes(pipe):
    theirs = pipe.encode_prompt(list(CAPTIONS), device="cpu")[0]
    for ours, given in zip(flow.encode_words(pipe.text_encoder, tokens(CAPTIONS)), theirs, strict=True):
        assert torch.allclose(ours, given, atol=1e-6)


def test_training_attention_is_the_models_own():
    transformer, text = networks()
    with torch.no_grad():
        words, images = flow.encode_words(text, tokens(CAPTIONS)), list(torch.randn(3, 4, 1, 32, 32))
        given = images, torch.tensor([0.1, 0.5, 0.9]), words
        before = torch.stack(transformer(*given, return_dict=False)[0])
        flow.processors(transformer, flow.TrainingAttention())
        after = torch.stack(transformer(*given, return_dict=False)[0])
    assert before.std() > 0.01 and torch.allclose(before, after, atol=1e-5)


def test_pooled_latents_lie_on_the_whole_grid():
    embed = flow.build_transformer().rope_embedder
    text, image = torch.tensor([[4, 0, 0]]), torch.tensor([[33, 7, 3]])
    assert torch.equal(flow.Spread(embed, 2)(image), embed(torch.tensor([[33, 14, 6]])))
    assert torch.equal(flow.Spread(embed, 2)(text), embed(text))


def test_labels_say_what_covers_a_cell():
    masks = torch.zeros(1, 3, 2, 2)
    masks[0, 0, 0, 0], masks[0, 1, 0, 1] = 1, 0.25
    things = torch.zeros(1, 3, 2, dtype=torch.long)
    things[0, 0] = torch.tensor([WORDS.index("red"), WORDS.index("ball")])
    things[0, 1] = torch.tensor([WORDS.index("blue"), WORDS.index("boat")])
    kinds, colours = flow.label_targets(masks, things)
    order, paints = list(flow.SHAPES), list(flow.COLOURS)
    assert kinds[0, 0, 1 + order.index("ball")] == 1 and kinds[0, 1, 1 + order.index("boat")] == 0.25
    assert colours[0, 1, 1 + paints.index("blue")] == 0.25 and colours[0, 1, 0] == 0.75
    assert torch.equal(kinds.sum(-1), torch.ones(1, 4)) and kinds[0, 2:, 0].eq(1).all()
    right = torch.cat([kinds.clamp(min=1e-9).log(), colours.clamp(min=1e-9).log()], -1)
    assert flow.label_loss(right, masks, things) < 0.5 * flow.label_loss(right.flip(1), masks, things)


def test_scenes_name_their_things_whatever_the_caption_says(work):
    trainer = FlowTrainer(work, "cpu", None)
    trainer.load_data()
    torch.manual_seed(4)
    batch = trainer.batch(40, 0.0)
    described = {tuple(tokens([caption(scene(i))])[0].tolist()): scene(i) for i in range(30)}
    for words, things in zip(batch["tokens"].tolist(), batch["things"].tolist(), strict=True):
        drawn = described.get(tuple(words))
        if drawn:  # the full caption
            named = [(WORDS[colour], WORDS[kind]) for colour, kind in things if kind]
            assert named == [(thing.colour, thing.kind) for thing in drawn.things]
        assert any(kind for _, kind in things)  # an empty caption does not hide what is there


@pytest.mark.parametrize("pooled", [False, True])
def test_training_goes_on_from_a_checkpoint_as_if_never_cut(work, pooled):
    torch.manual_seed(1)
    whole = FlowTrainer(work, "cpu", None, pooled)
    whole.load_data()
    whole.advance(2, 0.4, 1.0)
    whole.save(spent=5.0)
    straight = whole.advance(2, 0.4, 1.0)
    again = FlowTrainer(work, "cpu", None, pooled)
    again.load_data()
    again.resume(fresh_box=False)
    assert (again.step, again.spent) == (1, 5.0)
    assert torch.equal(again.advance(2, 0.4, 1.0), straight)
    for ours, theirs in zip(again.ema.average, whole.ema.average, strict=True):
        assert torch.equal(ours, theirs)


def test_training_goes_on_from_exported_weights_alone(work, tmp_path):
    torch.manual_seed(2)
    trainer = FlowTrainer(work, "cpu", None, pooled=True)
    trainer.load_data()
    for _ in range(2):
        trainer.advance(2, 0.4, 1.0)
    trainer.save_average()
    export(work, tmp_path / "out")
    files = list((tmp_path / "out").rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) < 22e6 and max(file.stat().st_size for file in files) < 16e6
    assert not [file for file in (tmp_path / "out").rglob("*.json") if str(work) in file.read_text()]
    again = FlowTrainer(work, "cpu", tmp_path / "out")
    again.load_data()
    for name in ("transformer", "text"):
        for ours, theirs in zip(again.networks[name].parameters(), trainer.networks[name].parameters(), strict=True):
            assert ours.dtype == torch.float32 and torch.allclose(ours, theirs, atol=2e-3)
    assert again.advance(2, 0.4, 1.0).isfinite().all()


def test_a_half_copy_hands_over_and_follows():
    torch.manual_seed(3)
    module = torch.nn.Linear(3, 2)
    half = HalfCopy(module)
    half.module(torch.ones(1, 3).to(half.dtype)).sum().backward()
    half.hand_over()
    assert module.weight.grad.dtype == torch.float32 and torch.equal(module.weight.grad, torch.ones(2, 3))
    with torch.no_grad():
        module.weight += 1
    half.refresh()
    assert torch.equal(half.module.weight, module.weight.to(half.dtype)) and half.module.weight.grad is None


def test_the_fine_autoencoder_adopts_the_layers_of_the_coarse_one():
    torch.manual_seed(4)
    coarse, fine = build(), build(fine=True)
    adopt(fine, coarse)
    assert torch.equal(fine.encoder.conv_in.weight, coarse.encoder.conv_in.weight)
    assert torch.equal(
        fine.decoder.up_blocks[1].resnets[0].conv1.weight, coarse.decoder.up_blocks[2].resnets[0].conv1.weight
    )
    with torch.no_grad():
        assert fine.encode(torch.zeros(1, 3, 128, 128)).latent_dist.mean.shape == (1, 4, 32, 32)


def test_noise_levels_reach_both_ends_and_lie_where_asked():
    torch.manual_seed(5)
    low, high = flow.draw_noise_levels(20_000, 0.0), flow.draw_noise_levels(20_000, 0.5)
    assert low.min() >= 0 and high.max() <= 1
    assert (high > 0.95).float().mean() > 0.01
    assert high.median() - low.median() == pytest.approx(0.11, abs=0.03)


def test_the_students_cuts_are_the_teachers_steps(pipe, tmp_path):
    found = flow_student.collect(pipe, first=5, count=2, side=32)
    assert found["points"].shape == (2, flow_student.STEPS + 1, 4, 8, 8) and found["tokens"].shape == (2, LENGTH)
    cuts, taken = flow_student.levels(), pipe.scheduler.sigmas  # what the pipeline itself has just gone through
    assert torch.allclose(taken[:: flow_student.CROSSED], cuts) and cuts[0] == 1 and cuts[-1] == 0
    called = {"num_inference_steps": flow_student.STEPS, "guidance_scale": 0.0, "height": 32, "width": 32}
    pipe("a red ball", output_type="latent", **called)
    assert torch.allclose(pipe.scheduler.sigmas, cuts)  # and as the student is called


def test_a_student_that_learned_its_segments_ends_where_the_teacher_does(pipe, tmp_path):
    """The loss's target is the step that the pipeline's own scheduler makes of it."""
    pipe.save_pretrained(tmp_path / "teacher")
    torch.save(flow_student.collect(pipe, first=5, count=2, side=32), tmp_path / "flow-paths-0.pt")
    student = flow_student.FlowStudent(tmp_path, tmp_path / "teacher", "cpu")
    student.load_data()
    rows, seen = torch.tensor([0, 1]), {}
    student.half.module.forward = lambda images, times, words, return_dict: (seen.setdefault("answer", images),)
    points, cuts = student.data["points"].float(), student.levels
    for cut in range(flow_student.STEPS):
        straight = (points[:, cut + 1] - points[:, cut]) / (cuts[cut] - cuts[cut + 1])
        seen["answer"] = list(straight.unsqueeze(2))
        assert student.loss(rows, torch.full((2,), cut)) == pytest.approx(0, abs=1e-5)
        scheduler = student.pipe.scheduler
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / flow_student.STEPS, flow_student.STEPS).tolist())
        stepped = scheduler.step(-straight, scheduler.timesteps[cut], points[:, cut]).prev_sample
        assert torch.allclose(stepped, points[:, cut + 1], atol=1e-3)


def test_the_student_trains(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "teacher")
    torch.save(flow_student.collect(pipe, first=5, count=2, side=32), tmp_path / "flow-paths-0.pt")
    torch.manual_seed(6)
    student = flow_student.FlowStudent(tmp_path, tmp_path / "teacher", "cpu")
    student.load_data()
    before = student.loss(torch.tensor([0, 1]), torch.tensor([0, 2])).item()
    for _ in range(5):
        student.advance(4, 0.0, 0.1)
    assert student.loss(torch.tensor([0, 1]), torch.tensor([0, 2])).item() < 0.9 * before
    with pytest.raises(FileNotFoundError, match="--collect"):
        flow_student.FlowStudent(tmp_path / "teacher", tmp_path / "teacher", "cpu").load_data()

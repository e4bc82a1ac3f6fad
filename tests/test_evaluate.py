"""`diffgraft evaluate`: rows of the field's benchmarks, scorers, a whole run on the picture book and on tiny SDXL."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import tiny
import torch
import transformers
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor
from typer.testing import CliRunner

from diffgraft import ModelLoadError
from diffgraft.app.cli import app
from diffgraft.app.errors import DataError, MissingExtraError
from diffgraft.app.evaluate import grammar
from diffgraft.app.evaluate.cases import Case, spread
from diffgraft.app.evaluate.prompts import read_prompts
from diffgraft.app.evaluate.run import Evaluation, Pair
from diffgraft.app.evaluate.score_pixels import Pixels
from diffgraft.app.evaluate.scorers import KNOWN, scorer
from diffgraft.app.evaluate.table import table
from diffgraft.app.evaluate.techniques import technique


def evaluate(*words):
    return CliRunner().invoke(app, ["evaluate", *map(str, words)])


def quiet(text):
    """Nothing is said."""


def test_the_grammar_gives_the_published_276_prompts():
    cases = grammar.attend_and_excite()
    assert Counter(case.group for case in cases) == {"animals": 66, "animals and objects": 144, "objects": 66}
    prompts = {case.prompt for case in cases}
    assert {"a elephant and a rabbit", "a horse with a glasses", "a turtle with a crown"} < prompts
    assert len({case.id for case in cases}) == len(cases) == 276
    assert all(word in case.prompt for case in cases for word in case.concepts)
    assert grammar.attend_and_excite() == cases != grammar.attend_and_excite(seed=1)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a green bench and a blue bowl", ("bench", "bowl")),
        ("a giraffe on the left of a lamp", ("giraffe", "lamp")),
        ("a bee on side of a refrigerator", ("bee", "refrigerator")),
        ("rubber sole shoes and fluffy clouds", ("shoes", "clouds")),
        ("a photo of a tie above a bear", ("tie", "bear")),
        ("rubber gloves and leather gloves", ()),
        ("The wooden spoon and metallic ladle serve the fluffy soup in the plastic bowl.", ()),
    ],
)
def test_concepts_of_a_text_list(prompt, words):
    assert grammar.nouns(prompt) == words


def test_files_of_prompts(tmp_path):
    (tmp_path / "color_val.txt").write_text("a red car and a blue star\n\na cat\n")
    geneval = {
        "tag": "color_attr", "prompt": "a photo of a red tv remote and a black tie",
        "include": [{"class": "tv remote", "count": 1, "color": "red"}, {"class": "tie", "count": 2}],
        "exclude": [{"class": "tie", "count": 3}],
    }  # fmt: skip
    (tmp_path / "evaluation_metadata.jsonl").write_text(json.dumps(geneval) + "\n")
    (tmp_path / "pairs.csv").write_text(
        'prompt,negative_prompt,concepts\n"a cat, sitting",blurry,\nA star is,x,star; cat\n'
    )
    colour, cat, remote, pair, own = read_prompts(tmp_path)
    assert (colour.concepts, colour.group, colour.id) == (("car", "star"), "color_val", "color_val-1")
    assert cat.concepts == ("cat",) and cat.id == "color_val-3"
    assert remote.concepts == ("tv remote", "tie") and remote.group == "color_attr"
    assert (remote.attributes, remote.counts) == ((("tv remote", "red"),), (("tv remote", 1), ("tie", 2)))
    assert remote.limits == (("tie", 3),)
    assert (pair.negative, own.concepts) == ("blurry", ("star", "cat"))
    found, left_out = technique("segregation").cases(tmp_path, embedded=False)
    assert left_out == 1 and cat not in found
    assert technique("negative").cases(tmp_path, embedded=False)[1] == 3


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "a cat"}\n{"text": "x"}', "a:2 has no prompt; it has text"),
        ("a.jsonl", '{"prompt": "a cat"', "a.jsonl:1 is not JSON"),
        ("a.jsonl", '{"prompt": "a cat", "include": [1]}', 'a:1: "concepts" are words'),
        ("a.yaml", "prompt: a cat", "holds no prompts"),
    ],
)
def test_files_that_cannot_be_read_say_where(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_prompts(tmp_path)


def test_a_few_rows_come_from_all_over_the_benchmark():
    assert spread(range(276), 4) == [0, 69, 138, 207]
    assert spread(range(3), 9) == spread(range(3), None) == [0, 1, 2]


@pytest.mark.parametrize("name", ["negative", "concept", "redirection", "style"])
def test_what_needs_data_says_which(name, tmp_path):
    with pytest.raises(DataError, match="give --data"):
        technique(name).cases(None, embedded=False)
    with pytest.raises(DataError):
        technique(name).cases(tmp_path, embedded=False)
    assert technique(name).cases(None, embedded=True)[0]


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_a_missing_package_is_named_with_its_pip_line(name, monkeypatch):
    from diffgraft.app.evaluate import scorers

    monkeypatch.setattr(scorers, "find_spec", lambda package: None)
    if KNOWN[name].packages:
        with pytest.raises(MissingExtraError, match=f'pip install "{KNOWN[name].pip}'.replace("[", r"\[")):
            scorer(name)
    else:
        assert scorer(name).key["scorer"] == name


def test_the_whole_command_on_the_picture_book_and_again(tmp_path, monkeypatch):
    bare = ("segregation", "--limit", 2, "--steps", 2, "--out", tmp_path)
    unscored = evaluate(*bare, "--quiet")
    assert unscored.exit_code == 0 and "seconds a picture" in unscored.stdout and "judge" not in unscored.stdout
    words = (*bare, "--scorer", "judge")  # a scorer that comes later looks at what is there
    drawn = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "pictures").iterdir()}
    first = evaluate(*words)
    assert first.exit_code == 0, first.output
    for name in ("all | 2 x 1 | judge, every object ↑", "three objects | 1 x 1 | judge", "changed 2 of 2 pictures"):
        assert name in first.stdout
    assert (tmp_path / "table.md").read_text().strip() == first.stdout.strip()
    assert (tmp_path / "contact-sheet.png").exists()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "pictures").iterdir()}
    assert len(before) == 4 and before == drawn
    again = evaluate(*words, "--quiet")
    assert again.stdout == first.stdout
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "pictures").iterdir()} == before
    assert evaluate("segregation", "--settings", "[1]").exit_code == 2
    assert evaluate("sharpen").exit_code == 2


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny CLIP with its processor, in a folder."""
    folder, words = tmp_path_factory.mktemp("clip"), tiny.tokenizer()
    text = {
        "vocab_size": len(words), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    torch.manual_seed(11)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**size), words).save_pretrained(folder)
    return folder


def test_tiny_sdxl_with_a_tiny_clip(tmp_path, clip):
    (tmp_path / "color.txt").write_text("a red ball and a blue star\n")
    tiny.sdxl().save_pretrained(tmp_path / "sdxl")
    words = ("--model", tmp_path / "sdxl", "--data", tmp_path / "color.txt", "--scorer", f"clip={clip}")
    small = ("--width", 32, "--height", 32, "--steps", 2, "--seeds", 2, "--out", tmp_path / "out")
    done = evaluate("segregation", *words, *small)
    assert done.exit_code == 0, done.output
    assert "| all | 1 x 2 | clip, least concept ↑ |" in done.stdout and "clip, prompt ↑" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    scored = [row["value"] for row in rows if "scorer" in row["key"] and row["key"]["scorer"]["scorer"] == "clip"]
    assert len(scored) == 4 and all(0 <= v <= 100 for value in scored for v in value.values())
    assert len({value["clip, prompt ↑"] for value in scored}) > 1


def test_clip_agrees_with_the_model_itself(clip):
    """CLIPScore as it is defined, worked out from the model's own features."""
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    picture = Image.effect_noise((32, 32), 80).convert("RGB")
    with torch.no_grad():
        out = model(**processor(text=["a red ball"], images=[picture], return_tensors="pt"))
        cosine = float(torch.cosine_similarity(out.text_embeds, out.image_embeds))
    assert cosine > 0.01  # below 0 nothing is told apart
    own = scorer(f"clip={clip}")
    assert own.agree(picture, "a red ball") == pytest.approx(max(0.0, 100 * cosine), abs=1e-3)
    assert own.agree(picture, picture) == pytest.approx(100, abs=1e-3)


def test_redirection_and_style_from_folders(tmp_path):
    for name, colour in (("image", "red"), ("truth", "green"), ("content", "blue"), ("style", "yellow")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (32, 32), colour).save(tmp_path / name / "a.png")
    (tmp_path / "mask").mkdir()
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 20, 20))
    mask.save(tmp_path / "mask" / "a.png")
    (tmp_path / "rows.jsonl").write_text('{"image": "a.png", "gone": "dog", "prompt": "a cat"}')
    pipe = tiny.sd15()
    for name, more, told in (
        ("redirection", {}, "hole against the truth, dB"), ("style", {"iterations": 0}, "style distance"),
    ):  # fmt: skip
        chosen = technique(name)
        cases, _ = chosen.cases(tmp_path, embedded=False)
        assert name != "redirection" or (cases[0].gone, cases[0].prompt) == ("dog", "a cat")
        made = Evaluation(chosen, pipe, tmp_path / "out", more, {"steps": 2}).run(cases, [0], [Pixels()], quiet)
        assert not made[0].error
        assert any(told in line for line in table(made, chosen.plugin))


def test_a_row_that_fails_is_named_and_the_others_go_on(tmp_path):
    cases = [Case("bad", "a", "a cat", ("cat", "zebra")), Case("good", "a", "a cat and a star", ("cat", "star"))]
    call = {"steps": 2, "width": 32, "height": 32}
    run = Evaluation(technique("segregation"), tiny.sd15(), tmp_path, {}, call)
    bad, good = run.run(cases, [0], [Pixels()], quiet)
    assert "zebra" in bad.error and not good.error
    assert set(good.files) == {"plain", "grafted"}


def test_the_table_pairs_seeds_within_cases():
    pairs, cases = [], [Case("case", "g"), Case("case", "g")]  # two rows may be called alike
    for number, (plain, grafted) in enumerate([(False, True), (False, True), (True, True), (True, True)]):
        scores = {"plain": {"right": plain, "x": 1.0}, "grafted": {"right": grafted, "x": 1.5}}
        pairs.append(Pair(cases[number // 2], number % 2, {}, scores))
    right, x = list(table(pairs, "Plugin"))[2:]
    assert right.startswith("| all | 2 x 2 | right | 50.0%") and right.endswith("| +50.0 (+0.0 to +100.0) |")
    assert "1.500 | +0.500 |" in x


@pytest.fixture(scope="module")
def detectors(tmp_path_factory):
    """Folders of a detector of fixed classes and of an open one; their random weights see something everywhere."""
    fixed, free, words = tmp_path_factory.mktemp("yolos"), tmp_path_factory.mktemp("owl"), tiny.tokenizer()
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.YolosConfig(
        **small, image_size=[32, 32], patch_size=8, num_detection_tokens=5, id2label={0: "cat"}, label2id={"cat": 0}
    )
    torch.manual_seed(0)
    transformers.YolosForObjectDetection(config).save_pretrained(fixed)
    transformers.YolosImageProcessor(size={"shortest_edge": 32, "longest_edge": 32}).save_pretrained(fixed)
    words.model_max_length = 16
    text = {"vocab_size": len(words), "max_position_embeddings": 16, "pad_token_id": words.pad_token_id}
    sight = {"image_size": 32, "patch_size": 8}
    text |= {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    config = transformers.OwlViTConfig(text_config=small | text, vision_config=small | sight, projection_dim=32)
    transformers.OwlViTForObjectDetection(config).save_pretrained(free)
    pictures = transformers.OwlViTImageProcessor(size={"height": 32, "width": 32})
    transformers.OwlViTProcessor(pictures, words).save_pretrained(free)
    return fixed, free


def test_a_detector_counts_what_geneval_asks(detectors):
    fixed, free = (scorer(f"detector={folder}") for folder in detectors)
    picture = Image.effect_noise((40, 40), 80).convert("RGB")
    assert fixed.count(picture, ["cat", "dog"]) == {"cat": 5, "dog": 0}
    assert fixed.score(Case("a", "g", counts=(("cat", 5),), negative="dog", gone="cat"), picture) == {
        "detector, all found ↑": True, "detector, negative found ↓": False, "detector, what was to go found ↓": True,
    }  # fmt: skip
    for counts, limits in (((("cat", 6),), ()), ((("cat", 1),), (("cat", 5),)), ((("dog", 1),), ())):
        assert fixed.score(Case("a", "g", counts=counts, limits=limits), picture) == {"detector, all found ↑": False}
    assert free.count(picture, ["cat", "red ball"])["red ball"] > 0
    assert free.score(Case("a", "g", concepts=("cat", "star")), picture) == {"detector, all found ↑": True}


@pytest.mark.parametrize("name", ["clip", "detector"])
def test_a_folder_without_a_model_is_an_error(name, tmp_path):
    with pytest.raises(ModelLoadError, match=f"--scorer {name}="):
        scorer(f"{name}={tmp_path}")

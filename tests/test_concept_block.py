"""ConceptBlock: its equations against a derivation of their own, the gate, the same bytes without the concept."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import tiny_transformers as tt
import torch
from plugins_for_tests import fingerprint

import diffgraft as dg
from diffgraft.app.bench.concept_cost import cost
from diffgraft.app.bench.concept_prompts import shown
from diffgraft.app.bench.configs import SD15, meta_pipe
from diffgraft.app.bench.judge import load_judge, look
from diffgraft.plugins.concept_geometry import adavd, calibrated, contrast, nearness, phrase_nearness


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the equations, by loops over columns ---------------------------------------------------------------------------


def slow_contrast(v, c, f, weight):
    out = v.copy()
    for i in range(len(v)):
        d, u = c[i] - f[i], v[i] - f[i]
        if d @ d > 0:
            out[i] = v[i] - weight[i] * max(0.0, (u @ d) / (d @ d)) * d
    return out


def slow_adavd(v, concepts):
    """Subtracts from each value its part along an orthonormal basis that QR makes of the concepts at its column."""
    out = v.copy()
    for i in range(len(v)):
        basis, _ = np.linalg.qr(np.stack([c[i] for c in concepts], 1))
        for k, c in enumerate(concepts):
            cosine = v[i] @ c[i] / np.linalg.norm(v[i]) / np.linalg.norm(c[i])
            shift = 2 / (1 + np.exp(-100 * (cosine - 0.93)))
            out[i] = out[i] - shift * (v[i] @ basis[:, k]) * basis[:, k]
    return out


@pytest.mark.parametrize("count", [1, 3])
def test_contrast_in_float64(count):
    v, weight = normal(7, 12), normal(7, seed=1).abs()
    expected, found = v.numpy(), v
    for k in range(count):
        c, f = normal(7, 12, seed=2 + k), normal(7, 12, seed=9 + k)
        c[3] = f[3]
        expected, found = slow_contrast(expected, c.numpy(), f.numpy(), weight.numpy()), contrast(found, c, f, weight)
    assert found.dtype == torch.float64 and np.abs(found.numpy() - expected).max() < 1e-13
    assert torch.equal(found[3], v[3]) and not torch.equal(found, v)


@pytest.mark.parametrize("count", [1, 3])
def test_adavd_in_float64(count):
    concepts = normal(count, 7, 12, seed=1)
    v = concepts[0] + 0.3 * normal(7, 12)  # cosines on both sides of 0.93
    v[1] = concepts[0, 1] * 2
    found = adavd(v, concepts).numpy()
    assert np.abs(found - slow_adavd(v.numpy(), concepts.numpy())).max() < 1e-12
    whole = adavd(v, concepts, steep=0.0)  # without the shift: nothing along any concept is left
    assert (whole * concepts).sum(-1).abs().max() < 1e-12


def test_a_zero_concept_takes_nothing_out():
    v = normal(5, 8)
    assert torch.equal(adavd(v, torch.zeros(2, 5, 8, dtype=torch.float64)), v)
    assert torch.equal(contrast(v, v * 0, v * 0, torch.ones(5)), v)


def test_nearness_knows_the_own_word_whatever_the_scale():
    own, others = normal(6, 8), normal(4, 6, 8, seed=1)
    middle = torch.cat([others, own[None]]).mean(0)
    for weight in (0.3, 1.0, 1.6):  # as prompt weighting scales what a word has beyond others
        text = torch.stack([middle + weight * (own - middle), others[2]])
        found = nearness(text, own, others)
        assert (found[0] > 0.2).all() and (found[1] < -0.2).all()
    own[4] = 0
    assert (nearness(text, own, others)[:, 4] == -2).all()


def test_a_phrase_needs_all_its_tokens_in_a_row():
    own, others = normal(2, 6, 8), normal(4, 6, 8, seed=1)
    text = others[0].repeat(3, 1, 1)
    text[0, 2:4] = torch.stack([own[0, 2], own[1, 3]])
    text[1, 2] = own[0, 2]
    text[2, 2:4] = torch.stack([own[1, 2], own[0, 3]])
    best = phrase_nearness(text, own, others).max(1)
    assert best.values[0] > 0.3 and best.indices[0] == 2
    assert (best.values[1:] < 0).all()


def test_the_threshold_lies_between_and_has_a_floor():
    assert calibrated([0.8, 0.6], [0.1, 0.2]) == pytest.approx(0.4)
    assert calibrated([0.1], [-0.5]) == 0.12


# -- on the picture book --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student():
    return tiny.quiet(dg.picturebook(one_step=True))


def draw(pipe, prompt, *plugins, **call):
    options = {"num_inference_steps": 1, "guidance_scale": 0, "output_type": "latent"} | call
    options.setdefault("generator", torch.Generator().manual_seed(0))
    with dg.graft(pipe, *plugins) as g:
        return pipe(prompt, **options).images, g.report()


NEUTRAL = ["a blue ball and a yellow moon , sky", "a tree", "a green fish and a white boat , sea , mosaic style", ""]


@pytest.mark.parametrize("rule", ["contrast", "adavd", "nasa"])
def test_prompts_without_the_concept_keep_their_bytes(student, rule):
    block, before = dg.ConceptBlock(["star", "red"], rule=rule), fingerprint(student)
    for prompt in NEUTRAL:
        assert torch.equal(draw(student, prompt, block)[0], draw(student, prompt)[0]), prompt
    asked = "a red star and a blue ball , sky"
    assert not torch.equal(draw(student, asked, block)[0], draw(student, asked)[0])
    assert fingerprint(student) == before


@pytest.mark.parametrize("rule", ["contrast", "adavd", "nasa"])
def test_one_batch_holds_both_and_each_is_as_if_alone(student, rule):
    prompts = ["a red star , sky", NEUTRAL[0]]
    noise = torch.randn(2, *draw(student, "a tree")[0].shape[1:], generator=torch.Generator().manual_seed(3))
    both, report = draw(student, prompts, dg.ConceptBlock("star", rule=rule), latents=noise)
    plain, _ = draw(student, prompts, latents=noise)
    assert torch.equal(both[1], plain[1]) and not torch.equal(both[0], plain[0])
    assert "star: at 3 star" in str(report) and "not there" in str(report)


@pytest.mark.parametrize(
    "written", ["a RED Star , sky", "a red\nstar ,\tsky", "a red star,sky", "an red star , sky"], ids=repr
)
def test_how_it_is_written_does_not_switch_it_off(student, written):
    block, plain = draw(student, "a red star , sky", dg.ConceptBlock("star"))[0], draw(student, "a red star , sky")[0]
    found = draw(student, written, dg.ConceptBlock("STAR"))[0]
    assert torch.equal(found, block) and not torch.equal(found, plain)


def test_embeddings_are_looked_at_too(student):
    with torch.no_grad():
        star, tree = (student.encode_prompt(x, "cpu", 1, False)[0] for x in ("a red star , sky", "a blue tree , sky"))
    for scale in (0.8, 1.0, 1.2):
        found, report = draw(student, None, dg.ConceptBlock("star"), prompt_embeds=star * scale)
        assert not torch.equal(found, draw(student, None, prompt_embeds=star * scale)[0])
        assert "star: at 3" in str(report)
    assert torch.equal(
        draw(student, None, dg.ConceptBlock("star"), prompt_embeds=tree)[0], draw(student, None, prompt_embeds=tree)[0]
    )


def test_a_text_that_changes_on_the_way_is_looked_at_again(student):
    """A callback that brings the concept in at the second step meets the gate as well."""
    with torch.no_grad():
        star = student.encode_prompt("a red star , sky", "cpu", 1, False)[0]

    def bring(pipe, step, timestep, tensors):
        return {"prompt_embeds": star}

    call = {
        "num_inference_steps": 2, "callback_on_step_end": bring,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
    }  # fmt: skip
    blocked = draw(student, "a blue tree , sky", dg.ConceptBlock("star"), **call)[0]
    assert not torch.equal(blocked, draw(student, "a blue tree , sky", **call)[0])


def test_the_guided_half_alone_is_touched(picturebook):
    seen = []
    hook = picturebook.unet.register_forward_hook(lambda module, args, out: seen.append(out[0].clone()))
    call = {"num_inference_steps": 1, "guidance_scale": 2.5}
    draw(picturebook, "a red star , sky", **call)
    draw(picturebook, "a red star , sky", dg.ConceptBlock("star"), **call)
    hook.remove()
    (plain, blocked) = seen
    assert torch.equal(plain[:1], blocked[:1]) and not torch.equal(plain[1:], blocked[1:])


def test_paraphrases_replacement_and_neutral_settings(student):
    asked = "a red star , sky"
    plain = draw(student, asked)[0]
    for block in (dg.ConceptBlock("star", strength=0), dg.ConceptBlock([]), dg.ConceptBlock("star", end=0)):
        assert torch.equal(draw(student, asked, block)[0], plain)
    first = draw(student, asked, dg.ConceptBlock({"moon": ["star"]}))[0]
    swapped = draw(student, asked, dg.ConceptBlock("star", replace="ball"))[0]
    phrase = draw(student, asked, dg.ConceptBlock("red star"))[0]
    blue = "a blue star and a red ball"
    assert torch.equal(draw(student, blue, dg.ConceptBlock("red star"))[0], draw(student, blue)[0])
    for one in (first, swapped, phrase):
        assert not torch.equal(one, plain)
    assert not torch.equal(first, swapped)


def test_a_long_text_of_several_contexts(student):
    with torch.no_grad():
        tree, star = (student.encode_prompt(x, "cpu", 1, False)[0] for x in ("a blue tree , sky", "a red star , sky"))
    text = torch.cat([tree, star], 1)
    found, report = draw(student, None, dg.ConceptBlock("star"), prompt_embeds=text)
    assert "star: at 23" in str(report) and not torch.equal(found, draw(student, None, prompt_embeds=text)[0])


@pytest.mark.parametrize("make", [tiny.sd15, tiny.sdxl, tt.pixart], ids=["sd15", "sdxl", "pixart"])
def test_other_families_run_and_come_off(make):
    pipe = make()
    own = {"clean_caption": False, "use_resolution_binning": False, "max_sequence_length": 16}
    call = (own if "PixArt" in type(pipe).__name__ else {}) | {
        "num_inference_steps": 2,
        "height": 32,
        "width": 32,
        "guidance_scale": 3.0,
    }
    plain, before = draw(pipe, "a red ball", **call)[0], fingerprint(pipe)
    blocked = draw(pipe, "a red ball", dg.ConceptBlock("ball", threshold=-2), **call)[0]
    assert blocked.isfinite().all() and not torch.equal(blocked, plain)
    assert fingerprint(pipe) == before and torch.equal(draw(pipe, "a red ball", **call)[0], plain)


def test_wrong_settings_say_so(student):
    for wrong in ({"rule": "sald"}, {"threshold": 3}, {"strength": -1}, {"reach": -1}, {"replace": ""}):
        with pytest.raises(dg.SettingError):
            dg.ConceptBlock("star", **wrong)
    for wrong in (3, [3], {"star": [3]}):
        with pytest.raises(dg.SettingTypeError):
            dg.ConceptBlock(wrong)
    with pytest.raises(dg.SettingError):
        dg.ConceptBlock(["star", " "])
    for wrong in ({"space": "text"}, {"rule": "adavd", "space": "embeddings"}, {"rule": "safree", "space": "values"}):
        with pytest.raises(dg.SettingError, match="space="):
            dg.ConceptBlock("star", **wrong)
    with pytest.raises(dg.ConceptError):
        draw(student, "a star", dg.ConceptBlock("a red star and a blue ball , sky , mosaic style"))


def test_a_call_costs_at_most_a_thousandth_more():
    assert cost(meta_pipe(SD15), 64, 1)[1] <= 0.1


@pytest.mark.parametrize("written", ["ｓｔａｒ", "\N{CYRILLIC SMALL LETTER DZE}tar", "s\u200btar", "s t a r", "star's"])
def test_letters_that_look_alike_do_not_bring_it_back(student, written):
    """What is another token is no star to the model either; what the tokenizer makes the same, is blocked."""
    picture, report = draw(student, f"a red {written} , sky", dg.ConceptBlock("star"), output_type="pt")
    assert not shown(look(load_judge(), picture * 2 - 1)[0], "star"), str(report)


@pytest.mark.parametrize("colour", ["red", "purple"])
def test_what_stands_in_for_a_colour_is_no_way_of_painting(student, colour):
    """Words as "sketch" are near to colours; in the place of one they would change the whole picture's style."""
    prompts = [f"a {colour} {kind} and a blue tree , sky" for kind in ("ball", "house", "boat")]
    for space in ("values", "embeddings"):
        generators, block = [torch.Generator().manual_seed(i) for i in range(3)], dg.ConceptBlock(colour, space=space)
        seen = look(load_judge(), draw(student, prompts, block, output_type="pt", generator=generators)[0] * 2 - 1)
        assert not any(shown(one, colour) for one in seen), space
        assert space == "embeddings" or [one.style for one in seen] == ["plain"] * 3

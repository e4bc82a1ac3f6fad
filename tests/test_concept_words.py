"""ConceptBlock in the prompt's embeddings: joint models against a derivation of its own, and SAFREE's projection."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import tiny
import tiny_family_pipelines as fp
import tiny_transformers as tt
import torch
from plugins_for_tests import fingerprint

import diffgraft as dg
from diffgraft.pipelines.families import adapter_for
from diffgraft.plugins import concept_safree
from diffgraft.plugins.concept_bank import Bank, Places
from diffgraft.plugins.concept_context import Blocked

SMALL = {"num_inference_steps": 1, "height": 32, "width": 32, "output_type": "latent"}
ASKED, OTHER, NEGATIVE = "a blue ball", "a red star and a green star", "a red ball"
_PLAIN = {"clean_caption": False, "use_resolution_binning": False}
_NO_WORDS = {"prompt": None, "prompt_embeds": torch.ones(1, 20, 128)}
_SCALE = ({"guidance_scale": 3.0}, {"guidance_scale": 1.0})
_TRUE = ({"true_cfg_scale": 3.0, "negative_prompt": NEGATIVE}, {})
FAMILIES = {
    "flux": (tt.flux, {"max_sequence_length": 16}, *_TRUE),
    "klein": (fp.klein, {"max_sequence_length": 16, "text_encoder_out_layers": (1, 2, 3)}, *_SCALE),
    "z-image": (fp.z_image, {"max_sequence_length": 16}, {"guidance_scale": 3.0}, {"guidance_scale": 0.0}),
    "qwen": (fp.qwen, {}, *_TRUE),
    "chroma": (fp.chroma, {"max_sequence_length": 16}, *_SCALE),
    "lumina2": (fp.lumina2, {"max_sequence_length": 20}, *_SCALE),
    "krea2": (fp.krea2, {"max_sequence_length": 16}, {"guidance_scale": 3.0}, {"guidance_scale": 0.0}),
    "pixart": (tt.pixart, {"max_sequence_length": 16} | _PLAIN, *_SCALE),
    "sana": (tt.sana, {"max_sequence_length": 16, "complex_human_instruction": None} | _PLAIN, *_SCALE),
    "sdxl": (tiny.sdxl, {}, *_SCALE),
    "unet": (lambda: tiny.quiet(dg.picturebook(one_step=True)), {}, *_SCALE),
}  # fmt: skip

CLIPS = ("unet", "sdxl")


@functools.cache
def pipe_of(name):
    pipe = FAMILIES[name][0]()
    if name == "qwen":
        pipe.tokenizer_max_length = 16
    if name == "lumina2":
        pipe.system_prompt = "a red"
    return pipe


def run(name, prompt, *plugins, guided=False, **call):
    """(latents, texts of the denoiser's rows as [L, D], pooled texts as {name: rows}, report)."""
    pipe, seen, pooled = pipe_of(name), [], {}
    adapter = adapter_for(pipe)

    def look(module, args, kwargs):
        inputs = adapter.bind(args, kwargs)
        seen.extend(row.flatten(1).clone() for row in inputs[adapter.text])
        for key, value in (inputs | (inputs.get("added_cond_kwargs") or {})).items():
            if key in ("pooled_projections", "text_embeds") and value is not None:
                pooled.setdefault(key, []).extend(value.clone())

    options = SMALL | FAMILIES[name][1] | FAMILIES[name][3 - guided] | call
    if isinstance(options.get("negative_prompt"), str) and isinstance(prompt, list):
        options["negative_prompt"] = [options["negative_prompt"]] * len(prompt)
    options.setdefault("generator", torch.Generator().manual_seed(0))
    with dg.graft(pipe, *plugins) as g:
        hook = adapter.denoiser.register_forward_pre_hook(look, with_kwargs=True)
        prompt = list(prompt) if isinstance(prompt, list) else prompt  # Z-Image writes into it
        latents = pipe(prompt=prompt, **options)[0]
        hook.remove()
        return latents, seen, pooled, g.report()


def without(e, c, f, strength):
    """The contrast in float64, a column after the other."""
    e, c, f = (x.double().numpy() for x in (e, c, f))
    for i in range(len(e)):
        d, u = c[i] - f[i], e[i] - f[i]
        if d @ d > 0 and c[i].any() and f[i].any():
            e[i] = e[i] - strength * max(0.0, (u @ d) / (d @ d)) * d
    return torch.from_numpy(e)


def expected(name, strength, **call):
    """(text of ASKED, what it should become), and its pooled texts, from plain calls of the pipeline alone."""
    calls = [run(name, text, **call) for text in (ASKED, ASKED.replace("ball", "star"))]
    own, other = (texts[0].double() for _, texts, _, _ in calls)
    pairs = {key: (rows[0].double(), calls[1][2][key][0].double()) for key, rows in calls[0][2].items()}
    pooled = {key: (mine, mine - strength * (mine - other)) for key, (mine, other) in pairs.items()}
    return own, own - strength * (own - other), pooled


def test_what_stands_in_is_as_long_and_takes_whole_words_alone():
    def bank(*sizes):
        one, two = torch.zeros(1, 1, 1), torch.zeros(2, 1)
        places = [Places(torch.zeros(size, 2, 1), two, [1], one, {}, True) for size in sizes]
        return Bank(places, [], torch.zeros(1, 2, 1), torch.zeros(1, 1), 0.2, ["ball", "tree"])

    star, red = Blocked(["star", "Big Star"], bank(1, 2)), Blocked(["red"], bank(1))
    asked = "a red STAR , a starfish and a big star"
    assert star.replaced(asked, 0) == "a red ball , a starfish and a a ball"
    assert red.replaced(star.replaced(asked, 3), 2) == "a ball tree , a starfish and a a tree"


def test_two_concepts_leave_a_text_together_and_other_spellings_by_the_bank():
    """What the tokenizer reads as the word, but no search for it finds, is cleaned all the same."""
    block = dg.ConceptBlock(["ball", "blue"], replace="star", reach=0, threshold=-0.3)
    own, other = (run("qwen", text)[1][0].double() for text in (ASKED, "a star star"))
    assert near(run("qwen", ASKED, block)[1][0], own - block.strength * (own - other))
    written = "a blue ball\N{ZERO WIDTH SPACE}"
    texts = [run("qwen", written, *p)[1][0] for p in ((), (dg.ConceptBlock("ball", replace="star", threshold=-2),))]
    assert not torch.equal(*texts)


@pytest.mark.parametrize(("name", "column", "least"), [("unet", 3, 0.3), ("qwen", 2, -0.1)])
def test_embeddings_without_words_become_what_the_bank_says(name, column, least):
    """Where the words are not known, the concept's column is cleaned by what it is behind other words."""
    own, concept, other = (run(name, text)[1][0] for text in (ASKED, "a a ball", "a a star"))
    block = dg.ConceptBlock("ball", replace="star", reach=0, space="embeddings", threshold=least)
    mask = {"prompt_embeds_mask": torch.ones(1, len(own)).bool()} if name == "qwen" else {}
    _, texts, _, report = run(name, None, block, prompt_embeds=own[None], **mask)
    held, changed = slice(column, column + 1), own.double().clone()
    changed[held] = without(own[held], concept[held], other[held], block.strength)
    assert near(texts[0], changed) and not near(changed, own), report


def near(a, b):
    a, b = a.double(), b.double()
    return len(a) >= len(b) and float((a[: len(b)] - b).abs().max()) < 1e-5 * float(b.abs().max())


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "sdxl"])
def test_the_text_becomes_what_a_derivation_says_and_nothing_else_does(name):
    least = -0.2 if name == "lumina2" else -0.1  # what random encoders make of the word behind others
    block = dg.ConceptBlock("ball", replace="star", reach=0, space="embeddings", threshold=least)
    own, changed, pooled = expected(name, block.strength)
    before = fingerprint(pipe_of(name))
    assert not near(changed, own)
    alone = run(name, ASKED, block)
    assert near(alone[1][0], changed), alone[3]
    prompts = [ASKED, OTHER]
    plain, blocked = (run(name, prompts, *p, guided=True, num_images_per_prompt=2) for p in ((), (block,)))
    found = 0
    for was, now in zip(plain[1], blocked[1], strict=True):
        if near(was, own):
            found += 1
            assert near(now, changed)
        else:
            assert torch.equal(was, now)
    assert found == 2 and len(plain[1]) in (8, 10)
    for key, (mine, new) in pooled.items():
        for was, now in zip(plain[2][key], blocked[2][key], strict=True):
            assert near(now[None], new[None]) if near(was[None], mine[None]) else torch.equal(was, now)
    for i, (was, now) in enumerate(zip(plain[0], blocked[0], strict=True)):
        assert torch.equal(was, now) == (i >= 2), i
    assert fingerprint(pipe_of(name)) == before


def test_a_template_that_the_call_brings_moves_the_columns():
    """Lumina 2 takes a system prompt of the call's own in the place of the pipeline's."""
    call = {"system_prompt": "a big red"}
    block = dg.ConceptBlock("ball", replace="star", reach=0, threshold=-0.2)
    own, changed, _ = expected("lumina2", block.strength, **call)
    _, texts, _, report = run("lumina2", ASKED, block, **call)
    assert near(texts[0], changed) and not near(changed, own)
    assert "at 9 ball" in str(report)


def test_a_pooled_text_is_cleaned_where_the_concept_leaves_the_values():
    """SDXL's: its columns stay as they are, the vector becomes what a derivation says, other prompts' bytes stay."""
    block = dg.ConceptBlock("ball", replace="star", reach=0, threshold=-0.3)
    own, _, pooled = expected("sdxl", block.strength)
    (mine, new), both = pooled["text_embeds"], run("sdxl", [ASKED, "a"], block, guided=True)
    plain = run("sdxl", [ASKED, "a"], guided=True)
    assert all(torch.equal(a, b) for a, b in zip(plain[1], both[1], strict=True)) and near(both[1][2], own)
    rows = both[2]["text_embeds"]
    assert near(rows[2][None], new[None]) and not near(mine[None], new[None])
    assert [torch.equal(a, b) for a, b in zip(plain[2]["text_embeds"], rows, strict=True)] == [True, True, False, True]


@pytest.mark.parametrize("name", ["flux", "z-image", "qwen"])
def test_without_the_concept_the_bytes_are_the_same(name):
    block = dg.ConceptBlock("ball", replace="star")
    for prompt in (OTHER, "", "a cat"):
        plain, blocked = (run(name, prompt, *p)[0] for p in ((), (block,)))
        assert torch.equal(plain, blocked)
    assert not torch.equal(run(name, ASKED)[0], run(name, ASKED, block)[0])


@pytest.mark.parametrize(
    ("name", "make", "call", "say"),
    [
        ("sd3", {}, {}, "sd3.*NegativeAway"),
        ("flux", {"rule": "adavd"}, {}, "space='embeddings'"),
        ("flux", {"rule": "nasa"}, {}, "NegativeAway"),
        ("flux", {"space": "values"}, {}, "space='embeddings'"),
        ("flux", {"rule": "safree"}, {}, "one CLIP"),
        ("pixart", {"rule": "safree"}, _PLAIN, "pools no text"),
        ("unet", {"rule": "safree", "threshold": -2}, _NO_WORDS, "give a prompt"),
        ("flux", {}, {"prompt_2": "a red star"}, "prompt_2"),
        ("sdxl", {}, {"prompt_2": "a red star"}, "prompt_2"),
    ],
)
def test_what_cannot_be_served_says_what_to_do(name, make, call, say):
    pipe = tt.sd3() if name == "sd3" else pipe_of(name)
    with pytest.raises(dg.UnsupportedPipelineError, match=say), dg.graft(pipe, dg.ConceptBlock("ball", **make)):
        length = {} if name in CLIPS else {"max_sequence_length": 16}
        pipe(**{"prompt": ASKED} | SMALL | length | call)


def test_embeddings_in_the_place_of_a_prompt_meet_the_same_gate():
    """Padding and a template's end are no words."""
    pipe = pipe_of("qwen")
    with torch.no_grad():
        ball, star = (pipe.encode_prompt([text, OTHER], "cpu") for text in (ASKED, "a cat"))
    for (text, mask), there in ((ball, True), (star, False)):
        call = {"prompt_embeds": text, "prompt_embeds_mask": mask}
        plain, blocked = (run("qwen", None, *p, **call) for p in ((), (dg.ConceptBlock("ball", replace="star"),)))
        assert torch.equal(plain[0][0], blocked[0][0]) != there, blocked[3]
        assert torch.equal(plain[0][1], blocked[0][1])


def test_it_composes_on_a_joint_model():
    block, others = dg.ConceptBlock("ball"), (dg.NegativeAway("red"), dg.AttentionSegregation(["blue", "ball"]))
    one, two, three = (run("flux", ASKED, *p)[0] for p in (others, (*others, block), (block, *others)))
    assert torch.equal(two, three) and not torch.equal(one, two) and two.isfinite().all()


# -- SAFREE ---------------------------------------------------------------------------------------------------------


def published(text, masked, concepts, start, alpha=0.01):
    """The program's own form: square matrices, pseudo-inverses, a mean over all others for each token."""
    text, masked, concepts = (x.numpy() for x in (text, masked, concepts))

    def projector(rows):
        return rows.T @ np.linalg.pinv(rows @ rows.T) @ rows

    off, within = np.eye(text.shape[1]) - projector(concepts), projector(masked)
    far = np.linalg.norm(off @ masked.T, axis=0)
    safe = [far[i] < (1 + alpha) * np.delete(far, i).mean() for i in range(len(far))]
    new, out = (off @ within @ text.T).T, text.copy()
    for i, keep in enumerate(safe):
        if not keep:
            out[start + i] = new[start + i]
    held = slice(0, start + len(far) + 1)
    cosine = (text * new).sum(1)[held] / np.linalg.norm(text[held], axis=1) / np.linalg.norm(new[held], axis=1)
    return out, round(10 / (1 + np.exp(-5 * (10 * (1 - cosine.mean()) - 5.333)))), safe


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("count", [1, 3])
def test_safree_in_float64(count):
    text, masked, concepts = normal(9, 24, seed=1), normal(5, 24, seed=2), normal(count, 24, seed=3)
    masked[:3] = 0.2 * masked[:3] + concepts[0]  # what stays near the concept without its first tokens
    new, steps, safe = published(text, masked, concepts, 1)
    found, counted = concept_safree.safree(text, masked, concepts, range(1, 6))
    assert np.abs(found.numpy() - new).max() < 1e-12 and counted == steps and 0 < sum(safe) < 5
    half, _ = concept_safree.safree(text, masked, concepts, range(1, 6), 0.5)
    assert torch.allclose(half, (text + found) / 2, atol=1e-12)
    assert concept_safree.filter_steps(text, text) == 0


def test_safree_on_a_model_is_the_projection_of_its_own_encoder():
    """The picture book's prompts, masked by hand; without the concept nothing is touched."""
    pipe, asked, block = pipe_of("unet"), "a ball", dg.ConceptBlock("ball", rule="safree")
    ids = pipe.tokenizer(asked).input_ids

    def pooled(rows):
        with torch.no_grad():
            return pipe.text_encoder(torch.tensor(rows)).pooler_output.double()

    masked = pooled([[0 if i == j else token for j, token in enumerate(ids)] for i in range(1, len(ids) - 1)])
    plain, blocked = (run("unet", asked, *p)[1][0] for p in ((), (block,)))
    wide = plain.reshape(-1, masked.shape[1]).double()
    new, steps, safe = published(wide, masked, pooled([pipe.tokenizer("ball").input_ids]), 1)
    assert not all(safe)
    expected = torch.from_numpy(new) if steps else wide
    assert torch.allclose(blocked.reshape(wide.shape).double(), expected, atol=1e-4)
    assert torch.equal(run("unet", "a blue star , sky", block)[0], run("unet", "a blue star , sky")[0])

"""Redirection in sequences of text and image: layers against explicit masked logits, runs against two branches."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import tiny_families as tf
import tiny_family_pipelines as tp
import tiny_transformers as tt
import torch
import torch.nn.functional as F
from plugins_for_tests import fingerprint
from torch.overrides import TorchFunctionMode

import diffgraft as dg
from diffgraft.attention.call import AttentionCall
from diffgraft.attention.edit import attend
from diffgraft.attention.layer import AttentionLayer
from diffgraft.attention.step import Step
from diffgraft.pipelines.families import adapter_for
from diffgraft.pipelines.families.family import Family
from diffgraft.pipelines.families.running import Running
from diffgraft.pipelines.families.table import FAMILIES

SDPA = F.scaled_dot_product_attention


def explicit(q, k, v, mask, scale, image, asked, masked, factor):
    """Logits of all pairs; those on the image's masked tokens minus infinity, of its masked queries scaled."""
    logits = q @ k.transpose(-1, -2) * scale
    inside = torch.zeros(logits.shape[-2], dtype=torch.bool)
    inside[asked] = masked
    own = logits.clone()
    own[..., image] *= factor
    logits = torch.where(inside[:, None], own, logits)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    hidden = torch.zeros(logits.shape[-1], dtype=torch.bool)
    hidden[image] = masked
    return logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v


GRID = (5, 7)
FORMS = {
    "text first": ("joint", slice(0, 6), 0), "image first": ("joint", slice(35, 41), 0),
    "padded image first": ("joint", slice(40, 46), 5), "reference behind": ("joint", slice(0, 6), 9),
    "keys": ("keys", slice(0, 6), 0), "image alone": ("self", None, 0), "padded image alone": ("self", None, 5),
}  # fmt: skip
"""(kind, the text's columns, tokens behind the picture's own)."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masks", [None, "float", "bool"])
def test_a_layer_is_attention_with_masked_logits(form, masks):
    kind, text, behind = FORMS[form]
    words = 0 if text is None else text.stop - text.start
    length, g = words + 35 + behind, torch.Generator().manual_seed(1)
    start = words if text is not None and text.start == 0 else 0
    image, asked = slice(start, start + 35), slice(0, 35) if kind == "keys" else slice(start, start + 35)
    queries = 35 + behind if kind == "keys" else length
    q, k, v = (torch.randn(2, 3, n, 8, generator=g, dtype=torch.float64) for n in (queries, length, length))
    mask = None if masks is None else torch.rand(2, 1, queries, length, generator=g, dtype=torch.float64)
    mask = mask > 0.1 if masks == "bool" else mask
    boxes = [torch.zeros(GRID, dtype=torch.bool), torch.zeros(GRID, dtype=torch.bool)]
    boxes[0][1:4, 2:5], boxes[1][0, :] = True, True
    layer = AttentionLayer("transformer_blocks.0.attn", None, kind, "block", 0)
    for index, factor in ((0, 0.3), (20, 1.0)):
        step = Step(index, 50, size=GRID, rows={"cond": slice(0, 2)})
        plugin = dg.SelfAttentionRedirection([box.numpy() for box in boxes], scale=1)
        edits = [edit for edit in plugin.edits() if edit.active(layer, step)]
        with torch.no_grad():
            got = attend(AttentionCall(layer, q, k, v, mask, 8**-0.5, 0, step, text), edits)
        for row, box in enumerate(boxes):
            own = None if mask is None else mask[row : row + 1]
            one = [t[row : row + 1] for t in (q, k, v)]
            wanted = explicit(*one, own, 8**-0.5, image, asked, box.flatten(), factor)
            assert (got[row : row + 1] - wanted).abs().max() <= 1e-10


def test_a_gradient_goes_through_a_redirected_layer():
    q, k, v = (torch.randn(1, 2, 41, 8, dtype=torch.float64, requires_grad=True) for _ in "qkv")
    box = np.zeros(GRID, bool)
    box[1:3, 1:4] = True
    layer = AttentionLayer("a.attn", None, "joint", "block", 0)
    step = Step(0, 50, size=GRID, rows={"cond": slice(0, 1)})
    edits = [e for e in dg.SelfAttentionRedirection(box, scale=1).edits() if e.active(layer, step)]
    attend(AttentionCall(layer, q, k, v, None, 8**-0.5, 0, step, slice(0, 6)), edits).sum().backward()
    hidden = torch.from_numpy(box).flatten().nonzero()[:, 0] + 6
    assert k.grad[:, :, hidden].abs().max() == 0 and q.grad.abs().max() > 0


# -- runs ------------------------------------------------------------------------------------------------------------


def embeds(n=1):
    g = torch.Generator().manual_seed(3)
    return {"prompt_embeds": torch.randn(1, 5, 32, generator=g).expand(n, -1, -1),
            "prompt_embeds_mask": torch.ones(n, 5, dtype=torch.long)}  # fmt: skip


PIPES = {
    "flux": (tt.flux, True), "sd3": (tt.sd3, False), "qwen": (tt.qwen, True), "z-image": (tp.z_image, False),
    "chroma": (tp.chroma, True), "klein": (tp.klein, True), "lumina2": (tp.lumina2, True), "pixart": (tt.pixart, True),
}  # fmt: skip
"""Family -> (pipeline, whether text stands first)."""
MORE = {"klein": {"text_encoder_out_layers": (1, 2, 3)}, "pixart": {"use_resolution_binning": False}}


@pytest.fixture(scope="module")
def pipes():
    made = {}

    def get(name):
        if name not in made:
            made[name] = PIPES[name][0]()
        return made[name]

    return get


def run(name, pipe, n=1, size=(16, 16), **call):
    """Latents, of `size` for most."""
    height, width = (side * pipe.vae_scale_factor for side in size)
    given = {"num_inference_steps": 2, "height": height, "width": width, "output_type": "latent"}
    given |= {"generator": [torch.Generator().manual_seed(i) for i in range(n)]}
    if name == "qwen":
        given |= embeds(n)
    else:
        given |= {"prompt": ["a red ball"] * n, "guidance_scale": 0.0 if name == "z-image" else 1.0}
    given |= MORE.get(name, {}) | {"max_sequence_length": 64 if name == "z-image" else 16}
    with torch.no_grad():
        return pipe(**copy.deepcopy(given | call)).images  # Z-Image writes its template into the list of prompts


class Hidden(TorchFunctionMode):
    """Every attention of the image over itself by explicit logits, one mask a row."""

    def __init__(self, first, boxes, factor):
        super().__init__()
        self.first, self.boxes, self.factor = first, boxes, factor

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | (kwargs or {})
        tokens = self.boxes[0].numel()
        if func is not SDPA or given["query"].shape[-2] != given["key"].shape[-2] or given["key"].shape[-2] < tokens:
            return func(*args, **(kwargs or {}))
        q, k, v = (given[name] for name in ("query", "key", "value"))
        if k.shape[1] != q.shape[1]:
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        start = k.shape[-2] - tokens if self.first else 0
        image, scale, outs = slice(start, start + tokens), given.get("scale") or 1 / math.sqrt(q.shape[-1]), []
        for row, box in enumerate(self.boxes):
            mask = given.get("attn_mask")
            mask = mask[row : row + 1] if mask is not None and len(mask) > 1 else mask
            one = [t[row : row + 1] for t in (q, k, v)]
            outs.append(explicit(*one, mask, scale, image, image, box.flatten(), self.factor))
        return torch.cat(outs)


def by_hand(denoiser, first, boxes, scale, suppression=0.3, order="cond"):
    """The denoiser's forward as plain + scale * (redirected - plain), one after the other.

    Under guidance both halves get what the prompt's does: `order` of the rows, or "apart" for calls in turn.
    """
    own, kept = denoiser.forward, []

    def forward(*args, **kwargs):
        plain = own(*args, **kwargs)[0]
        if order == "apart" and kept:
            return (plain + kept.pop(),)
        with Hidden(first, boxes * (1 + (", " in order)), suppression):
            other = own(*args, **kwargs)[0]
        delta = [scale * (b - a) for a, b in zip(plain, other, strict=True)]
        if ", " in order:
            half = len(delta) // 2
            delta = (delta[:half] if order.startswith("cond") else delta[half:]) * 2
        if order == "apart":
            kept.append(torch.stack(delta))
        moved = [a + d for a, d in zip(plain, delta, strict=True)]
        return (moved if isinstance(plain, list) else torch.stack(moved),)

    return forward


BOXES = [np.zeros((16, 16), bool), np.zeros((16, 16), bool)]
BOXES[0][2:9, 4:12], BOXES[1][10:14, 1:15] = True, True


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("name", PIPES)
def test_a_run_is_two_branches_by_hand(pipes, monkeypatch, name, scale):
    """Two pictures with a mask each, at an odd aspect."""
    pipe, size = pipes(name), (16, 24)
    boxes = [np.pad(box, ((0, 0), (0, 8))) for box in BOXES]
    with dg.graft(pipe, dg.SelfAttentionRedirection(boxes, scale=scale)) as g:
        got = run(name, pipe, 2, size)
    assert g.report().layers
    tokens = [torch.from_numpy(box).reshape(8, 2, 12, 2).amax((1, 3)) for box in boxes]
    plain = run(name, pipe, 2, size)
    monkeypatch.setattr(pipe.transformer, "forward", by_hand(pipe.transformer, PIPES[name][1], tokens, scale))
    wanted = run(name, pipe, 2, size)
    assert (got - wanted).abs().max() <= 1e-5 * max(1, wanted.abs().max())
    assert (got - plain).abs().max() > 1e-3


GUIDED = {
    "sd3": ("uncond, cond", {"guidance_scale": 4.0, "negative_prompt": ["a cat"]}),
    "z-image": ("cond, uncond", {"guidance_scale": 3.0, "negative_prompt": ["a cat and a star " * 8]}),
    "flux": ("apart", {"true_cfg_scale": 3.0, "negative_prompt": ["a cat"]}),
    "chroma": ("apart", {"guidance_scale": 3.0, "negative_prompt": ["a cat"]}),
}  # fmt: skip


@pytest.mark.parametrize("name", GUIDED)
def test_under_guidance_both_halves_move_alike(pipes, monkeypatch, name):
    """The negative's text is of another length where the model takes that: rows are then computed one at a time."""
    pipe, (order, call), size = pipes(name), GUIDED[name], (16, 24)
    box = np.pad(BOXES[0], ((0, 0), (0, 8)))
    for scale in (1.0, 3.0):
        with dg.graft(pipe, dg.SelfAttentionRedirection(box, scale=scale)):
            got = run(name, pipe, size=size, **call)
        with monkeypatch.context() as patch:
            tokens = [torch.from_numpy(box).reshape(8, 2, 12, 2).amax((1, 3))]
            hand = by_hand(pipe.transformer, PIPES[name][1], tokens, scale, order=order)
            patch.setattr(pipe.transformer, "forward", hand)
            wanted = run(name, pipe, size=size, **call)
        assert (got - wanted).abs().max() <= 1e-5 * max(1, wanted.abs().max())


@pytest.mark.parametrize("name", PIPES)
def test_neutral_is_bit_identical_and_nothing_is_left(pipes, name):
    pipe = pipes(name)
    plain = run(name, pipe)
    before = fingerprint(pipe)
    for neutral in (dg.SelfAttentionRedirection(BOXES[0], scale=0), dg.SelfAttentionRedirection(BOXES[0], end=0.0)):
        with dg.graft(pipe, neutral):
            assert torch.equal(run(name, pipe), plain)
    with dg.graft(pipe, dg.SelfAttentionRedirection(BOXES[0])):
        assert not torch.equal(run(name, pipe), plain)
    with pytest.raises(KeyboardInterrupt), dg.graft(pipe, dg.SelfAttentionRedirection(BOXES[0])):
        run(name, pipe, **{"callback" if name == "pixart" else "callback_on_step_end": interrupt})
    assert fingerprint(pipe) == before and torch.equal(run(name, pipe), plain)


def interrupt(*given):
    raise KeyboardInterrupt


def test_layers_of_a_transformer(pipes):
    pipe = pipes("flux")

    def chosen(layers):
        with dg.graft(pipe, dg.SelfAttentionRedirection(BOXES[0], layers=layers)) as g:
            return list(g.edits)

    every = chosen("up")
    assert every == chosen("all") == [layer.name for layer in dg.graft(pipe).layers] and len(every) == 4
    assert chosen("early") == every[:2] and chosen("late") == every[2:] and chosen([0, 3]) == [every[0], every[3]]
    assert chosen("single_transformer_blocks") == every[2:]
    with pytest.raises(dg.SettingError, match="choose up, early, late, all or among: 0 transformer_blocks.0.attn"):
        chosen("mid")


def test_the_text_refiner_is_left_alone(pipes):
    with dg.graft(pipes("z-image"), dg.SelfAttentionRedirection(BOXES[0])) as g:
        assert {name.split(".")[0] for name in g.edits} == {"noise_refiner", "layers"}


def test_linear_attention_is_refused():
    with pytest.raises(dg.UnsupportedPipelineError, match="linear attention has no logits"):
        dg.graft(tt.sana(), dg.SelfAttentionRedirection(BOXES[0])).attach()


def test_films_are_refused():
    with pytest.raises(dg.UnsupportedPipelineError, match="makes films"):
        dg.graft(tp.wan(), dg.SelfAttentionRedirection(BOXES[0])).attach()


def test_beside_a_negative_in_the_sequence(pipes):
    """The negative's tokens are cut out first; at both ends of its settings each is what it is alone."""
    pipe = pipes("flux")
    with dg.graft(pipe, dg.SelfAttentionRedirection(BOXES[0], scale=1.0)):
        alone = run("flux", pipe)
    both = dg.NegativeAway("a cat", scale=0.5), dg.SelfAttentionRedirection(BOXES[0], scale=1.0)
    with dg.graft(pipe, *both):
        got = run("flux", pipe)
    with dg.graft(pipe, *reversed(both)):
        assert torch.equal(run("flux", pipe), got)
    assert got.isfinite().all() and (got - alone).abs().max() > 1e-3


# -- every declared family -------------------------------------------------------------------------------------------


def pictures():
    said = {name: FAMILIES.get(name.split()[0]) for name in tf.models()}
    return [n for n, family in said.items() if isinstance(family, Family) and family.latent.layout != "film"]


class HiddenAt(TorchFunctionMode):
    """The same for one row, where the columns of text and image are known."""

    def __init__(self, spec, box):
        super().__init__()
        self.how, self.box, self.seen = spec.how, box, 0
        self.text, self.image = spec.columns([7])[0]

    def places(self, queries, keys):
        n, whole = self.box.numel(), self.image.stop - self.image.start
        first = slice(self.image.start, self.image.start + n)
        if "keys" in self.how and keys == whole + self.text.stop - self.text.start:
            return first, slice(0, n)
        if queries == keys and "cross" not in self.how and keys >= max(self.text.stop, self.image.stop):
            return first, first
        return (slice(0, n), slice(0, n)) if queries == keys and keys in (n, whole) else None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | (kwargs or {})
        places = None
        if func is SDPA:
            q, k, v = (given[name] for name in ("query", "key", "value"))
            places = self.places(q.shape[-2], k.shape[-2])
        if places is None:
            return func(*args, **(kwargs or {}))
        self.seen += 1
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        scale = given.get("scale") or 1 / math.sqrt(q.shape[-1])
        return explicit(q, k, v, given.get("attn_mask"), scale, *places, self.box.flatten(), 0.3)


@pytest.mark.parametrize("name", [name for name in pictures() if not name.startswith("ZImage")])  # its runs are above
def test_every_family_hides_the_images_columns(name):
    pipe, spec = tf.bare(name), tf.models()[name]
    call, adapter = spec.call([tf.normal(7, *spec.width, seed=3)]), adapter_for(pipe)
    size = adapter.grid(adapter.bind((), call), Running(pipe, False))
    box = torch.zeros(size, dtype=torch.bool)
    box[: size[0] // 2, : size[1] // 2] = True
    by_logits = HiddenAt(spec, box)
    with torch.no_grad():
        plain = adapter.prediction(pipe.transformer(**call))
        with dg.graft(pipe, dg.SelfAttentionRedirection(box.numpy(), scale=1)) as g:
            got = adapter.prediction(pipe.transformer(**call))
        with by_logits:
            wanted = adapter.prediction(pipe.transformer(**call))
    assert by_logits.seen == len(g.report().layers) > 0
    assert (got - wanted).abs().max() <= 1e-5 * max(1, wanted.abs().max()) and (got - plain).abs().max() > 1e-3

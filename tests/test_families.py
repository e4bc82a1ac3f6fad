"""Every declared family against the doubled form: the image twice, beside the prompt and beside the negative."""

from __future__ import annotations

import re

import pytest
import tiny_families as tf
import torch
import torch.nn.functional as F
from plugins_for_tests import fingerprint
from tiny_families import normal
from tiny_families_more import llama
from torch.overrides import TorchFunctionMode

import diffgraft as dg
from diffgraft.plugins.base import Text

TINY = tf.models()
CASES = {
    "nasa": {"rule": "nasa", "scale": 0.4},
    "nasa-full": {"rule": "nasa", "scale": 0.4, "joint": "full"},
    "nag": {"rule": "nag", "scale": 3.0, "alpha": 0.5, "tau": 1.1},
    "vsf": {"rule": "vsf", "scale": 1.5, "offset": 0.3},
}


class Doubled(TorchFunctionMode):
    """Rows [prompt, negative] through the unedited model, attention written out where text and image meet; the image
    tokens of both rows get the rule's result.
    """

    def __init__(self, name, lengths, settings):
        super().__init__()
        self.spec, self.settings, self.inside, self.calls, self.met = TINY[name], settings, "", 0, set()
        self.columns = self.spec.columns(lengths)
        self.hooks = []
        if self.spec.pooled:
            pooled = tf.denoiser(name).get_submodule(self.spec.pooled)
            self.hooks.append(pooled.register_forward_hook(lambda module, args, out: out[:1].expand(len(out), -1)))
        for path, module in tf.denoiser(name).named_modules():
            if re.fullmatch(self.spec.layers, path):
                self.hooks.append(module.register_forward_pre_hook(lambda *_, path=path: self._enter(path)))
                self.hooks.append(module.register_forward_hook(lambda *_: self._enter("")))

    def _enter(self, path):
        self.inside, self.calls = path, 0

    def __exit__(self, *error):
        [hook.remove() for hook in self.hooks]
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or not self.inside:
            return func(*args, **kwargs)
        number, self.calls = self.calls, self.calls + 1
        if number != self.spec.own:
            return func(*args, **kwargs)
        self.met.add(self.inside)
        named = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
        return self.attend(**{name: named.get(name) for name in ("query", "key", "value", "attn_mask", "scale")})

    def attend(self, query, key, value, attn_mask, scale):
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
        logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            logits = logits + attn_mask
        p = logits.softmax(-1).nan_to_num(0)  # padding that sees nothing
        out = p @ value
        if self.spec.how == "cross":
            words = [slice(None)] * 2
            images = [slice(None)] * 2
        else:
            words, images = zip(*self.columns, strict=True)
            images = [slice(None)] * 2 if "keys" in self.spec.how else images
        n = len(query) // 2  # frames ride in the batch of some films
        new = self.combine(out, logits, p, value, words, images, n)
        for half in range(2):
            out[half * n : (half + 1) * n, :, images[half]] = new
        return out

    def combine(self, out, logits, p, v, words, images, n):
        z, other, scale = out[:n, :, images[0]], out[n:, :, images[1]], self.settings["scale"]
        rule = self.settings["rule"]
        if rule == "nasa":
            full = self.settings.get("joint") == "full" or self.spec.how == "cross"
            share = p[n:, :, images[1]][..., words[1]] @ v[n:, :, words[1]]
            return z - scale * (other if full else share)
        if rule == "nag":
            far, tau, alpha = z + scale * (z - other), self.settings["tau"], self.settings["alpha"]
            ratio = far.abs().sum((1, 3), keepdim=True) / z.abs().sum((1, 3), keepdim=True)
            return alpha * far * ratio.clamp_max(tau) / ratio + (1 - alpha) * z
        flipped = logits[n:, :, images[1]][..., words[1]] - self.settings["offset"]
        weights = torch.cat([logits[:n, :, images[0]], flipped], -1).softmax(-1)
        return weights @ torch.cat([v[:n], -scale * v[n:, :, words[1]]], 2)


def texts_of(name, lengths):
    return [normal(n, *TINY[name].width, seed=10 + i) for i, n in enumerate(lengths)]


def outcome(output):
    output = output[0] if isinstance(output, tuple) else output
    return torch.stack(output) if isinstance(output, list) else output


def doubled(name, texts, settings):
    with Doubled(name, [len(text) for text in texts], settings) as mode, torch.no_grad():
        output = outcome(tf.denoiser(name)(**TINY[name].call(texts)))
    assert mode.met, "no layer met"
    return output[: len(output) // 2], mode.met


def away(name, text, **settings):
    """The negative as embeddings; padded and masked where its pipeline pads every text."""
    fixed = TINY[name].fixed
    if not fixed:
        return dg.NegativeAway(text[None], **settings)
    mask = torch.arange(fixed)[None] < len(text)
    return dg.NegativeAway(F.pad(text, (0, 0, 0, fixed - len(text)))[None], mask=mask, **settings)


def steered(name, texts, plugin):
    with dg.graft(tf.bare(name), plugin) as g, torch.no_grad():
        output = outcome(tf.denoiser(name)(**TINY[name].call(texts[:1])))
    return output, g.report()


ROWS_ONLY = ["ErnieImageTransformer2DModel", "HiDreamImageTransformer2DModel"]
JOINS = [(name, pair) for name, tiny in TINY.items() if name not in ROWS_ONLY for pair in tiny.lengths]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("name", "lengths"), JOINS, ids=str)
def test_a_family_is_the_doubled_form(name, lengths, case):
    texts, settings = texts_of(name, lengths), CASES[case]
    expected, met = doubled(name, texts, settings)
    found, report = steered(name, texts, away(name, texts[1], **settings))
    plain = outcome(tf.denoiser(name)(**TINY[name].call(texts[:1])))
    size = float(expected.abs().max())
    print(name, lengths, case, float((found - expected).abs().max()) / size, float((found - plain).abs().max()) / size)
    assert (found - expected).abs().max() <= TINY[name].error * size
    assert (found - plain).abs().max() > 1e-3 * size
    assert set(report.layers) == met


@pytest.mark.parametrize("name", [name for name in TINY if name not in ROWS_ONLY])
def test_a_family_comes_off_and_neutral_is_plain(name):
    texts = texts_of(name, TINY[name].lengths[0])
    call, pipe, model = TINY[name].call(texts[:1]), tf.bare(name), tf.denoiser(name)
    plain, before = outcome(model(**call)), fingerprint(pipe)
    for plugin in (dg.NegativeAway(None), away(name, texts[1], scale=0)):
        assert torch.equal(steered(name, texts, plugin)[0], plain)
    steered(name, texts, away(name, texts[1], scale=0.5))
    assert torch.equal(outcome(model(**call)), plain) and fingerprint(pipe) == before


POOLED = [name for name, tiny in TINY.items() if tiny.pooled]  # a row of its own has its own pooled text
FRAMES = ["UNetMotionModel"]


@pytest.mark.parametrize("case", ["nasa", "vsf"])
@pytest.mark.parametrize("name", [name for name in TINY if name not in POOLED + FRAMES + ROWS_ONLY])
def test_rows_of_its_own_are_the_doubled_form_too(name, case):
    """As a row of the batch, with the model's own forward for both; the pooled text given is the prompt's."""
    texts, settings = texts_of(name, TINY[name].lengths[0]), CASES[case]
    expected, met = doubled(name, texts, settings)
    found, report = steered(name, texts, away(name, texts[1], form="rows", **settings))
    assert (found - expected).abs().max() <= TINY[name].error * expected.abs().max()
    assert set(report.layers) == met and report.rows == [2]


class Encoded(dg.NegativeAway):
    """A negative as all of HiDream's encoders give it; of others as embeddings."""

    def __init__(self, text, name, **settings):
        super().__init__(text[None], **settings)
        more = {"encoder_hidden_states_llama3": llama(text)[None]} if name.startswith("HiDream") else {}
        self.text = Text(text[None], None, more, {"pooled_embeds": text.mean(0)[None]} if more else {})

    def _texts(self, session):
        return [self.text], [1.0]


@pytest.mark.parametrize("case", ["nasa", "nasa-full", "nag", "vsf"])
@pytest.mark.parametrize(("name", "lengths"), [(n, pair) for n in ROWS_ONLY for pair in TINY[n].lengths], ids=str)
def test_families_that_only_rows_serve_are_the_doubled_form(name, lengths, case):
    texts, settings = texts_of(name, lengths), CASES[case]
    plain = outcome(tf.denoiser(name)(**TINY[name].call(texts[:1])))
    expected, met = doubled(name, texts, settings)
    found, report = steered(name, texts, Encoded(texts[1], name, form="rows", **settings))
    size = float(expected.abs().max())
    print(name, lengths, case, float((found - expected).abs().max()) / size, float((found - plain).abs().max()) / size)
    assert (found - expected).abs().max() <= TINY[name].error * size and set(report.layers) == met
    assert (found - plain).abs().max() > 1e-3 * size
    assert torch.equal(steered(name, texts, Encoded(texts[1], name, form="rows", scale=0))[0], plain)
    with pytest.raises(dg.UnsupportedPipelineError, match="form='rows'"):
        steered(name, texts, Encoded(texts[1], name))


def test_rows_of_its_own_are_refused_where_every_frame_has_a_text():
    texts = texts_of(FRAMES[0], (7, 7))
    with pytest.raises(dg.UnsupportedPipelineError, match="every frame"):
        steered(FRAMES[0], texts, away(FRAMES[0], texts[1], form="rows"))


def test_a_controlnet_of_a_one_sequence_model_adds_nothing_to_the_negative():
    """Its residuals are those of image and prompt; the streams' columns get none."""
    name = "ZImageTransformer2DModel"
    texts, settings = texts_of(name, (7, 7)), CASES["nag"]
    residual = {0: normal(1, 64, 32, seed=4) * 0.3}

    def call(rows):
        given = {place: value.expand(len(rows), -1, -1) for place, value in residual.items()}
        return TINY[name].call(rows) | {"controlnet_block_samples": given}

    with Doubled(name, [7, 7], settings), torch.no_grad():
        both = residual[0].repeat(2, 1, 1)
        both[1, 32:] = 0  # the negative's row: the image's residual alone
        expected = outcome(tf.denoiser(name)(**call(texts) | {"controlnet_block_samples": {0: both}}))[:1]
    with dg.graft(tf.bare(name), dg.NegativeAway(texts[1][None], **settings)), torch.no_grad():
        found = outcome(tf.denoiser(name)(**call(texts[:1])))
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert (found - steered(name, texts, away(name, texts[1], **settings))[0]).abs().max() > 1e-3

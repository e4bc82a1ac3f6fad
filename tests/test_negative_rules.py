"""The equations of negative-away steering and of merged attention, against float64 derivations of their own."""

from __future__ import annotations

import pytest
import tiny
import torch

from diffgraft.attention import partial
from diffgraft.attention.partial import Partial, attend_with_lse, log_sum_exp, merge
from diffgraft.plugins.negative_away import nag, nasa, vsf
from diffgraft.plugins.negative_edits import pooled

EXACT = {"rtol": 0, "atol": 1e-10}
ROUNDING = {torch.float64: 2e-16, torch.float32: 1e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}
HALF = 1e-5 if tiny.AVX512 else 1e-4
SUMS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: HALF, torch.bfloat16: HALF}
"""Of a log-sum-exp: for half precision torch's kernel takes a rougher exponential on CPUs with AVX2 alone."""


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture(scope="module")
def qkv():
    """Queries, and keys and values of two texts of 8 and 40 tokens."""
    q, texts = normal(2, 3, 17, 4), [(normal(2, 3, n, 4, seed=n), normal(2, 3, n, 4, seed=n + 1)) for n in (8, 40)]
    return q, *texts


def softmax(q, k, v, scale=0.5, mask=None):
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k) * scale + (0 if mask is None else mask)
    weights = logits.exp()
    return torch.einsum("bhqk,bhkd->bhqd", weights, v) / weights.sum(-1, keepdim=True), weights.sum(-1).log()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_attention_with_its_log_sum_exp(qkv, dtype):
    q, (k, v), _ = qkv
    out, lse = attend_with_lse(*(t.to(dtype) for t in (q, k, v)), None, 0.5)
    expected, sums = softmax(*(t.to(dtype).double() for t in (q, k, v)))
    assert out.dtype == dtype and lse.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=max(1e-10, 10 * ROUNDING[dtype]))
    torch.testing.assert_close(lse.double(), sums, rtol=0, atol=SUMS[dtype])


def test_the_explicit_form_is_the_fused_one(qkv, monkeypatch):
    q, (k, v), _ = qkv
    monkeypatch.setattr(partial, "_SCORES", 200)  # four queries at a time
    mask = torch.tensor([0.0, 0.0, -10000.0, 0.0, 0.0, 0.0, 0.0, 0.0]).double()[None, None, None]
    fused = attend_with_lse(q, k, v, mask, 0.5)
    explicit = attend_with_lse(q.clone().requires_grad_(), k, v, mask, 0.5)  # no fused kernel keeps a graph here
    torch.testing.assert_close(explicit.out, fused.out, **EXACT)
    torch.testing.assert_close(explicit.lse, fused.lse, **EXACT)


@pytest.mark.parametrize("kind", ["none", "boolean", "additive"])
def test_the_log_sum_exp_alone_keeps_no_scores_and_has_their_gradient(kind, monkeypatch):
    generator = torch.Generator().manual_seed(4)
    q, k = (torch.randn(2, 3, n, 8, dtype=torch.float64, generator=generator) for n in (9, 7))
    seen = torch.rand(2, 1, 1, 7, generator=generator) > 0.3
    seen[..., 0] = True
    bias = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, -torch.inf)
    mask = {"none": None, "boolean": seen, "additive": bias}[kind]
    q, k = q.requires_grad_(), k.requires_grad_()
    expected = (q @ k.mT * 0.5 + (0 if mask is None else bias)).logsumexp(-1)
    wanted = torch.autograd.grad(expected.square().sum(), (q, k))
    monkeypatch.setattr(partial, "_SCORES", 2 * 3 * 7 * 4)  # four queries at a time
    found = log_sum_exp(q, k, mask, 0.5)
    gradients = torch.autograd.grad(found.square().sum(), (q, k))
    assert torch.allclose(found, expected, atol=1e-12)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(gradients, wanted, strict=True))
    with torch.no_grad():
        assert torch.allclose(log_sum_exp(q, k, mask, 0.5), expected, atol=1e-12)


def test_large_logits_stay_in_float16s_range():
    q, k, v = (normal(1, 1, 3, 4, seed=seed) for seed in range(3))
    q, k = q * 400, k * 400
    assert (q @ k.mT).abs().max() > torch.finfo(torch.float16).max
    part = partial._explicit(q.half(), k.half(), v.half(), None, 0.001)
    assert part.out.isfinite().all()
    torch.testing.assert_close(part.lse.double(), softmax(q, k, v, 0.001)[1], rtol=1e-2, atol=1e-2)


def test_merged_parts_are_attention_over_all_keys(qkv):
    q, (k, v), (k2, v2) = qkv
    parts = [attend_with_lse(q, k, v, None, 0.5), attend_with_lse(q, k2, v2, None, 0.5)]
    whole, lse = softmax(q, torch.cat([k, k2], 2), torch.cat([v, v2], 2))
    torch.testing.assert_close(merge(parts).out, whole, **EXACT)
    torch.testing.assert_close(merge(parts).lse, lse, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_keys_that_nobody_sees_weigh_nothing(qkv, dtype):
    q, (k, v), (k2, v2) = (x if torch.is_tensor(x) else [t.to(dtype) for t in x] for x in qkv)
    q = q.to(dtype)
    hidden = torch.zeros(2, 1, 1, 8, dtype=torch.bool)
    blind, seeing = attend_with_lse(q, k, v, hidden, 0.5), attend_with_lse(q, k2, v2, None, 0.5)
    assert (blind.lse == -torch.inf).all() and not blind.out.any()
    torch.testing.assert_close(merge([blind, seeing]).out, seeing.out)
    assert not merge([blind, blind]).out.any()
    assert torch.equal(vsf(seeing.out, seeing.lse, blind.out, blind.lse, scale=3.0), seeing.out.float())


def test_nasa_is_two_attentions_subtracted(qkv):
    q, pos, neg = qkv
    (z, _), (n, _) = softmax(q, *pos), softmax(q, *neg)
    torch.testing.assert_close(nasa(z, None, n, None, scale=0.3), z - 0.3 * n, **EXACT)
    assert torch.equal(nasa(z, None, n, None, scale=0.0), z)


def reference_nag(z, n, scale, tau, alpha, per_head=False):
    """Tokens as vectors of all heads, as the paper writes it."""
    flat, other = (t if per_head else t.transpose(1, 2).flatten(2) for t in (z, n))
    away = flat + scale * (flat - other)
    ratio = away.abs().sum(-1, keepdim=True) / flat.abs().sum(-1, keepdim=True)
    capped = ratio.clamp_max(tau) / ratio * away
    mixed = alpha * capped + (1 - alpha) * flat
    return mixed if per_head else mixed.unflatten(2, (z.shape[1], -1)).transpose(1, 2)


@pytest.mark.parametrize(("scale", "tau"), [(0.5, 50.0), (8.0, 1.2)])
def test_nag_with_its_cap_open_and_shut(qkv, scale, tau):
    q, pos, neg = qkv
    (z, _), (n, _) = softmax(q, *pos), softmax(q, *neg)
    found = nag(z, None, n, None, scale=scale, tau=tau, alpha=0.4)
    torch.testing.assert_close(found, reference_nag(z, n, scale, tau, 0.4), **EXACT)
    if tau < 2:  # a norm of each head alone is another rule
        assert (found - reference_nag(z, n, scale, tau, 0.4, per_head=True)).abs().max() > 1e-3


def test_nag_is_the_official_form_with_its_scale_less_one(qkv):
    q, pos, neg = qkv
    (z, _), (n, _) = softmax(q, *pos), softmax(q, *neg)
    official = z * 5 - n * 4
    torch.testing.assert_close(nag(z, None, n, None, scale=4.0, tau=1e9, alpha=1.0), official, **EXACT)


def test_vsf_is_one_softmax_over_both_texts_with_values_flipped(qkv):
    q, (k, v), (k2, v2) = qkv
    pos, neg = attend_with_lse(q, k, v, None, 0.5), attend_with_lse(q, k2, v2, None, 0.5)
    logits = torch.cat([torch.zeros(8).double(), torch.full((40,), -0.7, dtype=torch.float64)])
    joint, _ = softmax(q, torch.cat([k, k2], 2), torch.cat([v, -1.5 * v2], 2), mask=logits)
    found = vsf(pos.out, pos.lse, neg.out, neg.lse, scale=1.5, offset=0.7)
    torch.testing.assert_close(found, joint, **EXACT)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_negative_equal_to_the_prompt(qkv, dtype):
    q, (k, v), _ = qkv
    part = attend_with_lse(q, k, v, None, 0.5)
    z, lse = part.out.to(dtype), part.lse
    assert torch.equal(nasa(z, None, z, None, scale=0.25), 0.75 * nasa(z, None, z, None, scale=0.0))
    same = nag(z, None, z, None, scale=4.0, tau=2.5, alpha=0.5).to(dtype)
    torch.testing.assert_close(same, z, rtol=0, atol=ROUNDING[dtype] * float(z.abs().max()))
    half = vsf(z, lse, z, lse, scale=0.5)
    torch.testing.assert_close(half.double(), 0.25 * z.double(), rtol=0, atol=1e-7 if dtype != torch.float64 else 1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_zero_rows_stay_finite(dtype):
    zero, other = torch.zeros(1, 2, 3, 4, dtype=dtype), normal(1, 2, 3, 4, dtype=dtype)
    lse = torch.zeros(1, 2, 3)
    for z, n in ((zero, zero), (zero, other), (other, zero), (other, 2 * other)):
        for new in (
            nasa(z, None, n, None, scale=100.0),
            nag(z, None, n, None, scale=1.0, tau=2.5, alpha=0.5),
            vsf(z, lse, n, lse, scale=100.0),
        ):
            assert new.isfinite().all()
    assert not nag(zero, None, other, None, scale=4.0, tau=2.5, alpha=0.5).any()  # nothing may outgrow nothing


def test_a_planted_direction_falls_linearly():
    z, n, u = normal(1, 2, 5, 4), normal(1, 2, 5, 4, seed=1), normal(4, seed=2)
    along = torch.stack([nasa(z, None, n, None, scale=a) @ u for a in (0.0, 0.25, 0.5, 1.0)])
    slopes = (along[1:] - along[0]) / torch.tensor([0.25, 0.5, 1.0]).double().view(3, 1, 1, 1)
    torch.testing.assert_close(slopes, -(n @ u).expand(3, -1, -1, -1), **EXACT)


def test_several_negatives_with_weights(qkv):
    q, (k, v), (k2, v2) = qkv
    z = normal(2, 3, 17, 4, seed=9)
    parts = [attend_with_lse(q, k, v, None, 0.5), attend_with_lse(q, k2, v2, None, 0.5)]
    one = pooled("nasa", parts, [1.0, 0.5])
    apart = z - 0.3 * parts[0].out - 0.15 * parts[1].out
    torch.testing.assert_close(nasa(z, None, one.out, None, scale=0.3 * 1.5), apart, **EXACT)
    both = pooled("vsf", parts, [1.0, 0.5])
    whole, lse = softmax(q, torch.cat([k, k2], 2), torch.cat([v, 0.5 * v2], 2))
    torch.testing.assert_close(both.out, whole, **EXACT)
    torch.testing.assert_close(both.lse, lse, **EXACT)
    assert pooled("nag", [Partial(z, z)], [1.0]).out is z
    large = [Partial(1000 * torch.ones(1, 1, 2, 4).half(), torch.zeros(1, 1, 2))] * 2
    assert torch.equal(pooled("vsf", large, [100.0, 100.0]).out, torch.full((1, 1, 2, 4), 1e5))

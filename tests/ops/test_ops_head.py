"""Statistics of a head against float64, for every layout, type and tile."""

from __future__ import annotations

import numpy as np
import ops_oracle as oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelens_certify import ops
from saelens_certify.errors import CertifyError

IMPLS = oracle.IMPLS


def case(dtype=torch.float32, tokens=9, d_model=40, columns=4300, seed=0):
    """Two residuals, a head and gold tokens."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(tokens, d_model, generator=g).to(dtype)
    other = (base + 0.3 * torch.randn(tokens, d_model, generator=g)).to(dtype)
    W = (0.7 * torch.randn(d_model, columns, generator=g)).to(dtype)
    b = torch.randn(columns, generator=g)
    return base, other, W, b, torch.randint(0, columns - 7, (tokens,), generator=g)


def exact(residual, W, b, softcap, size):
    logits = residual.double() @ W.double()[:, :size]
    logits = logits if b is None else logits + b.double()[:size]
    return [oracle.log_softmax(oracle.capped(row, softcap)) for row in logits.numpy()]


def check(base, other, W, b, targets, alpha, impl, softcap=None, size=None, column_tile=None):
    options = {
        "b_U": b, "softcap": softcap, "d_vocab": size, "impl": impl, "column_tile": column_tile
    }  # fmt: skip
    stats = ops.head_stats(other, W, targets, alpha, **options)
    pair = ops.head_pair_stats(base, other, W, targets, alpha, **options)
    size = W.shape[1] if size is None else size
    of_base, of_other = (exact(each, W, b, softcap, size) for each in (base, other))
    errors = []
    for t, gold in enumerate(targets.tolist()):
        (p, _), (q, lse) = of_base[t], of_other[t]
        wanted = oracle.bits(q[gold], alpha, size)
        errors.append(float(stats.bits[t]) - wanted)
        assert abs(float(pair.bits[t]) - wanted) <= 1e-4
        assert abs(float(pair.bits_base[t]) - oracle.bits(p[gold], alpha, size)) <= 1e-4
        assert abs(float(stats.lse[t]) - lse) <= 1e-4
        assert abs(float(stats.gold_logprob[t]) - q[gold]) <= 1e-4
        kl = (np.exp(p) * (p - q)).sum() / np.log(2)
        assert abs(float(pair.kl[t]) - kl) <= 1e-6 + 1e-4 * kl
        gap = abs(p[gold] - q[gold]) / np.log(2)
        assert abs(float(pair.gold_logprob_gap[t]) - gap) <= 1e-4
        if softcap is None or softcap > 10:
            assert int(stats.argmax[t]) == int(q.argmax())
            assert bool(pair.agree[t]) == (p.argmax() == q.argmax())
    assert max(map(abs, errors), default=0) <= 1e-4
    assert abs(np.mean(errors)) <= 1e-6
    return stats, pair


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 15.0])
def test_head_matches_float64(impl, dtype, softcap):
    base, other, W, b, targets = case(dtype, tokens=300)
    for bias in (None, b):
        check(base, other, W, bias, targets, 0.5, impl, softcap)
    check(base, other, W, b.to(dtype), targets, 0.5, impl, softcap, size=4293)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_of_the_head(impl, dtype):
    base, other, W, b, targets = case(dtype)
    wide = torch.zeros(2 * W.shape[0], 3 * W.shape[1], dtype=dtype)
    wide[::2, ::3] = W
    for layout in (W, W.t().contiguous().t(), wide[::2, ::3]):
        check(base, other, layout, b, targets, 0.1, impl)
    check(base.t().contiguous().t(), other.t().contiguous().t(), W, b, targets, 0.1, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("softcap", [None, 15.0])
def test_results_hardly_depend_on_tiles(impl, softcap):
    base, other, W, b, targets = case(tokens=40, seed=1)
    stats, pair = check(base, other, W, b, targets, 0.1, impl, softcap)
    for tile in (1, 100, 4096, 5000):
        few = slice(0, 40 if tile > 1 else 2)
        again = check(
            base[few], other[few], W, b, targets[few], 0.1, impl, softcap, column_tile=tile
        )
        for one, two in zip((stats, pair), again, strict=True):
            for name, values in vars(one).items():
                if values.dtype == torch.float64:
                    assert (values[few] - getattr(two, name)).abs().max() <= 1e-5


@pytest.mark.parametrize("impl", IMPLS)
def test_the_statistics_are_those_of_the_logits(impl):
    """Given equal products they are equal: here all sums are exact."""
    g = torch.Generator().manual_seed(2)
    residual, W = (
        torch.randint(-4, 5, shape, generator=g).float() for shape in ((300, 8), (8, 5000))
    )
    other = residual.flip(0)
    targets = torch.randint(0, 5000, (300,), generator=g)
    found = ops.head_stats(residual, W, targets, 0.1, impl=impl)
    wanted = ops.token_stats(residual @ W, targets, 0.1, impl=impl)
    pair = ops.head_pair_stats(residual, other, W, targets, 0.1, impl=impl)
    wanted_pair = ops.pair_stats(residual @ W, other @ W, targets, 0.1, impl=impl)
    for one, two in ((found, wanted), (pair, wanted_pair)):
        for name, values in vars(one).items():
            if impl == "native" or values.dtype != torch.float64:
                assert torch.equal(values, getattr(two, name)), name
            else:
                torch.testing.assert_close(values, getattr(two, name), atol=1e-9, rtol=1e-9)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    first=st.sampled_from([1, 2048, 2500]),
    base_shift=st.sampled_from([-50.0, 0.0, 50.0]),
    gap=st.sampled_from([-1000.0, -30.0, 10.0, 300.0, 1e4]),
    tile=st.sampled_from([None, 700]),
)
def test_divergence_of_predictions_that_differ_by_parts(seed, first, base_shift, gap, tile):
    """Rows of W are the two predictions and the first tokens: each logit is a sum of two numbers."""
    g = torch.Generator().manual_seed(seed)
    W = 3 * torch.randn(3, 5000, generator=g)
    W[1] = W[0] + 0.1 * W[1]
    W[2] = torch.arange(5000) < first
    base = torch.tensor([[1.0, 0.0, base_shift]])
    other = torch.tensor([[0.0, 1.0, base_shift - gap]])
    targets = torch.tensor([4999])
    p, q = ((row.double() @ W.double()).log_softmax(1) for row in (base, other))
    wanted = float((p.exp() * (p - q)).sum()) / np.log(2)
    for impl in IMPLS:
        found = ops.head_pair_stats(base, other, W, targets, 0.5, column_tile=tile, impl=impl)
        assert abs(float(found.kl) - wanted) <= 1e-6 + 1e-5 * wanted


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tokens", [9, 600])
def test_several_predictions_against_one_base(impl, tokens):
    base, other, W, b, targets = case(tokens=tokens, columns=2100)
    others = [other, base, other.flip(0)]
    shared = {"b_U": b, "impl": impl}
    together = ops.head_pair_stats(base, torch.cat(others), W, targets, 0.1, **shared)
    for v, each in enumerate(others):
        alone = ops.head_pair_stats(base, each, W, targets, 0.1, **shared)
        for name, values in vars(together).items():
            assert torch.equal(values[v * tokens : (v + 1) * tokens], getattr(alone, name)), name
    none = ops.head_pair_stats(base, other[:0], W, targets, 0.1, **shared)
    assert none.kl.shape == (0,)


@pytest.mark.parametrize("impl", IMPLS)
def test_several_predictions_are_each_compared_with_the_base(impl):
    base, other, W, b, targets = case()
    each = [other, base, other.flip(0)]
    together = ops.head_pair_stats(base, torch.cat(each), W, targets, 0.3, b_U=b, impl=impl)
    alone = [ops.head_pair_stats(base, one, W, targets, 0.3, b_U=b, impl=impl) for one in each]
    for name in ("bits", "kl", "agree", "gold_logprob_gap"):
        apart = torch.cat([getattr(stats, name) for stats in alone]).double()
        torch.testing.assert_close(getattr(together, name).double(), apart, atol=1e-6, rtol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_masked_tokens(impl):
    """A bias of -inf masks; where only the other prediction masked, the divergence is infinite."""
    base, other, W, b, targets = case(columns=5000)
    b[:4500] = -torch.inf
    targets = targets * 0 + 4700
    stats = ops.head_stats(other, W, targets, 0.1, b_U=b, impl=impl)
    few = ops.token_stats(other @ W[:, 4500:] + b[4500:], targets - 4500, 0.1, impl=impl)
    torch.testing.assert_close(stats.lse, few.lse, atol=1e-5, rtol=0)
    assert torch.equal(stats.argmax, few.argmax + 4500)
    pair = ops.head_pair_stats(base, other, W, targets, 0.1, b_U=b, impl=impl)
    assert torch.isfinite(pair.kl).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_and_bad_inputs(impl):
    base, other, W, b, targets = case()
    none = ops.head_pair_stats(base[:0], other[:0], W, targets[:0], 0.1, impl=impl)
    assert none.kl.shape == (0,)
    assert ops.head_stats(base[:0], W, targets[:0], 0.1, impl=impl).bits.shape == (0,)
    broken = other.clone()
    broken[3, 0] = float("nan")
    with pytest.raises(CertifyError, match="logits of row 3"):
        ops.head_stats(broken, W, targets, 0.1, impl=impl)
    with pytest.raises(CertifyError, match="base logits of row 3"):
        ops.head_pair_stats(broken, other, W, targets, 0.1, impl=impl)
    with pytest.raises(CertifyError, match="^logits of row 3"):
        ops.head_pair_stats(base, broken, W, targets, 0.1, softcap=30.0, impl=impl)
    with pytest.raises(CertifyError, match=r"W_U has shape \[39, 4300\]"):
        ops.head_stats(base, W[1:], targets, 0.1, impl=impl)
    with pytest.raises(CertifyError, match="W_U is torch.float16"):
        ops.head_stats(base, W.half(), targets, 0.1, impl=impl)
    with pytest.raises(CertifyError, match="b_U has shape"):
        ops.head_stats(base, W, targets, 0.1, b_U=b[1:], impl=impl)
    with pytest.raises(CertifyError, match="target token 4300"):
        ops.head_stats(base, W, targets * 0 + 4300, 0.1, impl=impl)
    with pytest.raises(CertifyError, match="d_vocab = 4301"):
        ops.head_stats(base, W, targets, 0.1, d_vocab=4301, impl=impl)
    with pytest.raises(CertifyError, match="column_tile = 0"):
        ops.head_stats(base, W, targets, 0.1, column_tile=0, impl=impl)
    for rows, residual in ((8, other[1:]), (10, torch.cat([other, other[:1]]))):
        with pytest.raises(CertifyError, match=f"residual has {rows} rows, expected a multiple"):
            ops.head_pair_stats(base, residual, W, targets, 0.1, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_head_of_more_than_2_to_the_31_weights(impl):
    d_model, columns = 2048, 2**20 + 40
    W = torch.empty(columns, d_model, dtype=torch.bfloat16)  # untouched pages cost nothing
    last = torch.randn(40, d_model, generator=torch.Generator().manual_seed(0)).bfloat16() / 30
    W[-40:] = last
    residual = torch.randn(3, d_model, generator=torch.Generator().manual_seed(1)).bfloat16()
    targets = torch.tensor([0, 7, 39])
    found = ops.head_stats(residual, W.t()[:, -40:], targets, 0.1, impl=impl)
    wanted = ops.head_stats(residual, last.t(), targets, 0.1, impl=impl)
    assert torch.equal(found.bits, wanted.bits)


@pytest.mark.parametrize("impl", IMPLS)
def test_threads_and_batches(impl):
    base, other, W, b, targets = case(tokens=70, seed=3)
    threads = torch.get_num_threads()
    whole = ops.head_pair_stats(base, other, W, targets, 0.1, b_U=b, impl=impl)
    torch.set_num_threads(3)
    parts = [
        ops.head_pair_stats(base[i], other[i], W, targets[i], 0.1, b_U=b, impl=impl)
        for i in (slice(0, 1), slice(1, 70))
    ]
    torch.set_num_threads(threads)
    for name in ("bits_base", "bits", "kl", "gold_logprob_gap"):
        joined = torch.cat([getattr(part, name) for part in parts])
        torch.testing.assert_close(joined, getattr(whole, name), atol=1e-5, rtol=0)

from __future__ import annotations

import mpmath
import numpy as np
import ops_oracle as oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelens_certify import ops
from saelens_certify.errors import CertifyError

IMPLS = oracle.IMPLS


def check(base, other, targets, alpha, size, impl, softcap=None):
    """Compare both operators with float64, row by row."""
    shared = {"d_vocab": size, "softcap": softcap, "impl": impl}
    stats = ops.token_stats(other, targets, alpha, **shared)
    pair = ops.pair_stats(base, other, targets, alpha, **shared)
    for t, gold in enumerate(targets.tolist()):
        best = [int(row[t, :size].double().numpy().argmax()) for row in (base, other)]
        p, _ = oracle.log_softmax(oracle.capped(base[t, :size].double().numpy(), softcap))
        q, lse = oracle.log_softmax(oracle.capped(other[t, :size].double().numpy(), softcap))
        assert abs(float(stats.bits[t]) - oracle.bits(q[gold], alpha, size)) <= 1e-5
        assert float(pair.bits[t]) == float(stats.bits[t])
        assert abs(float(pair.bits_base[t]) - oracle.bits(p[gold], alpha, size)) <= 1e-5
        assert abs(float(stats.lse[t]) - lse) <= 5e-6 + 1e-7 * abs(lse)
        assert int(stats.argmax[t]) == best[1]
        assert bool(pair.agree[t]) == (best[0] == best[1])
        if np.isfinite(q[gold]):
            assert abs(float(stats.gold_logprob[t]) - q[gold]) <= 5e-6 + 1e-7 * abs(q[gold])
        with np.errstate(invalid="ignore", over="ignore"):
            terms = np.where(p == -np.inf, 0.0, np.exp(p) * (p - q))
        kl = np.inf if ((q == -np.inf) & (p > -np.inf)).any() else terms.sum() / np.log(2)
        if np.isinf(kl):
            assert np.isinf(float(pair.kl[t]))
        else:
            assert abs(float(pair.kl[t]) - kl) <= 1e-6 + 1e-5 * kl
            assert float(pair.kl[t]) >= 0
        if np.isfinite(p[gold]) and np.isfinite(q[gold]):
            gap = abs(p[gold] - q[gold]) / np.log(2)
            assert abs(float(pair.gold_logprob_gap[t]) - gap) <= 1e-5 + 1e-6 * gap


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 17, 2048, 50257])
def test_statistics_match_float64(impl, dtype, size):
    g = torch.Generator().manual_seed(size)
    base = (3 * torch.randn(5, size + 7, generator=g)).to(dtype)
    base[1] *= 6
    base[2] += 90
    base[3] = 0
    other = (base + torch.randn(5, size + 7, generator=g).to(dtype)).to(dtype)
    other[:, -7:] = float("nan")  # padding must not be read
    base[:, -7:] = float("inf")
    targets = torch.randint(0, size, (5,), generator=g)
    for alpha in (0.0, 0.1, 0.9):
        check(base, other, targets, alpha, size, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [0.5, 30.0, 2000.0])
def test_softcapped_statistics_match_float64(impl, dtype, softcap):
    g = torch.Generator().manual_seed(int(softcap))
    size = 5003
    base = (softcap * torch.randn(6, size + 7, generator=g)).to(dtype)
    base[1] /= 100
    base[2, ::2] = -torch.inf  # the model has -softcap there, not a mask
    base[3, 4] = torch.inf
    base[4] = -torch.inf
    other = base.clone()
    other[:, : size // 2] = base[:, : size // 2] + torch.randn(6, size // 2, generator=g).to(dtype)
    other[:, -7:] = float("nan")
    targets = torch.randint(0, size, (6,), generator=g)
    targets[2] = 0
    # Without smoothing the loss of a token at -softcap may be infinite.
    for alpha in (0.0 if softcap < 100 else 0.1, 0.5):
        check(base, other, targets, alpha, size, impl, softcap)


@pytest.mark.parametrize("impl", IMPLS)
def test_softcap_itself_against_arbitrary_precision(impl):
    """With one token in the vocabulary the log-sum-exp is the capped logit."""
    g = torch.Generator().manual_seed(0)
    logits = 10 ** torch.empty(400, 1).uniform_(-6, 3, generator=g)
    logits[::2] *= -1
    logits[:4, 0] = torch.tensor([0.0, torch.inf, -torch.inf, 1e-45])
    for softcap in (0.3, 30.0, 1000.0):
        targets = torch.zeros(400, dtype=torch.int64)
        stats = ops.token_stats(logits, targets, 0.1, softcap=softcap, impl=impl)
        with mpmath.workdps(40):
            for logit, lse in zip(logits[:, 0].tolist(), stats.lse.tolist(), strict=True):
                wanted = softcap * mpmath.tanh(mpmath.mpf(logit) / mpmath.mpf(softcap))
                assert abs(mpmath.mpf(lse) - wanted) <= 1e-12 * softcap


@pytest.mark.parametrize("impl", IMPLS)
def test_softcap_and_bad_rows(impl):
    logits, targets = torch.randn(4, 3000), torch.zeros(4).long()
    plain = ops.token_stats(logits, targets, 0.1, impl=impl)
    for none in (None, 0, 0.0):
        same = ops.token_stats(logits, targets, 0.1, softcap=none, impl=impl)
        assert torch.equal(same.bits, plain.bits)
    logits[2, 2999] = float("nan")
    with pytest.raises(CertifyError, match="row 2"):
        ops.token_stats(logits, targets, 0.1, softcap=30.0, impl=impl)
    with pytest.raises(CertifyError, match="^logits of row 2"):
        ops.pair_stats(logits.nan_to_num(), logits, targets, 0.1, softcap=30.0, impl=impl)
    for bad in (-1.0, 1e13, 1e-310, float("inf"), float("nan")):
        with pytest.raises(CertifyError, match="softcap = .* must lie between"):
            ops.token_stats(logits, targets, 0.1, softcap=bad, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_divergence_stays_infinite(impl):
    """A masked token whose weight vanishes when a far larger logit comes, blocks later."""
    base, other = torch.zeros(2, 2, 5000)
    other[:, 0] = -torch.inf
    base[:, 4500], other[:, 4500] = 2000.0, 2000.0
    pair = ops.pair_stats(base, other, torch.full((2,), 4500), 0.1, impl=impl)
    assert torch.isinf(pair.kl).all()


def test_more_than_2_to_the_31_logits():
    rows, width = 513, 2**22
    logits = torch.empty(rows, width, dtype=torch.bfloat16)  # untouched pages cost nothing
    logits[:, :70] = torch.randn(rows, 70, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.arange(rows) % 70
    few = logits[:, :70].contiguous()
    stats = ops.token_stats(logits, targets, 0.1, d_vocab=70)
    assert torch.equal(stats.bits, ops.token_stats(few, targets, 0.1).bits)
    pair = ops.pair_stats(logits, logits, targets, 0.1, d_vocab=70)
    assert torch.equal(pair.bits, stats.bits)


def test_logits_that_are_not_contiguous():
    logits = torch.randn(60, 9, generator=torch.Generator().manual_seed(0)).t()
    targets = torch.arange(9)
    wanted = ops.token_stats(logits.contiguous(), targets, 0.1).bits
    assert torch.equal(ops.token_stats(logits, targets, 0.1).bits, wanted)
    assert torch.equal(ops.pair_stats(logits, logits, targets, 0.1).bits, wanted)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.integers(1, 200),
    spread=st.sampled_from([0.0, 1.0, 30.0, 300.0]),
    shift=st.sampled_from([0.0, 100.0, -3000.0]),
    masked=st.sampled_from([0.0, 0.3, 0.95]),
)
def test_masks_ties_and_extreme_logits(seed, size, spread, shift, masked):
    g = torch.Generator().manual_seed(seed)
    base = (spread * torch.randn(4, size, generator=g)).round() + shift
    other = base + 0.5 * torch.randn(4, size, generator=g)
    mask = torch.rand(4, size, generator=g) < masked
    mask[:, seed % size] = False
    base[mask] = -torch.inf
    other[:2][mask[:2]] = -torch.inf
    for impl in IMPLS:
        check(base, other, torch.full((4,), seed % size), 0.1, size, impl)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    first=st.sampled_from([1, 2048, 2500, 8999]),
    base_shift=st.sampled_from([-50.0, 0.0, 50.0]),
    gap=st.sampled_from([-1000.0, -30.0, 0.0, 10.0, 300.0, 1e4]),
    everywhere=st.sampled_from([0.0, 3000.0]),
    softcap=st.sampled_from([None, 100.0]),
)
def test_divergence_of_predictions_that_differ_by_parts(
    seed, first, base_shift, gap, everywhere, softcap
):
    """The first tokens differ by far more than the rest, as they do under a finite mask."""
    g = torch.Generator().manual_seed(seed)
    base = 3 * torch.randn(2, 9000, generator=g)
    other = base + 0.3 * torch.randn(2, 9000, generator=g)
    base[:, :first] += base_shift
    other[:, :first] += base_shift - gap
    for impl in IMPLS:
        check(base, other + everywhere, torch.full((2,), 8999), 0.5, 9000, impl, softcap)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_largest_float_as_a_mask(impl):
    g = torch.Generator().manual_seed(0)
    base = torch.randn(3, 6000, generator=g)
    other = base + torch.randn(3, 6000, generator=g)
    least = torch.finfo(torch.float32).min
    base[:, :2500] = least
    other[0, :2500] = least
    other[1, :2500] = -1e4
    base[2] += 1e35
    other[2, 2500:] = 1e35
    check(base, other, torch.full((3,), 5999), 0.5, 6000, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_go_to_the_lowest_token_and_equal_rows_agree(impl):
    logits = torch.zeros(3, 5000)
    logits[0, [2047, 2048, 4000]] = 3.0
    logits[1, [4999, 17]] = 1.0
    stats = ops.token_stats(logits, torch.zeros(3).long(), 0.1, impl=impl)
    assert stats.argmax.tolist() == [2047, 17, 0]
    pair = ops.pair_stats(logits, logits, torch.zeros(3).long(), 0.1, impl=impl)
    assert pair.kl.abs().max() < 1e-7
    assert pair.agree.all()
    assert not pair.gold_logprob_gap.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_whole_blocks_of_masked_tokens(impl):
    g = torch.Generator().manual_seed(0)
    base, other = torch.randn(2, 3, 9000, generator=g)
    base[:, :4096], other[:, :6000] = -torch.inf, -torch.inf
    check(base, other, torch.full((3,), 8000), 0.1, 9000, impl)
    check(other, base, torch.full((3,), 8000), 0.1, 9000, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_results_do_not_depend_on_threads_or_batch(impl):
    g = torch.Generator().manual_seed(0)
    base, other = torch.randn(2, 40, 3000, generator=g)
    targets = torch.randint(0, 3000, (40,), generator=g)
    whole = ops.pair_stats(base, other, targets, 0.1, impl=impl)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = ops.pair_stats(base[7:8], other[7:8], targets[7:8], 0.1, impl=impl)
    torch.set_num_threads(threads)
    tolerance = 0.0 if impl == "native" else 1e-12
    for name in ("bits_base", "bits", "kl", "gold_logprob_gap"):
        difference = getattr(whole, name)[7] - getattr(alone, name)[0]
        assert abs(float(difference)) <= tolerance


@pytest.mark.parametrize("impl", IMPLS)
def test_bad_predictions_are_named(impl):
    logits, targets = torch.randn(4, 50), torch.zeros(4).long()
    for column in (0, 49):
        for bad in (float("nan"), float("inf")):
            broken = logits.clone()
            broken[2, column] = bad
            with pytest.raises(ValueError, match="logits of row 2"):
                ops.token_stats(broken, targets, 0.1, impl=impl)
            with pytest.raises(CertifyError, match="base_logits of row 2"):
                ops.pair_stats(broken, logits, targets, 0.1, impl=impl)
            with pytest.raises(CertifyError, match="^logits of row 2"):
                ops.pair_stats(logits, broken, targets, 0.1, impl=impl)
    masked = logits.clone()
    masked[3] = -torch.inf
    with pytest.raises(CertifyError, match="row 3"):
        ops.token_stats(masked, targets, 0.1, impl=impl)
    with pytest.raises(CertifyError, match="target token 50"):
        ops.token_stats(logits, targets + 50, 0.1, impl=impl)
    with pytest.raises(CertifyError, match="target token -1"):
        ops.token_stats(logits, targets - 1, 0.1, impl=impl)
    with pytest.raises(CertifyError, match="alpha = 1"):
        ops.token_stats(logits, targets, 1.0, impl=impl)
    with pytest.raises(CertifyError, match="d_vocab = 51"):
        ops.token_stats(logits, targets, 0.1, d_vocab=51, impl=impl)
    empty = ops.pair_stats(logits[:0], logits[:0], targets[:0], 0.1, impl=impl)
    assert empty.kl.shape == (0,)

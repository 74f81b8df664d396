from __future__ import annotations

from fractions import Fraction

import numpy as np
import ops_oracle as oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelens_certify import ops
from saelens_certify.errors import CertifyError
from saelens_certify.ops.reference.decode import _fma_float32

IMPLS = oracle.IMPLS


def random_codes(seed: int, tokens: int, slots: int, d_sae: int) -> ops.SparseCodes:
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, slots + 1, (tokens,), generator=g, dtype=torch.int32)
    used = torch.arange(slots) < counts.unsqueeze(1)
    indices = torch.rand(tokens, d_sae, generator=g).argsort(1)[:, :slots].int()
    values = torch.rand(tokens, slots, generator=g) + 0.1
    return ops.SparseCodes(torch.where(used, values, 0.0), torch.where(used, indices, -1), counts)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), tokens=st.integers(0, 6), d_sae=st.integers(8, 100))
def test_pool_operators(seed, tokens, d_sae):
    codes = random_codes(seed, tokens, 8, d_sae)
    pool = torch.rand(d_sae, generator=torch.Generator().manual_seed(seed)) < 0.5
    bits = ops.pool_bits(pool)
    assert bits.shape == ((d_sae + 31) // 32,)
    for j in range(d_sae):
        assert bool((int(bits[j // 32]) >> (j % 32)) & 1) == bool(pool[j])
    listed = oracle.rows(codes)
    for impl in IMPLS:
        inside = ops.restrict(codes, bits, impl=impl)
        assert oracle.rows(inside) == [[(j, v) for j, v in row if pool[j]] for row in listed]
        outside = ops.count_outside(codes, bits, impl=impl)
        assert outside.dtype == torch.int32
        assert outside.tolist() == [sum(not pool[j] for j, _ in row) for row in listed]
        totals = torch.full((d_sae,), 5)
        ops.pool_count_(totals, codes, impl=impl)
        wanted = [5 + sum(j == f for row in listed for f, _ in row) for j in range(d_sae)]
        assert totals.tolist() == wanted


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("width", [1, 8, 1024])
@pytest.mark.parametrize("flush", [False, True])
def test_every_float16_number_is_decoded(impl, width, flush):
    numbers = torch.arange(1 << 16).to(torch.uint16).view(torch.float16)
    W = torch.where(numbers.isfinite(), numbers, 0.0)[: 1 << (16 if width > 1 else 12)]
    W = W.view(-1, width)
    one = torch.ones(len(W), 1)
    codes = ops.SparseCodes(one, torch.arange(len(W)).int().unsqueeze(1), one[:, 0].int())
    torch.set_flush_denormal(flush)
    try:
        found, _ = ops.decode(codes, W, impl=impl)
    finally:
        torch.set_flush_denormal(False)
    # Signs of zeros aside: a sum that starts from zero has none.
    assert torch.equal(found, W.float())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decode_equals_exact_fused_chain(impl, dtype):
    codes = random_codes(1, 5, 11, 40)
    g = torch.Generator().manual_seed(2)
    W, b = torch.randn(40, 37, generator=g).to(dtype), torch.randn(37, generator=g)
    target = torch.randn(5, 37, generator=g)
    x_hat, stats = ops.decode(codes, W, b, target, impl=impl)
    assert stats is not None
    assert stats.dtype == torch.float64
    for t, pairs in enumerate(oracle.rows(codes)):
        assert np.array_equal(x_hat[t].numpy(), oracle.decode_row(pairs, W, b))
        x, y = target[t].double().numpy(), x_hat[t].double().numpy()
        terms = ((x - y) * (x - y), x * x, y * y, x * y, x)
        assert stats[t].tolist() == [oracle.lane_sum(term) for term in terms]
    plain, nothing = ops.decode(codes, W, impl=impl)
    assert nothing is None
    assert torch.equal(plain, ops.decode(codes, W, torch.zeros(37), impl="torch")[0])


def test_decode_is_the_same_on_every_path():
    codes = random_codes(3, 300, 24, 500)
    W = torch.randn(500, 203, generator=torch.Generator().manual_seed(4))
    target = torch.randn(300, 203, generator=torch.Generator().manual_seed(5))
    wanted, wanted_stats = ops.decode(codes, W, None, target, impl="torch")
    assert wanted_stats is not None
    threads = torch.get_num_threads()
    for impl in IMPLS:
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            x_hat, stats = ops.decode(codes, W, None, target, impl=impl)
            assert stats is not None
            assert torch.equal(x_hat, wanted)
            assert torch.equal(stats, wanted_stats)
        torch.set_num_threads(threads)
        rows = torch.arange(299, -1, -1)
        x_hat, stats = ops.decode(codes[rows], W, None, target[rows], impl=impl)
        assert stats is not None
        assert torch.equal(x_hat, wanted[rows])
        assert torch.equal(stats, wanted_stats[rows])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d_out", [1, 15, 16, 17, 127, 128, 131, 203, 768])
def test_decode_of_any_width_and_layout(impl, dtype, d_out):
    """Blocks, single vectors and what remains; weights and codes that are not contiguous."""
    codes = random_codes(d_out, 7, 19, 60)
    g = torch.Generator().manual_seed(d_out)
    W, b = torch.randn(d_out, 60, generator=g).to(dtype).t(), torch.randn(d_out, generator=g)
    scattered = ops.SparseCodes(
        codes.values.t().contiguous().t(), codes.indices.t().contiguous().t(), codes.counts
    )
    target = torch.randn(d_out, 7, generator=g).t()
    x_hat, stats = ops.decode(scattered, W, b, target, impl=impl)
    wanted, wanted_stats = ops.decode(codes, W.contiguous(), b, target.contiguous(), impl="torch")
    assert torch.equal(x_hat, wanted)
    assert stats is not None
    assert wanted_stats is not None
    assert torch.equal(stats, wanted_stats)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d_out", [5, 130])
def test_permuted_decode_equals_decode_of_renamed_codes(impl, dtype, d_out):
    codes = random_codes(7, 23, 9, 50)
    g = torch.Generator().manual_seed(8)
    W, b = torch.randn(50, d_out, generator=g).to(dtype), torch.randn(d_out, generator=g)
    target = torch.randn(23, d_out, generator=g)
    orders = torch.rand(4, 50, generator=g).argsort(1)
    orders[3] = 7  # any renaming will do
    threads = torch.get_num_threads()
    for n_threads in (1, 3):
        torch.set_num_threads(n_threads)
        for bias in (None, b):
            x_hat = ops.decode_permuted(codes, W, orders.int(), bias, impl=impl)
            stats = ops.decode_permuted_stats(codes, W, orders, target, bias, impl=impl)
            assert x_hat.shape == (4, 23, d_out)
            assert stats.shape == (4, 23, 5)
            for r, order in enumerate(orders):
                renamed = codes.map_indices(order)
                wanted, wanted_stats = ops.decode(renamed, W, bias, target, impl="torch")
                assert torch.equal(x_hat[r], wanted)
                assert wanted_stats is not None
                assert torch.equal(stats[r], wanted_stats)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("impl", IMPLS)
def test_permuted_decode_edges(impl):
    W = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    orders = torch.arange(9).flip(0).expand(3, 9)
    for tokens, slots in ((0, 3), (4, 0), (3, 2)):
        codes = ops.SparseCodes(
            torch.zeros(tokens, slots),
            torch.full((tokens, slots), -1, dtype=torch.int32),
            torch.zeros(tokens, dtype=torch.int32),
        )
        x_hat = ops.decode_permuted(codes, W, orders, torch.arange(5.0), impl=impl)
        assert torch.equal(x_hat, torch.arange(5.0).expand(3, tokens, 5))
        stats = ops.decode_permuted_stats(codes, W, orders, torch.ones(tokens, 5), impl=impl)
        assert torch.equal(stats, torch.tensor([5.0, 5, 0, 0, 5]).double().expand(3, tokens, 5))
        none = ops.decode_permuted_stats(codes, W, orders[:0], torch.ones(tokens, 5), impl=impl)
        assert none.shape == (0, tokens, 5)
        assert ops.decode_permuted(codes, W, orders[:0], impl=impl).shape == (0, tokens, 5)
    codes = random_codes(1, 3, 4, 9)
    with pytest.raises(CertifyError, match=r"permutations has shape \[2, 8\]"):
        ops.decode_permuted(codes, W, torch.zeros(2, 8, dtype=torch.int32), impl=impl)
    with pytest.raises(CertifyError, match="permutations name feature 9, but"):
        ops.decode_permuted(codes, W, torch.full((2, 9), 9), impl=impl)
    with pytest.raises(CertifyError, match="permutations name feature -1"):
        ops.decode_permuted_stats(codes, W, orders - 1, torch.ones(3, 5), impl=impl)
    with pytest.raises(CertifyError, match="permutations is torch.float32"):
        ops.decode_permuted(codes, W, torch.zeros(2, 9), impl=impl)
    with pytest.raises(CertifyError, match="target has shape"):
        ops.decode_permuted_stats(codes, W, orders, torch.ones(3, 6), impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_weights_of_more_than_2_to_the_31_numbers(impl):
    d_sae, d_out = 2**20 + 40, 2048
    W = torch.empty(d_sae, d_out, dtype=torch.bfloat16)  # untouched pages cost nothing
    last = torch.randn(20, d_out, generator=torch.Generator().manual_seed(0)).bfloat16()
    W[-20:] = last
    codes = random_codes(3, 5, 6, 20)
    order = torch.arange(d_sae, dtype=torch.int32)
    far = codes.map_indices(torch.arange(20) + d_sae - 20)
    target = torch.ones(5, d_out)
    wanted, wanted_stats = ops.decode(codes, last, None, target, impl=impl)
    x_hat, stats = ops.decode(far, W, None, target, impl=impl)
    assert torch.equal(x_hat, wanted)
    assert stats is not None
    assert wanted_stats is not None
    assert torch.equal(stats, wanted_stats)
    assert torch.equal(ops.decode_permuted(far, W, order[None], impl=impl)[0], wanted)
    permuted = ops.decode_permuted_stats(far, W, order[None], target, impl=impl)
    assert torch.equal(permuted[0], wanted_stats)


@settings(max_examples=200, deadline=None)
@given(
    st.floats(
        width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**40), max_value=2.0**40
    ),
    st.floats(
        width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**40), max_value=2.0**40
    ),
    st.floats(
        width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**80), max_value=2.0**80
    ),
)
def test_emulated_fused_multiply_add(a, b, c):
    got = _fma_float32(*(torch.tensor([v], dtype=torch.float64) for v in (a, b, c)))
    wanted = oracle.nearest_float32(Fraction(a) * Fraction(b) + Fraction(c))
    assert float(got) == float(wanted)


def test_emulated_fused_multiply_add_where_rounding_twice_errs():
    # c + a b lies just beside the middle of two float32 numbers, closer than float64 can tell.
    a, b, c = 1 + 2.0**-23, 2.0**-24 * (1 - 2.0**-23), 1 + 2.0**-23
    got = _fma_float32(*(torch.tensor([v], dtype=torch.float64) for v in (a, b, c)))
    wanted = oracle.nearest_float32(Fraction(a) * Fraction(b) + Fraction(c))
    twice = np.float32(np.float64(a) * np.float64(b) + np.float64(c))
    assert float(twice) != float(wanted) == float(got)


@pytest.mark.parametrize("impl", IMPLS)
def test_decode_edges(impl):
    W = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    for tokens, slots in ((0, 3), (4, 0), (3, 2)):
        codes = ops.SparseCodes(
            torch.zeros(tokens, slots),
            torch.full((tokens, slots), -1, dtype=torch.int32),
            torch.zeros(tokens, dtype=torch.int32),
        )
        x_hat, stats = ops.decode(codes, W, torch.arange(5.0), torch.ones(tokens, 5), impl=impl)
        assert torch.equal(x_hat, torch.arange(5.0).expand(tokens, 5))
        assert stats is not None
        assert stats.shape == (tokens, 5)
    codes = random_codes(1, 3, 4, 30)
    with pytest.raises(CertifyError, match="only 9 features"):
        ops.decode(codes, W, impl=impl)
    with pytest.raises(CertifyError, match="target has shape"):
        ops.decode(random_codes(1, 3, 4, 9), W, None, torch.ones(3, 6), impl=impl)
    with pytest.raises(CertifyError, match="only 8 features"):
        ops.pool_count_(torch.zeros(8, dtype=torch.int64), codes, impl=impl)


def test_sparse_codes():
    codes = random_codes(2, 6, 5, 20)
    listed = oracle.rows(codes)
    assert oracle.rows(codes[2:4]) == listed[2:4]
    assert oracle.rows(codes.select(torch.tensor([5, 0]))) == [listed[5], listed[0]]
    assert len(codes[torch.tensor([True, False] * 3)]) == 3
    joined = ops.SparseCodes.cat([codes.trimmed(), random_codes(3, 2, 9, 20)])
    assert joined.slots == 9
    assert oracle.rows(joined)[:6] == listed
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    mapped = codes.map_indices(order.int())
    assert oracle.rows(mapped) == [[(int(order[j]), v) for j, v in row] for row in listed]
    assert oracle.rows(codes.to("cpu")) == listed
    with pytest.raises(CertifyError, match="permutation of 3"):
        codes.map_indices(torch.arange(3).int())
    with pytest.raises(CertifyError, match="at least one part"):
        ops.SparseCodes.cat([])
    with pytest.raises(CertifyError, match="int32 indices"):
        ops.SparseCodes(codes.values, codes.indices.long(), codes.counts)
    with pytest.raises(CertifyError, match="one shape"):
        ops.SparseCodes(codes.values[:, :2], codes.indices, codes.counts)
    with pytest.raises(CertifyError, match="one number per token"):
        ops.SparseCodes(codes.values, codes.indices, codes.counts[:3])


@pytest.mark.parametrize("impl", oracle.IMPLS)
def test_codes_that_do_not_hold_together_are_named(impl):
    def codes(indices, count):
        return ops.SparseCodes(
            torch.ones(1, 2),
            torch.tensor([indices], dtype=torch.int32),
            torch.tensor([count]).int(),
        )

    W = torch.ones(5, 3)
    bits = ops.pool_bits(torch.ones(5, dtype=torch.bool))
    with pytest.raises(CertifyError, match="name feature -3"):
        ops.decode(codes([1, -3], 2), W, impl=impl)
    with pytest.raises(CertifyError, match="name feature -3"):
        ops.restrict(codes([1, -3], 2), bits, impl=impl)
    with pytest.raises(CertifyError, match="name feature -3"):
        ops.count_outside(codes([1, -3], 2), bits, impl=impl)
    with pytest.raises(CertifyError, match="name feature -3"):
        ops.pool_count_(torch.zeros(5, dtype=torch.int64), codes([1, -3], 2), impl=impl)
    for indices, count in (([1, -1], 2), ([1, 2], 1), ([1, 2], -3)):
        with pytest.raises(CertifyError, match=f"count {count} features in row 0"):
            ops.decode(codes(indices, count), W, impl=impl)

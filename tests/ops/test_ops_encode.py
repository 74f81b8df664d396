from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import ops_oracle as oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelens_certify import ops
from saelens_certify.errors import CertifyError

FORMS = oracle.FORMS
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extras", [False, True])
def test_encoders_equal_oracle_bit_by_bit(form, dtype, extras):
    x, W, bias, scale, theta, pool = oracle.random_encoder(1, 6, 45, 131, dtype)
    if not extras:
        scale = theta = None
    top, pooled = form.topk(
        x, W, bias, k=5, scale=scale, theta=theta, pool_bits=ops.pool_bits(pool)
    )
    every = form.threshold(x, W, bias, scale=scale, theta=theta)
    assert pooled is not None
    for t in range(6):
        row = oracle.scores(x[t], W, bias, scale)
        assert oracle.rows(top)[t] == oracle.top_k(row, 5, theta)
        assert oracle.rows(pooled)[t] == oracle.top_k(row, 5, theta, pool)
        wanted = [(j, float(row[j])) for j in oracle.active(row, theta)]
        assert oracle.rows(every)[t] == wanted


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(0, 5),
    d_in=st.integers(1, 70),
    d_sae=st.integers(1, 90),
    k=st.integers(1, 100),
    levels=st.sampled_from([1, 2, 1000]),
    tile=st.integers(1, 90),
)
def test_ties_and_odd_shapes(seed, tokens, d_in, d_sae, k, levels, tile):
    g = torch.Generator().manual_seed(seed)
    # Few distinct values make many exact ties.
    x = torch.randint(-levels, levels + 1, (tokens, d_in), generator=g).float()
    W = torch.randint(-levels, levels + 1, (d_sae, d_in), generator=g).float()
    bias = torch.randint(-1, 2, (d_sae,), generator=g).float()
    pool = torch.randint(0, 2, (d_sae,), generator=g).bool()
    for form in FORMS:
        top, pooled = form.topk(
            x, W, bias, k=k, pool_bits=ops.pool_bits(pool), row_chunk=2, column_tile=tile
        )
        assert pooled is not None
        assert top.slots == min(k, d_sae)
        for t in range(tokens):
            row = oracle.scores(x[t], W, bias)
            assert oracle.rows(top)[t] == oracle.top_k(row, k)
            assert oracle.rows(pooled)[t] == oracle.top_k(row, k, pool=pool)


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_does_not_depend_on_how_it_is_computed(dtype):
    x, W, bias, scale, theta, pool = oracle.random_encoder(2, 70, 96, 1500, dtype)
    theta = theta + 1
    bits = ops.pool_bits(pool)
    shared: dict[str, Any] = {"scale": scale, "theta": theta}
    top, pooled = ops.topk_encode(x, W, bias, k=20, pool_bits=bits, impl="torch", **shared)
    every = ops.threshold_encode(x, W, bias, impl="torch", **shared)
    threads = torch.get_num_threads()
    for form in FORMS:
        for n_threads, chunk, tile in ((1, None, None), (2, 17, 333), (3, 64, 64)):
            torch.set_num_threads(n_threads)
            size: dict[str, Any] = {"row_chunk": chunk, "column_tile": tile}
            got = form.topk(x, W, bias, k=20, pool_bits=bits, **shared, **size)
            oracle.assert_same(got[0], top)
            oracle.assert_same(got[1], pooled)
            oracle.assert_same(form.threshold(x, W, bias, **shared, **size), every)
        torch.set_num_threads(threads)
        parts = [
            form.topk(part, W, bias, k=20, pool_bits=bits, **shared)[0]
            for part in x.split([1, 9, 60])
        ]
        oracle.assert_same(ops.SparseCodes.cat(parts), top)
        strided = torch.stack([x, x], 2)[..., 0]
        wide = torch.cat([W, W], 1)[:, : W.shape[1]]
        assert not strided.is_contiguous()
        assert not wide.is_contiguous()
        oracle.assert_same(form.topk(strided, wide, bias, k=20, **shared)[0], top)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_permuted_features_give_permuted_codes(form):
    x, W, bias, _, _, pool = oracle.random_encoder(3, 20, 40, 500)
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    place = torch.empty_like(order)
    place[order] = torch.arange(500)
    before = form.topk(x, W, bias, k=12, pool_bits=ops.pool_bits(pool))
    after = form.topk(x, W[order], bias[order], k=12, pool_bits=ops.pool_bits(pool[order]))
    for a, b in zip(before, after, strict=True):
        assert a is not None
        oracle.assert_same(a.map_indices(place.int()), b)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_flat_ascending_and_duplicated_columns(form):
    m, k = 5000, 9
    x = torch.ones(3, 8)
    flat = torch.full((m, 8), 0.37)
    codes, pooled = form.topk(
        x, flat, torch.zeros(m), k=k, pool_bits=ops.pool_bits(torch.arange(m) >= 4000)
    )
    assert pooled is not None
    assert codes.indices.tolist() == [list(range(k))] * 3
    assert pooled.indices.tolist() == [list(range(4000, 4000 + k))] * 3
    # Every column beats all before it: the floor rises with every column.
    rising = flat * (1 + torch.arange(m) / m).unsqueeze(1)
    codes, _ = form.topk(x, rising, torch.zeros(m), k=k)
    assert codes.indices.tolist() == [list(range(m - 1, m - 1 - k, -1))] * 3
    twice = torch.cat([rising, rising])
    codes, _ = form.topk(x, twice, torch.zeros(2 * m), k=4)
    assert codes.indices.tolist() == [[m - 1, 2 * m - 1, m - 2, 2 * m - 2]] * 3
    # Differences far below the screening margin: only exact scores can order these.
    near = torch.full((m, 8), 1.0)
    near[:, 0] += torch.arange(m).flip(0) * 2.0**-23
    codes, _ = form.topk(x, near, torch.zeros(m), k=k)
    row = oracle.scores(x[0], near, torch.zeros(m))
    assert oracle.rows(codes)[0] == oracle.top_k(row, k)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_edge_shapes(form):
    x, W, bias, _, _, _ = oracle.random_encoder(4, 4, 33, 70)
    none, _ = form.topk(x[:0], W, bias, k=3)
    assert none.values.shape == (0, 3)
    assert form.threshold(x[:0], W, bias).n_tokens == 0
    everything, _ = form.topk(x, W, bias, k=1000)
    assert everything.slots == 70
    assert torch.equal(everything.counts, form.threshold(x, W, bias).counts)
    silent = form.threshold(x, W, bias - 1e6)
    assert silent.slots == 0
    assert not silent.counts.any()
    assert not form.topk(x, W, bias - 1e6, k=3)[0].counts.any()
    for pool in (torch.zeros(70).bool(), torch.ones(70).bool()):
        top, pooled = form.topk(x, W, bias, k=3, pool_bits=ops.pool_bits(pool))
        assert pooled is not None
        if pool.any():
            oracle.assert_same(top, pooled)
        else:
            assert not pooled.counts.any()
    zero_row, _ = form.topk(torch.zeros(1, 33), W, torch.ones(70), k=3)
    assert oracle.rows(zero_row) == [[(0, 1.0), (1, 1.0), (2, 1.0)]]
    no_input, _ = form.topk(torch.zeros(1, 0), W[:, :0], torch.ones(70), k=2)
    assert oracle.rows(no_input) == [[(0, 1.0), (1, 1.0)]]
    # Activity is strict: a score equal to its threshold is not active.
    unit = form.threshold(
        torch.ones(1, 1),
        torch.ones(2, 1),
        torch.zeros(2),
        theta=torch.tensor([1.0, 0.5]),
    )
    assert oracle.rows(unit) == [[(1, 1.0)]]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_threshold_code_beyond_the_first_capacity(form):
    x, W, bias, _, _, _ = oracle.random_encoder(5, 5, 16, 2000)
    x[2] = 0
    bias = bias - 0.2 * (bias > 0)
    codes = form.threshold(x, W, bias)
    dense = torch.stack([torch.tensor(oracle.scores(row, W, bias)) for row in x]).clamp(min=0)
    assert codes.counts.max() > 256 > codes.counts.min()
    assert torch.equal(codes.to_dense(2000), dense)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_reduced_precision_products_do_not_change_the_result(form):
    x, W, bias, _, theta, pool = oracle.random_encoder(6, 300, 256, 2048)
    bits = ops.pool_bits(pool)
    wanted = form.topk(x, W, bias, k=16, pool_bits=bits)
    every = form.threshold(x, W, bias, theta=theta + 2)
    try:
        for precision in ("medium", "high"):
            torch.set_float32_matmul_precision(precision)
            got = form.topk(x, W, bias, k=16, pool_bits=bits)
            oracle.assert_same(got[0], wanted[0])
            oracle.assert_same(got[1], wanted[1])
            oracle.assert_same(form.threshold(x, W, bias, theta=theta + 2), every)
    finally:
        torch.set_float32_matmul_precision("highest")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        oracle.assert_same(form.topk(x, W, bias, k=16)[0], wanted[0])
    W.requires_grad_()
    oracle.assert_same(form.topk(x, W, bias, k=16)[0], wanted[0])


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_unusable_input_is_named(form):
    x, W, bias, _, _, _ = oracle.random_encoder(7, 4, 10, 20)
    for bad in (float("nan"), float("inf"), -float("inf")):
        broken = x.clone()
        broken[2, 3] = bad
        with pytest.raises(ValueError, match="row 2"):
            form.topk(broken, W, bias, k=2)
        with pytest.raises(ValueError, match="row 2"):
            form.threshold(broken, W, bias)
        weights = W.clone()
        weights[11, 0] = bad
        with pytest.raises(CertifyError, match="feature 11"):
            form.topk(x, weights, bias, k=2)
        biases = bias.clone()
        biases[5] = bad
        with pytest.raises(CertifyError, match="bias holds .* feature 5"):
            form.topk(x, W, biases, k=2)
    with pytest.raises(CertifyError, match="k = 0"):
        form.topk(x, W, bias, k=0)
    with pytest.raises(CertifyError, match="overflow"):
        form.topk(x * 1e30, W * 1e30, bias, k=2)
    # Nothing may leave the range of float32 on the way to a score, or to its margin.
    for far in ({"scale": torch.full((20,), 3e38)}, {"gate_bias": torch.full((20,), -3e38)}):
        with pytest.raises(CertifyError, match="overflow float32 scores"):
            form.threshold(x, W, bias, **far)
    with pytest.raises(CertifyError, match="overflow float32 scores"):
        form.topk(torch.full_like(x, 3.4e38), W * 1e-30, bias, k=2)
    with pytest.raises(CertifyError, match=r"W has shape \[20, 10\], expected \[any, 9\]"):
        form.topk(x[:, :9], W, bias, k=2)
    with pytest.raises(CertifyError, match="pool_bits has shape"):
        form.topk(x, W, bias, k=2, pool_bits=torch.zeros(3, dtype=torch.int32))
    with pytest.raises(CertifyError, match="x is torch.float64"):
        form.topk(x.double(), W, bias, k=2)
    with pytest.raises(CertifyError, match="column_tile = 0"):
        form.topk(x, W, bias, k=2, column_tile=0)
    with pytest.raises(CertifyError, match="impl = 'fast'"):
        ops.topk_encode(x, W, bias, k=2, impl="fast")  # type: ignore[arg-type]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_small_float16_weights_count_where_denormals_are_flushed(form):
    """Subnormal float16 numbers are ordinary in float32 and must not be taken for zero."""
    x, W, bias, _, _, pool = oracle.random_encoder(9, 6, 45, 131)
    for size in (1e-6, 0.02):
        W16 = (size * W).half()
        assert ((W16.abs() < 2.0**-14) & (W16 != 0)).any()
        bits = ops.pool_bits(pool)
        wanted = form.topk(x, W16, size * bias, k=9, pool_bits=bits)
        every = form.threshold(x, W16, size * bias)
        torch.set_flush_denormal(True)
        try:
            got = form.topk(x, W16, size * bias, k=9, pool_bits=bits)
            got_every = form.threshold(x, W16, size * bias)
        finally:
            torch.set_flush_denormal(False)
        oracle.assert_same(got[0], wanted[0])
        oracle.assert_same(got[1], wanted[1])
        oracle.assert_same(got_every, every)


_DIGEST = """
import hashlib, sys, torch
sys.path.insert(0, sys.argv[1])
import ops_oracle as oracle
from saelens_certify import ops
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    x, W, bias, scale, theta, pool = oracle.random_encoder(8, 40, 77, 700, dtype)
    codes = []
    for form in oracle.FORMS[1:]:
        codes += form.topk(x, W, bias, k=9, scale=scale, pool_bits=ops.pool_bits(pool))
        codes.append(form.threshold(x, W, bias, theta=theta))
    every = ops.threshold_encode(x, W, bias, theta=theta)
    x_hat, stats = ops.decode(every, W, bias[:77], x)
    logits = (8 * torch.randn(9, 4999, generator=torch.Generator().manual_seed(1))).to(dtype)
    targets = torch.arange(9)
    tokens = ops.token_stats(logits, targets, 0.1)
    pair = ops.pair_stats(logits, logits.flip(0), targets, 0.1)
    cap = ops.pair_stats(logits, logits.flip(0), targets, 0.1, softcap=11.0)
    orders = torch.rand(3, 700, generator=torch.Generator().manual_seed(2)).argsort(1)
    for part in (*codes, tokens, pair, cap):
        for value in vars(part).values():
            digest.update(value.numpy().tobytes())
    digest.update(x_hat.numpy().tobytes() + stats.numpy().tobytes())
    digest.update(ops.decode_permuted(every, W, orders).numpy().tobytes())
    digest.update(ops.decode_permuted_stats(every, W, orders, x).numpy().tobytes())
print(digest.hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits():
    folder = os.path.dirname(oracle.__file__)
    digests = set()
    for isa in ("scalar", "avx2", "avx512"):
        run = subprocess.run(
            [sys.executable, "-c", _DIGEST, folder],
            env={**os.environ, "SAELENS_CERTIFY_ISA": isa},
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(run.stdout)
    assert len(digests) == 1

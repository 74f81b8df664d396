"""Pools and decoders: emulated (or real) CUDA against the CPU operators and exact definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import ops_oracle as oracle

from saelens_certify import ops

CPU = torch.ops.saelens_certify
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_codes(seed: int, tokens: int, slots: int, d_sae: int) -> ops.SparseCodes:
    """Codes with 0 to all slots in use and values of both signs."""
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, slots + 1, (tokens,), generator=g, dtype=torch.int32)
    used = torch.arange(slots) < counts.unsqueeze(1)
    indices = torch.randint(0, max(d_sae, 1), (tokens, slots), generator=g).int()
    values = torch.randn(tokens, slots, generator=g)
    return ops.SparseCodes(torch.where(used, values, 0.0), torch.where(used, indices, -1), counts)


def parts(codes: ops.SparseCodes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return codes.values, codes.indices, codes.counts


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit by bit, -0.0 and 0.0 apart."""
    a, b = a.cpu(), b.cpu()
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    whole = {torch.float32: torch.int32, torch.float64: torch.int64}.get(a.dtype, a.dtype)
    return torch.equal(a.view(whole), b.view(whole))


# --- pools -----------------------------------------------------------------------------------


def check_pool(backend, codes, pool):
    bits = ops.pool_bits(pool)
    listed = oracle.rows(codes)
    values, indices, bits_there = backend.to(codes.values, codes.indices, bits)
    inside = [part.cpu() for part in backend.ops.restrict(values, indices, bits_there)]
    for got, wanted in zip(inside, CPU.restrict(codes.values, codes.indices, bits), strict=True):
        assert same(got, wanted)
    wanted_rows = [[(j, v) for j, v in row if pool[j]] for row in listed]
    assert oracle.rows(ops.SparseCodes(*inside)) == wanted_rows
    outside = backend.ops.count_outside(indices, bits_there)
    assert same(outside, CPU.count_outside(codes.indices, bits))
    assert outside.tolist() == [sum(not pool[j] for j, _ in row) for row in listed]
    start = torch.arange(len(pool)) * (1 << 40)
    (totals,) = backend.to(start.clone())
    backend.ops.pool_count_(totals, indices)
    ours = start.clone()
    CPU.pool_count_(ours, codes.indices)
    assert same(totals, ours)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(0, 9),
    slots=st.integers(0, 70),
    d_sae=st.integers(1, 100),
)
def test_pools(backend, seed, tokens, slots, d_sae):
    pool = torch.rand(d_sae, generator=torch.Generator().manual_seed(seed)) < 0.5
    check_pool(backend, random_codes(seed, tokens, slots, d_sae), pool)


@pytest.mark.parametrize("fill", [False, True])
def test_empty_and_full_pool(backend, fill):
    check_pool(backend, random_codes(3, 50, 64, 1000), torch.full((1000,), fill))


def test_pool_counts_meet_in_one_feature(backend):
    # Every slot of every row: as many atomics on one address as there can be.
    indices = torch.full((300, 40), 7, dtype=torch.int32)
    totals, indices = backend.to(torch.zeros(8, dtype=torch.int64), indices)
    backend.ops.pool_count_(totals, indices)
    assert totals.tolist() == [0] * 7 + [12000]


def test_indices_outside_touch_nothing(backend):
    # The Python faces refuse them; the kernels themselves must stay inside their tensors.
    indices = torch.tensor([[5, -1, 64, -7, 2**31 - 1, 3, -(2**31)]], dtype=torch.int32)
    values = torch.arange(7.0).unsqueeze(0)
    bits = torch.full((2,), -1, dtype=torch.int32)
    there = backend.to(values, indices, bits)
    kept, names, counts = backend.ops.restrict(*there)
    assert counts.tolist() == [2]
    assert names[0, :2].tolist() == [5, 3]
    assert kept[0, :2].tolist() == [0.0, 5.0]
    assert backend.ops.count_outside(*there[1:]).tolist() == [2]
    (totals,) = backend.to(torch.zeros(4, dtype=torch.int64))
    backend.ops.pool_count_(totals, there[1])
    assert totals.tolist() == [0, 0, 0, 1]
    weight, count = backend.to(torch.ones(64, 8), torch.full((1,), 99, dtype=torch.int32))
    x_hat = backend.ops.decode(there[0], there[1], count, weight, None)
    assert x_hat.tolist() == [[5.0] * 8]
    nothing = backend.ops.decode(there[0], there[1], count, weight[:0], None)
    assert nothing.tolist() == [[0.0] * 8]
    permutations = torch.full((1, 64), -3, dtype=torch.int32, device=backend.device)
    x_hat = backend.ops.decode_permuted(there[0], there[1], count, weight, None, permutations)
    assert x_hat.tolist() == [[[0.0] * 8]]


# --- decoders ---------------------------------------------------------------------------------


def check_decode(backend, codes, W, b, target):
    there = backend.to(*parts(codes), W, b)
    x_hat = backend.ops.decode(*there)
    wanted, wanted_stats = CPU.decode_stats(*parts(codes), W, b, target)
    assert same(x_hat, wanted)
    (goal,) = backend.to(target)
    x_hat, stats = backend.ops.decode_stats(*there, goal)
    assert same(x_hat, wanted)
    assert same(stats, wanted_stats)
    return wanted, wanted_stats


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d_out", [1, 7, 32, 40])
def test_decode_equals_exact_chain(backend, dtype, d_out):
    codes = random_codes(d_out, 4, 11, 40)
    g = torch.Generator().manual_seed(2)
    W, b = torch.randn(40, d_out, generator=g).to(dtype), torch.randn(d_out, generator=g)
    target = torch.randn(4, d_out, generator=g)
    x_hat, stats = check_decode(backend, codes, W, b, target)
    for t, pairs in enumerate(oracle.rows(codes)):
        assert x_hat[t].tolist() == oracle.decode_row(pairs, W, b).tolist()
        x, y = target[t].double().numpy(), x_hat[t].double().numpy()
        terms = ((x - y) * (x - y), x * x, y * y, x * y, x)
        assert stats[t].tolist() == [oracle.lane_sum(term) for term in terms]


# Widths below, at and above one tile of 1024 (float32) or 2048 (16 bits) columns, vectors or not.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d_out", [64, 100, 768, 1030, 2055, 4104, 6144])
def test_decode_widths(backend, dtype, d_out):
    codes = random_codes(d_out, 3, 20, 60)
    g = torch.Generator().manual_seed(d_out)
    W, b = torch.randn(60, d_out, generator=g).to(dtype), torch.randn(d_out, generator=g)
    check_decode(backend, codes, W, b, torch.randn(3, d_out, generator=g))
    check_decode(backend, codes, W, None, torch.randn(3, d_out, generator=g))


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_from_unaligned_addresses(backend, dtype):
    codes = random_codes(8, 5, 9, 30)
    g = torch.Generator().manual_seed(8)
    flat = torch.randn(30 * 96 + 1, generator=g).to(dtype)
    W = backend.to(flat)[0][1:].view(30, 96)
    b = backend.to(torch.randn(97, generator=g))[0][1:]
    target = backend.to(torch.randn(5 * 96 + 1, generator=g))[0][1:].view(5, 96)
    x_hat, stats = backend.ops.decode_stats(*backend.to(*parts(codes)), W, b, target)
    wanted = CPU.decode_stats(*parts(codes), W.cpu(), b.cpu(), target.cpu())
    assert same(x_hat, wanted[0])
    assert same(stats, wanted[1])


def test_decode_more_slots_than_fit_into_shared_memory(backend):
    codes = random_codes(5, 3, 700, 90)
    codes.counts[1] = 700
    codes.indices[1] = torch.arange(700).int() % 90
    g = torch.Generator().manual_seed(5)
    for d_out in (24, 1100):
        W, target = torch.randn(90, d_out, generator=g), torch.randn(3, d_out, generator=g)
        check_decode(backend, codes, W, None, target)


@pytest.mark.parametrize(("tokens", "slots", "d_out"), [(0, 3, 5), (4, 0, 8), (3, 2, 0), (0, 0, 0)])
def test_decode_edges(backend, tokens, slots, d_out):
    codes = random_codes(1, tokens, slots, 9)
    b, target = torch.arange(float(d_out)), torch.ones(tokens, d_out)
    check_decode(backend, codes, torch.ones(9, d_out), b, target)
    for repeats in (0, 2):
        check_permuted(backend, codes, torch.ones(9, d_out), b, target, repeats)


def check_permuted(backend, codes, W, b, target, repeats):
    g = torch.Generator().manual_seed(repeats)
    d_sae = W.shape[0]
    rows = [torch.randperm(d_sae, generator=g).int() for _ in range(repeats)]
    permutations = torch.stack(rows) if rows else torch.empty(0, d_sae, dtype=torch.int32)
    there = backend.to(*parts(codes), W, b, permutations)
    x_hat = backend.ops.decode_permuted(*there)
    stats = backend.ops.decode_permuted_stats(*there, *backend.to(target))
    assert x_hat.shape == (repeats, *target.shape)
    assert stats.shape == (repeats, target.shape[0], 5)
    assert same(x_hat, CPU.decode_permuted(*parts(codes), W, b, permutations))
    assert same(stats, CPU.decode_permuted_stats(*parts(codes), W, b, permutations, target))
    for r, permutation in enumerate(permutations):
        mapped = codes.map_indices(permutation)
        wanted, wanted_stats = CPU.decode_stats(*parts(mapped), W, b, target)
        assert same(x_hat[r], wanted)
        assert same(stats[r], wanted_stats)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d_out", [1, 63, 768, 1100])
def test_permuted_decoding_equals_decoding_of_renamed_codes(backend, dtype, d_out):
    g = torch.Generator().manual_seed(d_out)
    W, b = torch.randn(50, d_out, generator=g).to(dtype), torch.randn(d_out, generator=g)
    check_permuted(backend, random_codes(1, 4, 13, 50), W, b, torch.randn(4, d_out, generator=g), 3)
    check_permuted(backend, random_codes(2, 1, 5, 50), W, None, torch.randn(1, d_out), 5)


def test_decode_more_than_2_to_the_31_weights(backend):
    # Only the rows that codes name are ever touched: the rest takes no memory.
    W = torch.empty((1 << 21) + 2, 1024, dtype=torch.bfloat16, device=backend.device)
    few = torch.randn(2, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    W[1 << 21 :] = few.to(backend.device)
    codes = ops.SparseCodes(
        torch.tensor([[2.0, -3.0]]),
        torch.tensor([[0, 1]], dtype=torch.int32),
        torch.tensor([2], dtype=torch.int32),
    )
    far = backend.to(codes.values, codes.indices + (1 << 21), codes.counts)
    x_hat = backend.ops.decode(*far, W, None)
    assert same(x_hat, CPU.decode(*parts(codes), few, None))


def test_results_do_not_depend_on_the_order_of_threads(backend, monkeypatch):
    codes = random_codes(6, 4, 20, 80)
    g = torch.Generator().manual_seed(6)
    W, target = torch.randn(80, 260, generator=g), torch.randn(4, 260, generator=g)
    for seed in range(4):
        monkeypatch.setenv("SAELENS_CERTIFY_SHIM_SEED", str(seed))
        check_decode(backend, codes, W, None, target)
        check_pool(backend, codes, torch.arange(80) % 3 == 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d_out", [1024, 1023])
def test_every_16_bit_number_is_read_right(backend, dtype, d_out):
    rows = -(-65536 // d_out)
    W = (torch.arange(rows * d_out) % 65536 - 32768).to(torch.int16).view(dtype).view(rows, d_out)
    indices = torch.arange(rows, dtype=torch.int32).unsqueeze(1)
    count = torch.ones(rows, dtype=torch.int32)
    there = backend.to(torch.ones(rows, 1), indices, count, W)
    got, wanted = backend.ops.decode(*there, None).cpu(), W.float()
    # Zero plus -0.0 is 0.0.
    assert torch.equal(got.isnan(), wanted.isnan())
    assert same(got.nan_to_num(7.0), wanted.nan_to_num(7.0) + 0.0)


def test_decode_of_infinite_and_tiny_numbers(backend):
    codes = ops.SparseCodes(
        torch.tensor([[3e38, 3e38, 1e-40, -1e-45, 1.0, 2.0]]),
        torch.tensor([[0, 0, 1, 2, 3, 4]], dtype=torch.int32),
        torch.tensor([6], dtype=torch.int32),
    )
    W = torch.ones(5, 36)
    W[:, ::3] = 1e-38
    W[1:, 1::3] = 1e-5
    W[3, 5], W[4, 5] = torch.inf, -torch.inf
    W[3, 7] = torch.nan
    there = backend.to(*parts(codes), W)
    got, wanted = backend.ops.decode(*there, None).cpu(), CPU.decode(*parts(codes), W, None)
    assert torch.equal(got.isnan(), wanted.isnan())
    assert same(got.nan_to_num(7.0), wanted.nan_to_num(7.0))


def test_arguments_are_checked(backend):
    codes, W = random_codes(1, 3, 4, 9), torch.ones(9, 6)
    there = backend.to(*parts(codes))
    W, b = backend.to(W, torch.ones(6))
    for wrong, message in (
        ((W.double(), b), "weight has type"),
        ((W[:, :5], b), "weight must be contiguous"),
        ((W, b[:5].clone()), "bias has size"),
        ((W, b.half()), "bias has type"),
        ((W.unsqueeze(0), b), "dimensions"),
    ):
        with pytest.raises(RuntimeError, match=message):
            backend.ops.decode(*there, *wrong)
    with pytest.raises(RuntimeError, match="counts has size"):
        backend.ops.decode(there[0], there[1], there[2][:2].clone(), W, b)
    with pytest.raises(RuntimeError, match="target has size"):
        backend.ops.decode_stats(*there, W, b, W[:3, :5].contiguous())
    with pytest.raises(RuntimeError, match="permutations has size"):
        backend.ops.decode_permuted(*there, W, b, there[1])
    with pytest.raises(RuntimeError, match="pool_bits has type"):
        backend.ops.count_outside(there[1], there[0][0].contiguous())
    with pytest.raises(RuntimeError, match="values has size"):
        backend.ops.restrict(there[0][:2].contiguous(), there[1], there[2])


@pytest.mark.parametrize("name", ["restrict", "count_outside", "pool_count_", "decode_stats"])
def test_registration(backend, name):
    codes = random_codes(1, 3, 4, 32)
    values, indices, counts = backend.to(*parts(codes))
    bits, totals, W = backend.to(
        torch.ones(1, dtype=torch.int32), torch.zeros(32, dtype=torch.int64), torch.ones(32, 6)
    )
    arguments = {
        "restrict": (values, indices, bits),
        "count_outside": (indices, bits),
        "pool_count_": (totals, indices),
        "decode_stats": (values, indices, counts, W, None, W[:3].contiguous()),
    }[name]
    torch.library.opcheck(getattr(backend.ops, name).default, arguments)

"""CUDA encoders: bit by bit what the oracle and the independent CPU operators say."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops import ops_oracle as oracle
from torch import Tensor

from saelens_certify import ops
from saelens_certify.ops import margin

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCREENS = [None, torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Case:
    """Inputs of an encoder."""

    x: Tensor
    W: Tensor
    bias: Tensor
    scale: Tensor | None = None
    theta: Tensor | None = None
    gate_bias: Tensor | None = None
    pool: Tensor | None = None

    @property
    def pool_bits(self) -> Tensor | None:
        return None if self.pool is None else ops.pool_bits(self.pool)

    def oracle(self, row: int) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
        """All active (feature, score) of a row, features ascending; those of the pool."""
        scores = oracle.scores(self.x[row], self.W, self.bias, self.scale)
        active = oracle.active(scores, self.theta)
        if self.gate_bias is not None:
            gates = oracle.scores(self.x[row], self.W, self.gate_bias)
            active = [j for j in active if gates[j] > 0]
        pairs = [(j, float(scores[j])) for j in active]
        return pairs, [p for p in pairs if self.pool is not None and self.pool[p[0]]]


def best(pairs: list[tuple[int, float]], k: int) -> list[tuple[int, float]]:
    return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:k]


def screen_of(W: Tensor, dtype: torch.dtype | None) -> tuple[Tensor | None, Tensor | None]:
    if dtype is None:
        return None, None
    rounded = W.to(dtype)
    return rounded, margin.rounded_up((W.double() - rounded.double()).square().sum(1).sqrt())


def arguments(backend, case: Case, dtype: torch.dtype | None) -> list[Tensor | None]:
    return backend.to(
        case.x,
        case.W,
        case.bias,
        case.scale,
        case.theta,
        case.gate_bias,
        margin.weight_norms(case.W),
        *screen_of(case.W, dtype),
    )


def gemm_error(backend, case: Case, dtype: torch.dtype | None) -> float:
    return margin.gemm_error(case.x.shape[1], backend.device, dtype or torch.float32)


def topk(
    backend, case: Case, k: int, dtype: torch.dtype | None = None, rows: int = 0, columns: int = 0
) -> tuple[ops.SparseCodes, ops.SparseCodes | None]:
    parts = backend.ops.topk_encode(
        *arguments(backend, case, dtype),
        *backend.to(case.pool_bits),
        k,
        gemm_error(backend, case, dtype),
        rows,
        columns,
    )
    parts = [part.cpu() for part in parts]
    return ops.SparseCodes(*parts[:3]), None if case.pool is None else ops.SparseCodes(*parts[3:])


def threshold(
    backend,
    case: Case,
    capacity: int,
    dtype: torch.dtype | None = None,
    rows: int = 0,
    columns: int = 0,
) -> ops.SparseCodes:
    parts = backend.ops.threshold_encode(
        *arguments(backend, case, dtype), capacity, gemm_error(backend, case, dtype), rows, columns
    )
    return ops.SparseCodes(*(part.cpu() for part in parts))


def on_cpu(case: Case, k: int) -> tuple[ops.SparseCodes, ops.SparseCodes | None]:
    return ops.topk_encode(
        case.x,
        case.W,
        case.bias,
        k=k,
        scale=case.scale,
        theta=case.theta,
        gate_bias=case.gate_bias,
        pool_bits=case.pool_bits,
        impl="native",
    )


def all_on_cpu(case: Case) -> ops.SparseCodes:
    return ops.threshold_encode(
        case.x,
        case.W,
        case.bias,
        scale=case.scale,
        theta=case.theta,
        gate_bias=case.gate_bias,
        impl="native",
    )


def same_bits(a: ops.SparseCodes | None, b: ops.SparseCodes | None) -> None:
    oracle.assert_same(a, b)
    if a is not None and b is not None:
        # Zeros of both signs are equal, but not the same bits.
        assert torch.equal(a.values.view(torch.int32), b.values.view(torch.int32))


def random_case(
    seed: int, tokens: int, d_in: int, d_sae: int, dtype=torch.float32, extras: str = "all"
) -> Case:
    x, W, bias, scale, theta, pool = oracle.random_encoder(seed, tokens, d_in, d_sae, dtype)
    gate = 0.3 * torch.randn(d_sae, generator=torch.Generator().manual_seed(seed + 1))
    return Case(
        x,
        W,
        bias,
        scale if extras in ("all", "scale") else None,
        theta if extras in ("all", "theta") else None,
        gate if extras in ("all", "gate") else None,
        pool,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("extras", ["", "scale", "theta", "gate", "all"])
def test_encoders_equal_oracle_bit_by_bit(backend, dtype, screen, extras):
    case = random_case(1, 5, 45, 131, dtype, extras)
    top, pooled = topk(backend, case, 5, screen)
    alone, none = topk(backend, replace(case, pool=None), 5, screen)
    every = threshold(backend, case, 100, screen)
    assert pooled is not None
    assert none is None
    same_bits(alone, top)
    for t in range(5):
        active, members = case.oracle(t)
        assert oracle.rows(top)[t] == best(active, 5)
        assert oracle.rows(pooled)[t] == best(members, 5)
        assert oracle.rows(every)[t] == active


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(0, 4),
    d_in=st.integers(0, 70),
    d_sae=st.integers(1, 90),
    k=st.integers(1, 90),
    levels=st.sampled_from([1, 2, 1000]),
    rows=st.integers(0, 3),
    tile=st.integers(0, 90),
    screen=st.sampled_from(SCREENS),
    gated=st.booleans(),
    capacity=st.integers(0, 90),
)
def test_ties_and_odd_shapes(
    backend, seed, tokens, d_in, d_sae, k, levels, rows, tile, screen, gated, capacity
):
    g = torch.Generator().manual_seed(seed)

    # Few distinct values make many exact ties.
    def draw(*shape: int) -> Tensor:
        return torch.randint(-levels, levels + 1, shape, generator=g).float()

    case = Case(
        draw(tokens, d_in),
        draw(d_sae, d_in),
        draw(d_sae),
        gate_bias=draw(d_sae) if gated else None,
        pool=torch.randint(0, 2, (d_sae,), generator=g).bool(),
    )
    k = min(k, d_sae)
    top, pooled = topk(backend, case, k, screen, rows, tile)
    every = threshold(backend, case, capacity, screen, rows, tile)
    assert pooled is not None
    assert top.slots == pooled.slots == k
    assert every.values.shape == (tokens, capacity)
    for t in range(tokens):
        active, members = case.oracle(t)
        assert oracle.rows(top)[t] == best(active, k)
        assert oracle.rows(pooled)[t] == best(members, k)
        assert every.counts[t] == len(active)
        found = min(capacity, len(active))
        assert every.indices[t].tolist() == [j for j, _ in active[:found]] + [-1] * (
            capacity - found
        )
        assert every.values[t].tolist() == [s for _, s in active[:found]] + [0.0] * (
            capacity - found
        )


@pytest.mark.parametrize(("seed", "screen"), list(zip("012", SCREENS, strict=True)))
def test_result_does_not_depend_on_how_it_is_computed(backend, monkeypatch, screen, seed):
    monkeypatch.setenv("SAELENS_CERTIFY_SHIM_SEED", seed)
    case = random_case(2, 6, 72, 2101)
    case = replace(case, theta=None, gate_bias=None)
    wanted, wanted_pool = on_cpu(case, 20)
    every = all_on_cpu(case)
    for rows, columns in ((0, 0), (5, 512), (1, 1000)):
        top, pooled = topk(backend, case, 20, screen, rows, columns)
        same_bits(top, wanted)
        same_bits(pooled, wanted_pool)
        same_bits(threshold(backend, case, every.slots, screen, rows, columns), every)


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("size", [30.0, 3e4, 1e-30])
def test_rows_with_outlier_dimensions(backend, screen, size):
    case = random_case(3, 20, 100, 700)
    x = case.x.clone()
    # Large in every row, with a sign of its own in each; one row with a spike somewhere else.
    x[:, [3, 40, 77]] *= size
    x[7, 11] = 1e4 * size
    x[8] = 0
    x[9] *= 2.0**-120
    case = replace(case, x=x, theta=None)
    wanted, wanted_pool = on_cpu(case, 15)
    top, pooled = topk(backend, case, 15, screen)
    same_bits(top, wanted)
    same_bits(pooled, wanted_pool)
    every = all_on_cpu(case)
    same_bits(threshold(backend, case, every.slots, screen), every)


@pytest.mark.parametrize("screen", SCREENS[1:])
def test_outlier_dimensions_that_some_chunks_do_not_have(backend, screen):
    case = random_case(3, 40, 100, 700)
    x = case.x.clone()
    x[:30, 3] *= 1e4
    x[20:, [40, 77]] *= 1e4
    x[4:8, 5] *= 1e8
    case = replace(case, x=x, theta=None)
    wanted, wanted_pool = on_cpu(case, 15)
    every = all_on_cpu(case)
    for rows in (0, 4, 13):
        top, pooled = topk(backend, case, 15, screen, rows)
        same_bits(top, wanted)
        same_bits(pooled, wanted_pool)
        same_bits(threshold(backend, case, every.slots, screen, rows), every)


def adversaries(m: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Rows and weights that fill candidate buffers beyond what bounds can sort out."""
    flat = torch.full((m, 8), 0.37)
    slope = (torch.arange(m) / m).unsqueeze(1)
    rising = flat * (1 + slope)
    # Differences far below the screening margin: only exact scores can order these.
    near = torch.full((m, 32), 1.0)
    near[:, 0] += torch.arange(m) * 2.0**-23
    order = torch.randperm(m, generator=torch.Generator().manual_seed(0))
    return {
        "flat": (torch.ones(2, 8), flat),
        "rising": (torch.ones(2, 8), rising),
        "falling": (torch.ones(2, 8), flat * (2 - slope)),
        "duplicated": (torch.ones(2, 8), torch.cat([rising[: m // 2], rising[: m // 2]])),
        "near": (torch.ones(2, 32), near.flip(0)),
        "near, rising": (torch.ones(2, 32), near),
        "near, in any order": (torch.ones(2, 32), near[order]),
    }


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("name", list(adversaries(2)))
def test_buffers_that_overflow(backend, screen, name):
    m = 1400
    x, W = adversaries(m)[name]
    case = Case(x, W, torch.zeros(m), pool=torch.arange(m) >= 1000)
    top, pooled = topk(backend, case, 9, screen)
    assert pooled is not None
    active, members = case.oracle(0)
    assert len(active) == m
    for t in range(2):
        assert oracle.rows(top)[t] == best(active, 9)
        assert oracle.rows(pooled)[t] == best(members, 9)
    # More features than wait for scoring at a time, and more than there are slots.
    for capacity in (600, 1100):
        every = threshold(backend, case, capacity, screen)
        for t in range(2):
            assert every.counts[t] == m
            assert every.indices[t].tolist() == list(range(capacity))
            assert every.values[t].tolist() == [score for _, score in active[:capacity]]


def test_counts_beyond_the_capacity_are_exact(backend):
    # Scores within the margin of their thresholds, on both sides and equal to them.
    case = random_case(4, 2, 40, 1300, extras="")
    scores = torch.stack([torch.tensor(oracle.scores(x, case.W, case.bias)) for x in case.x])
    step = torch.arange(1300) % 3 - 1
    theta = scores[0] * (1 + step * 2.0**-23)
    case = replace(case, theta=theta)
    for screen in SCREENS:
        for capacity in (0, 7, 1300):
            every = threshold(backend, case, capacity, screen)
            for t in range(2):
                active, _ = case.oracle(t)
                assert every.counts[t] == len(active)
                assert oracle.rows(replace_counts(every, capacity))[t] == active[:capacity]


def replace_counts(codes: ops.SparseCodes, capacity: int) -> ops.SparseCodes:
    return ops.SparseCodes(codes.values, codes.indices, codes.counts.clamp(max=capacity))


@pytest.mark.parametrize(("k", "m"), [(300, 300), (1024, 2600), (1100, 1101)])
def test_large_k(backend, k, m):
    case = random_case(5, 2, 16, m, extras="")
    for screen in (None, torch.float16):
        top, pooled = topk(backend, case, k, screen)
        wanted, wanted_pool = on_cpu(case, k)
        same_bits(top, wanted)
        same_bits(pooled, wanted_pool)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_too_long_for_shared_memory(backend, dtype):
    case = random_case(11, 2, 4130, 60, dtype)
    for screen in SCREENS:
        top, pooled = topk(backend, case, 7, screen)
        wanted, wanted_pool = on_cpu(case, 7)
        same_bits(top, wanted)
        same_bits(pooled, wanted_pool)
        same_bits(threshold(backend, case, 60, screen).trimmed(), all_on_cpu(case))


def test_weights_beyond_2_to_the_31_elements(backend):
    # NumPy's zeros take no memory until they are written; only the last feature has a weight.
    d_in, d_sae = 1 << 16, (1 << 15) + 64
    W = torch.from_numpy(np.zeros((d_sae, d_in), np.float32))
    assert W.numel() > 2**31
    W[-1, -1] = 2
    x = torch.zeros(1, d_in)
    x[0, -1] = 1
    bias = torch.full((d_sae,), -1.0)
    x, W, bias, norms = backend.to(x, W, bias, W[:, -1].contiguous())
    parts = backend.ops.topk_encode(
        *(x, W, bias, None, None, None, norms, None, None, None, 3, 0.01, 0, 64)
    )
    codes = ops.SparseCodes(*(part.cpu() for part in parts[:3]))
    assert oracle.rows(codes) == [[(d_sae - 1, 1.0)]]


def test_edge_shapes(backend):
    case = random_case(6, 4, 33, 70)
    empty = replace(case, x=case.x[:0])
    top, pooled = topk(backend, empty, 3)
    assert pooled is not None
    assert top.values.shape == pooled.values.shape == (0, 3)
    assert threshold(backend, empty, 9).values.shape == (0, 9)
    silent = replace(case, bias=case.bias - 1e6, scale=None)
    assert not threshold(backend, silent, 5).counts.any()
    assert not topk(backend, silent, 3)[0].counts.any()
    for pool in (torch.zeros(70).bool(), torch.ones(70).bool()):
        top, pooled = topk(backend, replace(case, pool=pool), 3)
        assert pooled is not None
        if pool.any():
            same_bits(top, pooled)
        else:
            assert not pooled.counts.any()
    # Zeros of both signs tie, and keep their sign.
    zeros = Case(
        torch.zeros(1, 3),
        torch.ones(6, 3),
        torch.zeros(6),
        scale=torch.tensor([1.0, -1, 1, -1, 1, -1]),
        theta=torch.full((6,), -1.0),
    )
    same_bits(topk(backend, zeros, 4)[0], on_cpu(zeros, 4)[0])
    # Activity is strict: a score equal to its threshold is not active.
    unit = Case(torch.ones(1, 1), torch.ones(2, 1), torch.zeros(2), theta=torch.tensor([1.0, 0.5]))
    assert oracle.rows(threshold(backend, unit, 2)) == [[(1, 1.0)]]


@pytest.mark.parametrize("screen", SCREENS)
def test_vectors_at_any_address(backend, screen):
    case = random_case(7, 3, 37, 203)
    shifted = {}
    for name in ("bias", "scale", "theta", "gate_bias"):
        vector = getattr(case, name)
        # On the device from the start: moved there later, the numbers would be aligned again.
        shifted[name] = backend.to(torch.cat([torch.zeros(1), vector]))[0][1:]
        assert shifted[name].data_ptr() % 16 != 0
    for moved in (replace(case, **shifted), case):
        arguments_of = topk(backend, moved, 4, screen)
        same_bits(arguments_of[0], on_cpu(case, 4)[0])


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_unusable_rows_do_no_harm(backend, screen, bad):
    # The Python face refuses them; here the other rows must not notice.
    case = random_case(8, 9, 40, 500)
    x = case.x.clone()
    x[2, 3] = bad
    broken = replace(case, x=x)
    others = [t for t in range(9) if t != 2]
    for a, b in zip(topk(backend, broken, 6, screen), on_cpu(case, 6), strict=True):
        assert a is not None
        assert b is not None
        same_bits(
            ops.SparseCodes(a.values[others], a.indices[others], a.counts[others]),
            ops.SparseCodes(b.values[others], b.indices[others], b.counts[others]),
        )
    assert threshold(backend, broken, 50, screen).counts.shape == (9,)


def test_wrong_arguments_are_named(backend):
    case = random_case(9, 2, 8, 40)
    with pytest.raises(RuntimeError, match="weight has size 8 in dimension 1, expected 7"):
        topk(backend, replace(case, x=case.x[:, :7].contiguous()), 2)
    with pytest.raises(RuntimeError, match="k = 41 must lie between 1 and 40"):
        topk(backend, case, 41)
    with pytest.raises(RuntimeError, match="gate_bias has size 39"):
        topk(backend, replace(case, gate_bias=torch.zeros(39)), 2)
    with pytest.raises(RuntimeError, match="x must be contiguous"):
        topk(backend, replace(case, x=torch.zeros(8, 2).t()), 2)
    with pytest.raises(RuntimeError, match="capacity = -1 must not be negative"):
        threshold(backend, case, -1)
    args = arguments(backend, case, torch.float16)
    with pytest.raises(RuntimeError, match="screen_weight and screen_error must be given together"):
        backend.ops.threshold_encode(*args[:8], None, 5, 1e-3, 0, 0)
    with pytest.raises(RuntimeError, match="screen_weight has type Float"):
        backend.ops.threshold_encode(*args[:7], args[1], args[8], 5, 1e-3, 0, 0)


def test_float16_screening_leaves_few_candidates():
    """How many features the margin of the operators cannot rule out, on Gaussian data."""
    x, W, _, _, _, _ = oracle.random_encoder(10, 64, 768, 8192)
    k = 32
    error = screen_of(W, torch.float16)[1]
    assert error is not None
    scale = torch.exp2(x.abs().amax(1, keepdim=True).log2().floor())
    rounded = (x / scale).half().float() * scale
    lost = (x - rounded).double().norm(dim=1, keepdim=True)
    length = rounded.double().norm(dim=1, keepdim=True)
    gemm = margin.gemm_error(768, torch.device("cpu"), torch.float16)
    norms = margin.weight_norms(W).double()
    outer = margin.OUTER_ROUNDINGS * x.double().norm(dim=1, keepdim=True)
    slack = (lost + gemm * length + outer) * norms + (1 + gemm) * length * error.double()
    screened = rounded @ W.half().float().t()
    floor = (screened - slack).topk(k).values[:, -1:]
    candidates = (screened + slack >= floor).sum(1).float()
    exact = x.double() @ W.double().t()
    assert bool(((screened - exact).abs() <= slack).all())
    assert candidates.mean() < 1.5 * k

"""Screening in 16 bits: its bounds hold, and codes do not depend on it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import ops_oracle as oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelens_certify import ops
from saelens_certify.errors import CertifyError
from saelens_certify.ops import screen as screening
from saelens_certify.ops.margin import gemm_error

FORMS = oracle.FORMS
CPU = torch.device("cpu")
KINDS = ["random", "aligned", "cancelling", "midpoints", "outliers", "tiny", "huge"]


def activations(kind: str, tokens: int, d_in: int, d_sae: int):
    """Rows and weights that are hard on 16 bits, each in its way."""
    x, W, bias, _, _, pool = oracle.random_encoder(11, tokens, d_in, d_sae)
    if kind == "aligned":
        x, W = x.abs() + 1 / 3, W.abs() + 1 / 3
    elif kind == "cancelling":
        half = d_in // 2
        W[:, half : 2 * half] = -W[:, :half]
        x[:, half : 2 * half] = x[:, :half] * (1 + 2.0**-7)
    elif kind == "midpoints":
        # Half way between two bfloat16 numbers everywhere: errors are as large as they can be, and
        # of one sign in x.
        x = torch.full_like(x, 1 + 2.0**-8) * (1 + torch.arange(tokens).unsqueeze(1))
        W = W.sign() * (1 + 2.0**-8)
    elif kind == "outliers":
        x[:, [0, d_in // 2, d_in - 1]] *= 3000
    elif kind == "tiny":
        x, W, bias = x * 1e-30, W * 1e-8, bias * 1e-39
    elif kind == "huge":
        x, W, bias = x * 1e20, W * 1e12, bias * 1e30
    return x, W, bias, ops.pool_bits(pool)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_products_keep_their_bound(kind):
    x, W, _, _ = activations(kind, 64, 500, 300)
    screen = ops.prepare_screen(W, "bfloat16")
    assert screen.weight is not None
    assert screen.error is not None
    lost = (W.double() - screen.weight.double()).square().sum(1).sqrt()
    assert (screen.error.double() >= lost).all()
    assert (screen.error.double() <= lost * (1 + 1e-6) + 1e-44).all()
    narrow = x.bfloat16()
    product = (narrow @ screen.weight.T).double()
    exact = narrow.double() @ screen.weight.double().T
    lengths = narrow.double().norm(dim=1, keepdim=True) * screen.weight.double().norm(dim=1)
    bound = gemm_error(500, CPU, torch.bfloat16) * lengths + product.abs() * 2.0**-8 + 1e-36
    assert ((product - exact).abs() <= bound).all()


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_hard_rows_give_the_same_codes(form, kind):
    x, W, bias, bits = activations(kind, 40, 300, 900)
    shared: dict[str, Any] = {"k": 12, "pool_bits": bits}
    wanted = ops.topk_encode(x, W, bias, impl="torch", **shared)
    every = ops.threshold_encode(x, W, bias, impl="torch")
    for chunk in (None, 7):
        got = form.topk(x, W, bias, row_chunk=chunk, column_tile=chunk and 130, **shared)
        oracle.assert_same(got[0], wanted[0])
        oracle.assert_same(got[1], wanted[1])
        oracle.assert_same(form.threshold(x, W, bias, row_chunk=chunk), every)
    row = oracle.scores(x[3], W, bias)
    assert oracle.rows(wanted[0])[3] == oracle.top_k(row, 12)


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 5),
    d_in=st.integers(1, 70),
    d_sae=st.integers(1, 90),
    k=st.integers(1, 100),
    outliers=st.integers(0, 9),
    gated=st.booleans(),
    scaled=st.booleans(),
    tile=st.integers(1, 90),
)
def test_screened_codes_equal_the_oracle(
    seed, tokens, d_in, d_sae, k, outliers, gated, scaled, tile
):
    g = torch.Generator().manual_seed(seed)
    x, W, bias, scale, theta, pool = oracle.random_encoder(seed, tokens, d_in, d_sae)
    x[:, torch.randperm(d_in, generator=g)[:outliers]] *= 500
    gate = torch.randn(d_sae, generator=g) if gated else None
    extra: dict[str, Any] = {"gate_bias": gate}
    if scaled:
        extra |= {"scale": scale, "theta": theta}
    for form in FORMS:
        top, pooled = form.topk(
            x, W, bias, k=k, pool_bits=ops.pool_bits(pool), column_tile=tile, **extra
        )
        every = form.threshold(x, W, bias, column_tile=tile, **extra)
        assert pooled is not None
        for t in range(tokens):
            row = oracle.scores(x[t], W, bias, scale if scaled else None)
            if gate is not None:
                row = oracle.gated(row, oracle.scores(x[t], W, gate))
            limit = theta if scaled else None
            assert oracle.rows(top)[t] == oracle.top_k(row, k, limit)
            assert oracle.rows(pooled)[t] == oracle.top_k(row, k, limit, pool)
            wanted = [(j, float(row[j])) for j in oracle.active(row, limit)]
            assert oracle.rows(every)[t] == wanted


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_large_first_tile_finds_its_floor(form):
    # 4096 columns in one tile: the floor comes from groups of columns, for k small and large.
    x, W, bias, scale, _, pool = oracle.random_encoder(12, 9, 24, 4100)
    few = torch.zeros(4100, dtype=torch.bool)
    few[[5, 4097]] = True
    for k in (1, 40, 700, 4100):
        for members in (pool, few):
            bits = ops.pool_bits(members)
            got = form.topk(x, W, bias, k=k, scale=scale, pool_bits=bits)
            wanted = ops.topk_encode(
                x, W, bias, k=k, scale=scale, pool_bits=bits, impl="torch", column_tile=50
            )
            oracle.assert_same(got[0], wanted[0])
            oracle.assert_same(got[1], wanted[1])


@pytest.mark.parametrize(
    ("d_in", "d_sae", "k", "fewest", "most"), [(768, 24576, 32, 55, 70), (576, 8192, 64, 95, 115)]
)
def test_how_many_features_lie_inside_the_bound(d_in, d_sae, k, fewest, most):
    """The number that docs/kernels.md gives for Gaussian rows and weights."""
    g = torch.Generator().manual_seed(0)
    x, W = (torch.randn(rows, d_in, generator=g) for rows in (48, d_sae))
    screen = ops.prepare_screen(W, "bfloat16")
    assert screen.weight is not None
    assert screen.error is not None
    narrow = x.bfloat16()
    lost = (x.double() - narrow.double()).norm(dim=1, keepdim=True)
    length = narrow.double().norm(dim=1, keepdim=True)
    product = (narrow.float() @ screen.weight.float().T).double()
    g16 = gemm_error(d_in, CPU, torch.bfloat16)
    bound = (lost + g16 * length) * screen.norms.double() + (1 + g16) * length * screen.error
    bound += product.abs() * 2.0**-8
    assert ((product - x.double() @ W.double().T).abs() <= bound).all()
    floor = (product - bound).topk(k).values[:, -1:]
    inside = (product + bound >= floor).sum(1).double().mean()
    assert fewest < inside < most


def test_weights_already_in_16_bits_lose_nothing():
    _, W, _, _, _, _ = oracle.random_encoder(13, 1, 30, 20, torch.bfloat16)
    screen = ops.prepare_screen(W, "bfloat16")
    assert screen.weight is not None
    assert screen.error is not None
    assert screen.weight.data_ptr() == W.data_ptr()
    assert not screen.error.any()


def test_automatic_precision_follows_the_machine(monkeypatch):
    _, W, _, _, _, _ = oracle.random_encoder(14, 1, 30, 20)
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(screening, "native_bfloat16", lambda native=native: native)
        assert ops.prepare_screen(W).precision == dtype
    assert ops.prepare_screen(W, "float32").weight is None


def test_unusable_screens_are_named():
    x, W, bias, _, _, _ = oracle.random_encoder(15, 3, 30, 20)
    with pytest.raises(CertifyError, match="'float16' is for GPUs"):
        ops.prepare_screen(W, "float16")
    with pytest.raises(CertifyError, match="precision = 'int8' is unknown"):
        ops.prepare_screen(W, "int8")  # pyright: ignore[reportArgumentType]
    other = ops.prepare_screen(W[:19], "bfloat16")
    with pytest.raises(CertifyError, match=r"screen.norms has shape \[19\]"):
        ops.threshold_encode(x, W, bias, screen=other)
    with pytest.raises(CertifyError, match=r"screen.weight has shape \[19, 30\]"):
        ops.topk_encode(x, W, bias, k=2, screen=replace(other, norms=torch.ones(20)))
    gate = torch.zeros(20)
    gate[4] = float("nan")
    with pytest.raises(CertifyError, match="gate_bias holds .* feature 4"):
        ops.threshold_encode(x, W, bias, gate_bias=gate)
    with pytest.raises(CertifyError, match="mode = 'fast'"):
        ops.topk_encode(x, W, bias, k=2, mode="fast")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_screens_that_cannot_be_those_of_the_weights(form):
    x, W, bias, _, _, _ = oracle.random_encoder(16, 3, 30, 200)
    good = ops.prepare_screen(W, "bfloat16")
    half, error = good.weight, good.error
    assert half is not None
    assert error is not None
    nan, minus, infinite = (good.norms.clone() for _ in range(3))
    nan[7], minus[7], infinite[7] = torch.nan, -1, torch.inf
    wrong = {
        "screen.norms must hold lengths": [replace(good, norms=n) for n in (nan, minus, infinite)],
        "screen.error must hold lengths": [replace(good, error=n) for n in (nan, minus, infinite)],
        "belong together": [replace(good, error=None), replace(good, weight=None)],
        "screen.norms is torch.float64": [replace(good, norms=good.norms.double())],
        "screen.error is torch.float64": [replace(good, error=error.double())],
        r"screen.error has shape \[199\]": [replace(good, error=error[1:])],
        "screen.weight is torch.float32, expected bfloat16 or float16": [
            replace(good, weight=half.float())
        ],
        "screen is that of other weights, or W has changed": [
            ops.prepare_screen(W.flip(0), "bfloat16"),
            ops.prepare_screen(W / 3, "bfloat16"),
            ops.prepare_screen(W / 3, "float32"),
            replace(good, norms=good.norms / 2),
            replace(good, error=error / 2),
        ],
    }
    wanted = form.threshold(x, W, bias)
    for screen in (good, ops.prepare_screen(W, "float32"), replace(good, norms=2 * good.norms)):
        oracle.assert_same(ops.threshold_encode(x, W, bias, screen=screen, impl=form.impl), wanted)
    for message, screens in wrong.items():
        for screen in screens:
            with pytest.raises(CertifyError, match=message):
                ops.topk_encode(x, W, bias, k=5, screen=screen, impl=form.impl)
            with pytest.raises(CertifyError, match=message):
                ops.threshold_encode(x, W, bias, screen=screen, impl=form.impl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e-42])
def test_screens_of_small_weights_are_accepted(dtype, size):
    for seed in range(20):
        x, W, bias, _, _, _ = oracle.random_encoder(seed, 1, 30, 9)
        W = (size * W).to(dtype)
        for precision in ("float32", "bfloat16"):
            ops.topk_encode(x, W, bias, k=1, screen=ops.prepare_screen(W, precision))


def zero_pages(shape: tuple[int, int], dtype: type) -> torch.Tensor:
    """Zeros that take memory only where they are written: torch's own are written at once."""
    return torch.from_numpy(np.zeros(shape, dtype))


def test_weights_beyond_2_to_the_31_elements():
    # Only the last feature of 32,832 has a weight.
    d_in, d_sae = 1 << 16, (1 << 15) + 64
    W = zero_pages((d_sae, d_in), np.int16).view(torch.bfloat16)
    assert W.numel() > 2**31
    W[-1, -1] = 2
    x = torch.zeros(2, d_in)
    x[:, -1] = torch.tensor([1.0, -1.0])
    screen = ops.Screen(torch.full((d_sae,), 2.0), W, torch.zeros(d_sae))
    codes, _ = ops.topk_encode(x, W, torch.zeros(d_sae), k=3, screen=screen, column_tile=64)
    assert oracle.rows(codes) == [[(d_sae - 1, 2.0)], []]


def test_activations_beyond_2_to_the_31_elements():
    d_in = 1 << 16
    x = zero_pages(((1 << 15) + 16, d_in), np.float32)
    assert x.numel() > 2**31
    x[-1, -1] = 3
    W = torch.zeros(4, d_in)
    W[2, -1] = 1
    screen = ops.prepare_screen(W, "bfloat16")
    # Past the checks of the Python face, which would read every page once more.
    parts = torch.ops.saelens_certify.topk_encode(
        *(x, W, torch.zeros(4), None, None, None, screen.norms, screen.weight, screen.error),
        *(None, 1, gemm_error(d_in, CPU, screen.precision), 256, 0),
    )
    assert parts[2].sum() == parts[2][-1] == 1
    assert parts[0][-1, 0] == 3
    assert parts[1][-1, 0] == 2

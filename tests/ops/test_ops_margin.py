from __future__ import annotations

import ops_oracle as oracle
import pytest
import torch

from saelens_certify.ops.margin import gemm_error, weight_norms
from saelens_certify.ops.reference.encode import Encoder

CPU = torch.device("cpu")


def encoder(W, bias, scale=None, error=None):
    error = gemm_error(W.shape[1], CPU) if error is None else error
    return Encoder(W, bias, scale, None, None, weight_norms(W), error)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("kind", ["random", "cancelling", "aligned", "tiny", "outliers"])
def test_margin_contains_the_exact_score(precision, kind):
    x, W, bias, scale, _, _ = oracle.random_encoder(1, 64, 512, 256)
    if kind == "cancelling":
        W[:, 256:] = -W[:, :256]
        x[:, 256:] = x[:, :256] * (1 + 2.0**-12)
    elif kind == "aligned":
        # Every product rounds the same way: the worst case of the bound.
        x, W = x.abs() + 1 / 3, W.abs() + 1 / 3
    elif kind == "tiny":
        x, W, bias = x * 1e-25, W * 1e-18, bias * 1e-40
    elif kind == "outliers":
        x[:, :3] *= 1e4
    try:
        torch.set_float32_matmul_precision(precision)
        used = encoder(W, bias, scale)
        for tile in used.tiles(x, 100):
            part = slice(tile.start, tile.start + 100)
            exact = (x.double() @ W[part].double().T) + bias[part]
            exact = (exact * scale[part].double()).float()
            assert ((tile.screened.double() - exact.double()).abs() <= tile.margins.double()).all()
    finally:
        torch.set_float32_matmul_precision("highest")


def test_margin_follows_the_matrix_product_mode(monkeypatch):
    full = gemm_error(768, CPU)
    assert 768 * 2.0**-24 <= full <= 800 * 2.0**-24
    try:
        torch.set_float32_matmul_precision("medium")
        assert gemm_error(768, CPU) > 2.0**-7
        assert gemm_error(768, CPU, torch.bfloat16) < 2.0**-11
    finally:
        torch.set_float32_matmul_precision("highest")
    assert gemm_error(768, CPU) == full
    for mode in ("BF16", "any"):
        monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", mode)
        assert gemm_error(768, CPU) > 2.0**-7
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "STRICT")
    assert gemm_error(768, CPU) == full


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_norms_are_upper_bounds(dtype):
    W = torch.randn(300, 45, generator=torch.Generator().manual_seed(0)).to(dtype)
    W[3] = 0
    exact = W.double().square().sum(1).sqrt()
    norms = weight_norms(W).double()
    assert (norms >= exact).all()
    assert (norms <= exact * (1 + 1e-6)).all()

"""mode="reference" selects what SAELens itself selects."""

from __future__ import annotations

import ops_oracle as oracle
import pytest
import torch
from sae_lens import (
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)

from saelens_certify import ops

D_IN, D_SAE = 48, 700


def saes(dtype: str):
    shared = {"d_in": D_IN, "d_sae": D_SAE, "dtype": dtype, "device": "cpu"}
    return [
        StandardSAE(StandardSAEConfig(**shared)),
        JumpReLUSAE(JumpReLUSAEConfig(**shared)),
        TopKSAE(TopKSAEConfig(k=9, rescale_acts_by_decoder_norm=False, **shared)),
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_codes_equal_sae_encode(dtype):
    torch.manual_seed(0)
    x = torch.randn(70, D_IN)
    pool = torch.rand(D_SAE) < 0.5
    for sae in saes(dtype):
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
            dense = sae.encode(x.to(sae.dtype))
            # The view of W_enc, so that the very same product is computed.
            W, bias = sae.W_enc.T, sae.b_enc.float()
            u = (x.to(sae.dtype) - sae.b_dec).float() if sae.cfg.apply_b_dec_to_input else x
        if isinstance(sae, TopKSAE):
            codes, pooled = ops.topk_encode(
                u, W, bias, k=9, mode="reference", pool_bits=ops.pool_bits(pool)
            )
            assert pooled is not None
            inside = oracle.rows(pooled)
            assert all(pool[j] for row in inside for j, _ in row)
            assert any(len(row) == 9 for row in inside)
        else:
            theta = sae.threshold.detach().float() if isinstance(sae, JumpReLUSAE) else None
            if theta is not None:
                theta = theta.clamp(min=0)
            codes = ops.threshold_encode(u, W, bias, theta=theta, mode="reference")
        assert torch.equal(codes.to_dense(D_SAE), dense.float())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gates_are_those_of_a_gated_sae(dtype):
    torch.manual_seed(0)
    x = torch.randn(70, D_IN)
    sae = GatedSAE(GatedSAEConfig(d_in=D_IN, d_sae=D_SAE, dtype=dtype, device="cpu"))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        dense = sae.encode(x.to(sae.dtype)).float()
        u = (x.to(sae.dtype) - sae.b_dec).float() if sae.cfg.apply_b_dec_to_input else x
        scale = sae.r_mag.exp().float()
        codes = ops.threshold_encode(
            u, sae.W_enc.T, sae.b_mag.float() / scale, scale=scale, gate_bias=sae.b_gate.float(),
            mode="reference",
        )  # fmt: skip
    found = codes.to_dense(D_SAE)
    assert (dense > 0).any(dim=1).all()
    assert torch.equal(found > 0, dense > 0)
    # The bias comes divided by the scale: in float32 that is one rounding more.
    tolerance = 1e-6 if dtype == "float32" else 0.0
    torch.testing.assert_close(found, dense, rtol=tolerance, atol=tolerance)


def test_reference_mode_is_the_dense_product_of_the_weights_type():
    x, W, bias, scale, theta, _ = oracle.random_encoder(1, 30, D_IN, D_SAE)
    for dtype in (torch.float32, torch.bfloat16):
        rounded = W.to(dtype)
        codes = ops.threshold_encode(
            x, rounded, bias, scale=scale, theta=theta, gate_bias=bias - 0.1, mode="reference"
        )
        magnitude = x.to(dtype) @ (rounded * scale.to(dtype)[:, None]).T
        score = magnitude + (bias * scale).to(dtype)
        open_gate = x.to(dtype) @ rounded.T + (bias - 0.1).to(dtype) > 0
        wanted = torch.where((score > theta.to(dtype)) & open_gate, score, 0)
        assert torch.equal(codes.to_dense(D_SAE), wanted.float())
    # Empty input has a shape all the same.
    assert ops.threshold_encode(x[:0], W, bias, mode="reference").n_tokens == 0
    assert ops.topk_encode(x[:0], W, bias, k=3, mode="reference")[0].slots == 3

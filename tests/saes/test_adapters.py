"""`adapt(sae).reconstruct(x)` is `sae.forward(x)`, for settings and shapes of all kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sae_lens import (
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata

from engine.builders import D_MODEL, D_SAE, make_sae
from saelens_certify import ops
from saelens_certify.pool import Pool
from saelens_certify.saes import Coding, adapt
from saelens_certify.saes.loading import load_sae
from saelens_certify.saes.selfcheck import self_check

SETTINGS = st.fixed_dictionaries(
    {
        "normalize_activations": st.sampled_from(["none", "layer_norm", "constant_norm_rescale"]),
        "apply_b_dec_to_input": st.booleans(),
    }
)


@given(
    kind=st.sampled_from(["topk", "standard", "jumprelu"]),
    overrides=SETTINGS,
    shape=st.sampled_from([(5,), (2, 3), (1, 1, 4)]),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_reconstruct_is_forward(kind, overrides, shape, scale, seed) -> None:
    sae = make_sae(kind, **overrides)
    x = scale * torch.randn(*shape, D_MODEL, generator=torch.Generator().manual_seed(seed))
    found, expected = adapt(sae).reconstruct(x), sae.forward(x)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=1e-4 * scale, rtol=1e-4)


@pytest.mark.parametrize("k", [1, 7, D_SAE])
@pytest.mark.parametrize("rescale", [True, False])
def test_topk_of_any_k(k, rescale) -> None:
    sae = make_sae("topk", k=k, rescale_acts_by_decoder_norm=rescale)
    x = torch.randn(6, D_MODEL, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(adapt(sae).reconstruct(x), sae.forward(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["topk", "standard", "jumprelu"])
def test_saved_and_training_forms_agree(name, tmp_path) -> None:
    common: dict[str, Any] = {
        "d_in": D_MODEL,
        "d_sae": D_SAE,
        "metadata": SAEMetadata(hook_name="blocks.1.hook_resid_post"),
    }
    training: Any = {
        "topk": lambda: TopKTrainingSAE(TopKTrainingSAEConfig(k=5, **common)),
        "standard": lambda: StandardTrainingSAE(StandardTrainingSAEConfig(**common)),
        "jumprelu": lambda: JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**common)),
    }[name]()
    training.eval()
    training.save_inference_model(tmp_path)
    saved, asked = load_sae(tmp_path)
    assert asked == str(tmp_path)
    x = torch.randn(6, D_MODEL, generator=torch.Generator().manual_seed(0))
    expected = saved.forward(x)
    torch.testing.assert_close(adapt(saved).reconstruct(x), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(adapt(training).reconstruct(x), expected, atol=1e-4, rtol=1e-4)


def test_bfloat16_sae_passes_its_self_check_in_its_own_precision() -> None:
    sae = make_sae("topk").to(torch.bfloat16)
    x = torch.randn(4, 8, D_MODEL, generator=torch.Generator().manual_seed(0))
    result = self_check(sae, adapt(sae), x)
    assert result.n_tokens == 32
    assert result.max_error < result.tolerance


@given(seed=st.integers(0, 100), k=st.integers(1, 12), share=st.floats(0.1, 1.0))
def test_masking_happens_before_the_rule(seed, k, share) -> None:
    """Pool-restricted top-k is the top-k of the masked scores, not the masked top-k."""
    generator = torch.Generator().manual_seed(seed)
    adapter = adapt(make_sae("standard"))
    x = torch.randn(9, D_MODEL, generator=generator)
    mask = torch.rand(D_SAE, generator=generator) < share
    codes = adapter.encode(x, Coding(k), Pool(mask).bits(torch.device("cpu")))
    dense = make_sae("standard").encode(x) * mask
    values, indices = dense.sort(dim=-1, descending=True, stable=True)
    assert codes.pooled is not None
    for row in range(len(x)):
        n = int(codes.pooled.counts[row])
        assert n == min(k, int((dense[row] > 0).sum()))
        assert codes.pooled.indices[row, :n].tolist() == indices[row, :n].tolist()
        torch.testing.assert_close(codes.pooled.values[row, :n], values[row, :n])


def test_pool_of_counts() -> None:
    pool = Pool.from_counts(torch.tensor([0, 1, 2, 5]), tau=2)
    assert pool.mask.tolist() == [False, False, True, True]
    assert pool.size == 2
    assert ops.pool_bits(pool.mask).tolist() == [0b1100]

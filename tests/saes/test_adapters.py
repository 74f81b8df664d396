"""`adapt(sae).reconstruct(x)` is `sae.forward(x)`, for settings and shapes of all kinds."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from engine.builders import ALL_KINDS, D_MODEL, D_SAE, FACTORIES, TRANSCODERS, make_sae
from hypothesis import given
from hypothesis import strategies as st
from sae_lens import (
    AbsTopKTrainingSAE,
    AbsTopKTrainingSAEConfig,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatchingPursuitTrainingSAE,
    MatchingPursuitTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata

from saelens_certify import CertifyError, ops
from saelens_certify.pool import Pool
from saelens_certify.saes import Coding, FusedAdapter, adapt
from saelens_certify.saes.coding import NATIVE
from saelens_certify.saes.loading import load_sae
from saelens_certify.saes.selfcheck import self_check

SETTINGS = st.fixed_dictionaries(
    {
        "normalize_activations": st.sampled_from(["none", "layer_norm", "constant_norm_rescale"]),
        "apply_b_dec_to_input": st.booleans(),
    }
)


@given(
    kind=st.sampled_from(sorted(ALL_KINDS)),
    overrides=SETTINGS,
    shape=st.sampled_from([(5,), (2, 3), (1, 1, 4)]),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_reconstruct_is_forward(kind, overrides, shape, scale, seed) -> None:
    if kind in TRANSCODERS:
        overrides = overrides | {"apply_b_dec_to_input": False}
    if kind == "temporal":
        shape = (2, *shape[-1:])  # its attention takes batches of sequences
    sae = make_sae(kind, **overrides)
    x = scale * torch.randn(*shape, D_MODEL, generator=torch.Generator().manual_seed(seed))
    found, expected = adapt(sae).reconstruct(x), sae.forward(x)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=1e-4 * scale, rtol=1e-4)


@pytest.mark.parametrize("k", [1, 7, D_SAE])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("kind", ["topk", "abstopk"])
def test_topk_of_any_k(kind, k, rescale) -> None:
    sae = make_sae(kind, k=k, rescale_acts_by_decoder_norm=rescale)
    x = torch.randn(6, D_MODEL, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(adapt(sae).reconstruct(x), sae.forward(x), atol=1e-4, rtol=1e-4)


def test_a_dead_row_that_would_be_divided_by() -> None:
    sae = make_sae("topk", rescale_acts_by_decoder_norm=True)
    with torch.no_grad():
        sae.W_dec[7] = 0
    with pytest.raises(CertifyError, match="W_dec row 7 is zero"):
        adapt(sae)


def test_temporal_with_its_own_normalisation() -> None:
    sae = make_sae(
        "temporal",
        normalize_activations="constant_scalar_rescale",
        activation_normalization_factor=0.3,
    )
    x = torch.randn(2, 6, D_MODEL, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(adapt(sae).reconstruct(x), sae.forward(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reshape", ["hook_z", "none"])
@pytest.mark.parametrize("kind", sorted(set(FACTORIES) - set(TRANSCODERS)))
def test_hook_z_in_both_registered_shapes(kind, reshape) -> None:
    sae = make_sae(kind, "blocks.1.attn.hook_z", reshape_activations=reshape)
    heads = torch.randn(2, 5, 4, D_MODEL // 4, generator=torch.Generator().manual_seed(0))
    adapter = adapt(sae)
    result = self_check(sae, adapter, heads)
    assert result.n_tokens == 10
    found = adapter.reconstruct(heads.flatten(2))
    given = heads if reshape == "hook_z" else heads.flatten(2)
    torch.testing.assert_close(found, sae.forward(given).flatten(2), atol=1e-4, rtol=1e-4)


TRAINING: dict[str, tuple[Any, Any]] = {
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
    "abstopk": (AbsTopKTrainingSAE, AbsTopKTrainingSAEConfig),
    "standard": (StandardTrainingSAE, StandardTrainingSAEConfig),
    "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig),
    "gated": (GatedTrainingSAE, GatedTrainingSAEConfig),
    "matching_pursuit": (MatchingPursuitTrainingSAE, MatchingPursuitTrainingSAEConfig),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    "matryoshka_batchtopk": (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig),
}
BATCH_RANKED = ("batchtopk", "matryoshka_batchtopk")


@pytest.mark.parametrize("name", sorted(TRAINING))
def test_saved_and_training_forms_agree(name, tmp_path) -> None:
    settings: dict[str, Any] = {
        "d_in": D_MODEL,
        "d_sae": D_SAE,
        "decoder_init_norm": 1.0,
        "metadata": SAEMetadata(hook_name="blocks.1.hook_resid_post"),
    }
    if "topk" in name:
        settings["k"] = 5
    if name == "matryoshka_batchtopk":
        settings["matryoshka_widths"] = [D_SAE // 4, D_SAE // 2, D_SAE]
    if name == "matching_pursuit":
        settings["max_iterations"] = 5
    sae_class, config_class = TRAINING[name]
    training = sae_class(config_class(**settings))
    if name in BATCH_RANKED:
        training.topk_threshold.fill_(0.3)  # what training would have estimated
    training.eval()
    training.save_inference_model(tmp_path)
    saved = load_sae(tmp_path)[0]
    x = torch.randn(6, D_MODEL, generator=torch.Generator().manual_seed(0))
    expected = saved.forward(x)
    adapter = adapt(saved)
    torch.testing.assert_close(adapter.reconstruct(x), expected, atol=1e-4, rtol=1e-4)
    if name in BATCH_RANKED:
        assert adapter.architecture == "jumprelu"
        with pytest.raises(CertifyError, match="save_inference_model"):
            adapt(training)
    else:
        torch.testing.assert_close(adapt(training).reconstruct(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", sorted(ALL_KINDS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_self_check_in_the_precision_of_the_sae(kind, dtype) -> None:
    sae = make_sae(kind).to(dtype)
    x = torch.randn(4, 8, D_MODEL, generator=torch.Generator().manual_seed(0))
    result = self_check(sae, adapt(sae), x)
    assert result.n_tokens == 32
    assert result.max_error <= result.tolerance


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", sorted(ALL_KINDS))
def test_self_check_finds_a_changed_parameter(kind, dtype) -> None:
    sae, other = make_sae(kind).to(dtype), make_sae(kind).to(dtype)
    adapter = adapt(sae)
    with torch.no_grad():
        other.W_dec[3:40] *= 1.05
    x = torch.randn(4, 8, D_MODEL, generator=torch.Generator().manual_seed(0))
    fused = isinstance(adapter, FusedAdapter)
    if not fused and dtype != torch.float32:
        with torch.no_grad():
            other.W_dec *= 1.2  # own code runs in the SAE's precision, and is compared in it
    with pytest.raises(CertifyError, match="does not reproduce"):
        self_check(other, adapter, x)


def _never_fires(adapter: FusedAdapter) -> FusedAdapter:
    theta = torch.zeros(D_SAE) if adapter.theta is None else adapter.theta.clone()
    often = int(adapter.encode(PROBE).features.indices.flatten().clamp(min=0).mode().values)
    theta[often] = 1e30
    return dataclasses.replace(adapter, theta=theta)


def _scaled_decoder(adapter: FusedAdapter) -> FusedAdapter:
    assert adapter.decoder is not None
    return dataclasses.replace(adapter, decoder=adapter.decoder * 1.02)


PROBE = torch.randn(4, 8, D_MODEL, generator=torch.Generator().manual_seed(0))
WRONG = {
    "one feature too few": ("topk", lambda a: dataclasses.replace(a, k=a.k - 1)),
    "one feature too many": ("topk", lambda a: dataclasses.replace(a, k=a.k + 1)),
    "half of the signs": ("abstopk", lambda a: dataclasses.replace(a, signed=False)),
    "no threshold": ("jumprelu", lambda a: dataclasses.replace(a, theta=None)),
    "one feature never fires": ("jumprelu", _never_fires),
    "one of the top k never fires": ("topk", _never_fires),
    "no gate": ("gated", lambda a: dataclasses.replace(a, gate_bias=None)),
    "no input bias": ("standard", lambda a: dataclasses.replace(a, input_bias=None)),
    "no decoder bias": ("standard", lambda a: dataclasses.replace(a, decoder_bias=None)),
    "decoder a little larger": ("standard", _scaled_decoder),
    "no skip term": ("jumprelu_skip_transcoder", lambda a: dataclasses.replace(a, skip=None)),
    "no normalisation": ("standard-ln", lambda a: dataclasses.replace(a, normalization="none")),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", sorted(WRONG))
def test_self_check_finds_a_wrong_adapter(what, dtype) -> None:
    """Also in 16 bits, where rounding is larger than most of these faults."""
    kind, spoil = WRONG[what]
    norm = "layer_norm" if kind.endswith("-ln") else "none"
    sae = make_sae(kind.removesuffix("-ln"), normalize_activations=norm).to(dtype)
    adapter = adapt(sae)
    self_check(sae, adapter, PROBE)
    with pytest.raises(CertifyError, match="does not reproduce"):
        self_check(sae, spoil(adapter), PROBE)


def test_ties_of_scores_are_ties() -> None:
    """Two features with one encoder row: which of them enters the top k is SAELens's accident."""
    sae = make_sae("topk", k=4)
    with torch.no_grad():
        first = int(adapt(sae).encode(PROBE[:1, :1]).features.indices[0, 3])
        sae.W_enc[:, 90], sae.b_enc[90] = sae.W_enc[:, first], sae.b_enc[first] * (1 + 1e-7)
    result = self_check(sae, adapt(sae), PROBE[:, :1])
    assert result.max_error < result.tolerance


@pytest.mark.parametrize("reshape", ["hook_z", "none"])
@pytest.mark.parametrize("kind", sorted(ALL_KINDS))
def test_the_sae_is_left_as_it_was(kind, reshape) -> None:
    """SAELens keeps norms, means and head sizes on the module; also after an error."""
    if kind in TRANSCODERS:
        sae = make_sae(kind, normalize_activations="layer_norm")
        x = torch.randn(2, 5, D_MODEL)
    else:
        sae = make_sae(
            kind, "blocks.1.attn.hook_z", reshape_activations=reshape,
            normalize_activations="layer_norm",
        )  # fmt: skip
        x = torch.randn(2, 5, 4, D_MODEL // 4)
    before, config = dict(vars(sae)), sae.cfg.to_dict()
    adapter = adapt(sae)
    self_check(sae, adapter, x)
    adapter.reconstruct(x.flatten(2))
    with pytest.raises(Exception, match=r"shape|size|width|match|tie|einops|expected"):
        self_check(sae, adapter, x[..., :1])
    with pytest.raises(CertifyError, match="NaN|finite|infinite"):
        adapter.reconstruct(x.flatten(2) * float("nan"))
    assert vars(sae).keys() == before.keys()
    assert all(vars(sae)[name] is value for name, value in before.items())
    assert sae.cfg.to_dict() == config


OWN_TOPK = ("topk", "abstopk")
OWN_SELECTION = (*OWN_TOPK, "matching_pursuit", "temporal")


@given(
    kind=st.sampled_from(sorted(set(FACTORIES) - set(OWN_SELECTION))),
    seed=st.integers(0, 100),
    k=st.integers(1, 12),
    share=st.floats(0.1, 1.0),
)
def test_masking_happens_before_the_rule(kind, seed, k, share) -> None:
    """Pool-restricted top-k is the top-k of the masked scores, not the masked top-k."""
    generator = torch.Generator().manual_seed(seed)
    adapter = adapt(make_sae(kind))
    x = torch.randn(2, 5, D_MODEL, generator=generator)
    mask = torch.rand(D_SAE, generator=generator) < share
    codes = adapter.encode(x, Coding(k), Pool(mask).bits(torch.device("cpu")))
    assert codes.pooled is not None
    dense = make_sae(kind).encode(x).reshape(10, D_SAE)
    for found, rows in ((codes.features, dense), (codes.pooled, dense * mask)):
        order = rows.abs().sort(dim=-1, descending=True, stable=True).indices
        for row, largest in enumerate(order):
            n = int(found.counts[row])
            assert n == min(k, int((rows[row] != 0).sum()))
            assert found.indices[row, :n].tolist() == largest[:n].tolist()
            torch.testing.assert_close(found.values[row, :n], rows[row, largest[:n]])


@given(seed=st.integers(0, 100), share=st.floats(0.1, 1.0), kind=st.sampled_from(OWN_TOPK))
def test_an_own_top_k_is_chosen_again_inside_the_pool(seed, share, kind) -> None:
    generator = torch.Generator().manual_seed(seed)
    sae = make_sae(kind)
    everything = make_sae(kind, k=D_SAE)
    x = torch.randn(6, D_MODEL, generator=generator)
    mask = torch.rand(D_SAE, generator=generator) < share
    pooled = adapt(sae).encode(x, NATIVE, Pool(mask).bits(torch.device("cpu"))).pooled
    assert pooled is not None
    masked = everything.encode(x) * mask
    order = masked.abs().sort(dim=-1, descending=True, stable=True).indices[:, : sae.cfg.k]
    expected = torch.zeros_like(masked).scatter(1, order, masked.gather(1, order))
    torch.testing.assert_close(pooled.to_dense(D_SAE), expected, atol=1e-5, rtol=1e-5)


@given(
    kind=st.sampled_from(sorted(FACTORIES)),
    coding=st.sampled_from([NATIVE, Coding(3)]),
    seed=st.integers(0, 100),
)
def test_uncoded_positions_are_read_and_not_returned(kind, coding, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    adapter = adapt(make_sae(kind))
    x = torch.randn(3, 5, D_MODEL, generator=generator)
    coded = torch.rand(3, 5, generator=generator) < 0.6
    everything = adapter.encode(x, coding).features.to_dense(D_SAE)
    some = adapter.encode(x, coding, coded=coded)
    torch.testing.assert_close(some.features.to_dense(D_SAE), everything[coded.flatten()])
    found = adapter.decode(some.features, some.token_map)
    if coding is NATIVE:
        expected = adapter.reconstruct(x)[coded]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", sorted(ALL_KINDS))
@pytest.mark.parametrize("norm", ["none", "layer_norm"])
def test_error_only_permutations_equal_decoding_them(kind, norm) -> None:
    adapter = adapt(make_sae(kind, normalize_activations=norm))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, D_MODEL, generator=generator)
    target = torch.randn(8, D_MODEL, generator=generator)
    codes = adapter.encode(x)
    permutations = torch.stack([torch.randperm(D_SAE, generator=generator) for _ in range(3)])
    found = adapter.permuted_errors(codes.features, codes.token_map, permutations, target)
    for permutation, errors in zip(permutations, found, strict=True):
        x_hat = adapter.decode(codes.features.map_indices(permutation), codes.token_map)
        expected = (target.double() - x_hat.double()).square().sum(dim=-1)
        torch.testing.assert_close(errors, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", TRANSCODERS)
def test_hooks_of_transcoders(kind) -> None:
    adapter = adapt(make_sae(kind, "blocks.1.ln2.hook_normalized"))
    assert adapter.input_hook == "blocks.1.ln2.hook_normalized"
    assert adapter.output_hook == "blocks.1.hook_mlp_out"
    lost = make_sae(kind)
    lost.cfg.metadata.hook_name_out = None
    with pytest.raises(CertifyError, match="no hook_name_out"):
        adapt(lost)


def test_a_norm_output_registered_as_its_input_is_read_where_it_was_trained() -> None:
    sae = make_sae("jumprelu_transcoder", "blocks.1.hook_mlp_in")
    assert adapt(sae).input_hook == "blocks.1.hook_mlp_in"
    sae.cfg.metadata.hf_hook_name = "model.layers.1.pre_feedforward_layernorm.output"
    assert adapt(sae).input_hook == "blocks.1.mlp.hook_in"


@pytest.mark.parametrize("name", ["hook_head_index", "hook_head_index_out"])
def test_single_heads_are_refused(name) -> None:
    sae = make_sae()
    setattr(sae.cfg.metadata, name, 2)
    with pytest.raises(CertifyError, match=f"{name} = 2"):
        adapt(sae)


def test_widths_of_a_transcoder_may_differ() -> None:
    sae = make_sae("jumprelu_skip_transcoder", d_in=24, d_out=D_MODEL)
    adapter = adapt(sae)
    assert (adapter.d_in, adapter.d_sae, adapter.d_out) == (24, D_SAE, D_MODEL)
    x = torch.randn(3, 4, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(adapter.reconstruct(x), sae.forward(x), atol=1e-4, rtol=1e-4)
    assert dataclasses.replace(adapter).d_out == D_MODEL


def test_pool_of_counts() -> None:
    pool = Pool.from_counts(torch.tensor([0, 1, 2, 5]), tau=2)
    assert pool.mask.tolist() == [False, False, True, True]
    assert pool.size == 2
    assert ops.pool_bits(pool.mask).tolist() == [0b1100]

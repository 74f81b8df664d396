"""Every number of the evidence against the float64 oracle, sequence by sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from oracle import float64_oracle as oracle
from oracle.oracle_sae import OracleSAE, code
from oracle.test_oracle_sae import build

from engine.builders import D_SAE, SEQ_LEN, hooked_transformer, make_sae, make_tokens
from saelens_certify import Certificate, CertifyConfig, certify
from saelens_certify.config import Positions
from saelens_certify.proxies import feature_permutation, random_decoder
from saelens_certify.saes import adapt

CALIBRATION, EVALUATION = make_tokens(30, seed=1), make_tokens(60, seed=2)
TIE = 1e-4
SEED = 7
HOOKS = (
    "blocks.0.hook_resid_pre",
    "blocks.1.hook_resid_post",
    "blocks.2.hook_resid_post",
    "blocks.1.hook_mlp_out",
    "blocks.1.hook_resid_mid",
)


def run(sae, coding="native", positions: Positions = "all", tau=1, **kwargs) -> Certificate:
    config = CertifyConfig(
        coding=coding, positions=positions, tau=tau, seq_len=SEQ_LEN, batch_tokens=20 * SEQ_LEN,
        part_sequences=25, progress=False, **kwargs,
    )  # fmt: skip
    return certify(
        hooked_transformer(), sae, calibration=CALIBRATION, evaluation=EVALUATION, config=config
    )


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(
    ("kind", "coding"),
    [
        ("topk", "native"),
        ("standard", "native"),
        ("jumprelu", "native"),
        ("standard", "topk:6"),
        ("jumprelu", "topk:6"),
        ("topk", "topk:5"),
    ],
)
def test_evidence_matches_oracle(kind: str, coding: str, hook: str) -> None:
    check_against_oracle(make_sae(kind, hook), coding=coding)


@pytest.mark.parametrize("kind", ["topk", "standard", "jumprelu"])
@pytest.mark.parametrize("overrides", [
    {"normalize_activations": "layer_norm"},
    {"normalize_activations": "constant_norm_rescale"},
    {"apply_b_dec_to_input": False},
])  # fmt: skip
def test_other_settings_match_oracle(kind: str, overrides: dict) -> None:
    check_against_oracle(make_sae(kind, **overrides))


@pytest.mark.parametrize(("kind", "k"), [("topk", 8), ("topk", 20), ("topk", 5), ("jumprelu", 6)])
def test_topk_rule_acts_on_what_the_sae_encodes(kind: str, k: int) -> None:
    """With a small pool: a TopK SAE's own selection comes first, the mask second, the rule third."""
    check_against_oracle(make_sae(kind), coding=f"topk:{k}", tau=12)


def test_rescaled_topk_matches_oracle() -> None:
    check_against_oracle(make_sae("topk", rescale_acts_by_decoder_norm=True))


@pytest.mark.parametrize("positions", ["all", "no_bos"])
@pytest.mark.parametrize("tau", [1, 3])
def test_positions_and_tau_match_oracle(positions: Positions, tau: int) -> None:
    check_against_oracle(make_sae("topk"), positions=positions, tau=tau)


def test_pool_variant_differs_from_sae_only_on_violations() -> None:
    certificate = run(make_sae("topk"), tau=8)
    violation = certificate.column("violation")
    assert 0.05 < violation.mean() < 1, "the case must have both kinds of sequences"
    same = certificate.column("loss_pool") == certificate.column("loss_sae")
    assert same[~violation].all()
    assert not same[violation].all()


MLP = {"hook": "blocks.1.ln2.hook_normalized", "hook_out": "blocks.1.hook_mlp_out"}
ACROSS_BLOCKS = {"hook": "blocks.0.hook_resid_mid", "hook_out": "blocks.2.hook_mlp_out"}
TRANSCODERS = [
    "transcoder",
    "skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
    "topk_transcoder",
    "topk_skip_transcoder",
    "groupmax_transcoder",
    "groupmax_skip_transcoder",
]
DENSE = ["gated", *(kind for kind in TRANSCODERS if not kind.startswith(("topk", "groupmax")))]
"""Kinds of which half of the features are active on a token."""
NEW_KINDS = ["gated", "abstopk", "groupmax", "matching_pursuit", "temporal", *TRANSCODERS]


@pytest.mark.parametrize("coding", ["native", "topk:5"])
@pytest.mark.parametrize("kind", NEW_KINDS)
def test_every_architecture_matches_oracle(kind: str, coding: str) -> None:
    """With a pool that some sequences violate and others do not."""
    hooks = MLP if kind in TRANSCODERS else {}
    tau = tau_of(kind) if coding == "native" else 3
    certificate = check_against_oracle(float32(kind, **hooks), coding=coding, tau=tau)
    assert 0 < certificate.column("violation").mean() < 1, "the case must have both kinds"


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("gated", {"normalize_activations": "layer_norm"}),
        ("gated", {"normalize_activations": "constant_norm_rescale"}),
        ("gated", {"apply_b_dec_to_input": False}),
        ("abstopk", {"normalize_activations": "layer_norm"}),
        ("abstopk", {"apply_b_dec_to_input": False, "rescale_acts_by_decoder_norm": True}),
        ("matching_pursuit", {"normalize_activations": "layer_norm"}),
        ("matching_pursuit", {"apply_b_dec_to_input": False}),
        ("temporal", {"normalize_activations": "constant_norm_rescale"}),
        ("temporal", {"normalize_activations": "constant_scalar_rescale",
                      "activation_normalization_factor": 0.4}),
        ("temporal", {"apply_b_dec_to_input": False, "sae_diff_type": "relu"}),
        ("skip_transcoder", {"normalize_activations": "layer_norm", **ACROSS_BLOCKS}),
        ("skip_transcoder", {"normalize_activations": "constant_norm_rescale", **MLP}),
        ("topk_skip_transcoder", ACROSS_BLOCKS),
        ("jumprelu_skip_transcoder", {"normalize_activations": "layer_norm", **MLP}),
        ("jumprelu_transcoder", ACROSS_BLOCKS),
        ("skip_transcoder", {**MLP, "hook_out": "blocks.1.mlp.hook_post", "d_out": 64}),
        ("topk_skip_transcoder", {"hook": "blocks.0.hook_resid_mid",
                                  "hook_out": "blocks.1.attn.hook_z"}),
    ],
)  # fmt: skip
def test_other_settings_of_every_architecture_match_oracle(kind: str, overrides: dict) -> None:
    check_against_oracle(float32(kind, **overrides), tau=tau_of(kind))


@pytest.mark.parametrize("reshape", ["hook_z", "none"])
@pytest.mark.parametrize("kind", ["topk", "jumprelu", "gated", "temporal"])
def test_joined_heads_match_oracle(kind: str, reshape: str) -> None:
    normalize = "layer_norm" if kind == "topk" else "none"
    sae = float32(
        kind, hook="blocks.1.attn.hook_z", reshape_activations=reshape,
        normalize_activations=normalize,
    )  # fmt: skip
    check_against_oracle(sae, tau=5)


@pytest.mark.parametrize("kind", ["abstopk", "temporal", "skip_transcoder", "topk_transcoder"])
def test_positions_of_every_kind_match_oracle(kind: str) -> None:
    """Uncoded positions stay; a temporal SAE still looks at them."""
    hooks = MLP if kind in TRANSCODERS else {}
    check_against_oracle(float32(kind, **hooks), positions="no_bos", tau=tau_of(kind))


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("skip_transcoder", {"normalize_activations": "layer_norm", **MLP}),
        ("jumprelu_skip_transcoder", ACROSS_BLOCKS),
        ("abstopk", {}),
        ("abstopk", {"rescale_acts_by_decoder_norm": True}),
        ("temporal", {}),
        ("topk", {"hook": "blocks.1.attn.hook_z", "reshape_activations": "hook_z"}),
    ],
)
def test_controls_match_oracle(kind: str, overrides: dict) -> None:
    sae = float32(kind, **overrides)
    rows = random_decoder(adapt(sae), SEED).decoder
    assert rows is not None
    if not sae.cfg.to_dict().get("rescale_acts_by_decoder_norm"):
        # Otherwise only the directions count: codes are divided by the norms of whatever rows decode.
        torch.testing.assert_close(rows.norm(dim=-1), sae.W_dec.detach().norm(dim=-1))
    controls = {
        f"permuted_{index}": oracle.Control(permutation=feature_permutation(D_SAE, SEED, index))
        for index in range(2)
    }
    controls["random_decoder_0"] = oracle.Control(decoder=rows)
    certificate = check_against_oracle(sae, controls=controls)
    losses = [certificate.column(f"loss_{name}").mean() for name in ("sae", *controls)]
    assert len({round(loss, 4) for loss in losses}) == 4, "each control must change the loss"


@pytest.mark.parametrize(
    ("kind", "normalize"),
    [
        *((kind, "none") for kind in ("standard", "topk", "jumprelu", *NEW_KINDS)),
        *((kind, "layer_norm") for kind in ("topk", "gated", "abstopk", "groupmax")),
        ("matching_pursuit", "layer_norm"),
        *((kind, "layer_norm") for kind in ("temporal", "topk_transcoder", "skip_transcoder")),
    ],
)
def test_error_permutations_match_oracle(kind: str, normalize: str) -> None:
    """Squared errors of many shuffles from one encoding, against decoding each of them densely."""
    hooks = MLP if kind in TRANSCODERS else {}
    sae = float32(kind, normalize_activations=normalize, **hooks)
    x, y = (torch.randn(3, SEQ_LEN, 32, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    permutations = torch.stack([feature_permutation(D_SAE, SEED, index) for index in range(3)])
    adapter, own = adapt(sae), OracleSAE.read(sae)
    codes = adapter.encode(x)
    found = adapter.permuted_errors(codes.features, codes.token_map, permutations, y.flatten(0, 1))
    dense, gap = code(own, x.double())
    clear = gap.flatten() > TIE
    assert clear.double().mean() > 0.8
    for error, permutation in zip(found, permutations, strict=True):
        y_hat = oracle.Control(permutation=permutation).decode(own, dense, x.double())
        expected = (y.double() - y_hat).square().sum(-1).flatten()
        torch.testing.assert_close(error.double()[clear], expected[clear], rtol=1e-5, atol=1e-5)


def float32(kind: str, **overrides) -> Any:
    return build(kind, dtype="float32", **overrides)


def tau_of(kind: str) -> int:
    """A threshold of the pool that some sequences meet and others do not, under native coding."""
    return 30 if kind in DENSE else 5


def check_against_oracle(
    sae: Any,
    coding: str = "native",
    positions: Positions = "all",
    tau: int = 1,
    controls: dict[str, oracle.Control] | None = None,
) -> Certificate:
    certificate = run(
        sae, coding, positions, tau, seed=SEED, random_decoders=int(bool(controls)),
        permutations=sum("permuted" in name for name in controls or {}),
    )  # fmt: skip
    model = hooked_transformer()
    counted = oracle.calibrate(model, sae, CALIBRATION, coding=coding, positions=positions)
    # A tie moves a count from one feature to another; without ties the counts are the same.
    tied_tokens = int((counted.gap < TIE).sum())
    off = int((certificate.calibration.counts - counted.counts).abs().sum())
    assert off <= 4 * tied_tokens, "more counts differ than ties explain"
    assert tied_tokens < 0.05 * CALIBRATION.numel()
    expected = oracle.evaluate(
        model, sae, certificate.pool.mask, EVALUATION[_order(certificate)], coding=coding,
        positions=positions, controls=controls,
    )  # fmt: skip
    clear = (
        torch.minimum(oracle.smallest_gap(expected.gap), oracle.smallest_gap(expected.gap_pool))
        > TIE
    ).numpy()
    assert clear.mean() > 0.6

    def agree(name: str, value: torch.Tensor, atol: float = 2e-5, rtol: float = 1e-5) -> None:
        found = certificate.column(name)[clear]
        np.testing.assert_allclose(found, value.numpy()[clear], rtol, atol, err_msg=name)

    agree("loss_base", expected.loss_base)
    agree("l0", expected.l0, atol=1e-12)
    np.testing.assert_array_equal(
        certificate.column("violation")[clear], expected.violation.numpy()[clear]
    )
    proxies = {"": expected.sae, "_pool": expected.pool}
    proxies |= {f"_{name}": proxy for name, proxy in expected.controls.items()}
    for suffix, proxy in proxies.items():
        agree(f"loss{suffix or '_sae'}", proxy.loss)
        # A control is far from the model: many bits, and float32 activations move them by more.
        rtol = 1e-5 if suffix in ("", "_pool") else 3e-5
        agree(f"kl{suffix}", proxy.kl, rtol=rtol)
        agree(f"gold_logprob_gap{suffix}", proxy.gold_logprob_gap, rtol=rtol)
        agree(f"mse{suffix}", proxy.mse, atol=1e-6)
        agree(f"mse_no_first{suffix}", proxy.mse_no_first, atol=1e-6)
        # One prediction may be a tie.
        agree(f"top1_agreement{suffix}", proxy.top1_agreement, atol=1.5 / (SEQ_LEN - 1))
    return certificate


def _order(certificate: Certificate) -> list[int]:
    names = certificate.evidence.column("document").to_pylist()
    return [int(name.rsplit(":", 1)[1]) for name in names]

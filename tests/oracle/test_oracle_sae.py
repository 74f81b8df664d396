"""The SAE part of the oracle, before it is believed: against SAELens in float64 and by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from engine.builders import D_MODEL, D_SAE, FACTORIES, SEQ_LEN, TRANSCODERS, make_sae
from hypothesis import given, settings
from hypothesis import strategies as st

from saelens_certify.saes.classes import OWN_CLASSES

from .float64_oracle import Control
from .oracle_sae import KINDS, OracleSAE, code, keep_largest

HEADS, D_HEAD = 4, 8
HOOK_Z = "blocks.1.attn.hook_z"
LIKE = {
    kind: "skip_transcoder" if "skip" in kind else "transcoder"
    for kind in KINDS
    if "transcoder" in kind
}
"""The kind of SAELens with the same parameters."""


def build(kind: str, **overrides: Any) -> Any:
    """Return a SAE of `make_sae` in float64; also of the architectures that SAELens lacks."""
    overrides = {"dtype": "float64", **overrides}
    if kind not in OWN_CLASSES:
        return make_sae(kind, **overrides)
    k = overrides.pop("k", 8)
    like = make_sae(LIKE.get(kind, "standard"), **overrides)
    sae_class = OWN_CLASSES[kind]
    fields = {field.name for field in dataclasses.fields(sae_class.config_class)}
    options = {name: value for name, value in vars(like.cfg).items() if name in fields}
    sae: Any = sae_class(sae_class.config_class(**options, k=k))
    sae.load_state_dict(like.state_dict())
    return sae


def activations(*shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2.0 * torch.randn(*shape, generator=generator, dtype=torch.float64) + 0.3


def some_pool(share: float = 0.5) -> torch.Tensor:
    return torch.rand(D_SAE, generator=torch.Generator().manual_seed(4)) < share


NORMALIZED = [{"normalize_activations": n} for n in ("none", "layer_norm", "constant_norm_rescale")]
CENTRED = [{"apply_b_dec_to_input": centred} for centred in (True, False)]
MORE = [
    ("topk", {"rescale_acts_by_decoder_norm": True, "normalize_activations": "layer_norm"}),
    ("abstopk", {"rescale_acts_by_decoder_norm": True}),
    ("abstopk", {"k": 40}),
    ("matching_pursuit", {"max_iterations": None}),
    ("matching_pursuit", {"max_iterations": None, "stop_on_duplicate_support": False}),
    ("matching_pursuit", {"max_iterations": 40, "residual_threshold": 3.0}),
    ("matching_pursuit", {"max_iterations": 40, "residual_threshold": 0.0}),
    ("temporal", {"normalize_activations": "constant_scalar_rescale",
                  "activation_normalization_factor": 0.4}),
    ("temporal", {"sae_diff_type": "relu"}),
    ("temporal", {"kval_topk": None}),
    ("temporal", {"n_attn_layers": 2, "n_heads": 3}),
    ("temporal", {"tied_weights": False, "apply_b_dec_to_input": False}),
    ("temporal", {"tied_weights": False, "n_attn_layers": 2}),
    *[(kind, {"d_out": 20}) for kind in KINDS if "transcoder" in kind],
]  # fmt: skip
CASES = [
    *[(kind, options) for kind in KINDS for options in NORMALIZED],
    *[(kind, options) for kind in KINDS if "transcoder" not in kind for options in CENTRED],
    *MORE,
]


def test_every_architecture_of_saelens_is_known() -> None:
    assert set(FACTORIES) | set(OWN_CLASSES) == set(KINDS)
    assert set(TRANSCODERS) <= {kind for kind in KINDS if "transcoder" in kind}


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_codes_and_reconstruction_equal_the_sae(kind: str, options: dict[str, Any]) -> None:
    sae = build(kind, **options)
    x = activations(3, SEQ_LEN, D_MODEL)
    own = OracleSAE.read(sae)
    codes, gap = code(own, x)
    with torch.no_grad():
        torch.testing.assert_close(codes, sae.encode(x), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(own.decode(codes, x), sae.forward(x), rtol=1e-10, atol=1e-10)
    assert gap.shape == x.shape[:2]
    assert 0 < (codes != 0).double().mean() < 0.9
    assert bool((codes < 0).any()) == (kind == "abstopk")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "transcoder" not in kind])
def test_joined_heads_equal_the_sae(kind: str) -> None:
    z = activations(2, SEQ_LEN, HEADS, D_HEAD)
    for reshape, given_z in (("hook_z", z), ("none", z.flatten(2))):
        sae = build(kind, hook=HOOK_Z, reshape_activations=reshape)
        own = OracleSAE.read(sae)
        codes, _ = code(own, z.flatten(2))
        with torch.no_grad():
            out = sae.forward(given_z)
            torch.testing.assert_close(codes, sae.encode(given_z), rtol=1e-10, atol=1e-12)
        assert out.shape == given_z.shape
        torch.testing.assert_close(own.decode(codes, z.flatten(2)), out.reshape(2, SEQ_LEN, -1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("coding", ["native", "topk:4", "topk:64"])
def test_a_pool_of_all_that_is_active_changes_nothing(kind: str, coding: str) -> None:
    own = OracleSAE.read(build(kind))
    x = activations(2, SEQ_LEN, D_MODEL)
    codes, _ = code(own, x, coding)
    restricted, _ = code(own, x, coding, (codes != 0).any(0).any(0))
    assert restricted.equal(codes)
    none, _ = code(own, x, coding, torch.zeros(D_SAE, dtype=torch.bool))
    assert none.eq(0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_enters_in_place_of_features_outside_the_pool(kind: str) -> None:
    own = OracleSAE.read(build(kind))
    x, pool = activations(2, SEQ_LEN, D_MODEL), some_pool()
    free, _ = code(own, x)
    restricted, _ = code(own, x, "native", pool)
    left = torch.where(pool, free, 0.0)
    assert not restricted[..., ~pool].any()
    assert restricted[left != 0].equal(left[left != 0])
    entered = (restricted != 0) & (left == 0)
    assert bool(entered.any()) == ("topk" in kind)
    if "topk" in kind:
        scores = own.scores(x)
        values = scores if kind == "abstopk" else scores.relu()
        assert restricted.equal(keep_largest(torch.where(pool, values, 0.0), 8))
    # The published rule works on what the SAE encodes: nothing enters, whatever the architecture.
    outer, _ = code(own, x, f"topk:{D_SAE}", pool)
    assert outer.equal(left)
    few, _ = code(own, x, "topk:3", pool)
    assert few.equal(keep_largest(left, 3))


def test_abstopk_ranks_by_magnitude() -> None:
    own = OracleSAE.read(build("abstopk", k=2))
    own.parameters["W_enc"].zero_()
    own.parameters["b_enc"].zero_()
    own.parameters["b_enc"][:4] = torch.tensor([1.0, -3.0, 2.0, -0.5])
    x = activations(1, D_MODEL)
    codes, gap = code(own, x)
    assert codes[0, :4].tolist() == [0.0, -3.0, 2.0, 0.0]
    assert gap.item() == 1.0
    pool = torch.ones(D_SAE, dtype=torch.bool)
    pool[1] = False
    codes, gap = code(own, x, "native", pool)
    assert codes[0, :4].tolist() == [1.0, 0.0, 2.0, 0.0]
    assert gap.item() == 0.5
    codes, gap = code(own, x, "topk:1")
    assert codes[0, :4].tolist() == [0.0, -3.0, 0.0, 0.0]
    assert gap.item() == 1.0


def test_gated_needs_both_paths() -> None:
    own = OracleSAE.read(build("gated"))
    p = own.parameters
    p["W_enc"].zero_()
    p["b_gate"].fill_(-9.0)
    p["b_mag"].fill_(-9.0)
    p["b_gate"][:4] = torch.tensor([0.2, 1.0, -1.0, 0.3])
    p["b_mag"][:4] = torch.tensor([5.0, -2.0, 4.0, 0.7])
    x = activations(1, D_MODEL)
    codes, gap = code(own, x)
    torch.testing.assert_close(codes[0, :4], torch.tensor([5.0, 0.0, 0.0, 0.7]).double())
    assert gap.item() == pytest.approx(0.2)
    codes, gap = code(own, x, "topk:1")
    assert codes[0].nonzero().flatten().tolist() == [0]
    assert gap.item() == pytest.approx(0.2)


def test_transcoders_do_not_undo_the_normalisation_and_skip_the_raw_input() -> None:
    own = OracleSAE.read(build("skip_transcoder", normalize_activations="layer_norm", d_out=20))
    x = activations(2, SEQ_LEN, D_MODEL)
    codes, _ = code(own, x)
    torch.testing.assert_close(code(own, 3.0 * x + 1.0)[0], codes, rtol=1e-4, atol=1e-4)
    skip = x @ own.parameters["W_skip"].T
    rest = own.decode(codes, x) - skip
    torch.testing.assert_close(rest, own.decode(codes, torch.zeros_like(x)))
    assert skip.abs().max() > 0.1


def test_matching_pursuit_by_hand() -> None:
    sae = build("matching_pursuit", max_iterations=None, apply_b_dec_to_input=False)
    half = math.sqrt(0.5)
    sae.W_dec.data.zero_()
    sae.W_dec.data[0, 0] = sae.W_dec.data[1, 1] = 1.0
    sae.W_dec.data[2, :2] = half
    own = OracleSAE.read(sae)
    x = torch.zeros(1, D_MODEL, dtype=torch.float64)
    x[0, :2] = torch.tensor([3.0, 1.0])
    codes, gap = code(own, x)
    # 3 e0 (against 2.83 of the diagonal), then e1 against 0.71, then nothing is left.
    assert codes[0, :3].tolist() == [3.0, 1.0, 0.0]
    assert gap.item() == pytest.approx(sae.cfg.residual_threshold)
    sae.cfg.residual_threshold = 0.0
    assert code(OracleSAE.read(sae), x)[1].item() == 0.0  # what to add to nothing is a tie
    sae.cfg.residual_threshold = 1.2
    codes, gap = code(OracleSAE.read(sae), x)
    assert codes[0, :3].tolist() == [3.0, 0.0, 0.0]
    assert gap.item() == pytest.approx(3.0 - 4.0 * half)


def test_temporal_codes_look_at_earlier_tokens_only() -> None:
    own = OracleSAE.read(build("temporal"))
    x = activations(2, SEQ_LEN, D_MODEL)
    codes, _ = code(own, x)
    changed = x.clone()
    changed[:, 5] += 1.0
    others, _ = code(own, changed)
    assert others[:, :5].equal(codes[:, :5])
    assert not others[:, 6:].isclose(codes[:, 6:]).all()
    # Without any feature the predicted part stays.
    predicted = own.decode(torch.zeros_like(codes), x) - own.parameters["b_dec"]
    assert predicted.abs().amax(-1).gt(1e-3).double().mean() > 0.8


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("abstopk", {}),
        ("abstopk", {"rescale_acts_by_decoder_norm": True}),
        ("skip_transcoder", {}),
        ("gated", {"normalize_activations": "layer_norm"}),
        ("matching_pursuit", {}),
    ],
)
def test_controls_are_the_sae_with_other_features(kind: str, options: dict[str, Any]) -> None:
    """A permutation decodes renamed features; other rows are another W_dec. SAELens does the same."""
    sae = build(kind, **options)
    own = OracleSAE.read(sae)
    x = activations(2, SEQ_LEN, D_MODEL)
    codes, _ = code(own, x)
    permutation = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(0))
    renamed = torch.zeros_like(codes)
    for old, new in enumerate(permutation.tolist()):
        renamed[..., new] = codes[..., old]
    rows = activations(D_SAE, D_MODEL, seed=9)
    skip = x @ sae.W_skip.T if "skip" in kind else 0.0
    with torch.no_grad():
        sae.encode(x)  # sets the normalisation that decode undoes
        expected = sae.decode(renamed) + skip
        torch.testing.assert_close(Control(permutation=permutation).decode(own, codes, x), expected)
        sae.encode(x)
        sae.W_dec.data = rows
        expected = sae.decode(codes) + skip
        torch.testing.assert_close(Control(decoder=rows).decode(own, codes, x), expected)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(["abstopk", "gated", "topk_skip_transcoder", "matching_pursuit"]),
    coding=st.sampled_from(["native", "topk:3"]),
    restricted=st.booleans(),
)
def test_no_smaller_change_of_the_scores_selects_another_set(
    seed: int, kind: str, coding: str, restricted: bool
) -> None:
    """Whatever moves every score by less than half the gap leaves the set of active features."""
    sae = build(kind)
    own = OracleSAE.read(sae)
    x = activations(1, 4, D_MODEL, seed=seed)
    pool = some_pool() if restricted else None
    codes, gap = code(own, x, coding, pool)
    generator = torch.Generator().manual_seed(seed + 1)
    moved = torch.rand(D_SAE, generator=generator, dtype=torch.float64) - 0.5
    for token in range(x.shape[1]):
        at = x[:, token : token + 1]
        if kind == "matching_pursuit":
            # Rows have norm 1: a score moves by no more than the input does, a step's input too.
            direction = moved[:D_MODEL] / moved[:D_MODEL].norm()
            others, _ = code(own, at + 0.02 * gap[0, token] * direction, coding, pool)
        else:
            names = ("b_gate", "b_mag") if kind == "gated" else ("b_enc",)
            shifted = {n: own.parameters[n] + 0.99 * gap[0, token] * moved for n in names}
            other = dataclasses.replace(own, parameters=own.parameters | shifted)
            others, _ = code(other, at, coding, pool)
        assert (others != 0).equal(codes[:, token : token + 1] != 0)


def test_unknown_saes_are_refused() -> None:
    sae = build("topk")
    sae.cfg.normalize_activations = "expected_average_only_in"
    with pytest.raises(ValueError, match="expected_average_only_in"):
        OracleSAE.read(sae)
    sae = build("topk")
    sae.cfg.reshape_activations = "hook_q"
    with pytest.raises(ValueError, match="hook_q"):
        OracleSAE.read(sae)

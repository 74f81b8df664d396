"""The oracle is checked before it is believed: against SAELens, TransformerLens and hand-made cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import JumpReLUSAE, StandardSAE, TopKSAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAEConfig
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.utilities.lm_utils import lm_cross_entropy_loss

from .float64_oracle import (
    calibrate,
    evaluate,
    float64_copy,
    smallest_gap,
    smoothed_loss_bits,
)
from .oracle_sae import OracleSAE, _selection_gap, code, keep_largest, parse_coding

D_MODEL, D_SAE, VOCAB, LENGTH, LAYERS = 32, 80, 97, 12, 3
HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def model() -> HookedTransformer:
    cfg = HookedTransformerConfig(
        n_layers=LAYERS,
        d_model=D_MODEL,
        d_head=8,
        n_heads=4,
        d_vocab=VOCAB,
        n_ctx=LENGTH,
        act_fn="gelu",
        normalization_type="LN",
        seed=3,
        device="cpu",
    )
    return float64_copy(HookedTransformer(cfg))


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    drawn = torch.randint(1, VOCAB, (7, LENGTH), generator=torch.Generator().manual_seed(5))
    drawn[:, 0] = 0
    return drawn


def build(kind: str, seed: int = 0, d_sae: int = D_SAE, **options: Any) -> Any:
    """Return a random SAELens SAE of float64 parameters."""
    generator = torch.Generator().manual_seed(seed)
    common = {
        "d_in": D_MODEL,
        "d_sae": d_sae,
        "dtype": "float64",
        "metadata": SAEMetadata(hook_name=HOOK),
        **options,
    }
    if kind == "standard":
        sae: Any = StandardSAE(StandardSAEConfig(**common))
    elif kind == "topk":
        sae = TopKSAE(TopKSAEConfig(**{"k": 6, **common}))
    else:
        sae = JumpReLUSAE(JumpReLUSAEConfig(**common))

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    sae.W_enc.data = draw(D_MODEL, d_sae) / math.sqrt(D_MODEL)
    sae.W_dec.data = draw(d_sae, D_MODEL) / math.sqrt(d_sae)
    sae.b_enc.data = 0.1 * draw(d_sae)
    sae.b_dec.data = 0.1 * draw(D_MODEL)
    if kind == "jumprelu":
        sae.threshold.data = 0.4 * draw(d_sae)
    return sae


def replace_by(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a TransformerLens hook that applies ``function``."""

    def hook_function(x: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001 - passed by name
        return function(x)

    return hook_function


VARIANTS = [
    ("standard", {}),
    ("standard", {"normalize_activations": "layer_norm"}),
    ("standard", {"apply_b_dec_to_input": False}),
    ("jumprelu", {}),
    ("jumprelu", {"normalize_activations": "constant_norm_rescale"}),
    ("topk", {}),
    ("topk", {"rescale_acts_by_decoder_norm": False}),
    ("topk", {"rescale_acts_by_decoder_norm": True, "normalize_activations": "layer_norm"}),
]


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_codes_and_reconstruction_equal_the_sae(kind: str, options: dict[str, Any]) -> None:
    sae = build(kind, **options)
    x = torch.randn(50, D_MODEL, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    own = OracleSAE.read(sae)
    codes, _ = code(own, x)
    with torch.no_grad():
        torch.testing.assert_close(codes, sae.encode(x), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(own.decode(codes, x), sae.forward(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_splice_equals_sae_forward_in_the_model(
    kind: str, options: dict[str, Any], model: HookedTransformer, tokens: torch.Tensor
) -> None:
    sae = build(kind, **options)
    got = evaluate(model, sae, torch.ones(D_SAE, dtype=torch.bool), tokens)
    with torch.no_grad():
        base = model(tokens)
        spliced = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, replace_by(sae.forward))])
    # A smoothing of zero is the cross-entropy that TransformerLens computes.
    plain = smoothed_loss_bits(base, tokens, 0.0) * math.log(2.0)
    theirs = lm_cross_entropy_loss(base, tokens, per_token=True).mean(-1)
    torch.testing.assert_close(plain, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.loss_base, smoothed_loss_bits(base, tokens, 0.5))
    torch.testing.assert_close(got.loss_sae, smoothed_loss_bits(spliced, tokens, 0.5))
    assert got.loss_pool.equal(got.loss_sae)
    assert not got.violation.any()
    assert (got.kl > 0).all()


def test_loss_by_hand() -> None:
    logits = torch.log(
        torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [1.0, 1.0, 1.0]]])
    ).double()
    sequence = torch.tensor([[0, 1, 2]])
    expected = (-math.log2(0.5 * 0.25 + 0.5 / 3) - math.log2(0.5 * 0.1 + 0.5 / 3)) / 2
    assert smoothed_loss_bits(logits, sequence, 0.5).item() == pytest.approx(expected, abs=1e-7)


def test_loss_range_and_uniform() -> None:
    uniform = torch.zeros(1, 4, VOCAB, dtype=torch.float64)
    sequence = torch.tensor([[0, 5, 9, 11]])
    assert smoothed_loss_bits(uniform, sequence, 0.5).item() == pytest.approx(math.log2(VOCAB))
    cap = math.log2(VOCAB / 0.5)
    width = math.log2(1 + VOCAB)
    sure = torch.full_like(uniform, -1e6)
    wrong = sure.clone()
    sure[0, [0, 1, 2], [5, 9, 11]] = 0.0
    wrong[..., 3] = 0.0
    assert smoothed_loss_bits(wrong, sequence, 0.5).item() == pytest.approx(cap)
    assert smoothed_loss_bits(sure, sequence, 0.5).item() == pytest.approx(cap - width)


def identity_sae() -> Any:
    sae = build("standard", d_sae=2 * D_MODEL)
    eye = torch.eye(D_MODEL, dtype=torch.float64)
    sae.W_enc.data = torch.cat([eye, -eye], dim=1)
    sae.W_dec.data = torch.cat([eye, -eye], dim=0)
    sae.b_enc.data.zero_()
    sae.b_dec.data.zero_()
    return sae


def test_perfect_sae_changes_nothing(model: HookedTransformer, tokens: torch.Tensor) -> None:
    got = evaluate(model, identity_sae(), torch.ones(2 * D_MODEL, dtype=torch.bool), tokens)
    assert got.loss_sae.equal(got.loss_base)
    assert got.kl.eq(0).all()
    assert got.mse.eq(0).all()
    assert got.gold_logprob_gap.eq(0).all()
    assert got.top1_agreement.eq(1).all()
    assert got.l0.eq(D_MODEL).all()


def test_empty_pool_is_the_decoder_bias(model: HookedTransformer, tokens: torch.Tensor) -> None:
    sae = build("jumprelu")
    got = evaluate(model, sae, torch.zeros(D_SAE, dtype=torch.bool), tokens)
    with torch.no_grad():
        constant = model.run_with_hooks(
            tokens, fwd_hooks=[(HOOK, replace_by(lambda x: sae.b_dec.expand_as(x)))]
        )
    torch.testing.assert_close(got.loss_pool, smoothed_loss_bits(constant, tokens, 0.5))
    assert got.violation.all()
    assert got.outside.equal(got.active)


@pytest.mark.parametrize("coding", ["native", "topk:4", "topk:64"])
@pytest.mark.parametrize("kind", ["standard", "topk", "jumprelu"])
def test_pool_of_its_own_tokens_is_never_violated(
    kind: str, coding: str, model: HookedTransformer, tokens: torch.Tensor
) -> None:
    sae = build(kind)
    seen = calibrate(model, sae, tokens, coding=coding)
    assert seen.counts.max() <= tokens.numel()
    got = evaluate(model, sae, seen.pool(), tokens, coding=coding)
    assert not got.violation.any()
    assert got.loss_pool.equal(got.loss_sae)
    assert got.active.sum() == seen.counts.sum()

    # A pool from one sequence: sequences without a violation still agree exactly, others may not.
    small = calibrate(model, sae, tokens[:1], coding=coding).pool()
    got = evaluate(model, sae, small, tokens, coding=coding)
    assert not got.violation[0]
    assert got.loss_pool[~got.violation].equal(got.loss_sae[~got.violation])
    assert got.violation.equal((got.outside > 0).any(-1))


def test_tau_pools_shrink(model: HookedTransformer, tokens: torch.Tensor) -> None:
    seen = calibrate(model, build("topk"), tokens)
    sizes = [int(seen.pool(tau).sum()) for tau in (1, 2, 5, 20)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]


def test_pool_masks_before_the_coding_rule() -> None:
    x = torch.randn(40, D_MODEL, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    pool = torch.rand(D_SAE, generator=torch.Generator().manual_seed(4)) < 0.5

    native = OracleSAE.read(build("topk", k=6, rescale_acts_by_decoder_norm=False))
    codes, _ = code(native, x, "native", pool)
    scores = native.scores(x)
    expected = keep_largest(torch.where(pool, scores.clamp(min=0), 0.0), 6)
    assert codes.equal(expected)
    assert (codes > 0).sum(-1).eq(6).all()  # the next in-pool features entered

    # topk:K works on what sae.encode returns: the SAE's own k comes first and nothing enters.
    outer, _ = code(native, x, "topk:6", pool)
    unrestricted, _ = code(native, x)
    assert outer.equal(torch.where(pool, unrestricted, 0.0))

    relu = OracleSAE.read(build("standard"))
    codes, _ = code(relu, x, "topk:6", pool)
    assert codes.equal(keep_largest(torch.where(pool, relu.scores(x).clamp(min=0), 0.0), 6))


def test_topk_keeps_positive_values_only() -> None:
    sae = build("standard")
    sae.b_enc.data.fill_(-2.0)  # few features survive
    x = torch.randn(30, D_MODEL, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    native, _ = code(OracleSAE.read(sae), x)
    top, _ = code(OracleSAE.read(sae), x, "topk:64")
    assert top.equal(native)
    assert (top > 0).sum(-1).max() < 64


def test_ties_go_to_the_lower_index() -> None:
    values = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0]])
    assert keep_largest(values, 3).tolist() == [[0.0, 3.0, 2.0, 3.0, 0.0, 0.0]]
    gap = _selection_gap(values, values, 3, torch.ones(1, 6, dtype=torch.bool))
    assert gap.item() == 0.0


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    k=st.sampled_from([None, 1, 3, 6, 9]),
    shift=st.sampled_from([-1.5, 0.0, 1.0]),
)
def test_selection_gap_is_exact(seed: int, k: int | None, shift: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    m = 9
    scores = torch.randn(1, m, generator=generator, dtype=torch.float64) + shift
    threshold = torch.rand(m, generator=generator, dtype=torch.float64)
    allowed = torch.rand(m, generator=generator) < 0.8
    allowed[0] = True
    gap = _selection_gap(scores, scores - threshold, k, allowed[None]).item()

    def selected(values: torch.Tensor) -> list[bool]:
        masked = torch.where(allowed & (values > threshold), values, 0.0)
        # Thresholds are not negative, so an active value is positive.
        return (keep_largest(masked, k or m) > 0)[0].tolist()

    def changes(size: float) -> bool:
        moved = [scores + sign * size * torch.eye(m)[j] for j in range(m) for sign in (-1, 1)]
        return any(selected(values) != selected(scores) for values in moved)

    assert not changes(gap * 0.999)
    assert changes(gap * 1.001)


def test_no_bos_leaves_position_zero(model: HookedTransformer, tokens: torch.Tensor) -> None:
    sae = build("topk")
    everything = torch.ones(D_SAE, dtype=torch.bool)
    got = evaluate(model, sae, everything, tokens, positions="no_bos")

    def rest(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, :1], sae.forward(x)[:, 1:]], dim=1)

    with torch.no_grad():
        expected = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, replace_by(rest))])
    torch.testing.assert_close(got.loss_sae, smoothed_loss_bits(expected, tokens, 0.5))
    assert got.squared_error[:, 0].isnan().all()
    assert got.active[:, 0].eq(0).all()
    torch.testing.assert_close(got.mse, got.squared_error[:, 1:].mean(-1))
    torch.testing.assert_close(got.l0, got.active[:, 1:].double().mean(-1))
    assert smallest_gap(got.gap).isfinite().all()

    whole = calibrate(model, sae, tokens)
    later = calibrate(model, sae, tokens, positions="no_bos")
    first = calibrate(model, sae, tokens[:, :1])
    assert whole.counts.equal(later.counts + first.counts)


def test_batch_size_changes_nothing(model: HookedTransformer, tokens: torch.Tensor) -> None:
    sae = build("jumprelu")
    pool = calibrate(model, sae, tokens[:2]).pool()
    assert pool.equal(calibrate(model, sae, tokens[:2], batch_size=1).pool())
    one = evaluate(model, sae, pool, tokens, batch_size=1)
    all_ = evaluate(model, sae, pool, tokens, batch_size=7)
    torch.testing.assert_close(one.loss_pool, all_.loss_pool, rtol=1e-12, atol=1e-12)
    assert one.outside.equal(all_.outside)


def test_padded_head_columns_are_cut(model: HookedTransformer, tokens: torch.Tensor) -> None:
    true_vocabulary = 90
    ids = tokens % true_vocabulary
    everything = torch.ones(D_SAE, dtype=torch.bool)
    cut = evaluate(model, build("topk"), everything, ids, d_vocab=true_vocabulary)
    silenced = float64_copy(model)
    silenced.unembed.b_U.data[true_vocabulary:] = -1e6
    whole = evaluate(silenced, build("topk"), everything, ids)
    torch.testing.assert_close(cut.kl, whole.kl, rtol=1e-9, atol=1e-12)
    # Same probabilities, but the smoothing must use the true vocabulary.
    assert not cut.loss_base.allclose(whole.loss_base)


def test_float32_model_is_copied_not_changed(tokens: torch.Tensor) -> None:
    cfg = HookedTransformerConfig(
        n_layers=2, d_model=D_MODEL, d_head=8, d_vocab=VOCAB, n_ctx=LENGTH, act_fn="relu",
        normalization_type="RMS", seed=0, device="cpu",
    )  # fmt: skip
    small = HookedTransformer(cfg)
    got = evaluate(small, build("topk"), torch.ones(D_SAE, dtype=torch.bool), tokens)
    assert small.W_E.dtype == torch.float32
    with torch.no_grad():
        loss = smoothed_loss_bits(small(tokens), tokens, 0.5)
    torch.testing.assert_close(got.loss_base, loss.double(), rtol=0, atol=1e-5)


def test_unknown_inputs_are_refused(model: HookedTransformer, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="topk:0"):
        parse_coding("topk:0")
    with pytest.raises(ValueError, match="last_token"):
        calibrate(model, build("topk"), tokens, positions="last_token")
    sae = build("topk")
    sae.cfg.metadata.hook_name = "blocks.1.hook_attn_out_"
    with pytest.raises((ValueError, AssertionError, KeyError)):
        calibrate(model, sae, tokens)

"""Divergences read out between blocks, and predictions token by token, against float64."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from oracle.float64_oracle import float64_copy

from engine.builders import (
    N_LAYERS,
    SEQ_LEN,
    gpt2_bridge,
    hooked_transformer,
    llama_bridge,
    make_sae,
    make_tokens,
)
from saelens_certify import CertifyConfig, CertifyError, certify
from saelens_certify.forward import ForwardEngine, Strategy
from saelens_certify.horizons import blocks_after
from saelens_certify.measure import calibrate, measure
from saelens_certify.predictions import token_outputs
from saelens_certify.saes import adapt
from saelens_certify.subject import Reader, Subject

CALIBRATION, EVALUATION = make_tokens(24, seed=1), make_tokens(30, seed=2)
HORIZONS = (0, 1, 2, 9)
CONFIG = CertifyConfig(
    seq_len=SEQ_LEN, tau=30, horizons=HORIZONS, permutations=1, progress=False, batch_tokens=7 * SEQ_LEN
)  # fmt: skip
HOOKS = ("blocks.0.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.0.hook_mlp_out",
         "blocks.1.attn.hook_z", "blocks.2.hook_resid_post")  # fmt: skip
AFTER = dict(zip(HOOKS, (3, 2, 2, 1, 0), strict=True))
MODELS = {"hooked": hooked_transformer, "llama": llama_bridge, "gpt2": gpt2_bridge}


def read_out(model, residual: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (bits) of the model's own head on a residual."""
    return model.unembed(model.ln_final(residual)).log_softmax(-1)[:, :-1] / math.log(2)


def exact_kl(model, sae, hook: str, tokens: torch.Tensor, block: int) -> np.ndarray:
    """KL(M || S∘M) at the input of a block (or after the last) by whole forwards of float64 copies."""

    def replace(activation, hook):  # noqa: ARG001 - TL's signature
        flat = activation.flatten(2).float()
        return sae(flat).reshape(activation.shape).double()

    at = (
        f"blocks.{block}.hook_resid_pre"
        if block < N_LAYERS
        else f"blocks.{N_LAYERS - 1}.hook_resid_post"
    )
    caught = []
    catch = (at, lambda activation, hook: caught.append(activation.clone()))  # noqa: ARG005
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[catch])
        model.run_with_hooks(tokens, fwd_hooks=[(hook, replace), catch])
        base, proxy = (read_out(model, residual) for residual in caught)
    return (base.exp2() * (base - proxy)).sum(-1).mean(-1).numpy()


@pytest.mark.parametrize("hook", HOOKS)
def test_divergences_between_blocks(hook) -> None:
    model, sae = hooked_transformer(), make_sae("topk", hook)
    found = certify(model, sae, calibration=CALIBRATION, evaluation=EVALUATION, config=CONFIG)
    exact = float64_copy(model)
    order = {tuple(row): i for i, row in enumerate(EVALUATION.tolist())}
    hashes = found.evidence.column("sequence").to_pylist()
    from saelens_certify.data import as_sequences

    named = as_sequences(EVALUATION, seq_len=SEQ_LEN, d_vocab=101)
    row_of = {
        own: order[tuple(row)] for own, row in zip(named.hashes, named.tokens.tolist(), strict=True)
    }
    tokens = EVALUATION[[row_of[own] for own in hashes]]
    assert blocks_after(ForwardEngine(model), hook) == AFTER[hook]
    for horizon in HORIZONS:
        block = min(N_LAYERS - AFTER[hook] + horizon, N_LAYERS)
        expected = exact_kl(exact, sae, hook, tokens, block)
        assert expected.mean() > 1e-3
        np.testing.assert_allclose(found.column(f"kl_h{horizon}"), expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(found.column("kl_h9"), found.column("kl"))


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("hook", ["blocks.0.hook_resid_post", "blocks.0.hook_mlp_out"])
def test_partial_forwards_read_out_the_same(name, hook) -> None:
    model, sae = MODELS[name](), make_sae("standard", hook)
    adapter = adapt(sae)
    columns = []
    for strategy in (Strategy(), Strategy(suffix=False), Strategy(fused_head=True)):
        engine = ForwardEngine(model, strategy)
        counted = calibrate(engine, {"sae": Reader(adapter, CONFIG)}, CALIBRATION, CONFIG)["sae"]
        subject = Subject.of(adapter, counted, CONFIG)
        columns.append(measure(engine, {"sae": subject}, EVALUATION, CONFIG)["sae"])
    for other in columns[1:]:
        for horizon in HORIZONS:
            key = f"kl_h{horizon}"
            np.testing.assert_allclose(other[key], columns[0][key], atol=1e-5, err_msg=key)
    assert not np.allclose(columns[0]["kl_h0"], columns[0]["kl_h1"])


def test_without_the_models_own_head_they_are_refused(monkeypatch) -> None:
    from saelens_certify import passes, preparation

    whole = Strategy(suffix=False, chunked_head=False)
    monkeypatch.setattr(preparation, "choose_strategy", lambda *_: whole)
    monkeypatch.setattr(passes, "calibrate", None)
    with pytest.raises(CertifyError, match=r"horizons=\(0, 1, 2, 9\) need"):
        certify(
            hooked_transformer(), make_sae(), calibration=CALIBRATION, evaluation=EVALUATION, config=CONFIG
        )  # fmt: skip


@pytest.mark.parametrize("value", [(1, 0), (1, 1), (-1,), (0.5,), "01", 3, (True,)])
def test_wrong_horizons_are_refused(value) -> None:
    with pytest.raises(CertifyError, match="horizons must be increasing numbers of blocks"):
        CertifyConfig(horizons=value)


@pytest.mark.parametrize("length", [None, 6])
def test_predictions_token_by_token(length) -> None:
    model = hooked_transformer()
    sae = make_sae("topk")
    adapter, engine = adapt(sae), ForwardEngine(model)
    counted = calibrate(engine, {"sae": Reader(adapter, CONFIG)}, CALIBRATION, CONFIG)["sae"]
    subject = Subject.of(adapter, counted, CONFIG, length)
    found = token_outputs(engine, {"sae": subject}, EVALUATION, CONFIG)["sae"]
    assert set(found) == {"base", "sae", "pool", "permuted_0"}
    exact, hook = float64_copy(model), adapter.output_hook
    pool = counted.pool(CONFIG.tau).mask

    def spliced(masked: bool):
        def replace(activation, hook):  # noqa: ARG001 - TL's signature
            x = activation.float()
            with torch.no_grad():
                pre = (
                    torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
                    if sae.cfg.apply_b_dec_to_input
                    else torch.relu(x @ sae.W_enc + sae.b_enc)
                )
                if masked:
                    pre = pre * pool
                top = pre.topk(sae.cfg.k, dim=-1)
                codes = torch.zeros_like(pre).scatter(-1, top.indices, top.values)
                return sae.decode(codes).double()

        return replace

    runs = {"base": [], "sae": [(hook, spliced(False))], "pool": [(hook, spliced(True))]}
    for name, hooks in runs.items():
        with torch.no_grad():
            logits = exact.run_with_hooks(EVALUATION, fwd_hooks=hooks)[:, :-1]
        expected = logits.log_softmax(-1).gather(-1, EVALUATION[:, 1:, None])[..., 0]
        torch.testing.assert_close(found[name].logprob, expected, atol=1e-4, rtol=1e-4)
        greedy = logits.argmax(-1) == EVALUATION[:, 1:]
        assert (found[name].greedy == greedy).double().mean() > 0.99
        assert greedy.any()
    assert not torch.equal(found["sae"].logprob, found["pool"].logprob)
    config = dataclasses.replace(CONFIG, batch_tokens=4 * SEQ_LEN)
    again = token_outputs(engine, {"sae": subject}, EVALUATION.flip(0), config)["sae"]
    for name, outputs in again.items():
        torch.testing.assert_close(
            outputs.logprob.flip(0), found[name].logprob, atol=1e-5, rtol=1e-5
        )

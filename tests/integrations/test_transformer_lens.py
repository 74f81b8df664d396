"""Proxies as hooks: the same numbers as the certificate, and right where SAELens's splice is not."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import numpy as np
import pytest
import torch
from engine.builders import (
    D_SAE,
    FACTORIES,
    MODEL_CLASSES,
    SEQ_LEN,
    TRANSCODERS,
    make_sae,
    make_tokens,
    of_class,
)
from torch import Tensor

from saelens_certify import CertifyConfig, CertifyError, certify
from saelens_certify.forward import resolve_hook
from saelens_certify.integrations.transformer_lens import proxy_hooks
from saelens_certify.saes import adapt

CONFIG = CertifyConfig(
    seq_len=SEQ_LEN, permutations=2, matched_permutations=2, random_decoders=2, tau=3,
    progress=False, seed=4,
)  # fmt: skip
VARIANTS = ("sae", "pool", "permuted_1", "matched_1", "random_decoder_1")
EVALUATION = make_tokens(20, seed=2)


def bits(logits: Tensor, tokens: Tensor, alpha: float = 0.5) -> Tensor:
    p = logits[:, :-1].double().softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return -torch.log2((1 - alpha) * p + alpha / logits.shape[-1]).mean(dim=1).detach()


def sae_of(kind: str, hook: str | None = None) -> Any:
    """An SAE at a hook that every model class has."""
    return make_sae(
        kind,
        hook or ("blocks.1.hook_resid_pre" if kind in TRANSCODERS else "blocks.1.hook_resid_post"),
    )


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
@pytest.mark.parametrize("kind", ["topk", "abstopk", "temporal", "jumprelu_skip_transcoder"])
def test_hooks_give_the_losses_of_the_certificate(kind, model_class) -> None:
    model, sae = of_class(model_class), sae_of(kind)
    certificate = certify(
        model, sae, calibration=make_tokens(12, seed=1), evaluation=EVALUATION, config=CONFIG
    )
    rows = {tuple(t): i for i, t in enumerate(EVALUATION.tolist())}
    by_hash = [rows[tuple(t)] for t in _evidence_tokens(certificate)]
    assert certificate.column("violation").any(), "the pool must matter"
    for variant in VARIANTS:
        hooks = proxy_hooks(sae, variant, certificate, model=model)
        logits = model.run_with_hooks(EVALUATION, fwd_hooks=hooks, return_type="logits")
        found = bits(logits, EVALUATION)[by_hash]
        expected = certificate.column(f"loss_{variant}")
        np.testing.assert_allclose(found.numpy(), expected, atol=2e-5, err_msg=variant)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def _evidence_tokens(certificate: Any) -> list[list[int]]:
    from saelens_certify.data import as_sequences

    sequences = as_sequences(EVALUATION, seq_len=SEQ_LEN, d_vocab=101).canonical
    assert list(sequences.hashes) == certificate.evidence.column("sequence").to_pylist()
    return sequences.tokens.tolist()


def test_a_certificate_brings_its_settings() -> None:
    """Coding rule, seed and positions of the certificate hold, without being named again."""
    model, sae = of_class("TransformerBridge"), sae_of("standard")
    config = dataclasses.replace(CONFIG, coding="topk:4", positions="no_bos", seed=9)
    certificate = certify(
        model, sae, calibration=make_tokens(12, seed=1), evaluation=EVALUATION, config=config
    )
    tokens = torch.tensor(_evidence_tokens(certificate))
    for variant in VARIANTS:
        hooks = proxy_hooks(sae, variant, certificate, model=model, tokens=tokens)
        found = bits(model.run_with_hooks(tokens, fwd_hooks=hooks), tokens)
        expected = certificate.column(f"loss_{variant}")
        np.testing.assert_allclose(found.numpy(), expected, atol=2e-5, err_msg=variant)
    with pytest.raises(CertifyError, match="positions='no_bos'; pass tokens="):
        proxy_hooks(sae, "pool", certificate)
    for other in (sae_of("topk"), make_sae("standard", "blocks.2.hook_resid_post")):
        with pytest.raises(
            CertifyError, match="not the certified SAE|other settings|certify it there"
        ):
            proxy_hooks(other, "pool", certificate, model=model, tokens=tokens)


def test_an_attached_sae_is_named() -> None:
    model, sae = of_class.__wrapped__("HookedSAETransformer"), sae_of("topk")
    model.add_sae(sae)
    with pytest.raises(CertifyError, match=r"an SAE is attached.*reset_saes\(\)"):
        proxy_hooks(sae, model=model)


@pytest.mark.parametrize("kind", sorted(set(FACTORIES) - set(TRANSCODERS) - {"temporal"}))
def test_splice_is_that_of_sae_lens_where_that_is_right(kind) -> None:
    model, sae = of_class("HookedSAETransformer"), sae_of(kind)
    ours = model.run_with_hooks(EVALUATION, fwd_hooks=proxy_hooks(sae))
    theirs = model.run_with_saes(EVALUATION, saes=[sae])
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("model_class", ["HookedSAETransformer", "SAETransformerBridge"])
@pytest.mark.parametrize("kind", ["skip_transcoder", "jumprelu_skip_transcoder", "temporal"])
def test_splice_is_right_where_that_of_sae_lens_is_not(kind, model_class) -> None:
    """SAELens runs decode(encode(x)), which leaves out skip terms and what is predicted from context."""
    model, sae = of_class.__wrapped__(model_class), sae_of(kind)  # a model for this test only
    captured: dict[str, Tensor] = {}

    def note(x: Tensor, hook: Any) -> None:  # noqa: ARG001
        captured["x"] = x

    def forward(_y: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
        return sae.forward(captured["x"])

    adapter = adapt(sae)
    by_hand = [
        (resolve_hook(model, adapter.input_hook), note),
        (resolve_hook(model, adapter.output_hook), forward),
    ]
    expected = model.run_with_hooks(EVALUATION, fwd_hooks=by_hand)
    ours = model.run_with_hooks(EVALUATION, fwd_hooks=proxy_hooks(sae, model=model))
    theirs = model.run_with_saes(EVALUATION, saes=[sae])
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=1e-4)
    assert float((theirs - expected).detach().abs().max()) > 0.1


def test_a_transcoder_whose_input_did_not_fire_is_an_error() -> None:
    """SAELens then encodes the output activation without a word."""
    sae = make_sae("transcoder", "blocks.1.hook_mlp_in")
    model = of_class("HookedSAETransformer")
    model.run_with_saes(EVALUATION, saes=[sae])
    with pytest.raises(CertifyError, match=r"blocks\.1\.hook_mlp_in.*did not fire"):
        model.run_with_hooks(EVALUATION, fwd_hooks=proxy_hooks(sae))
    model.set_use_hook_mlp_in(True)
    try:
        model.run_with_hooks(EVALUATION, fwd_hooks=proxy_hooks(sae))
    finally:
        model.set_use_hook_mlp_in(False)


def test_names_that_a_sae_bridge_has_forgotten() -> None:
    """There ``run_with_hooks`` leaves a hook on an alias out without a word."""
    model, sae = of_class("SAETransformerBridge"), sae_of("topk")
    clean = model(EVALUATION)
    unnamed = model.run_with_hooks(EVALUATION, fwd_hooks=proxy_hooks(sae))
    torch.testing.assert_close(unnamed, clean, atol=0, rtol=0)
    named = model.run_with_hooks(EVALUATION, fwd_hooks=proxy_hooks(sae, model=model))
    expected = of_class("TransformerBridge").run_with_hooks(EVALUATION, fwd_hooks=proxy_hooks(sae))
    torch.testing.assert_close(named, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(CertifyError, match="no hook 'blocks.7.hook_resid_post'"):
        proxy_hooks(make_sae("topk", "blocks.7.hook_resid_post"), model=model)


def test_a_hook_that_sae_lens_has_left_dead_is_refused() -> None:
    """On a SAETransformerBridge the hook point of a removed SAE never fires again."""
    model, sae = of_class.__wrapped__("SAETransformerBridge"), sae_of("topk")
    model.run_with_saes(EVALUATION, saes=[sae])
    with pytest.raises(CertifyError, match="stays dead"):
        certify(
            model, sae, calibration=make_tokens(12, seed=1), evaluation=EVALUATION, config=CONFIG
        )


def test_some_positions_only() -> None:
    model, sae = of_class("TransformerBridge"), sae_of("topk")
    coded = torch.ones(EVALUATION.shape, dtype=torch.bool)
    coded[:, :4] = False
    hooks = proxy_hooks(sae, coded=coded)
    _, clean = model.run_with_cache(EVALUATION)
    seen: dict[str, Tensor] = {}

    def look(x: Tensor, hook: Any) -> None:  # noqa: ARG001
        seen["x"] = x

    model.run_with_hooks(EVALUATION, fwd_hooks=[*hooks, ("blocks.2.hook_resid_pre", look)])
    before = clean["blocks.1.hook_resid_post"]
    torch.testing.assert_close(seen["x"][:, :4], before[:, :4])
    expected = adapt(sae).reconstruct(before)[:, 4:]
    torch.testing.assert_close(seen["x"][:, 4:], expected, atol=1e-4, rtol=1e-4)


def test_threads_do_not_share_a_transcoder_s_input() -> None:
    model, sae = of_class("HookedTransformer"), sae_of("skip_transcoder")
    hooks = dict(proxy_hooks(sae))
    note, replace = hooks["blocks.1.hook_resid_pre"], hooks["blocks.1.hook_mlp_out"]
    inputs = [torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    expected = [adapt(sae).reconstruct(x) for x in inputs]
    barrier = threading.Barrier(len(inputs))
    found: dict[int, Tensor | None] = {}

    def work(i: int) -> None:
        note(inputs[i], hook=None)
        barrier.wait()  # every input is noted before any is used
        found[i] = replace(torch.zeros(1, 3, 32), hook=None)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, x_hat in enumerate(expected):
        torch.testing.assert_close(found[i], x_hat)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "pools"}, "unknown variant 'pools'.*'permuted_0'"),
        ({"variant": "pool"}, "needs pool="),
        ({"variant": None}, "unknown variant None"),
        ({"variant": "pool", "pool": torch.ones(5).bool()}, rf"\(5,\) entries, the SAE {D_SAE}"),
        ({"variant": "pool", "pool": torch.arange(D_SAE)}, "int64 tensor.*boolean mask"),
        ({"variant": "pool", "pool": [1, 2]}, "pool is a list"),
        ({"seed": "x"}, "seed must be an integer, got 'x'"),
        ({"model": "gpt2"}, "model is a str"),
        ({"coding": "top"}, "unknown coding rule 'top'"),
    ],
)
def test_wrong_arguments(arguments, message) -> None:
    with pytest.raises(CertifyError, match=message):
        proxy_hooks(sae_of("topk"), **arguments)


def test_wrong_shapes() -> None:
    model = of_class("HookedTransformer")
    with pytest.raises(CertifyError, match="coded is a torch.bool tensor of shape"):
        model.run_with_hooks(
            EVALUATION, fwd_hooks=proxy_hooks(sae_of("topk"), coded=torch.ones(2, 2).bool())
        )
    narrow = make_sae("topk", d_in=16)
    with pytest.raises(CertifyError, match="width 32, the SAE expects 16"):
        model.run_with_hooks(EVALUATION, fwd_hooks=proxy_hooks(narrow))

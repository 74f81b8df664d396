"""What must not change a certificate: batches, parts, order, threads, operators, names of features."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from engine.builders import (
    D_SAE,
    SEQ_LEN,
    gpt2_bridge,
    hooked_transformer,
    llama_bridge,
    make_sae,
    make_tokens,
)
from saelens_certify import Certificate, CertifyConfig, as_sequences, build_info, certify

CALIBRATION, EVALUATION = make_tokens(24, seed=1), make_tokens(50, seed=2)
BASE = CertifyConfig(seq_len=SEQ_LEN, permutations=1, random_decoders=1, progress=False, tau=3)
MODELS = {"hooked": hooked_transformer, "llama": llama_bridge, "gpt2": gpt2_bridge}


def run(config=BASE, model="hooked", sae=None, calibration=None, evaluation=None) -> Certificate:
    return certify(
        MODELS[model](),
        make_sae() if sae is None else sae,
        calibration=CALIBRATION if calibration is None else calibration,
        evaluation=EVALUATION if evaluation is None else evaluation,
        config=config,
    )


def assert_same(a: Certificate, b: Certificate, atol: float = 1e-5) -> None:
    assert torch.equal(a.calibration.counts, b.calibration.counts)
    assert a.evidence.column("sequence").equals(b.evidence.column("sequence"))
    np.testing.assert_array_equal(a.column("violation"), b.column("violation"))
    np.testing.assert_array_equal(a.column("l0"), b.column("l0"))
    for name in a.evidence.column_names:
        if name.startswith(("loss_", "kl", "gold")):
            np.testing.assert_allclose(a.column(name), b.column(name), atol=atol, err_msg=name)
    for name, bound in a.bounds.items():
        assert abs(bound.value - b.bounds[name].value) < atol


@pytest.fixture(scope="module")
def reference() -> dict[str, Certificate]:
    return {name: run(model=name) for name in MODELS}


@settings(max_examples=12)
@given(
    batch=st.integers(1, 60),
    part=st.integers(1, 60),
    logits_mib=st.sampled_from([1, 64]),
    seed=st.integers(0, 2**16),
    model=st.sampled_from(sorted(MODELS)),
)
def test_batches_parts_and_order(reference, batch, part, logits_mib, seed, model) -> None:
    generator = torch.Generator().manual_seed(seed)
    shuffled = [t[torch.randperm(len(t), generator=generator)] for t in (CALIBRATION, EVALUATION)]
    config = dataclasses.replace(
        BASE, batch_tokens=batch * SEQ_LEN, part_sequences=part, logits_mib=logits_mib
    )
    found = run(config, model, calibration=shuffled[0], evaluation=shuffled[1])
    assert_same(reference[model], found)


def test_order_of_the_input_changes_no_bit(reference) -> None:
    found = run(calibration=CALIBRATION.flip(0), evaluation=EVALUATION.flip(0))
    for name in found.evidence.column_names:
        if name != "document":
            assert found.evidence.column(name).equals(reference["hooked"].evidence.column(name))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(reference, threads) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same(reference["hooked"], run())
    finally:
        torch.set_num_threads(before)


def test_native_and_torch_operators_give_the_same_certificate() -> None:
    assert build_info()["native"], "this machine has a compiler: the tests need the extension"
    for kind in ("topk", "standard", "jumprelu"):
        native, torch_only = (
            run(dataclasses.replace(BASE, impl=impl), sae=make_sae(kind))
            for impl in ("native", "torch")
        )
        assert_same(native, torch_only)
        np.testing.assert_array_equal(native.column("mse"), torch_only.column("mse"))


class _NoCompiledOperator(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.namespace != "saelens_certify", func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["topk", "standard", "jumprelu"])
def test_torch_operators_are_torch_alone(kind) -> None:
    config = dataclasses.replace(BASE, impl="torch", error_permutations=2)
    with _NoCompiledOperator():
        run(config, sae=make_sae(kind))
    with pytest.raises(AssertionError), _NoCompiledOperator():
        run(dataclasses.replace(config, impl="native"), sae=make_sae(kind))


@pytest.mark.parametrize("kind", ["topk", "standard", "jumprelu"])
def test_feature_order_does_not_matter(kind) -> None:
    config = dataclasses.replace(BASE, permutations=0, random_decoders=0)
    sae, renamed = make_sae(kind), make_sae(kind)
    order = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        renamed.W_enc.data = sae.W_enc.data[:, order].contiguous()
        renamed.W_dec.data = sae.W_dec.data[order].contiguous()
        renamed.b_enc.data = sae.b_enc.data[order].contiguous()
        if kind == "jumprelu":
            renamed.threshold.data = sae.threshold.data[order].contiguous()
    a, b = run(config, sae=sae), run(config, sae=renamed)
    assert torch.equal(a.calibration.counts[order], b.calibration.counts)
    for name in ("loss_sae", "loss_pool", "kl"):
        np.testing.assert_allclose(a.column(name), b.column(name), atol=1e-5)


def test_repeated_documents_count_once(reference) -> None:
    repeated = as_sequences(
        torch.cat([EVALUATION, EVALUATION[:7]]), seq_len=SEQ_LEN, d_vocab=101, on_duplicate="keep"
    )
    assert len(repeated) == len(EVALUATION) + 7
    assert_same(reference["hooked"], run(evaluation=repeated))


def test_pads_never_enter() -> None:
    pad = 1
    padded = torch.cat([EVALUATION, torch.full((len(EVALUATION), 5), pad)], dim=1)
    ragged = [row.tolist() for row in EVALUATION] + [[0, 5, 6]]
    for documents in (padded, ragged):
        found = run(evaluation=documents)
        assert found.measured.n_sequences == len(EVALUATION)
    assert_same(run(), run(evaluation=ragged))


def test_nothing_of_the_model_or_sae_is_changed() -> None:
    for build in MODELS.values():
        model, sae = build(), make_sae()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        weights = {k: v.clone() for k, v in sae.state_dict().items()}
        blocks = [dict(block.__dict__) for block in model.blocks]
        run_on = {"calibration": CALIBRATION, "evaluation": EVALUATION, "config": BASE}
        certify(model, sae, **run_on)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert all(torch.equal(v, weights[k]) for k, v in sae.state_dict().items())
        assert not any(point.fwd_hooks for point in model.hook_dict.values())
        assert all("forward" not in block.__dict__ or "forward" in seen
                   for block, seen in zip(model.blocks, blocks, strict=True))  # fmt: skip


def test_the_default_batch_follows_the_device():
    config = CertifyConfig()
    assert config.tokens_per_pass(torch.device("cpu")) == 1024
    assert config.tokens_per_pass(torch.device("cuda")) == 16384
    assert CertifyConfig(batch_tokens=7).tokens_per_pass(torch.device("cuda")) == 7
    # Logits as large as the head's weights, unless a limit is given.
    assert config.logits_tokens(d_model=2048, d_vocab=256_000) == 2048
    assert config.logits_tokens(d_model=64, d_vocab=4096) == 4096
    assert CertifyConfig(logits_mib=1).logits_tokens(d_model=2048, d_vocab=1024) == 256

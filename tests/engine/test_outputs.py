"""Predictions compared without logits, and errors of many permutations without forwards."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import pytest
import torch

from engine.builders import (
    D_SAE,
    SEQ_LEN,
    gpt2_bridge,
    hooked_transformer,
    llama_bridge,
    make_sae,
    make_tokens,
)
from saelens_certify import CertifyConfig, CertifyError
from saelens_certify.evidence import dump_table, to_table
from saelens_certify.forward import ForwardEngine, Strategy, choose_strategy
from saelens_certify.forward.head import plain_head
from saelens_certify.measure import calibrate, measure
from saelens_certify.proxies import all_features, feature_permutation, permuted, variants_of
from saelens_certify.saes import adapt
from saelens_certify.subject import Reader, Subject

MODELS = {"hooked": hooked_transformer, "llama": llama_bridge, "gpt2": gpt2_bridge}
HOOK = "blocks.1.hook_resid_post"
TOKENS = make_tokens(40, seed=5)
CONFIG = CertifyConfig(
    seq_len=SEQ_LEN, batch_tokens=9 * SEQ_LEN, permutations=2, random_decoders=1, tau=1,
    progress=False,
)  # fmt: skip


def measured(engine, sae, config=CONFIG, **more):
    adapter = adapt(sae)
    found = calibrate(engine, {"sae": Reader(adapter, config)}, TOKENS[:20], config)["sae"]
    variants = more.pop("variants", variants_of(adapter, config))
    subject = Subject(
        adapter, config, found.pool(config.tau), variants, found.mean_activations(),
        found.unigram_bits(config.alpha), **more,
    )  # fmt: skip
    return measure(engine, {"sae": subject}, TOKENS, config)["sae"]


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("impl", ["native", "torch"])
def test_without_logits_the_evidence_is_the_same(name, impl, monkeypatch) -> None:
    """Compiled, without logits, against logits and either kind of operators."""
    model, sae = MODELS[name](), make_sae()
    strategy = choose_strategy(model, TOKENS[:4], HOOK)
    assert strategy.fused_head
    with_logits = ForwardEngine(model, Strategy(True, True, fused_head=impl == "torch"))
    expected = measured(with_logits, sae, dataclasses.replace(CONFIG, impl=impl))
    violation = expected["violation"]
    assert violation.any(), "the case must have both kinds of sequences"
    assert not violation.all()
    engine = ForwardEngine(model, strategy)
    monkeypatch.setattr(engine, "logits", None)  # nobody may call it
    found = measured(engine, sae, dataclasses.replace(CONFIG, impl="native"))
    assert found.keys() == expected.keys()
    for column, values in found.items():
        np.testing.assert_allclose(values, expected[column], atol=2e-6, err_msg=column)
    same = found["loss_pool"] == found["loss_sae"]
    assert same[~violation].all()


def test_softcapped_head_without_logits() -> None:
    model = hooked_transformer(output_logits_soft_cap=5.0)
    strategy = choose_strategy(model, TOKENS[:4], HOOK)
    assert strategy.fused_head
    found = measured(ForwardEngine(model, strategy), make_sae())
    expected = measured(ForwardEngine(model, Strategy(False, False)), make_sae())
    for column, values in found.items():
        np.testing.assert_allclose(values, expected[column], atol=1e-5, err_msg=column)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_keep_the_models_own_logits(dtype) -> None:
    model = hooked_transformer(dtype=dtype)
    assert plain_head(model) is None
    assert not choose_strategy(model, TOKENS[:4], HOOK).fused_head


@contextlib.contextmanager
def hooked_output(model):
    model.unembed.hook_out.add_hook(lambda x, hook: x * 2)  # noqa: ARG005 - TL's signature
    yield
    model.unembed.hook_out.remove_hooks()


@contextlib.contextmanager
def torch_hook(model):
    inner = getattr(model.unembed, "original_component", None) or model.unembed
    handle = inner.register_forward_hook(lambda _module, _inputs, output: output * 2)
    yield
    handle.remove()


@contextlib.contextmanager
def replaced_forward(model):
    inner = getattr(model.unembed, "original_component", None) or model.unembed
    own = inner.forward
    inner.forward = lambda x: own(x) * 2
    yield
    del inner.forward


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("attach", [hooked_output, torch_hook, replaced_forward])
def test_what_is_attached_to_the_unembedding_takes_part(name, attach) -> None:
    model = MODELS[name]()
    strategy = choose_strategy(model, TOKENS[:4], HOOK)
    engine = ForwardEngine(model, strategy)
    plain = measured(engine, make_sae())
    with attach(model):
        assert plain_head(model) is None
        assert engine.plain_head() is None
        found = measured(engine, make_sae())
        expected = measured(ForwardEngine(model, Strategy(False, False)), make_sae())
        assert not choose_strategy(model, TOKENS[:4], HOOK).fused_head
    assert engine.plain_head() is not None
    np.testing.assert_allclose(found["loss_sae"], expected["loss_sae"], atol=1e-5)
    assert np.abs(found["loss_sae"] - plain["loss_sae"]).max() > 1e-2


def test_a_model_that_does_more_than_its_head_keeps_logits(monkeypatch) -> None:
    model = hooked_transformer()
    whole = type(model).forward

    def forward(self, *args, **kwargs):
        out = whole(self, *args, **kwargs)
        return out * 0.5 if kwargs.get("return_type") == "logits" else out

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.warns(UserWarning, match="whole forwards"):
        strategy = choose_strategy(model, TOKENS[:4], HOOK)
    assert not strategy.fused_head
    assert strategy.fused_difference is not None
    assert strategy.fused_difference > 1e-2


@pytest.mark.parametrize("impl", ["native", "torch"])
@pytest.mark.parametrize("normalisation", ["none", "layer_norm", "constant_norm_rescale"])
def test_error_permutations_equal_single_variants(normalisation, impl) -> None:
    model = hooked_transformer()
    sae = make_sae("topk", normalize_activations=normalisation)
    engine = ForwardEngine(model, choose_strategy(model, TOKENS[:4], HOOK))
    orders = torch.stack([feature_permutation(D_SAE, 3, r) for r in range(4)])
    config = dataclasses.replace(CONFIG, seed=3, positions="no_bos", impl=impl)
    singles = (all_features(), *(permuted(D_SAE, 3, r) for r in range(4)))
    expected = measured(engine, sae, config, variants=singles)
    found = measured(engine, sae, config, variants=(all_features(),), error_permutations=orders)
    assert "loss_permuted_0" not in found
    for key in ("mse", "mse_no_first"):
        several = found[f"{key}_error_permutations"]
        assert several.shape == (len(TOKENS), 4)
        assert several.dtype == np.float64
        for r in range(4):
            single = expected[f"{key}_permuted_{r}"]
            rtol = 1e-12 if normalisation == "none" else 1e-5
            np.testing.assert_allclose(several[:, r], single, rtol=rtol)
    for key, values in found.items():
        if "error_permutations" not in key:
            np.testing.assert_allclose(values, expected[key], atol=1e-6, err_msg=key)


def test_error_permutations_in_the_evidence() -> None:
    engine = ForwardEngine(hooked_transformer())
    orders = torch.stack([feature_permutation(D_SAE, 0, r) for r in range(3)])
    columns = measured(engine, make_sae(), variants=(all_features(),), error_permutations=orders)
    names = [str(i) for i in range(len(TOKENS))]
    table = to_table(names, names, columns)
    stored = np.array(table.column("mse_error_permutations").to_pylist())
    np.testing.assert_array_equal(stored, columns["mse_error_permutations"])
    assert dump_table(table) == dump_table(to_table(names, names, columns))
    none = measured(engine, make_sae(), variants=(all_features(),), error_permutations=orders[:0])
    assert none["mse_error_permutations"].shape == (len(TOKENS), 0)
    with pytest.raises(CertifyError, match="permutations has shape"):
        measured(engine, make_sae(), error_permutations=orders[:, 1:])

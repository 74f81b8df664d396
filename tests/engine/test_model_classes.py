"""The same weights in each model class, in other precisions, and models that others have touched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from engine.builders import (
    FACTORIES,
    MODEL_CLASSES,
    SEQ_LEN,
    TRANSCODERS,
    make_sae,
    make_tokens,
    of_class,
)
from saelens_certify import Certificate, CertifyConfig, CertifyError, certify, ops

CONFIG = CertifyConfig(seq_len=SEQ_LEN, permutations=1, random_decoders=1, tau=30, progress=False)
CALIBRATION, EVALUATION = make_tokens(16, seed=1), make_tokens(24, seed=2)


def run(model: Any, sae: Any, config: CertifyConfig = CONFIG) -> Certificate:
    return certify(model, sae, calibration=CALIBRATION, evaluation=EVALUATION, config=config)


def sae_of(kind: str) -> Any:
    return make_sae(kind, "blocks.1.ln2.hook_normalized" if kind in TRANSCODERS else HOOKS[0])


HOOKS = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_pre", "blocks.1.attn.hook_z",
         "blocks.0.hook_mlp_out", "blocks.1.hook_attn_out", "blocks.2.ln2.hook_normalized")  # fmt: skip


@pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("what", [*sorted(FACTORIES), *HOOKS])
def test_every_model_class_gives_the_same_certificate(what, family) -> None:
    """Kinds at their usual hook, and one kind at every hook; 1e-3 bits, float32."""
    sae = sae_of(what) if what in FACTORIES else make_sae("topk", what)
    reference = run(of_class("HookedTransformer", family), sae)
    assert 0 < reference.measured.eta <= 1
    for model_class in MODEL_CLASSES[1:]:
        found = run(of_class(model_class, family), sae)
        for name, bound in reference.bounds.items():
            assert abs(found.bounds[name].value - bound.value) < 1e-3, (model_class, name)
        assert abs(found.measured.gap - reference.measured.gap) < 1e-3
        for name, control in reference.controls.items():
            assert abs(found.controls[name]["gap"] - control["gap"]) < 1e-3


@pytest.mark.parametrize("model_class", ["HookedTransformer", "TransformerBridge"])
@pytest.mark.parametrize("sae_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(model_class, model_dtype, sae_dtype) -> None:
    kinds = ("topk", "gated", "jumprelu_skip_transcoder", "temporal")
    for kind in kinds:
        sae = sae_of(kind).to(sae_dtype)
        exact = run(of_class(model_class), sae)
        rounded = run(of_class(model_class, dtype=model_dtype), sae)
        assert rounded.manifest["model"]["dtype"] == str(model_dtype).removeprefix("torch.")
        assert rounded.manifest["sae"]["dtype"] == str(sae_dtype).removeprefix("torch.")
        # The model in 16 bits is another model; means over sequences stay near.
        assert abs(rounded.measured.risk_base - exact.measured.risk_base) < 0.02
        assert abs(rounded.measured.risk_sae - exact.measured.risk_sae) < 0.1
        assert np.isfinite(rounded.column("kl")).all()


@pytest.mark.parametrize("model_class", ["HookedSAETransformer", "SAETransformerBridge"])
@pytest.mark.parametrize("kind", ["topk", "transcoder"])
def test_attached_saes_are_refused(model_class, kind) -> None:
    model = of_class.__wrapped__(model_class)
    model.add_sae(make_sae(kind))
    with pytest.raises(CertifyError, match=r"reset_saes\(\)|reset_hooks"):
        run(model, make_sae("topk", "blocks.2.hook_resid_pre"))
    assert list(model.acts_to_saes), "it stays attached"


class Interrupted(Exception):
    """Raised in the middle of a run."""


@pytest.mark.parametrize("model_class", MODEL_CLASSES)
@pytest.mark.parametrize("where", ["decode", "topk_encode", "pair_stats"])
def test_nothing_is_left_changed_by_an_exception(model_class, where, monkeypatch) -> None:
    model = of_class(model_class)
    sae = make_sae(
        "topk", "blocks.1.attn.hook_z",
        reshape_activations="hook_z", normalize_activations="layer_norm",
    )  # fmt: skip
    original, calls = getattr(ops, where), []

    def fails_later(*args: Any, **kwargs: Any) -> Any:
        calls.append(where)
        if len(calls) > 4:
            raise Interrupted
        return original(*args, **kwargs)

    weights = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = [(block, dict(vars(block))) for block in model.blocks]
    of_sae, config = dict(vars(sae)), sae.cfg.to_dict()
    hook_names = set(model.hook_dict)
    random_state = torch.get_rng_state()
    monkeypatch.setattr(ops, where, fails_later)
    config_of_run = CertifyConfig(
        seq_len=SEQ_LEN, progress=False, batch_tokens=4 * SEQ_LEN, impl="torch", permutations=1
    )
    with pytest.raises(Interrupted):
        run(model, sae, config_of_run)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert all(vars(block).keys() == before.keys() for block, before in attributes)
    assert set(model.hook_dict) == hook_names
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    assert vars(sae).keys() == of_sae.keys()
    assert all(vars(sae)[name] is value for name, value in of_sae.items())
    assert sae.cfg.to_dict() == config
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None and p.requires_grad for p in sae.parameters())

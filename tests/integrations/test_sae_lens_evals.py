"""`run_evals`: SAELens's groups are SAELens's, the certificate is `certify`'s, nothing else is touched."""

from __future__ import annotations

import contextlib
import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from engine.builders import N_LAYERS
from sae_lens.evals import EvalConfig, get_eval_everything_config
from sae_lens.training.activation_scaler import ActivationScaler

from integrations import sae_lens_world as world
from integrations.test_sae_lens_inference import assert_same, snapshot, training_sae
from saelens_certify import CertifyConfig, CertifyError, certify, demo
from saelens_certify.integrations.sae_lens import (
    evals,
    inference_form,
    run_evals,
    sequences_of_store,
)
from saelens_certify.integrations.sae_lens.activations_store import draw

CONFIG = CertifyConfig(seq_len=world.SEQ_LEN, progress=False, part_sequences=64)
NUMBERS: dict[str, Any] = {"n_calibration_sequences": 60, "n_evaluation_sequences": 40}
EVERYTHING = get_eval_everything_config(4, 2, 2)
GROUP = "faithfulness_certificate"


def _run(sae: Any, store: Any, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    settings = {"certify_config": CONFIG, **NUMBERS, **options}
    scaler = settings.pop("activation_scaler", ActivationScaler())
    return run_evals(sae, store, world.model(), scaler, EVERYTHING, **settings)


@pytest.mark.parametrize("streamed", [False, True])
def test_the_groups_of_sae_lens_are_the_same_numbers(streamed: bool) -> None:
    def fresh() -> Any:
        data = world.text_dataset()
        return world.store(data.to_iterable_dataset(num_shards=3) if streamed else data)

    sae, ours, theirs = world.trained_sae(), fresh(), fresh()
    for _ in range(2):  # the second evaluation of a store sees other tokens
        metrics, features = _run(sae, ours)
        wanted, wanted_features = sae_lens.run_evals(
            sae, theirs, world.model(), ActivationScaler(), EVERYTHING
        )
        assert_same({k: v for k, v in metrics.items() if k != GROUP}, wanted)
        assert str(features) == str(wanted_features)  # dead features have NaN
    assert torch.equal(ours.get_batch_tokens(6), theirs.get_batch_tokens(6))
    assert ours.n_dataset_processed == theirs.n_dataset_processed


def test_the_group_is_that_of_certify() -> None:
    sae, store = world.trained_sae(), world.store()
    group = _run(sae, store)[0][GROUP]
    calibration, evaluation = draw(store, CONFIG, n_calibration=60, n_evaluation=40)
    certificate = certify(
        world.model(), sae, calibration=calibration, evaluation=evaluation, config=CONFIG
    )
    assert group == certificate.to_metrics()[GROUP]
    assert group["n_sequences"] == 40
    assert all(isinstance(v, (int, float)) and math.isfinite(v) for v in group.values())


def test_documents_may_be_given() -> None:
    texts = world.texts(200, seed=3)
    group = _run(
        world.trained_sae(), world.store(), calibration=texts[:120], evaluation=texts[120:]
    )
    long = [text for text in texts[120:] if len(text.split()) >= world.SEQ_LEN - 1]
    assert group[0][GROUP]["n_sequences"] == len(long)


def test_another_store_may_be_given_for_evaluation() -> None:
    held_out = world.store(world.text_dataset(80, seed=8))
    with pytest.warns(UserWarning, match="were asked for"):
        group = _run(world.trained_sae(), world.store(), calibration=held_out, evaluation=held_out)
    assert 0 < group[0][GROUP]["n_sequences"] < 80


def test_an_unfolded_factor_is_folded_into_a_copy() -> None:
    sae = world.trained_sae(normalize_activations="expected_average_only_in")
    scaler = ActivationScaler(scaling_factor=1.7)
    before = snapshot(sae)
    group = _run(sae, world.store(), activation_scaler=scaler)[0][GROUP]
    assert_same(snapshot(sae), before)
    folded = world.trained_sae(normalize_activations="expected_average_only_in")
    folded.fold_activation_norm_scaling_factor(1.7)
    assert group == _run(folded, world.store())[0][GROUP]
    with pytest.raises(CertifyError, match="expected_average_only_in"):
        _run(sae, world.store())  # without its factor it is another SAE


def test_a_training_sae_is_certified_as_it_would_be_saved() -> None:
    sae = training_sae("batchtopk", normalize_activations="expected_average_only_in")
    sae.cfg.metadata.prepend_bos, sae.cfg.metadata.context_size = True, 16
    scaler = ActivationScaler(scaling_factor=0.6)
    store = world.store(sae=sae)
    group = _run(sae, store, activation_scaler=scaler)[0][GROUP]
    assert group == _run(inference_form(sae, scaler), store)[0][GROUP]


def test_sae_model_and_store_are_left_as_they_were() -> None:
    sae, model, store = world.trained_sae(), world.model(), world.store()
    store.get_batch_tokens(3)
    before = snapshot(sae)
    parameters = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = {name: len(point.fwd_hooks) for name, point in model.hook_dict.items()}
    mode, attributes = model.training, sorted(vars(store))
    random = torch.get_rng_state()
    _run(sae, store)
    assert torch.equal(torch.get_rng_state(), random)
    assert_same(snapshot(sae), before)
    assert_same(dict(model.state_dict()), parameters)
    assert {name: len(point.fwd_hooks) for name, point in model.hook_dict.items()} == hooks
    assert model.training == mode
    # What SAELens itself sets (it has no effect on its stream).
    assert sorted(set(vars(store)) - set(attributes)) == ["iterable_dataset"]


def _refusals() -> dict[str, dict[str, Any]]:
    return {
        "unfolded": {"sae": world.trained_sae(normalize_activations="expected_average_only_in")},
        "other hook": {"sae": world.trained_sae(hook=f"blocks.{N_LAYERS}.hook_resid_post")},
        "one side": {"calibration": world.texts(50)},
        "model_kwargs": {"model_kwargs": {"padding_side": "left"}},
        "too long": {"certify_config": CertifyConfig(seq_len=60, progress=False)},
        "numbers": {"n_calibration_sequences": 0},
    }


@pytest.mark.parametrize("given", [None, world.text_dataset(20)], ids=["None", "Dataset"])
@pytest.mark.parametrize("on_refusal", ["raise", "record"])
def test_what_is_no_store_is_refused_before_anything_is_measured(
    given: Any, on_refusal: Any, monkeypatch: Any
) -> None:
    measured: list[int] = []
    monkeypatch.setattr(evals, "certify", lambda *_, **__: measured.append(1))
    documents = {"calibration": world.texts(60), "evaluation": world.texts(60, seed=1)}
    for options in ({}, documents):
        wanted = f"must be an ActivationsStore, got {type(given).__name__}: .*from_sae"
        with pytest.raises(CertifyError, match=wanted):
            _run(world.trained_sae(), given, on_refusal=on_refusal, **options)
    assert not measured


def test_what_is_no_model_is_named() -> None:
    with pytest.raises(CertifyError, match="int has no .*; pass a HookedTransformer"):
        run_evals(world.trained_sae(), world.store(), 3, ActivationScaler())


@pytest.mark.parametrize("given", [{"coding": "native"}, {}])
@pytest.mark.parametrize("on_refusal", ["raise", "record"])
def test_settings_that_are_no_config(given: Any, on_refusal: Any) -> None:
    sae, store = world.trained_sae(), world.store()
    with pytest.raises(CertifyError, match="certify_config must be a CertifyConfig, got dict"):
        _run(sae, store, certify_config=given, on_refusal=on_refusal)
    with pytest.raises(CertifyError, match="config must be a CertifyConfig, got dict"):
        sequences_of_store(store, given)


@pytest.mark.parametrize("name", list(_refusals()))
def test_refusals_come_before_the_store_moves(name: str) -> None:
    options = _refusals()[name]
    sae = options.pop("sae", world.trained_sae())
    touched, untouched = world.store(sae=sae), world.store(sae=sae)
    before = snapshot(sae)
    with pytest.raises(CertifyError):
        _run(sae, touched, **options)
    assert_same(snapshot(sae), before)
    assert torch.equal(touched.get_batch_tokens(9), untouched.get_batch_tokens(9))


def test_a_refusal_can_be_recorded_beside_the_metrics_of_sae_lens() -> None:
    sae = world.trained_sae(normalize_activations="expected_average_only_in")
    with pytest.warns(UserWarning, match="no certificate: the SAE's normalize_activations"):
        metrics, _ = _run(sae, world.store(), on_refusal="record")
    assert list(metrics[GROUP]) == ["refused"]
    assert "expected_average_only_in" in metrics[GROUP]["refused"]
    assert metrics["reconstruction_quality"]
    with pytest.raises(CertifyError, match="on_refusal must be one of"):
        _run(sae, world.store(), on_refusal="ignore")


def test_hook_z_reshaping_is_back_when_sae_lens_raises(monkeypatch: Any) -> None:
    sae = world.trained_sae(hook="blocks.1.attn.hook_z", reshape_activations="hook_z")
    assert sae.hook_z_reshaping_mode
    store, model = world.store(sae=sae), world.model()

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(sae_lens.evals, "get_downstream_reconstruction_metrics", fails)
    with contextlib.suppress(RuntimeError):
        sae_lens.run_evals(sae, store, model, ActivationScaler(), EVERYTHING)
    assert not sae.hook_z_reshaping_mode  # SAELens leaves it off
    sae.turn_on_forward_pass_hook_z_reshaping()
    with pytest.raises(RuntimeError, match="no memory"):
        _run(sae, store)
    assert sae.hook_z_reshaping_mode


def test_arguments_are_those_of_sae_lens() -> None:
    ours = inspect.signature(run_evals).parameters
    theirs = inspect.signature(sae_lens.run_evals).parameters
    shared = [p for p in ours.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert [(p.name, p.kind, p.default) for p in shared] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]
    group = run_evals(
        world.trained_sae(), world.store(), world.model(), ActivationScaler(), EvalConfig(),
        certify_config=CONFIG, **NUMBERS,
    )  # fmt: skip
    assert set(group[0]) == {"token_stats", GROUP}


def test_a_killed_certificate_resumes_in_its_folder(tmp_path: Path) -> None:
    sae = world.trained_sae()
    first = _run(sae, world.store(), output=tmp_path / "run")[0][GROUP]
    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.parquet")}
    again = _run(sae, world.store(), output=tmp_path / "run")[0][GROUP]
    assert again == first
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.parquet")} == written
    assert written


def test_rows_asserted_to_be_documents_are_taken() -> None:
    from datasets import Dataset

    rows = [[0, *row[:15]] for row in world.ids(300) if len(row) >= 15]
    store = world.store(Dataset.from_dict({"tokens": rows}))
    with pytest.raises(CertifyError, match="one_document_per_row"):
        _run(world.trained_sae(), store)
    assert _run(world.trained_sae(), store, one_document_per_row=True)[0][GROUP]["eta"] >= 0
    assert len(sequences_of_store(store, CONFIG, one_document_per_row=True)) == len(rows)


def test_a_bridge_of_the_same_weights_gives_the_same_numbers() -> None:
    from datasets import Dataset

    sae, texts = demo.load_sae("layer4-topk"), demo.load_texts("evaluation")[:300]
    found = []
    for model_class in ("HookedTransformer", "TransformerBridge"):
        model: Any = demo.load_model(model_class)
        store = world.store_of(model, sae, Dataset.from_dict({"text": texts}), context_size=32)
        config = EvalConfig(
            batch_size_prompts=4, compute_ce_loss=True, n_eval_reconstruction_batches=1
        )
        options = {"certify_config": CertifyConfig(progress=False), **NUMBERS}
        found.append(run_evals(sae, store, model, ActivationScaler(), config, **options)[0])
    for group, numbers in found[0].items():
        assert found[1][group] == pytest.approx(numbers, abs=1e-3)

"""`register`: SAELens's own functions and command include the group, and come back as they were."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import sae_lens.evals
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.evals import EvalConfig
from sae_lens.training.activation_scaler import ActivationScaler

from integrations import sae_lens_world as world
from saelens_certify import CertifyConfig, CertifyError, verify
from saelens_certify.integrations.sae_lens import (
    evals,
    register,
    registration,
    run_evals,
    unregister,
)
from saelens_certify.integrations.sae_lens.registration import check_sae_lens

ORIGINAL = sae_lens.run_evals
GROUP = "faithfulness_certificate"
SETTINGS: dict[str, Any] = {
    "certify_config": CertifyConfig(seq_len=world.SEQ_LEN, progress=False),
    "n_calibration_sequences": 30,
    "n_evaluation_sequences": 20,
}


@pytest.fixture(autouse=True)
def as_installed() -> Any:
    yield
    sae_lens.run_evals = sae_lens.evals.run_evals = ORIGINAL
    # What a failed test left behind must not fail the next one.
    registration._installed.clear()
    registration._registrations.clear()


def _evaluate(**extra: Any) -> dict[str, Any]:
    return sae_lens.run_evals(
        world.trained_sae(), world.store(), world.model(), ActivationScaler(), EvalConfig(), **extra
    )[0]


def in_place() -> bool:
    return sae_lens.run_evals is ORIGINAL and sae_lens.evals.run_evals is ORIGINAL


def test_the_installed_version_is_known() -> None:
    check_sae_lens()
    assert in_place()


def test_the_group_is_there_and_goes() -> None:
    assert GROUP not in _evaluate()
    register(**SETTINGS)
    assert sae_lens.run_evals is sae_lens.evals.run_evals
    assert inspect.signature(sae_lens.run_evals) == inspect.signature(ORIGINAL)
    assert _evaluate()[GROUP]["n_sequences"] == 20
    assert _evaluate(n_evaluation_sequences=10)[GROUP]["n_sequences"] == 10
    unregister()
    assert in_place()
    assert GROUP not in _evaluate()


def test_our_own_run_evals_does_not_certify_twice(monkeypatch: Any) -> None:
    calls: list[Any] = []
    from saelens_certify.integrations.sae_lens import evals

    certify = evals.certify

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return certify(*args, **kwargs)

    monkeypatch.setattr(evals, "certify", counted)
    with register(**SETTINGS):
        arguments = (
            world.trained_sae(),
            world.store(),
            world.model(),
            ActivationScaler(),
            EvalConfig(),
        )
        run_evals(*arguments, **SETTINGS)
        assert len(calls) == 1
        sae_lens.run_evals(*arguments)
        assert len(calls) == 2


def test_registering_again_is_harmless_and_one_unregister_ends_all() -> None:
    register(**SETTINGS)
    wrapper = sae_lens.run_evals
    register(**{**SETTINGS, "n_evaluation_sequences": 11})
    assert sae_lens.run_evals is wrapper
    assert _evaluate()[GROUP]["n_sequences"] == 11
    unregister()
    assert in_place()
    unregister()  # and again
    assert in_place()


def test_blocks_nest_and_end_only_themselves() -> None:
    with register(**SETTINGS):
        with register(**{**SETTINGS, "n_evaluation_sequences": 12}):
            assert _evaluate()[GROUP]["n_sequences"] == 12
        assert _evaluate()[GROUP]["n_sequences"] == 20
    assert in_place()
    register(**SETTINGS)
    with register(**SETTINGS):
        pass
    assert GROUP in _evaluate()


def test_an_exception_inside_takes_it_back() -> None:
    with pytest.raises(KeyError), register(**SETTINGS):
        raise KeyError("inside")
    assert in_place()


@settings(max_examples=40)
@given(st.lists(st.sampled_from(["open", "close first", "close last", "unregister"]), max_size=12))
def test_the_functions_are_replaced_exactly_while_somebody_is_registered(steps: list[str]) -> None:
    alive: list[Any] = []
    for step in steps:
        if step == "open":
            alive.append(register(**SETTINGS))
        elif step == "unregister":
            unregister()
            alive.clear()
        elif alive:
            alive.pop(0 if step == "close first" else -1).close()
        assert in_place() == (not alive)
    unregister()
    assert in_place()


@pytest.mark.parametrize("where", [sae_lens, sae_lens.evals])
def test_somebody_elses_replacement_is_not_undone(where: Any) -> None:
    register(**SETTINGS)
    ours = where.run_evals

    @functools.wraps(ours)
    def theirs(*args: Any, **kwargs: Any) -> Any:
        metrics, features = ours(*args, **kwargs)
        return {**metrics, "theirs": {"x": 1.0}}, features

    where.run_evals = theirs
    with pytest.raises(CertifyError, match=f"{where.__name__}.run_evals was replaced by"):
        unregister()
    assert where.run_evals is theirs
    sae, store = world.trained_sae(), world.store()
    metrics = theirs(sae, store, world.model(), ActivationScaler(), EvalConfig())[0]
    assert "theirs" in metrics
    assert GROUP not in metrics  # no longer added
    register(**SETTINGS)  # works again where it was left
    assert GROUP in theirs(sae, store, world.model(), ActivationScaler(), EvalConfig())[0]
    where.run_evals = ours
    unregister()
    assert in_place()


def test_a_replacement_does_not_hide_an_exception() -> None:
    def replace_and_fail() -> None:
        with register(**SETTINGS):
            sae_lens.run_evals = lambda *_, **__: None  # type: ignore[assignment]
            raise KeyError("inside")

    with (
        pytest.warns(UserWarning, match="was replaced by"),
        pytest.raises(KeyError, match="inside"),
    ):
        replace_and_fail()


def _other_signature(sae: Any, store: Any) -> Any:
    return sae, store


def _other_caller(
    sae_regex_pattern: str, sae_block_pattern: str, n_eval_reconstruction_batches: int,
    n_eval_sparsity_variance_batches: int, eval_batch_size_prompts: int = 8, datasets: Any = None,
    dataset_trust_remote_code: bool = False, ctx_lens: Any = None, output_dir: str = "",
    verbose: bool = False,
) -> None:  # fmt: skip
    """Takes what `multiple_evals` takes and calls nothing."""


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "run_evals",
            _other_signature,
            r"sae_lens.evals.run_evals takes \('sae', 'store'\), expected",
        ),
        ("multiple_evals", None, "sae_lens.evals has no multiple_evals"),
        ("multiple_evals", _other_caller, "multiple_evals does not call run_evals by its name"),
        ("process_results", _other_signature, "sae_lens.evals.process_results takes"),
    ],
)
def test_a_changed_sae_lens_is_refused(
    name: str, value: Any, message: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(sae_lens.evals, name, value)
    before = sae_lens.evals.run_evals
    with pytest.raises(CertifyError, match=message) as caught:
        register(**SETTINGS)
    assert f"version {sae_lens.__version__}" in str(caught.value)
    assert sae_lens.evals.run_evals is before
    assert sae_lens.run_evals is ORIGINAL


def test_unequal_functions_are_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr(sae_lens, "run_evals", functools.wraps(ORIGINAL)(lambda *_: None))
    with pytest.raises(CertifyError, match="are not the same function"):
        register()


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(CertifyError, match=r"no settings \['n_sequences'\]"):
        register(n_sequences=3)
    assert in_place()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("on_refusal", "x", "on_refusal must be one of .* got 'x'"),
        ("certify_config", {}, "certify_config must be a CertifyConfig, got dict"),
        ("calibration", ["w2 w3"], "together, or neither"),
        ("n_calibration_sequences", 0, "n_calibration_sequences must be an integer of at least 1"),
        ("n_evaluation_sequences", "9", "n_evaluation_sequences must be an integer of at least 1"),
        ("one_document_per_row", "no", "one_document_per_row must be True or False, got 'no'"),
        ("output", 3, "output must be a folder, got 3"),
    ],
)
def test_wrong_values_are_refused_at_once(name: str, value: Any, message: str) -> None:
    with pytest.raises(CertifyError, match=message):
        register(**{name: value})
    assert in_place()
    # And where they are given beside what is registered, which records refusals.
    with register(**SETTINGS), pytest.raises(CertifyError, match=message):
        _evaluate(**{name: value})


def counted_certificates(monkeypatch: Any) -> list[Any]:
    """The folders of the certificates that are issued from now on."""
    folders: list[Any] = []
    certify = evals.certify

    def counted(*args: Any, **kwargs: Any) -> Any:
        folders.append(kwargs["output"])
        return certify(*args, **kwargs)

    monkeypatch.setattr(evals, "certify", counted)
    return folders


def test_a_refusal_is_recorded_unless_asked_otherwise() -> None:
    arguments = (world.store(), world.model(), ActivationScaler(), EvalConfig())
    bad = world.trained_sae(normalize_activations="expected_average_only_in")
    with register(**SETTINGS):
        with pytest.warns(UserWarning, match="no certificate"):
            metrics = sae_lens.run_evals(bad, *arguments)[0]
        assert list(metrics[GROUP]) == ["refused"]
    with register(**SETTINGS, on_refusal="raise"), pytest.raises(CertifyError, match="expected_av"):
        sae_lens.run_evals(bad, *arguments)


def test_output_is_a_root_with_a_folder_for_each_sae(tmp_path: Path) -> None:
    saes = [world.trained_sae(), world.trained_sae("jumprelu"), world.trained_sae()]
    with torch.no_grad():
        saes[2].W_dec.mul_(0.9)
    with register(**SETTINGS, output=tmp_path / "runs", on_refusal="raise"):
        found = [
            sae_lens.run_evals(sae, world.store(), world.model(), ActivationScaler(), EvalConfig())
            for sae in saes
        ]
    folders = list((tmp_path / "runs").iterdir())
    assert len(folders) == 3
    bounds = {verify(folder).certificate.to_metrics()[GROUP]["u_sae"] for folder in folders}
    assert bounds == {metrics[GROUP]["u_sae"] for metrics, _ in found}
    # A call that names its folder gets that folder.
    with register(**SETTINGS, output=tmp_path / "runs"):
        _evaluate(output=tmp_path / "mine")
    assert verify(tmp_path / "mine").n_sequences == 20
    with pytest.raises(CertifyError, match="is a file"):
        register(output=folders[0] / "manifest.json")
    assert in_place()


def test_what_is_certified_already_is_not_certified_again(monkeypatch: Any) -> None:
    """And what differs in anything that a certificate is about is."""
    issued = counted_certificates(monkeypatch)
    sae, model = world.trained_sae(), world.model()

    def group(n: int, dataset: Any = None, **extra: Any) -> dict[str, Any]:
        store = world.store(dataset, sae, context_size=extra.pop("context_size", 16))
        arguments = (sae, store, model, ActivationScaler(), EvalConfig())
        found = sae_lens.run_evals(*arguments, **extra)[0][GROUP]
        assert len(issued) == n
        return found

    with register(**SETTINGS, on_refusal="raise"):
        first = group(1)
        assert group(1, context_size=20) == first
        group(1)["eta"] = 5  # what is handed out is the caller's
        assert group(1) == first
        group(2, world.text_dataset(seed=3))
        assert group(2) == first
        config = dataclasses.replace(SETTINGS["certify_config"], permutations=1)
        assert group(3, certify_config=config)["u_sae"] == first["u_sae"]
        faster = dataclasses.replace(SETTINGS["certify_config"], batch_tokens=64)
        assert group(3, certify_config=faster) == first
        sae.cfg.k, sae.activation_fn.k = 7, 7
        assert group(4) != first
        sae.cfg.k, sae.activation_fn.k = 8, 8
        bias = model.blocks[0].mlp.b_out
        old = bias.detach().clone()
        with torch.no_grad():
            bias.add_(0.5)
            try:
                assert group(5) != first
            finally:
                bias.copy_(old)
        model.add_perma_hook("blocks.0.hook_resid_pre", lambda x, **_: x * 0)
        try:
            with pytest.raises(CertifyError, match="a hook is attached"):
                group(5)
        finally:
            model.reset_hooks(including_permanent=True)
    with register(**SETTINGS):
        group(6)  # another registration knows nothing of it

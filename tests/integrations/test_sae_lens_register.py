"""`register`: SAELens's own functions and command include the group, and come back as they were."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
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
from saelens_certify.config_help import setting_descriptions
from saelens_certify.integrations.sae_lens import (
    evals,
    register,
    registration,
    run_evals,
    unregister,
)
from saelens_certify.integrations.sae_lens.cli import main
from saelens_certify.integrations.sae_lens.registration import check_sae_lens

ORIGINAL = sae_lens.run_evals
GROUP = "faithfulness_certificate"
SETTINGS: dict[str, Any] = {
    "certify_config": CertifyConfig(seq_len=world.SEQ_LEN, progress=False),
    "n_calibration_sequences": 30,
    "n_evaluation_sequences": 20,
}


@pytest.fixture(autouse=True)
def _as_installed() -> Any:
    yield
    sae_lens.run_evals = sae_lens.evals.run_evals = ORIGINAL
    # What a failed test left behind must not fail the next one.
    registration._installed.clear()
    registration._registrations.clear()


def _evaluate(**extra: Any) -> dict[str, Any]:
    return sae_lens.run_evals(
        world.trained_sae(), world.store(), world.model(), ActivationScaler(), EvalConfig(), **extra
    )[0]


def _in_place() -> bool:
    return sae_lens.run_evals is ORIGINAL and sae_lens.evals.run_evals is ORIGINAL


def test_the_installed_version_is_known() -> None:
    check_sae_lens()
    assert _in_place()


def test_the_group_is_there_and_goes() -> None:
    assert GROUP not in _evaluate()
    register(**SETTINGS)
    assert sae_lens.run_evals is sae_lens.evals.run_evals
    assert inspect.signature(sae_lens.run_evals) == inspect.signature(ORIGINAL)
    assert _evaluate()[GROUP]["n_sequences"] == 20
    assert _evaluate(n_evaluation_sequences=10)[GROUP]["n_sequences"] == 10
    unregister()
    assert _in_place()
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
    assert _in_place()
    unregister()  # and again
    assert _in_place()


def test_blocks_nest_and_end_only_themselves() -> None:
    with register(**SETTINGS):
        with register(**{**SETTINGS, "n_evaluation_sequences": 12}):
            assert _evaluate()[GROUP]["n_sequences"] == 12
        assert _evaluate()[GROUP]["n_sequences"] == 20
    assert _in_place()
    register(**SETTINGS)
    with register(**SETTINGS):
        pass
    assert GROUP in _evaluate()


def test_an_exception_inside_takes_it_back() -> None:
    with pytest.raises(KeyError), register(**SETTINGS):
        raise KeyError("inside")
    assert _in_place()


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
        assert _in_place() == (not alive)
    unregister()
    assert _in_place()


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
    assert _in_place()


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
    assert _in_place()


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
    assert _in_place()
    # And where they are given beside what is registered, which records refusals.
    with register(**SETTINGS), pytest.raises(CertifyError, match=message):
        _evaluate(**{name: value})


def _counted(monkeypatch: Any) -> list[Any]:
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
    assert _in_place()


def test_what_is_certified_already_is_not_certified_again(monkeypatch: Any) -> None:
    """And what differs in anything that a certificate is about is."""
    issued = _counted(monkeypatch)
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


# SAELens's `multiple_evals` and its command, with releases of our own.


@pytest.fixture
def releases(monkeypatch: Any) -> dict[str, Any]:
    """Two SAEs of a release, one of them not certifiable, a dataset "words", without a network."""
    bad = world.trained_sae("topk", normalize_activations="expected_average_only_in")
    saes = {"one": world.trained_sae("topk"), "two": bad}
    for sae in saes.values():
        sae.cfg.metadata.model_name = "words-model"
    monkeypatch.setattr(world.model().cfg, "model_name", "words-model")

    def directory() -> list[tuple[str, str, float, float]]:
        return [("words", name, 0.0, 1.0) for name in saes]

    class Models:
        @staticmethod
        def from_pretrained_no_processing(*_: Any, **__: Any) -> Any:
            return world.model()

    store_of_sae = sae_lens.evals.ActivationsStore.from_sae

    def from_sae(model: Any, sae: Any, dataset: str, **options: Any) -> Any:
        assert dataset == "words"
        return store_of_sae(model, sae, world.text_dataset(), **options)

    monkeypatch.setattr(sae_lens.evals, "all_loadable_saes", directory)
    monkeypatch.setattr(sae_lens.evals, "HookedTransformer", Models)
    monkeypatch.setattr(sae_lens.evals.ActivationsStore, "from_sae", staticmethod(from_sae))
    monkeypatch.setattr(
        sae_lens.SAE, "from_pretrained", staticmethod(lambda **asked: saes[asked["sae_id"]])
    )
    return saes


ARGUMENTS = [
    "words", "ONE", "--batch_size_prompts", "4", "--n_eval_reconstruction_batches", "1",
    "--datasets", "words", "--ctx_lens", "16",
]  # fmt: skip
OURS = ["--seq_len", "12", "--n_calibration_sequences", "30", "--n_evaluation_sequences", "20"]


def _arguments(pattern: str, folder: Path, *more: str) -> list[str]:
    given = [pattern if item == "ONE" else item for item in ARGUMENTS]
    return [*given, "--output_dir", str(folder), *OURS, *more]


def test_multiple_evals_includes_the_group(releases: dict[str, Any], tmp_path: Path) -> None:
    releases["one"].cfg.metadata.model_from_pretrained_kwargs = {}
    with register(**SETTINGS):
        found = sae_lens.evals.multiple_evals(
            "words", "one", 1, 1, 4, datasets=["words"], ctx_lens=[16], output_dir=str(tmp_path)
        )
    assert [record["metrics"][GROUP]["n_sequences"] for record in found] == [20]


def test_the_command_writes_the_group_to_the_files_of_sae_lens(
    releases: dict[str, Any], tmp_path: Path
) -> None:
    # None here is what ends SAELens's own command for Gemma Scope.
    assert releases["one"].cfg.metadata.model_from_pretrained_kwargs is None
    with pytest.raises(TypeError, match="must be a mapping"):
        sae_lens.evals.multiple_evals(
            "words", "one", 1, 1, 4, datasets=["words"], ctx_lens=[16], output_dir=str(tmp_path)
        )
    with pytest.warns(UserWarning, match="no certificate"):
        code = main(_arguments("one|two", tmp_path))
    assert code == 0
    assert _in_place()
    records = json.loads((tmp_path / "all_eval_results.json").read_text())
    first, second = (record["metrics"] for record in records)
    assert first[GROUP]["n_sequences"] == 20
    assert first[GROUP]["u_sae"] > 0
    assert "expected_average_only_in" in second[GROUP]["refused"]
    assert first["reconstruction_quality"].keys() == second["reconstruction_quality"].keys()
    alone = json.loads((tmp_path / "words-one_16_words.json").read_text())
    assert alone["metrics"] == first
    header = (tmp_path / "all_eval_results.csv").read_text().splitlines()[0]
    assert f"metrics.{GROUP}.u_sae" in header.split(",")
    assert sae_lens.evals.SAE is sae_lens.SAE


@pytest.mark.filterwarnings("ignore:no certificate:UserWarning")
def test_every_sae_and_context_length_of_multiple_evals(
    releases: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    issued = _counted(monkeypatch)
    releases["three"] = world.trained_sae("jumprelu")
    releases["three"].cfg.metadata.model_name = "words-model"
    root = tmp_path / "certificates"
    given = _arguments("one|two|three", tmp_path / "results")
    place = given.index("--ctx_lens")
    given[place : place + 2] = ["--ctx_lens", "16", "20"]
    assert main([*given, "--certificates_dir", str(root)]) == 0
    records = json.loads((tmp_path / "results" / "all_eval_results.json").read_text())
    groups = {(r["sae_id"], r["eval_cfg"]["context_size"]): r["metrics"][GROUP] for r in records}
    assert len(groups) == 6
    for name in releases:
        assert groups[name, 16] == groups[name, 20]
    assert "refused" in groups["two", 16]
    assert groups["one", 16]["u_sae"] != groups["three", 16]["u_sae"]
    folders = sorted(root.iterdir())
    assert [verify(folder).n_sequences for folder in folders] == [20, 20]
    # The refused one is tried again with each context.
    assert len(issued) - len({*issued}) == 1


@pytest.mark.usefixtures("releases")
def test_the_command_heeds_the_flags_that_sae_lens_ignores(tmp_path: Path) -> None:
    everything = sae_lens.evals.get_eval_everything_config
    assert main(_arguments("one", tmp_path, "--compute_ce_loss")) == 0
    record = json.loads((tmp_path / "all_eval_results.json").read_text())[0]
    assert set(record["metrics"]) == {"model_performance_preservation", "token_stats", GROUP}
    assert sae_lens.evals.get_eval_everything_config is everything


@pytest.mark.usefixtures("releases")
def test_the_command_can_stop_at_a_refusal(tmp_path: Path, capsys: Any) -> None:
    assert main(_arguments("one|two", tmp_path, "--stop_on_refusal")) == 2
    assert "expected_average_only_in" in capsys.readouterr().err
    assert main(_arguments("one", tmp_path, "--coding", "top:3")) == 2
    assert _in_place()


def test_the_command_shows_both_sets_of_options(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "--n_evaluation_sequences" in shown
    assert "--n_eval_reconstruction_batches" in shown


@pytest.mark.usefixtures("releases")
def test_the_command_has_every_setting_of_a_certificate(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """As `saelens-certify run` has them: from `CertifyConfig`, with its descriptions."""
    from saelens_certify.integrations.sae_lens import cli

    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name, text in setting_descriptions().items():
        assert f"--{name} " in shown or f"--{name}," in shown
        # Lines are broken at hyphens too.
        assert text[:25].replace(" ", "") in shown.replace(" ", "")

    given: list[CertifyConfig] = []

    def noted(**settings: Any) -> Any:
        given.append(settings["certify_config"])
        return register(**settings)

    monkeypatch.setattr(cli, "register", noted)
    more = ["--random_decoder", "--permutations", "1", "--impl", "torch", "--batch_tokens", "512"]
    assert main(_arguments("one", tmp_path, *more)) == 0
    assert main(_arguments("one", tmp_path, "--verbose")) == 0
    base = CertifyConfig(seq_len=12, progress=False)
    assert given[0] == dataclasses.replace(
        base, random_decoder=True, permutations=1, impl="torch", batch_tokens=512
    )
    assert given[1] == dataclasses.replace(base, progress=True)
    record = json.loads((tmp_path / "all_eval_results.json").read_text())[0]
    assert record["metrics"][GROUP]["n_sequences"] == 20

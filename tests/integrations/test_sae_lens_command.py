"""SAELens's `multiple_evals` and its command with certificates, on releases of our own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import sae_lens.evals

from integrations import sae_lens_world as world
from integrations.test_sae_lens_register import (
    GROUP,
    SETTINGS,
    counted_certificates,
    in_place,
)
from saelens_certify import CertifyConfig, verify
from saelens_certify.config_help import setting_descriptions
from saelens_certify.integrations.sae_lens import register
from saelens_certify.integrations.sae_lens.cli import main


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
    assert in_place()
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
    issued = counted_certificates(monkeypatch)
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
    assert in_place()


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
    more = [
        "--random_decoders",
        "1",
        "--permutations",
        "1",
        "--impl",
        "torch",
        "--batch_tokens",
        "512",
    ]
    assert main(_arguments("one", tmp_path, *more)) == 0
    assert main(_arguments("one", tmp_path, "--verbose")) == 0
    base = CertifyConfig(seq_len=12, progress=False)
    assert given[0] == dataclasses.replace(
        base, random_decoders=1, permutations=1, impl="torch", batch_tokens=512
    )
    assert given[1] == dataclasses.replace(base, progress=True)
    record = json.loads((tmp_path / "all_eval_results.json").read_text())[0]
    assert record["metrics"][GROUP]["n_sequences"] == 20

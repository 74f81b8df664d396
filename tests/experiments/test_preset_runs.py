"""Every preset run, small: on the bundled model in place of the published ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from engine.builders import SEQ_LEN, hooked_transformer, make_sae, make_tokens

from experiments.task_world import write_endings
from saelens_certify import CertifyConfig, CertifyError, demo, verify
from saelens_certify.experiments import presets
from saelens_certify.experiments.presets import PRESETS, run_preset
from saelens_certify.experiments.result import Experiment


def small(name: str, tmp_path: Path | None = None, **more: Any) -> dict[str, Experiment]:
    """A preset on the bundled model and a few of its documents."""
    return run_preset(
        name,
        model="demo",
        calibration=demo.load_sequences("calibration").take(120),
        evaluation=demo.load_sequences("evaluation").take(60),
        device="cpu",
        output=tmp_path,
        progress=False,
        **more,
    )


def test_figure_1_on_the_bundled_model(tmp_path: Path) -> None:
    found = small("paper-fig1", tmp_path)
    assert list(found) == ["demo-bound_curves"]
    rows = found["demo-bound_curves"].rows
    # 60 of 10,000 sequences: the grid follows.
    assert [row["n"] for row in rows] == [6, 12, 18, 24, 30, 36, 42, 48, 54, 60]
    run = verify(tmp_path / "demo-bound_curves" / demo.DEFAULT_SAE)
    config = run.certificate.config
    assert (config.coding, config.seq_len) == ("topk:64", 32)
    assert run.certificate.bounds["u_sae_occam"].value == rows[-1]["u_sae_occam"]
    assert (tmp_path / "demo-bound_curves" / "bound_curves.csv").exists()


def test_figure_2_on_the_bundled_model(tmp_path: Path) -> None:
    found = small("paper-fig2", tmp_path)
    assert list(found) == ["demo-layer_sweep", "demo-output_fidelity"]
    assert [row["layer"] for row in found["demo-layer_sweep"].rows] == [1, 2, 3, 4, 5]
    assert len(found["demo-output_fidelity"].rows) == 5
    assert (tmp_path / "demo-output_fidelity" / "output_fidelity.csv").exists()


def test_figure_3_on_the_bundled_model() -> None:
    found = small("paper-fig3")["demo-error_amplification"]
    ends = [row for row in found.rows if row["horizon"] == "full"]
    assert [row["blocks_after"] for row in ends] == [4, 3, 2, 1, 0]
    assert all(one.config.horizons == (0, 1, 2, 4, 8) for one in found.certificates.values())


def test_figure_5_on_the_bundled_model() -> None:
    found = small("paper-fig5")["demo-feature_shuffling"]
    assert found.rows[0]["kind"] == "sae"
    assert sum(row["kind"] == "permuted" for row in found.rows) == 1
    assert found.rows[-1]["n"] == 100


def test_figure_6_on_the_bundled_model() -> None:
    assert list(small("paper-fig6")) == ["demo-layer_sweep"]


def test_figure_7_on_the_bundled_model() -> None:
    found = small("paper-fig7")["demo-sensitivity"]
    assert {row["K"] for row in found.rows} == {16, 32, 64, 128}


def test_figure_8_on_the_bundled_model() -> None:
    found = small("paper-fig8")["demo-distribution_shift"]
    assert [row["rate"] for row in found.rows] == [0.0, 0.15, 1.0]


def test_table_2_on_the_bundled_model() -> None:
    found = small("paper-tab2")["demo-sensitivity"]
    assert sorted({row["budget"] for row in found.rows}) == [15, 30, 60, 120]  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_table_8_on_the_bundled_model() -> None:
    found = small("paper-tab8")["demo-sensitivity"]
    # 120 of 70,000 documents: thresholds follow, the small ones become 1.
    assert sorted({row["tau"] for row in found.rows}) == [1, 2, 3, 9]  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_table_7_asks_for_the_published_tasks(monkeypatch) -> None:
    asked: dict[str, Any] = {}

    def stand_in(model: Any, sae: Any, **arguments: Any) -> Experiment:
        asked.update(arguments, model=model, sae=sae)
        return Experiment("downstream_tasks", "", {}, (), (), None)  # type: ignore[arg-type]

    monkeypatch.setattr(presets, "downstream_tasks", stand_in)
    found = run_preset(
        "paper-tab7",
        model="demo",
        calibration=demo.load_sequences("calibration").take(40),
        questions=3,
        include_path="tasks",
        device="cpu",
        progress=False,
    )
    assert list(found) == ["demo-downstream_tasks"]
    assert asked["tasks"] == ("winogrande", "piqa", "hellaswag")
    assert (asked["limit"], asked["include_path"]) == (3, "tasks")
    assert len(asked["calibration"]) == 40
    assert asked["config"].coding == "topk:64"
    assert asked["sae"].sae_id == demo.DEFAULT_SAE


def test_table_7_on_the_bundled_model(tmp_path: Path) -> None:
    """The published tasks need the hub: a local one stands in, everything else is the preset's."""
    write_endings(tmp_path / "tasks")
    found = run_preset(
        "paper-tab7",
        model="demo",
        calibration_sequences=40,
        questions=5,
        tasks=["endings"],
        include_path=tmp_path / "tasks",
        device="cpu",
        output=tmp_path / "out",
        progress=False,
    )
    [row] = found["demo-downstream_tasks"].rows
    assert row["task"] == "endings"
    assert row["n"] == 5
    assert (tmp_path / "out" / "demo-downstream_tasks" / "downstream_tasks.csv").exists()


def test_the_bundled_model_brings_its_documents() -> None:
    found = run_preset(
        "paper-fig1",
        model="demo",
        calibration_sequences=20,
        evaluation_sequences=10,
        device="cpu",
        progress=False,
    )
    one = found["demo-bound_curves"].certificates[demo.DEFAULT_SAE]
    for side, n in (("calibration", 20), ("evaluation", 10)):
        assert one.manifest["data"][side]["n_sequences"] == n
        assert one.manifest["data"][side]["source"]["split"] == side


def tiny(name: str = "paper-fig1", **more: Any) -> dict[str, Experiment]:
    saes = {"early": make_sae(hook="blocks.0.hook_resid_post"), "late": make_sae()}
    arguments = {
        "model": hooked_transformer(),
        "saes": saes,
        "calibration": make_tokens(30, seed=1),
        "evaluation": make_tokens(20, seed=2),
        "seq_len": SEQ_LEN,
        "progress": False,
    }
    return run_preset(name, **{**arguments, **more})


def test_experiments_about_one_sae_run_for_each(tmp_path: Path) -> None:
    found = tiny("paper-fig5", output=tmp_path)
    assert list(found) == ["model-feature_shuffling-early", "model-feature_shuffling-late"]
    assert (tmp_path / "model-feature_shuffling-late" / "feature_shuffling.csv").exists()
    assert verify(tmp_path / "model-feature_shuffling-early" / "shuffling").n_sequences == 20


def test_several_models_make_one_picture_of_curves() -> None:
    preset = PRESETS["paper-fig1"]
    stand_in = preset.replaced(model=hooked_transformer(), saes=[make_sae()]).models[0]
    second = dataclasses.replace(stand_in, label="another")
    both = dataclasses.replace(preset, models=(stand_in, second))
    found = tiny(both, model=None, saes=None)  # type: ignore[arg-type]
    assert list(found) == ["bound_curves"]
    assert list(found["bound_curves"].certificates) == ["model", "another"]
    first, other = (
        [{**row, "name": ""} for row in found["bound_curves"].rows if row["name"] == name]
        for name in ("model", "another")
    )
    assert first == other


def test_numbers_of_documents_can_be_lowered() -> None:
    found = tiny(calibration_sequences=9, evaluation_sequences=7)["model-bound_curves"]
    one = next(iter(found.certificates.values()))
    assert one.manifest["data"]["calibration"]["n_sequences"] == 9
    assert one.measured.n_sequences == 7


def test_published_documents_are_divided_by_content(monkeypatch) -> None:
    """Without documents of one's own: the data set, read as far as needed."""
    read: dict[str, Any] = {}

    def stand_in(model: Any, data: Any, config: CertifyConfig, **options: Any) -> Any:
        read.update(options, data=data)
        return sequences_for(model, make_tokens(200, seed=5), config, limit=options["limit"])

    sequences_for = presets.sequences_for
    monkeypatch.setattr(presets, "sequences_for", stand_in)
    found = tiny(
        calibration=None, evaluation=None, calibration_sequences=30, evaluation_sequences=20
    )
    assert read == {"data": "allenai/c4:en", "split": "train", "limit": 50}
    one = next(iter(found["model-bound_curves"].certificates.values()))
    assert one.manifest["data"]["calibration"]["n_sequences"] == 30
    assert one.measured.n_sequences == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "fig1"}, "preset 'fig1' is unknown"),
        ({"calibration": None}, "evaluation= goes with calibration="),
        ({"evaluation": None}, "calibration= goes with evaluation="),
        ({"calibration": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"saes": [make_sae(), "no-such-release/sae"]}, "no-such-release"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(monkeypatch, arguments, message) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("work was done before the check")

    for name in ("sequences_for", "load_model", "bound_curves"):
        monkeypatch.setattr(presets, name, fail)
    with pytest.raises(CertifyError, match=message):
        tiny(**arguments)

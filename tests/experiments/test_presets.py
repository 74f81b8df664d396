"""Presets: their facts against the published tables and SAELens's registry, and each of them run, small."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from engine.builders import SEQ_LEN, hooked_transformer, make_sae, make_tokens
from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES

from saelens_certify import CertifyConfig, CertifyError, demo, verify
from saelens_certify.experiments import presets
from saelens_certify.experiments.presets import PRESETS, Preset, find_preset, run_preset
from saelens_certify.experiments.result import Experiment
from saelens_certify.preflight import check_model_name
from saelens_certify.saes.hookpoints import hooks_of
from saelens_certify.saes.sources import parse_spec, registry

TABLES = Path(__file__).parents[1] / "data" / "published"
PUBLISHED = [
    "paper-fig1", "paper-fig2", "paper-fig3", "paper-fig5", "paper-fig6", "paper-fig7", "paper-fig8",
    "paper-tab2", "paper-tab7", "paper-tab8",
]  # fmt: skip
# The tables' left-over name of the checkpoint.
LABELS = {"Llama-3.1-8B": "Llama-3-8B"}


def table(name: str) -> list[dict[str, str]]:
    with (TABLES / name).open() as file:
        return list(csv.DictReader(file))


def label(row: dict[str, str]) -> str:
    return LABELS.get(row["Model"], row["Model"])


def layers(preset: Preset, model: str) -> list[int]:
    [source] = [each for each in preset.models if each.label == model]
    return [int(str(sae.hook).split(".")[1]) for sae in source.saes.values()]


# The facts.


def test_every_preset_is_there_and_states_the_protocol() -> None:
    assert list(PRESETS) == PUBLISHED
    for name, preset in PRESETS.items():
        assert find_preset(name) is preset
        assert preset.name == name
        config = preset.config
        assert (config.coding, config.alpha, config.delta) == ("topk:64", 0.5, 0.05)
        assert (config.seq_len, config.positions) == (32, "all")
        assert preset.calibration_tokens == 2_240_000
        assert (preset.dataset, preset.split) == ("allenai/c4:en", "train")
        assert preset.experiment in presets._RUN
        for model in preset.models:
            assert model.model in OFFICIAL_MODEL_NAMES
            assert model.dtype == ("bfloat16" if model.label == "Llama-3-8B" else "float32")
    with pytest.raises(CertifyError, match="'paper-fig4' is unknown; known are paper-fig1, "):
        find_preset("paper-fig4")


def test_figure_1_is_the_published_grid_and_dictionaries() -> None:
    preset = PRESETS["paper-fig1"]
    rows = table("fig1_topk64_totals.csv")
    assert [m.label for m in preset.models] == list(dict.fromkeys(map(label, rows)))
    for model in preset.models:
        mine = [row for row in rows if label(row) == model.label]
        assert [int(float(row["N"])) for row in mine] == list(preset.grid)
        [sae] = model.saes.values()
        assert {int(row["m"]) for row in mine} == {sae.d_sae}
    assert preset.evaluation_sequences == max(preset.grid)
    assert layers(preset, "GPT-2 Small") == [6]
    assert layers(preset, "Gemma-2B") == [12]
    assert layers(preset, "Llama-3-8B") == [30]


def test_figure_2_is_the_published_layers_and_grid() -> None:
    preset = PRESETS["paper-fig2"]
    names = {int(p.stem.split("_")[-1]): p.name for p in TABLES.glob("fig2_llama_layer_*.csv")}
    assert layers(preset, "Llama-3-8B") == sorted(names)
    for name in names.values():
        rows = table(name)
        assert [int(float(row["N"])) for row in rows] == list(preset.grid)
        assert {int(row["m"]) for row in rows} == {131_072}
    published = sorted(int(p.stem.split("_")[-1]) for p in TABLES.glob("fig2_fidelity_*.csv"))
    assert [int(name.split(".")[1]) for name in preset.fidelity] == published
    assert set(preset.fidelity) < set(preset.models[0].saes)
    row = table("fig2_fidelity_layer_4.csv")[-1]
    assert int(float(row["N"])) == preset.evaluation_sequences
    assert int(row["Tokens"]) == 32 * preset.evaluation_sequences
    assert preset.config.coding == f"topk:{row['TopK']}"


def test_figure_3_is_the_published_layers_and_horizons() -> None:
    preset = PRESETS["paper-fig3"]
    rows = table("fig3_horizon_kl.csv")
    assert {int(row["Tokens Cached"]) for row in rows} == {32 * preset.evaluation_sequences}
    horizons = {row["Horizon"] for row in rows} - {"full"}
    assert sorted(map(int, horizons)) == list(preset.horizons)
    for model in preset.models:
        mine = {int(row["Patch Layer"]) for row in rows if label(row) == model.label}
        assert layers(preset, model.label) == sorted(mine)


def test_tables_2_7_and_8() -> None:
    budgets = PRESETS["paper-tab2"]
    rows = table("tab2_calibration_sensitivity.csv")
    for model in budgets.models:
        mine = [row for row in rows if label(row) == model.label]
        targets = [int(row["Calibration_Tokens_Target"]) for row in mine]
        assert targets == list(budgets.budget_tokens)
        assert {int(row["N"]) for row in mine} == {budgets.evaluation_sequences}
        assert {int(row["m"]) for row in mine} == {next(iter(model.saes.values())).d_sae}
    assert max(budgets.budget_tokens) == budgets.calibration_tokens
    tasks = PRESETS["paper-tab7"]
    rows = table("tab7_zero_shot_summary.csv")
    assert list(tasks.tasks) == list(dict.fromkeys(row["Dataset"] for row in rows))
    assert {int(row["N"]) for row in rows} == {tasks.questions}
    assert tasks.evaluation_sequences == 0
    for model in tasks.models:
        mine = {int(row["Layer"]) for row in rows if label(row) == model.label}
        assert layers(tasks, model.label) == sorted(mine)
    pools = PRESETS["paper-tab8"]
    rows = table("tab8_pool_preview.csv")
    assert [int(row["tau"]) for row in rows] == list(pools.taus)
    assert {int(row["m"]) for row in rows} == {131_072}
    assert layers(pools, "Llama-3-8B") == [30]


def every_sae() -> list[tuple[Any, Any]]:
    found = {
        sae.source: (model, sae)
        for preset in PRESETS.values()
        for model in preset.models
        for sae in model.saes.values()
    }
    return list(found.values())


@pytest.mark.parametrize(
    ("model", "sae"), [pytest.param(m, s, id=str(s.source)) for m, s in every_sae()]
)
def test_saes_are_where_they_are_said_to_be(model: Any, sae: Any) -> None:
    spec = parse_spec(sae.source)
    if spec.release in registry():
        entry = registry()[spec.release]
        assert spec.registered
        assert spec.sae_id == sae.hook
        # The folder in the repository names hook and width where SAELens gives it one of its own.
        folder = entry.saes_map[spec.sae_id]
        assert folder in (sae.hook, f"gemma_2b_{sae.hook}_{sae.d_sae}")

        class Metadata:
            model_name = entry.model

        class Config:
            model_name = model.model

        check_model_name(Config, Metadata)
        if model.label == "GPT-2 Small":
            overrides = entry.config_overrides
            assert overrides == {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    else:
        assert spec.release == "EleutherAI/sae-llama-3-8b-32x"
        assert hooks_of(spec.sae_id, transcode=False).output == sae.hook
        # 32 features for each of Llama-3-8B's 4,096 dimensions.
        assert sae.d_sae == 32 * 4096


# Other models and numbers.


def test_replaced_keeps_shares_and_nothing_below_one() -> None:
    preset = PRESETS["paper-tab8"].replaced(calibration=7000)
    assert preset.taus == (1, 2, 5, 10, 20, 50, 100, 200, 500)
    assert preset.evaluation_sequences == 10_000
    budgets = PRESETS["paper-tab2"].replaced(calibration=800)
    assert budgets.budget_tokens == tuple(32 * n for n in (100, 200, 400, 800))
    assert budgets.calibration_tokens == 800 * 32
    curves = PRESETS["paper-fig1"].replaced(scale=0.01)
    assert (curves.calibration_sequences, curves.evaluation_sequences) == (700, 100)
    assert curves.grid == tuple(10 * n for n in range(1, 11))
    tiny = PRESETS["paper-fig2"].replaced(evaluation=1)
    assert tiny.grid == (1,)
    tasks = PRESETS["paper-tab7"].replaced(scale=0.002)
    assert (tasks.questions, tasks.evaluation_sequences) == (2, 0)
    assert PRESETS["paper-tab7"].replaced(questions=5).questions == 5
    assert PRESETS["paper-fig1"].replaced() == PRESETS["paper-fig1"]
    quiet = PRESETS["paper-fig1"].replaced(progress=False, batch_tokens=64)
    assert quiet.config == dataclasses.replace(
        PRESETS["paper-fig1"].config, progress=False, batch_tokens=64
    )


def test_a_stand_in_takes_the_place_of_all_models() -> None:
    preset = PRESETS["paper-fig2"].replaced(model="demo")
    assert [model.model for model in preset.models] == ["demo"]
    assert list(preset.models[0].saes) == [f"layer{n}-topk" for n in range(1, 6)]
    assert preset.fidelity == tuple(preset.models[0].saes)
    one = PRESETS["paper-tab2"].replaced(model="demo")
    assert list(one.models[0].saes) == [demo.DEFAULT_SAE]
    assert one.fidelity == ()
    live = PRESETS["paper-fig3"].replaced(model=hooked_transformer(), saes=[make_sae()])
    assert list(live.models[0].saes) == ["blocks.1.hook_resid_post"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "gpt2"}, "only 'demo' has SAEs of its own"),
        ({"saes": ["somewhere/sae"]}, "saes= goes with model="),
        ({"model": "gpt2", "saes": {}}, "saes is empty"),
        ({"calibration": 0}, "calibration=0 must be a number of sequences"),
        ({"evaluation": 2.5}, "evaluation=2.5 must be a number of sequences"),
        ({"scale": 0}, "scale=0 must be positive"),
        ({"scale": 0.5, "evaluation": 3}, "goes in place of calibration"),
    ],
)
def test_impossible_replacements(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CertifyError, match=message):
        PRESETS["paper-fig1"].replaced(**arguments)


# Runs.


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

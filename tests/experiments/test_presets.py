"""Presets: their facts against the published tables and SAELens's registry, and what replaces what."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from engine.builders import hooked_transformer, make_sae
from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES

from saelens_certify import CertifyError, demo
from saelens_certify.experiments import presets
from saelens_certify.experiments.presets import PRESETS, Preset, find_preset
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

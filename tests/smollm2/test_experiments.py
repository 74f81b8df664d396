"""The experiments on SmolLM2 run from end to end, and the page says what the results say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.smollm2.experiments import Size, python_code, run_all
from benchmarks.smollm2.experiments_page import PAGE, page, picture
from benchmarks.smollm2.fetch import CACHE_DIR
from benchmarks.smollm2.model import load_smollm2
from benchmarks.smollm2.train_saes import HOOKS, LENGTH
from saelens_certify import verify

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "smollm2-experiments.json"
NAMES = {
    "layer_sweep", "output_fidelity", "error_amplification", "feature_shuffling", "sensitivity", "distribution_shift",
    "downstream_tasks",
}  # fmt: skip


def test_all_experiments_at_toy_size(tmp_path) -> None:
    size = Size(
        calibration=50, layers=12, amplification=6, shuffling=8, permutations=2, error_permutations=4, sensitivity=8,
        shift=6, questions=4,
    )  # fmt: skip
    found = run_all(size, tmp_path, CACHE_DIR, HOOKS)
    assert set(found) == NAMES
    for name, (experiment, _) in found.items():
        assert experiment.rows, name
        assert experiment.findings, name
        for run in (tmp_path / name).glob("*/certificate.json"):
            assert verify(run.parent).n_sequences > 0
    sweep, _ = found["layer_sweep"]
    assert [row["hook"] for row in sweep.rows] == list(HOOKS)
    risks = {row["risk_base"] for row in sweep.rows}
    assert len(risks) == 1, "one base pass for all layers"
    gaps = {row["kind"]: float(row["gap"] or 0) for row in found["feature_shuffling"][0].rows}
    assert gaps["permuted"] > 3 * gaps["sae"]


def test_python_code_is_one_function_a_file() -> None:
    tokens = python_code(load_smollm2().tokenizer, 40)
    assert tokens.shape == (40, LENGTH)
    assert len(set(map(tuple, tokens.tolist()))) == 40
    assert (tokens[:, 0] == tokens[0, 0]).all()  # BOS


@pytest.fixture(scope="module")
def results() -> dict:
    return json.loads(RESULTS.read_text())


def test_the_page_is_made_from_the_results(results) -> None:
    assert (ROOT / "docs" / PAGE).read_text() == page(results)
    for name in results["experiments"]:
        assert (ROOT / "docs" / picture(name)).stat().st_size > 10_000


def test_the_results_are_of_every_experiment(results) -> None:
    assert set(results["experiments"]) == NAMES
    assert results["seconds"] < 25 * 60, "on two cores"
    assert results["environment"]["cores"] == 2
    assert len(results["experiments"]["layer_sweep"]["rows"]) == 6

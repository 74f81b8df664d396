"""Sensitivities: one factor at a time, every row the one that a run by itself gives."""

from __future__ import annotations

import csv
import json
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from engine.builders import D_SAE, D_VOCAB, SEQ_LEN, hooked_transformer, make_sae, make_tokens

from saelens_certify import Certificate, CertifyConfig, CertifyError, certify, passes, verify
from saelens_certify.certification import read_sides
from saelens_certify.experiments.result import Row
from saelens_certify.experiments.sensitivity import (
    BASE,
    BOUNDS,
    pool_preview,
    sensitivity,
    sensitivity_experiment,
    sensitivity_rows,
    setting_name,
)
from saelens_certify.experiments.sensitivity_findings import sensitivity_findings, series_of
from saelens_certify.study import folder_name

CONFIG = CertifyConfig(seq_len=SEQ_LEN, coding="topk:6", tau=2, progress=False)
CALIBRATION, EVALUATION = make_tokens(40, seed=1), make_tokens(50, seed=2)
VARIED: dict[str, Any] = {
    "ks": (12, 3, 6),
    "budgets": (7, 40),
    "budget_tokens": (15 * SEQ_LEN - 3,),
    "taus": (2, 5, 9),
    "alphas": (0.3, 0.5),
    "lengths": (5, 8, SEQ_LEN),
}
NAMES = (BASE, "K=3", "K=12", "budget=7", "budget=15", "tau=5", "tau=9", "alpha=0.3", "L=5", "L=8")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    output = tmp_path_factory.mktemp("sensitivity")
    result = sensitivity(
        hooked_transformer(), make_sae(), calibration=CALIBRATION, evaluation=EVALUATION,
        config=CONFIG, output=output, **VARIED,
    )  # fmt: skip
    return result, output


@pytest.fixture(scope="module")
def rows(world) -> dict[str, Row]:
    return {str(row["setting"]): row for row in world[0].rows}


def alone(name: str) -> Certificate:
    """The same by a run by itself, on documents that are cut here."""
    known, _ = read_sides(hooked_transformer(), CALIBRATION, EVALUATION, CONFIG)
    calibration, evaluation = known.tokens, EVALUATION
    values: dict[str, Any] = CONFIG.to_dict()
    factor, _, value = name.partition("=")
    if factor == "budget":
        calibration = calibration[: int(value)]
    elif factor == "L":
        values["seq_len"] = int(value)
        evaluation = evaluation[:, : int(value)]
        begun = {tuple(row) for row in evaluation.tolist()}
        keep = [row for row in calibration.tolist() if tuple(row[: int(value)]) not in begun]
        calibration = torch.tensor(keep)[:, : int(value)]
    elif factor == "K":
        values["coding"] = f"topk:{value}"
    elif factor != BASE:
        values[factor] = float(value) if factor == "alpha" else int(value)
    return certify(
        hooked_transformer(), make_sae(), calibration=calibration, evaluation=evaluation,
        config=CertifyConfig.from_dict(values),
    )  # fmt: skip


def number(row: Row, name: str) -> float:
    value = row[name]
    assert isinstance(value, (int, float))
    return float(value)


def test_values_of_the_base_are_not_measured_twice(world, rows):
    result, _ = world
    assert tuple(rows) == NAMES
    assert set(result.certificates) == set(NAMES)
    assert len({tuple(row) for row in result.rows}) == 1


@pytest.mark.parametrize("name", NAMES)
def test_each_row_is_what_a_run_by_itself_says(rows, name):
    found, expected = rows[name], alone(name)
    measured = expected.measured
    assert 0 < measured.eta < 1, "the case must have both kinds of sequences"
    for key in ("risk_base", "risk_sae", "risk_pool", "gap", "eta"):
        assert abs(number(found, key) - getattr(measured, key)) < 1e-5
    for key in BOUNDS:
        assert abs(number(found, key) - expected.bounds[key].value) < 1e-5
        assert found[f"nonvacuous_{key}"] == (number(found, key) < math.log2(D_VOCAB))
    terms = {**expected.bounds["u_sae"].terms, **expected.bounds["u_sae_occam"].terms}
    for key in ("mismatch", "t_eta", "t_proxy", "t_occ", "t_eps"):
        assert abs(number(found, key) - terms[key]) < 1e-5
    config = expected.config
    assert found["n_sequences"] == measured.n_sequences
    assert found["pool_size"] == expected.pool.size
    assert found["pool_share"] == expected.pool.size / D_SAE
    assert found["calibration_tokens"] == expected.calibration.n_tokens
    assert found["complexity"] == pytest.approx(math.log(math.comb(D_SAE, expected.pool.size)))
    assert number(found, "loss_range") == pytest.approx(
        math.log2(1 + (1 - config.alpha) * D_VOCAB / config.alpha)
    )
    assert abs(number(found, "unigram") - expected.baselines["unigram"]) < 1e-5
    assert (found["K"], found["tau"], found["alpha"], found["L"], found["budget"]) == (
        int(config.coding.removeprefix("topk:")), config.tau, config.alpha, config.seq_len,
        expected.manifest["data"]["calibration"]["n_sequences"],
    )  # fmt: skip
    factor, _, value = name.partition("=")
    assert found["factor"] == factor
    assert found["value"] == (float(value) if value else None)
    if factor == "budget":
        assert found["budget"] == int(value)


def test_one_pass_each(monkeypatch):
    seen: dict[str, int] = {}

    def counted(name):
        real = getattr(passes, name)

        def count(engine, who, tokens, *rest):
            seen[name] = seen.get(name, 0) + len(tokens)
            return real(engine, who, tokens, *rest)

        return count

    for name in ("calibrate", "measure"):
        monkeypatch.setattr(passes, name, counted(name))
    sensitivity(
        hooked_transformer(), make_sae(), calibration=CALIBRATION, evaluation=EVALUATION,
        config=CONFIG, **VARIED,
    )  # fmt: skip
    assert seen == {"calibrate": 40, "measure": 50}


def test_violations_follow_from_the_rarest_feature(world):
    """A sequence violates the pool of threshold tau exactly if its rarest feature was seen less often."""
    certificates = world[0].certificates
    base = certificates[BASE]
    rarest = dict(
        zip(base.evidence.column("sequence").to_pylist(), base.column("rarest"), strict=True)
    )
    for name, tau in ((BASE, 2), ("tau=5", 5), ("tau=9", 9)):
        found = certificates[name]
        expected = [rarest[own] < tau for own in found.evidence.column("sequence").to_pylist()]
        assert list(found.column("violation")) == expected
    shares = [certificates[name].measured.eta for name in (BASE, "tau=5", "tau=9")]
    assert shares[0] < shares[1] < shares[2]


def test_budgets_are_nested(world):
    certificates = world[0].certificates
    small, middle, whole = (
        certificates[name].calibration.counts for name in ("budget=7", "budget=15", BASE)
    )
    assert bool((small <= middle).all())
    assert bool((middle <= whole).all())
    pools = [certificates[name].pool.size for name in ("budget=7", "budget=15", BASE)]
    assert pools[0] < pools[1] < pools[2]


def test_files_and_runs_are_written(world):
    result, output = world
    for name in result.certificates:
        verify(output / folder_name(name))
    with (output / "sensitivity.csv").open() as file:
        assert [line["setting"] for line in csv.DictReader(file)] == list(NAMES)
    saved = json.loads((output / "sensitivity.json").read_text())
    assert saved["findings"] == list(result.findings)
    loaded = {n: Certificate.load(output / folder_name(n)) for n in reversed(NAMES)}
    assert sensitivity_experiment(loaded).rows == result.rows


def test_the_figure_has_a_panel_for_each_factor(world, rows):
    traces: Any = world[0].figure.data
    sharp = [trace for trace in traces if trace.name == "sharp (betting)"]
    assert [list(trace.x) for trace in sharp] == [
        ["3", "<b>6</b>", "12"], ["7", "15", "<b>40</b>"], ["<b>2</b>", "5", "9"],
        ["0.3", "<b>0.5</b>"], ["5", "8", "<b>12</b>"],
    ]  # fmt: skip
    assert list(sharp[0].y) == [rows[n]["sharp_betting"] for n in ("K=3", BASE, "K=12")]
    bars = [trace for trace in traces if trace.type == "bar" and list(trace.x) == list(sharp[2].x)]
    heights = np.sum([trace.y for trace in bars], axis=0)
    np.testing.assert_allclose(
        heights, [number(rows[n], "u_sae_occam") for n in (BASE, "tau=5", "tau=9")], atol=1e-9
    )


@pytest.mark.parametrize(("kind", "most"), [("topk", 8), ("standard", D_SAE)])
def test_a_native_base_has_no_k_of_its_own(kind, most):
    config = CertifyConfig(seq_len=SEQ_LEN, tau=3, progress=False)
    result = sensitivity(
        hooked_transformer(), make_sae(kind), calibration=CALIBRATION[:6], evaluation=EVALUATION,
        ks=(3, most), config=config,
    )  # fmt: skip
    rows = {row["setting"]: row for row in result.rows}
    base, few, all_active = rows[BASE], rows["K=3"], rows[f"K={most}"]
    assert base["K"] is None
    assert number(base, "eta") > 0
    assert [row["setting"] for row in series_of(result.rows, "K")] == ["K=3", f"K={most}"]
    # No token has more than that many active features: the rule keeps all of them.
    same = ["pool_size", "risk_sae", "gap", "eta", "mismatch"]
    # What differs is h_G of an SAE that lets the next features in when those outside the pool are masked.
    same += [] if kind == "topk" else ["risk_pool", "u_sae", "sharp_betting"]
    for key in same:
        assert number(all_active, key) == pytest.approx(number(base, key), abs=1e-6)
    assert number(few, "gap") > number(base, "gap")
    figure: Any = result.figure
    assert "Sensitivities around native" in figure.layout.title.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "nothing is varied"),
        ({"ks": [6], "taus": [2], "alphas": [0.5], "lengths": [SEQ_LEN]}, "nothing is varied"),
        ({"ks": [0]}, "ks must hold whole numbers from 1, got 0"),
        ({"ks": [D_SAE + 1]}, f"the SAE has {D_SAE} features"),
        ({"budgets": [41]}, "a budget of 41 calibration sequences, there are 40"),
        ({"budget_tokens": [40 * SEQ_LEN + 1]}, "a budget of 41"),
        ({"budgets": [7.5]}, "budgets must hold whole numbers"),
        ({"budget_tokens": [0]}, "budget_tokens must hold whole numbers"),
        ({"taus": [True]}, "taus must hold whole numbers"),
        ({"alphas": [1.0]}, "alpha must lie strictly between"),
        ({"lengths": [SEQ_LEN + 1]}, "raise config.seq_len to the longest"),
        ({"lengths": [1]}, "seq_len must be an integer of at least 2"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(changes, message, monkeypatch):
    def never(*_args, **_kwargs):
        raise AssertionError("work was started")

    monkeypatch.setattr(sys.modules[sensitivity.__module__], "certify_many", never)
    with pytest.raises(CertifyError, match=message):
        sensitivity(
            hooked_transformer(), make_sae(), calibration=CALIBRATION, evaluation=EVALUATION,
            config=CONFIG, **changes,
        )  # fmt: skip


def test_an_experiment_is_known_by_its_names(world):
    certificates = world[0].certificates
    with pytest.raises(CertifyError, match="need a certificate named 'base'"):
        sensitivity_rows({"K=3": certificates["K=3"]})
    with pytest.raises(CertifyError, match="'depth=3' is no setting"):
        sensitivity_rows({BASE: certificates[BASE], "depth=3": certificates["K=3"]})
    assert setting_name("alpha", 0.1 + 0.2) == "alpha=0.30000000000000004"


def test_the_preview_agrees_with_the_settings(world, rows):
    preview = pool_preview(world[0].certificates[BASE].calibration, (2, 5, 9))
    for line, name in zip(preview, (BASE, "tau=5", "tau=9"), strict=True):
        assert (line["pool_size"], line["complexity"]) == (
            rows[name]["pool_size"], rows[name]["complexity"],
        )  # fmt: skip


def made_up(factor: str, value: float | None, **changes: Any) -> Row:
    row: Row = {"setting": f"{factor}={value}", "factor": factor, "value": value}
    row |= {"K": 4, "budget": 100, "tau": 1, "alpha": 0.5, "L": 32, "n_sequences": 50}
    row |= {} if value is None else {factor: value}
    row |= {"confidence": 0.95, "simultaneous": 1, "pool_size": 90, "pool_share": 0.9}
    row |= {"complexity": 10.0, "risk_base": 5.0, "gap": 0.1, "eta": 0.1, "loss_range": 12.0}
    row |= {"uniform": 10.0} | dict.fromkeys(BOUNDS, 8.0)
    row |= changes
    row |= {f"nonvacuous_{name}": number(row, name) < 10.0 for name in BOUNDS}
    return row


def said(*rows: Row) -> str:
    return " ".join(sensitivity_findings(rows))


def test_findings_name_the_smallest_and_where_it_says_something():
    text = said(
        made_up(BASE, None), made_up("tau", 5, u_sae=7.001, complexity=30.0, pool_share=0.5),
        made_up("tau", 9, u_sae=11.0, eta=0.4, pool_size=30),
    )  # fmt: skip
    assert "Frequency threshold tau, 1 to 9: pool 90 to 30 features" in text
    assert "violations 10.00 to 40.00 % of sequences" in text
    assert "the complexity is largest at 5 (30.0 nats, 50.0 % of the features in the pool)" in text
    assert "U_SAE by frequency threshold tau: smallest at 5 (7.01 bits per token)" in text
    assert "non-vacuous at 1, 5 of 1, 5, 9" in text
    assert (
        "U_SAE+Occam by frequency threshold tau: smallest at 1 (8.00 bits per token), non-vacuous everywhere"
        in text
    )
    assert "looking at 3 settings" in text
    assert "alpha" not in text
    none = dict.fromkeys(BOUNDS, 10.0)
    text = said(made_up(BASE, None, **none), made_up("L", 16, **none, simultaneous=2))
    assert text.count("non-vacuous nowhere") == 4


def test_findings_compare_budgets_with_the_paper():
    base = made_up(BASE, None)
    assert "as in the paper's Table 2" in said(base, made_up("budget", 50, eta=0.2))
    text = said(base, made_up("budget", 50, eta=0.05, complexity=9.0))
    assert "violations, complexity rise somewhere, other than in the paper's Table 2" in text
    assert "complexity rises somewhere" in said(base, made_up("budget", 50, complexity=9.0))


def test_findings_say_what_alpha_changes():
    assert "different losses" in said(made_up(BASE, None), made_up("alpha", 0.2))


def test_findings_know_of_simultaneous_settings():
    base, other = (made_up(*key, simultaneous=2) for key in ((BASE, None), ("L", 16)))
    text = said(base, other)
    assert "all of 2 at once" in text
    assert "found by looking" not in text

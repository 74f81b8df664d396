"""Layer sweeps: rows against single runs and plain formulas, first N against loops, and what the findings say when."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine.builders import D_SAE, SEQ_LEN, hooked_transformer, make_sae, make_tokens
from scipy import stats

from experiments import synthetic
from saelens_certify import Certificate, CertifyConfig, CertifyError, bounds, certify, verify
from saelens_certify.bounds.times import looks
from saelens_certify.experiments.layers import (
    BOUNDS,
    layer_experiment,
    layer_findings,
    layer_rows,
    layer_sweep,
    rank_correlation,
)
from saelens_certify.experiments.naming import named_saes
from saelens_certify.experiments.result import Experiment
from saelens_certify.report.terms import bound_label, sae_labels

HOOKS = [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
CONFIG = CertifyConfig(seq_len=SEQ_LEN, progress=False)


def sides() -> dict[str, Any]:
    return {"calibration": make_tokens(20, seed=1), "evaluation": make_tokens(40, seed=2)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sweep") / "out"


@pytest.fixture(scope="module")
def sweep(folder) -> Experiment:
    saes = [make_sae(hook=hook) for hook in reversed(HOOKS)]
    return layer_sweep(
        hooked_transformer(), saes, **sides(), config=CONFIG, simultaneous=True, output=folder
    )


@functools.cache
def alone(layer: int) -> Certificate:
    config = dataclasses.replace(CONFIG, simultaneous=3)
    return certify(hooked_transformer(), make_sae(hook=HOOKS[layer]), **sides(), config=config)


def made(*layers: int, config: dict[str, Any] | None = None, **each: Sequence[float]) -> Experiment:
    """A sweep of made-up certificates, one for each layer."""
    certificates = {}
    for place, layer in enumerate(layers):
        own: dict[str, Any] = {key: values[place] for key, values in each.items()}
        hook = f"blocks.{layer}.hook_resid_post"
        certificates[hook] = synthetic.certificate(hook, seed=place, **own, **(config or {}))
    return layer_experiment(certificates)


def test_rows_are_those_of_single_runs(sweep) -> None:
    assert [row["layer"] for row in sweep.rows] == [0, 1, 2]
    assert [row["name"] for row in sweep.rows] == HOOKS
    assert len({tuple(row) for row in sweep.rows}) == 1
    for layer, row in enumerate(sweep.rows):
        single = alone(layer)
        for name in (*BOUNDS, "sharp_unigram"):
            assert row[name] == pytest.approx(single.bounds[name].value, abs=1e-5), name
        for name in ("risk_base", "risk_sae", "risk_pool", "gap", "eta", "n_sequences"):
            assert row[name] == pytest.approx(getattr(single.measured, name), abs=1e-5), name
        assert row["uniform"] == single.baselines["uniform"]
        assert row["unigram"] == pytest.approx(single.baselines["unigram"], abs=1e-9)
        assert row["explained_variance"] == pytest.approx(single.explained_variance(), abs=1e-5)
        assert (row["d_sae"], row["pool_size"]) == (D_SAE, single.pool.size)
        assert (row["architecture"], row["simultaneous"]) == ("topk", 3)


def test_certificates_of_a_sweep_hold_at_once(sweep) -> None:
    """Bonferroni: every certificate spends a third of delta."""
    for name, certificate in sweep.certificates.items():
        row = next(row for row in sweep.rows if row["name"] == name)
        assert row["u_sae"] == certificate.bounds_at(0.05 / 3)["u_sae"].value
        assert row["confidence"] == 0.95
        assert row["first_n_u_sae"] is None
    assert "all 3 certificates at once" in sweep.findings[0]
    by_itself = layer_findings(made(0, 1, risk=[2.0, 2.0]).rows)
    assert "each by itself" in by_itself[0]


def test_a_family_already_larger_is_kept() -> None:
    config = dataclasses.replace(CONFIG, simultaneous=7)
    found = layer_sweep(
        hooked_transformer(), [make_sae()], **sides(), config=config, simultaneous=True
    )
    assert found.rows[0]["simultaneous"] == 7


def test_what_is_on_disk(sweep, folder) -> None:
    written = json.loads((folder / "layer_sweep.json").read_text())
    assert written["findings"] == list(sweep.findings)
    assert [row["name"] for row in written["rows"]] == HOOKS
    assert (folder / "layer_sweep.html").stat().st_size > 1000
    for hook in HOOKS:
        assert verify(folder / hook).certificate.bounds["u_sae"].value == (
            sweep.certificates[hook].bounds["u_sae"].value
        )
    again = layer_experiment({hook: Certificate.load(folder / hook) for hook in HOOKS})
    assert again.rows == sweep.rows


def test_floors_are_what_is_left_without_margins() -> None:
    certificate = synthetic.certificate(eta=0.1, n=200)
    row = layer_rows({"one": certificate})[0]
    columns = {name: certificate.column(name) for name in ("loss_base", "loss_sae", "loss_pool")}
    width = float(bounds.loss_range(101))
    high = float(bounds.loss_cap(101))
    gap = np.abs(columns["loss_base"] - columns["loss_sae"])
    violated = certificate.column("violation")
    plain = columns["loss_pool"].mean() + gap.mean() + width * violated.mean()
    assert row["floor_u_sae"] == row["floor_u_sae_occam"] == pytest.approx(plain, abs=1e-12)
    charged = np.where(violated, high, columns["loss_pool"] + gap).mean()
    measured = (
        columns["loss_pool"] + gap + np.abs(columns["loss_sae"] - columns["loss_pool"])
    ).mean()
    assert row["floor_sharp_betting"] == pytest.approx(charged, abs=1e-12)
    assert row["floor_sharp_occam"] == row["floor_sharp_occam_tau"] == row["floor_sharp_betting"]
    assert row["floor_sharp_measured"] == pytest.approx(measured, abs=1e-12)
    for name in ("sharp_betting", "sharp_measured"):
        lower = bounds.floor_sequence(name, certificate.losses, 0.05)[-1]
        assert row[f"floor_{name}_at_least"] == lower
        assert lower < float(str(row[f"floor_{name}"])) < float(str(row[name]))


def first_loop(certificate: Certificate, grid: Sequence[int], name: str) -> int | None:
    """First N of a grid, each N certified anew from a shorter table."""
    for n in grid:
        prefix = Certificate(
            certificate.manifest, certificate.calibration, certificate.evidence.slice(0, n)
        )
        if prefix.bounds[name].value < prefix.baselines["uniform"]:
            return n
    return None


@pytest.mark.parametrize(("eta", "simultaneous"), [(0.0, 1), (0.05, 1), (0.0, 12)])
def test_first_numbers_are_what_a_loop_finds(eta: float, simultaneous: int) -> None:
    certificate = synthetic.certificate(risk=2.5, eta=eta, n=300, simultaneous=simultaneous)
    grid = [300, *range(10, 300, 10), 5000]
    row = layer_rows({"one": certificate}, grid)[0]
    inside = sorted(n for n in grid if n <= 300)
    for name in ("u_sae", "u_sae_occam", "sharp_betting"):
        expected = first_loop(certificate, inside, name)
        assert expected is not None
        assert row[f"first_n_{name}"] == expected
    for name in ("sharp_betting", "sharp_measured"):
        times = np.union1d(looks(300), inside)
        values = bounds.sharp_sequence(name, certificate.losses, 0.05 / simultaneous, times)
        expected = int(times[values < certificate.losses.baseline][0])
        assert row[f"first_n_{name}_any_time"] == expected


def test_the_last_number_of_a_run_is_on_the_grid() -> None:
    certificate = synthetic.certificate(n=300)
    row = layer_rows({"one": certificate}, [300, 301])[0]
    assert row["first_n_u_sae"] == row["first_n_sharp_betting"] == 300


def test_all_the_time_means_at_the_numbers_of_the_grid_too() -> None:
    certificate = synthetic.certificate(risk=6.36, gap=0.1, n=300)
    usual = layer_rows({"one": certificate})[0]["first_n_sharp_betting_any_time"]
    every = layer_rows({"one": certificate}, range(1, 301))[0]["first_n_sharp_betting_any_time"]
    assert isinstance(every, int)
    assert every not in looks(300)
    assert isinstance(usual, int)
    assert every < usual


def test_a_finer_grid_never_finds_a_later_number() -> None:
    certificate = synthetic.certificate(n=300)
    coarse = layer_rows({"one": certificate}, [100, 200, 300])[0]
    fine = layer_rows({"one": certificate}, list(range(1, 301)))[0]
    for name in ("u_sae", "u_sae_occam", "sharp_betting"):
        assert float(str(fine[f"first_n_{name}"])) <= float(str(coarse[f"first_n_{name}"]))
    assert coarse["u_sae"] == fine["u_sae"]


def test_clusters_count_as_one() -> None:
    clusters: list[str | None] = [f"c{i // 4}" for i in range(400)]
    certificate = synthetic.certificate(clusters=clusters)
    row = layer_rows({"one": certificate}, [20, 40, 60, 80, 100, 400])[0]
    assert row["n_sequences"] == 100
    assert row["first_n_u_sae"] in (60, 80, 100)
    for n in (20, 40, 60, 80, 100):
        measured = Certificate(
            certificate.manifest, certificate.calibration, certificate.evidence.slice(0, 4 * n)
        )
        assert measured.measured.n_sequences == n
        below = measured.bounds["u_sae"].value < measured.baselines["uniform"]
        assert below == (n >= float(str(row["first_n_u_sae"])))


def test_a_run_that_could_stop_has_no_fixed_number() -> None:
    row = made(1, risk=[2.0], config={"until": "nonvacuous"}).rows[0]
    for name in ("u_sae", "u_sae_occam", "floor_u_sae", "first_n_u_sae", "first_n_sharp_betting"):
        assert row[name] is None
    assert row["first_n_sharp_betting_any_time"] is not None
    assert row["sharp_betting"] is not None


@pytest.mark.parametrize(
    ("risks", "verdict"),
    [
        ([4.0, 3.5, 3.0, 2.5, 2.0], "Later layers are easier to certify, as the paper found"),
        (
            [2.0, 2.5, 3.0, 3.5, 4.0],
            "Later layers are harder to certify, against the paper's finding",
        ),
        ([2.0, 3.0, 4.0], "No trend with depth is shown"),  # of three, every order is likely
        ([2.0, 4.0, 3.9, 2.1, 2.2], "No trend with depth is shown"),
    ],
)
def test_trends(risks: list[float], verdict: str) -> None:
    layers = [2 * i for i in range(len(risks))]
    found = made(*layers, risk=risks)
    said = " ".join(found.findings)
    assert verdict in said
    values = [row["u_sae"] for row in found.rows]
    expected = float(np.corrcoef(stats.rankdata(layers), stats.rankdata(values))[0, 1])
    assert f"U_SAE ({expected:+.2f}, p = " in said


def spearman(x: Any, y: Any) -> float:
    found: Any = stats.spearmanr(x, y)
    return float(found.statistic)


@pytest.mark.parametrize("n", [3, 5, 6, 12])
def test_the_p_value_of_a_trend_is_that_of_random_orders(n) -> None:
    rng = np.random.default_rng(n)
    x, y = np.arange(n), rng.integers(0, n, n).astype(float)
    correlation, p_value = rank_correlation(list(x), list(y))
    exact = stats.permutation_test(
        (y,), lambda z: spearman(x, z), permutation_type="pairings", n_resamples=50_000, rng=1
    )  # fmt: skip
    assert abs(correlation - spearman(x, y)) < 1e-12
    assert abs(p_value - float(exact.pvalue)) < (1e-9 if n <= 6 else 0.02)


def test_no_trend_of_two_layers() -> None:
    assert "paper" not in " ".join(made(0, 1, risk=[2.0, 3.0]).findings)


def test_who_certifies_and_who_never_does() -> None:
    found = made(3, 5, 9, risk=[6.0, 3.0, 2.0], gap=[1.1, 0.2, 0.1], eta=[0.0, 0.5, 0.0])
    said = found.findings
    first, middle, last = found.rows
    uniform = float(str(first["uniform"]))
    # Layer 3 is out of reach of all, layer 5 of the published bounds, layer 9 of none.
    assert float(str(first["floor_sharp_measured_at_least"])) > uniform
    assert float(str(middle["sharp_betting"])) < uniform < float(str(middle["u_sae"]))
    assert float(str(last["u_sae_occam"])) < uniform
    text = " ".join(said)
    never = [row["label"] for row in found.rows if float(str(row["floor_u_sae"])) >= uniform]
    assert f"The published bounds never certify {', '.join(map(str, never))} with" in text
    assert f"With confidence, {bound_label('sharp_measured')} never certifies layer 3" in text
    for name in BOUNDS:
        below = [str(r["label"]) for r in found.rows if float(str(r[name])) < uniform]
        sentence = next(s for s in said if f"{bound_label(name)} (" in s and "uniform" in s)
        assert ": " + ", ".join(below) in sentence
        assert f"for {len(below)} of 3 SAEs" in sentence
    none = made(1, 2, risk=[6.4, 6.4])
    assert "for none of 2 SAEs" in " ".join(none.findings)
    every = made(1, 2, risk=[2.0, 2.0])
    assert "for all 2 SAEs" in " ".join(every.findings)
    assert "certify every SAE from enough sequences on" in " ".join(every.findings)


def test_which_first_number_is_valid_is_said() -> None:
    found = made(1, 2, risk=[2.0, 3.0])
    for name, kind in (("u_sae", "descriptive"), ("sharp_betting", "valid there")):
        key = f"first_n_{name}" + ("" if name == "u_sae" else "_any_time")
        sentence = next(s for s in found.findings if f"N looked at where {bound_label(name)}" in s)
        assert kind in sentence
        for row in found.rows:
            assert f"{row[key]} ({row['label']})" in sentence


def test_the_picture_shows_the_rows() -> None:
    found = made(3, 5, 9, risk=[4.0, 3.0, 2.0], eta=[0.0, 0.1, 0.0])
    figure: Any = found.figure
    by_name = {trace.name: trace for trace in figure.data if trace.xaxis in (None, "x")}
    for name in BOUNDS:
        trace = by_name[bound_label(name)]
        assert list(trace.x) == [3, 5, 9]
        assert list(trace.y) == [row[name] for row in found.rows]
    bars = [trace for trace in figure.data if trace.type == "bar"]
    total = sum(np.array(bar.y) for bar in bars)
    np.testing.assert_allclose(total, [float(str(r["floor_u_sae"])) for r in found.rows], atol=1e-9)
    marks = [t for t in figure.data if t.type == "scatter" and t.mode == "markers"]
    keys = ("first_n_u_sae_occam", "first_n_u_sae", "first_n_sharp_betting_any_time", "first_n_sharp_measured_any_time")  # fmt: skip
    expected = [row[key] for row in found.rows for key in keys if row[key] is not None]
    assert [mark.x[0] for mark in marks] == expected
    for mark in marks:
        assert mark.marker.symbol == ("circle-open" if mark.xaxis in ("x3", "x4") else "circle")
    curves = [t for t in figure.data if t.legend == "legend3" and t.mode == "lines"]
    assert len(curves) == 12
    assert {t.name for t in curves} == {"layer 3", "layer 5", "layer 9"}
    for trace in (t for t in curves if t.xaxis == "x4"):
        row = next(r for r in found.rows if r["label"] == trace.name)
        assert trace.y[-1] == row["u_sae"]


def test_pictures_of_saes_that_layers_do_not_tell_apart() -> None:
    names = ("wide", "a-release/blocks.1.hook_resid_post", "narrow")
    certificates = {name: synthetic.certificate(seed=i) for i, name in enumerate(names)}
    figure: Any = layer_experiment(certificates).figure
    assert list(figure.data[0].x) == [0, 1, 2]
    assert list(figure.layout.xaxis.ticktext) == ["wide", "a-release/…esid_post", "narrow"]
    assert names[1] in {trace.name for trace in figure.data}


def test_names() -> None:
    saes = [make_sae(hook=HOOKS[1]), make_sae(hook=HOOKS[0]), make_sae(hook=HOOKS[1])]
    assert list(named_saes(saes)) == [HOOKS[1], HOOKS[0], f"{HOOKS[1]}_2"]
    assert list(named_saes({"b": saes[0], "a": saes[1]})) == ["b", "a"]
    assert sae_labels({HOOKS[1]: HOOKS[1], HOOKS[0]: HOOKS[0]})[HOOKS[1]] == "layer 1"
    mlp = "blocks.1.hook_mlp_out"
    assert sae_labels({HOOKS[1]: HOOKS[1], mlp: mlp}) == {HOOKS[1]: HOOKS[1], mlp: mlp}
    assert sae_labels({"a": HOOKS[1]}) == {"a": "a"}
    assert sae_labels({"hook_embed": "hook_embed"}) == {"hook_embed": "hook_embed"}


@pytest.mark.parametrize(
    ("saes", "options", "message"),
    [
        ([], {}, "saes is empty"),
        ({}, {}, "saes is empty"),
        ("sae", {}, "put a single one into a list"),
        (None, {}, "put a single one into a list"),
        ([0], {"grid": []}, "grid"),
        ([0], {"grid": [0]}, "grid"),
        ([0], {"grid": [1.5]}, "grid"),
    ],
)
def test_refused_before_any_work(saes: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CertifyError, match=message):
        layer_sweep(None, saes, calibration=None, evaluation=None, config=CONFIG, **options)


def test_grids_that_the_run_does_not_reach() -> None:
    certificate = synthetic.certificate(n=50)
    with pytest.raises(CertifyError, match="grid begins at 60, but the run has 50"):
        layer_rows({"one": certificate}, [60, 80])
    with pytest.raises(CertifyError, match="certificates is empty"):
        layer_experiment({})

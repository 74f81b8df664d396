"""Bounds against the number of sequences: each is the bound of a certificate of the first n."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from engine.builders import SEQ_LEN, hooked_transformer, make_sae, make_tokens

from saelens_certify import Certificate, CertifyConfig, CertifyError, certify
from saelens_certify.experiments.bound_curves import (
    FIXED,
    bound_curve_findings,
    bound_curves,
    bound_curves_experiment,
)
from saelens_certify.experiments.result import Experiment

CONFIG = CertifyConfig(seq_len=SEQ_LEN, progress=False)
GRID = (3, 10, 25, 40, 99)


@functools.cache
def experiment() -> Experiment:
    return bound_curves(
        hooked_transformer(),
        {"early": make_sae(hook="blocks.0.hook_resid_post"), "late": make_sae()},
        calibration=make_tokens(20, seed=1),
        evaluation=make_tokens(40, seed=2),
        grid=GRID,
        config=CONFIG,
    )


def test_each_row_is_a_certificate_of_the_first_n() -> None:
    found = experiment()
    assert [(row["name"], row["n"]) for row in found.rows] == [
        (name, n) for name in ("early", "late") for n in (3, 10, 25, 40)
    ]
    for row in found.rows:
        whole = found.certificates[str(row["name"])]
        first = Certificate(
            whole.manifest, whole.calibration, whole.evidence.slice(0, int(str(row["n"])))
        )
        for name in FIXED:
            assert row[name] == pytest.approx(first.bounds[name].value, abs=1e-12)
        times, values = whole.sequence("sharp_betting")
        at = dict(zip(times.tolist(), values.tolist(), strict=True))
        if row["n"] in at:
            assert row["sharp_betting_any_time"] == pytest.approx(at[row["n"]], abs=1e-12)
        assert row["uniform"] == whole.baselines["uniform"]


def made_up(name: str, occam: list[float], sharp: list[float]) -> list[Any]:
    return [
        {"name": name, "n": n, "u_sae_occam": a, "u_sae": a - 1, "sharp_betting_any_time": b, "uniform": 6.0}
        for n, a, b in zip((10, 1000), occam, sharp, strict=True)
    ]  # fmt: skip


def test_findings_name_the_first_number_that_certifies() -> None:
    said = bound_curve_findings([*made_up("a", [8, 5], [5.5, 5]), *made_up("b", [9, 7.5], [6, 6])])
    assert "a: of 2 numbers of sequences up to 1,000, below log2 V = 6.00 bits" in said[0]
    assert "U_SAE+Occam first at N = 1,000 (descriptive), 5.00 at the end" in said[0]
    assert "sharp (betting) first at N = 10 (valid there), 5.00 at the end" in said[0]
    assert "U_SAE+Occam nowhere, 7.50 at the end" in said[1]
    assert "sharp (betting) nowhere, 6.00 at the end" in said[1]


def test_the_figure_has_a_panel_each_and_marks_crossings() -> None:
    found = experiment()
    drawn: Any = found.figure
    assert {trace.xaxis for trace in drawn.data} == {"x", "x2"}
    lines = {trace.name: trace for trace in drawn.data if trace.mode != "markers" and trace.xaxis == "x"}  # fmt: skip
    rows = [row for row in found.rows if row["name"] == "early"]
    assert list(lines["U_SAE+Occam"].y) == [row["u_sae_occam"] for row in rows]
    marks = [t for t in drawn.data if t.mode == "markers"]
    crossed = sum(
        any(row[key] < row["uniform"] for row in found.rows if row["name"] == name)  # type: ignore[operator]
        for name in found.certificates
        for key in ("u_sae_occam", "u_sae", "sharp_betting_any_time")
    )
    assert len(marks) == crossed


def test_files_and_what_is_refused(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "calibration": make_tokens(6, seed=1),
        "evaluation": make_tokens(8, seed=2),
        "config": CONFIG,
    }
    model = hooked_transformer()
    found = bound_curves(model, [make_sae()], **arguments, output=tmp_path)
    assert [row["n"] for row in found.rows] == list(range(1, 9))
    assert (tmp_path / "bound_curves.csv").read_text().count("\n") == 9
    with pytest.raises(CertifyError, match="grid"):
        bound_curves(model, [make_sae()], **arguments, grid=[0])
    with pytest.raises(CertifyError, match="certificates is empty"):
        bound_curves_experiment({})
    early = certify(model, make_sae(), **arguments, until=100.0)
    with pytest.raises(CertifyError, match=r"'a' is of a run with until=100\.0"):
        bound_curves_experiment({"a": early})

"""The arithmetic of sensitivities against the published tables."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelens_certify import Certificate, CertifyConfig, CertifyError
from saelens_certify.experiments.result import Row
from saelens_certify.experiments.sensitivity import BASE, pool_preview, sensitivity_experiment
from saelens_certify.pool import Calibration

TABLES = Path(__file__).parents[1] / "data" / "published"


def number(row: Row, name: str) -> float:
    value = row[name]
    assert isinstance(value, (int, float))
    return float(value)


def calibration_of(counts: torch.Tensor) -> Calibration:
    empty = Calibration.empty(len(counts), 10, 3)
    return Calibration(
        counts, empty.target_counts, empty.activation_sums, empty.activation_tokens, 1
    )


def table(name: str) -> list[dict[str, str]]:
    with (TABLES / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_preview_reproduces_the_published_one():
    """Counts with as many features at each threshold as Table 8 has give its complexities."""
    published = table("tab8_pool_preview.csv")
    counts = torch.zeros(int(published[0]["m"]), dtype=torch.int64)
    for line in published:
        counts[: int(line["P"])] = int(line["tau"])
    rows = pool_preview(calibration_of(counts))
    assert [row["tau"] for row in rows] == [int(line["tau"]) for line in published]
    for row, line in zip(rows, published, strict=True):
        assert row["pool_size"] == int(line["P"])
        assert row["dict_size"] == int(line["m"])
        assert number(row, "pool_share") == float(line["P_over_m"])
        assert number(row, "complexity") == pytest.approx(float(line["exact_log_C_m_P"]), abs=1e-9)


@settings(max_examples=30)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=30), st.lists(st.integers(1, 14), max_size=5)
)
def test_the_preview_counts_features(counts, taus):
    rows = pool_preview(calibration_of(torch.tensor(counts)), taus)
    for row, tau in zip(rows, taus, strict=True):
        size = sum(count >= tau for count in counts)
        assert row["pool_size"] == size
        exact = math.log(math.comb(len(counts), size))
        assert number(row, "complexity") == pytest.approx(exact, abs=1e-12)


def test_the_preview_refuses_thresholds_below_one():
    with pytest.raises(CertifyError, match="taus must hold whole numbers from 1, got 0"):
        pool_preview(calibration_of(torch.ones(3, dtype=torch.int64)), (1, 0))


def published_certificate(line: dict[str, str], vocab_size: int) -> Certificate:
    """A certificate whose measured terms are those of a line of Table 2."""
    n, m = int(line["N"]), int(line["m"])
    base, pool, gap, eta = (
        float(line[key]) for key in ("R_hat_M", "R_hat_hG", "eps_loss_hat", "eta_hat")
    )
    counts = torch.zeros(m, dtype=torch.int64)
    counts[: int(line["P"])] = 5
    # Half of the sequences lose, half win: the mean of the differences is pool - base, of their sizes the gap.
    sign = np.where(np.arange(n) % 2 == 0, 1.0, -1.0)
    violation = np.arange(n) < round(eta * n)
    evidence = pa.table(
        {
            "sequence": [f"{i:064x}" for i in range(n)],
            "loss_base": pool - (sign * gap + (pool - base)),
            "loss_sae": np.full(n, pool),
            "loss_pool": np.full(n, pool),
            "violation": violation,
            "loss_unigram": np.full(n, 10.0),
            "rarest": np.where(violation, 0.0, 5.0),
        }
    )
    config = CertifyConfig(coding="topk:64", dependence="ignore")
    manifest = {
        "config": config.to_dict(),
        "model": {"d_vocab": vocab_size, "name": line["Model"]},
        "sae": {"d_sae": m},
        "identity": {"hook_out": "blocks.6.hook_resid_post"},
        "data": {
            "calibration": {"n_sequences": int(line["Calibration_Tokens_Actual"]) // 32},
            "evaluation": {"source": {"n_duplicates": 0}},
        },
    }
    return Certificate(manifest, calibration_of(counts), evidence)


@pytest.mark.parametrize(("model", "vocab_size"), [("GPT-2 Small", 50_257), ("Gemma-2B", 256_000)])
def test_rows_reproduce_the_published_decomposition(model, vocab_size):
    lines = [line for line in table("tab2_calibration_sensitivity.csv") if line["Model"] == model]
    names = [f"budget={int(line['Calibration_Tokens_Actual']) // 32}" for line in lines[:-1]]
    certificates = {
        name: published_certificate(line, vocab_size)
        for name, line in zip([*names, BASE], lines, strict=True)
    }
    columns = {
        "risk_base": "R_hat_M",
        "risk_pool": "R_hat_hG",
        "gap": "eps_loss_hat",
        "eta": "eta_hat",
        "mismatch": "Mismatch_Empirical_DeltaEta",
        "t_proxy": "Fixed_Proxy_Concentration",
        "t_eta": "Mismatch_Concentration",
        "t_occ": "Occam_Proxy_Concentration",
        "t_eps": "Reconstruction_Concentration",
        "u_sae": "U_SAE",
        "u_sae_occam": "U_SAE_Occam",
        "complexity": "exact_log_C_m_P",
        "loss_range": "Delta",
        "uniform": "Uniform_Baseline",
        "pool_share": "P_over_m",
    }
    result = sensitivity_experiment(certificates)
    rows = [*result.rows[1:], result.rows[0]]
    for row, line in zip(rows, lines, strict=True):
        for key, column in columns.items():
            assert number(row, key) == pytest.approx(float(line[column]), abs=1e-9), key
        assert str(row["nonvacuous_u_sae_occam"]) == line["U_SAE_Occam_Nonvacuous"]
    assert any("as in the paper's Table 2" in finding for finding in result.findings)

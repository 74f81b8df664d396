"""Output fidelity: rows against hooked forwards in float64, limits against their definition, and the picture."""

from __future__ import annotations

import csv
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine.builders import D_SAE, SEQ_LEN, hooked_transformer, make_sae, make_tokens
from torch import Tensor

from experiments import synthetic
from saelens_certify import Certificate, CertifyConfig, CertifyError, bounds, verify
from saelens_certify.bounds.times import looks
from saelens_certify.experiments.fidelity import (
    fidelity_findings,
    fidelity_rows,
    measure_fidelity,
    output_fidelity,
)
from saelens_certify.experiments.result import Experiment

HOOKS = ["blocks.0.hook_resid_post", "blocks.2.hook_resid_post"]
CONFIG = CertifyConfig(seq_len=SEQ_LEN, progress=False)
EVALUATION = make_tokens(30, seed=2)
PUBLISHED = Path(__file__).parents[1] / "data" / "published"

# Columns of the published tables that are not fidelity: every certificate has them among its metrics.
OF_THE_CERTIFICATE = {
    "R_hat_M", "R_hat_hG", "Direct_U_M", "Direct_U_hG", "Hoeffding_Margin", "B", "Delta",
    "Exact_log_C_m_P",
}  # fmt: skip


@functools.cache
def sae(hook: str) -> Any:
    # Few features are active on few calibration sequences: the pool leaves some out.
    return make_sae("standard", hook=hook)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fidelity") / "out"


@pytest.fixture(scope="module")
def measured(folder) -> Experiment:
    return measure_fidelity(
        hooked_transformer(), [sae(hook) for hook in HOOKS], calibration=make_tokens(1, seed=1),
        evaluation=EVALUATION, config=CONFIG, output=folder,
    )  # fmt: skip


@torch.no_grad()
def by_hand(hook: str, mask: Tensor) -> dict[str, np.ndarray]:
    """The columns of one SAE per sequence, from whole hooked forwards and plain arithmetic."""
    model, own = hooked_transformer(), sae(hook)

    def probabilities(pool: Tensor | None) -> Tensor:
        def splice(x: Tensor, hook: Any) -> Tensor:  # noqa: ARG001
            return own.decode(own.encode(x) * pool)

        hooks: list[Any] = [] if pool is None else [(hook, splice)]
        logits = model.run_with_hooks(EVALUATION, fwd_hooks=hooks)[:, :-1].double()
        return logits.softmax(dim=-1)

    everything = torch.ones(D_SAE)
    p = {"M": probabilities(None), "SoM": probabilities(everything), "hG": probabilities(mask)}
    gold = EVALUATION[:, 1:, None]
    vocabulary = p["M"].shape[-1]
    found = {}
    for name, q in p.items():
        at = q.gather(-1, gold)[..., 0]
        found[f"Loss_{name}"] = -torch.log2(0.5 * at + 0.5 / vocabulary)
        if name == "M":
            continue
        found[f"KL_M_vs_{name}"] = (p["M"] * (p["M"] / q).log2()).sum(dim=-1)
        found[f"Top1Agree_M_vs_{name}"] = (p["M"].argmax(-1) == q.argmax(-1)).double()
        true = p["M"].gather(-1, gold)[..., 0]
        found[f"AbsGoldLogProbDiff_M_vs_{name}"] = (true.log2() - at.log2()).abs()
    return {name: values.mean(dim=1).numpy() for name, values in found.items()}


def test_means_are_those_of_hooked_forwards(measured) -> None:
    assert [row["name"] for row in measured.rows] == HOOKS
    for row in measured.rows:
        certificate = measured.certificates[str(row["name"])]
        mask = certificate.pool.mask
        assert 0 < int(mask.sum()) == row["P"] < row["m"] == D_SAE
        found = by_hand(str(row["name"]), mask.float())
        assert not np.allclose(found["KL_M_vs_SoM"], found["KL_M_vs_hG"])
        for name, values in found.items():
            assert row[name] == pytest.approx(values.mean(), abs=2e-5), name
            if name.startswith(("KL", "Abs")):
                for suffix, share in (("q10", 0.1), ("q50", 0.5), ("q90", 0.9)):
                    expected = np.quantile(values, share)
                    assert row[f"{name}_{suffix}"] == pytest.approx(expected, abs=2e-5), name
        for short in ("SoM", "hG"):
            difference = (found[f"Loss_{short}"] - found["Loss_M"]).mean()
            assert row[f"Excess_{short}"] == pytest.approx(difference, abs=2e-5)


def test_settings_and_files(measured, folder) -> None:
    row = measured.rows[1]
    assert (row["label"], row["Layer"], row["SeqLen"], row["TopK"]) == ("layer 2", 2, SEQ_LEN, None)
    assert (row["N"], row["N_units"], row["Tokens"]) == (30, 30, 30 * SEQ_LEN)
    assert row["P_over_m"] == pytest.approx(float(str(row["P"])) / D_SAE)
    assert json.loads((folder / "output_fidelity.json").read_text())["rows"][1]["N"] == 30
    loaded = {hook: verify(folder / hook).certificate for hook in HOOKS}
    assert output_fidelity(loaded).rows == measured.rows


@pytest.mark.parametrize("layer", [4, 20, 30])
def test_every_published_fidelity_column_is_there(layer: int) -> None:
    with (PUBLISHED / f"fig2_fidelity_layer_{layer}.csv").open(newline="") as file:
        published = set(next(csv.reader(file)))
    row = fidelity_rows({"a": synthetic.certificate(coding="topk:64")})[0]
    assert published - OF_THE_CERTIFICATE <= set(row)
    assert row["TopK"] == 64


@pytest.mark.parametrize("simultaneous", [1, 4])
def test_limits_are_bets_on_both_sides(simultaneous: int) -> None:
    """Half of the certificate's share on each side, from the evidence."""
    certificate = synthetic.certificate(n=300, simultaneous=simultaneous)
    row = fidelity_rows({"a": certificate})[0]
    level = 0.05 / simultaneous / 2
    assert row["delta"] == 0.05 / simultaneous
    low, high = certificate.losses.low, certificate.losses.high
    for label, column, ends in (
        ("Top1Agree_M_vs_SoM", "top1_agreement", (0.0, 1.0)),
        ("Top1Agree_M_vs_hG", "top1_agreement_pool", (0.0, 1.0)),
        ("Loss_M", "loss_base", (low, high)),
        ("Loss_SoM", "loss_sae", (low, high)),
        ("Loss_hG", "loss_pool", (low, high)),
    ):
        values = certificate.column(column)
        upper = bounds.betting_upper(values, *ends, level)
        lower = -bounds.betting_upper(-values, -ends[1], -ends[0], level)
        assert (row[f"{label}_lower"], row[f"{label}_upper"]) == (lower, upper)
        assert lower < float(str(row[label])) < upper
        assert row[label] == pytest.approx(values.mean(), abs=1e-12)
    for short in ("SoM", "hG"):
        ends = float(str(row[f"Excess_{short}_lower"])), float(str(row[f"Excess_{short}_upper"]))
        assert ends[0] < float(str(row[f"Excess_{short}"])) < ends[1]


def test_limits_of_a_run_that_could_stop_hold_at_any_time() -> None:
    certificate = synthetic.certificate(until="nonvacuous")
    row = fidelity_rows({"a": certificate})[0]
    values = certificate.column("top1_agreement")
    upper = bounds.betting_sequence(values, 0.0, 1.0, 0.025, looks(len(values)))[-1]
    lower = -bounds.betting_sequence(-values, -1.0, 0.0, 0.025, looks(len(values)))[-1]
    assert (row["Top1Agree_M_vs_SoM_lower"], row["Top1Agree_M_vs_SoM_upper"]) == (lower, upper)
    assert upper != bounds.betting_upper(values, 0.0, 1.0, 0.025)


def test_clusters_count_as_one_in_means_and_limits() -> None:
    clusters: list[str | None] = ["big"] * 100 + [None] * 300
    certificate = synthetic.certificate(clusters=clusters)
    row = fidelity_rows({"a": certificate})[0]
    assert (row["N"], row["N_units"]) == (400, 301)
    values = certificate.column("kl")
    means = np.concatenate([[values[:100].mean()], values[100:]])
    assert row["KL_M_vs_SoM"] == pytest.approx(means.mean())
    assert row["KL_M_vs_SoM_q50"] == pytest.approx(np.median(values))
    agreement = certificate.losses.units(certificate.column("top1_agreement"))
    assert row["Top1Agree_M_vs_SoM_upper"] == bounds.betting_upper(agreement, 0.0, 1.0, 0.025)


def test_findings_say_who_is_most_faithful() -> None:
    def found(**changes: dict[str, float]) -> str:
        rows = []
        for name, values in changes.items():
            row = fidelity_rows({name: synthetic.certificate()})[0]
            rows.append({**row, **values})
        return " ".join(fidelity_findings(rows))

    best = {"KL_M_vs_SoM": 0.1, "KL_M_vs_hG": 0.1, "Top1Agree_M_vs_SoM": 0.9, "Loss_SoM": 2.0}
    worse = {"KL_M_vs_SoM": 0.4, "KL_M_vs_hG": 0.75, "Top1Agree_M_vs_SoM": 0.5, "Loss_SoM": 3.0}
    assert "the SAE at good is the most faithful" in found(bad=worse, good=best)
    said = found(bad=worse, good=best | {"Loss_SoM": 4.0})
    assert "depends on the measure: good by KL, good by top-1 agreement, bad by loss" in said
    assert "changes KL by at most 0.35 bits per token (at bad)" in said
    assert "KL from the model is 0.400 bits" in said
    assert "the same at 90.0% of positions" in said
    alone = found(good=best)
    assert "most faithful" not in alone
    assert "95% confidence" in alone


def test_shown_limits_are_rounded_outwards() -> None:
    row = fidelity_rows({"a": synthetic.certificate()})[0]
    row |= {"Top1Agree_M_vs_SoM_lower": 0.40099, "Top1Agree_M_vs_SoM_upper": 0.50001}
    row |= {"Excess_SoM_lower": -0.12341, "Excess_SoM_upper": 0.12341}
    said = " ".join(fidelity_findings([row]))
    assert "(40.0 to 50.1)" in said
    assert "(-0.124 to 0.124)" in said


def test_the_picture_shows_quantiles_of_the_evidence(measured) -> None:
    figure: Any = measured.figure
    boxes = list(figure.data)
    assert len(boxes) == 9
    columns = [
        "kl", "kl_pool", "gold_logprob_gap", "gold_logprob_gap_pool", "top1_agreement",
        "top1_agreement_pool", "loss_base", "loss_sae", "loss_pool",
    ]  # fmt: skip
    each = [measured.certificates[hook] for hook in HOOKS]
    for box, column in zip(boxes, columns, strict=True):
        values = [certificate.column(column) for certificate in each]
        for ends, share in (("lowerfence", 0.1), ("q1", 0.25), ("median", 0.5), ("q3", 0.75), ("upperfence", 0.9)):  # fmt: skip
            np.testing.assert_allclose(box[ends], [np.quantile(v, share) for v in values])
        np.testing.assert_allclose(box["mean"], [v.mean() for v in values])
    assert list(figure.layout.xaxis.ticktext) == ["layer 0", "layer 2"]
    assert [box.name for box in boxes if box.showlegend] == ["M", "S∘M", "h_G"]


def test_one_certificate_is_enough() -> None:
    certificate = synthetic.certificate()
    found = output_fidelity(certificate)
    assert len(found.rows) == 1
    assert list(found.certificates.values()) == [certificate]


@pytest.mark.parametrize("given", [{}, {"a": 3}, "folder", None])
def test_something_else_is_refused(given: Any) -> None:
    with pytest.raises(CertifyError, match=r"output_fidelity takes a certificate"):
        output_fidelity(given)


def test_no_saes_are_refused_before_any_work() -> None:
    with pytest.raises(CertifyError, match="saes is empty"):
        measure_fidelity(None, {}, calibration=None, evaluation=None)


def test_a_run_read_again_says_the_same(measured, folder) -> None:
    again = output_fidelity({HOOKS[0]: Certificate.load(folder / HOOKS[0])})
    assert {**again.rows[0], "label": ""} == {**measured.rows[0], "label": ""}

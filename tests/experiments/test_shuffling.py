"""Feature shuffling on tiny models: rows against the evidence, what the findings say and when."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from engine.builders import D_SAE, SEQ_LEN, hooked_transformer, make_sae, make_tokens

from saelens_certify import Certificate, CertifyConfig, CertifyError, verify
from saelens_certify.experiments.result import Experiment
from saelens_certify.experiments.shuffling import (
    ERRORS,
    ERRORS_NO_FIRST,
    error_tests,
    feature_shuffling,
    shuffling_findings,
    shuffling_rows,
)
from saelens_certify.proxies import feature_permutation
from saelens_certify.report.experiments.shuffling import shuffling_figure

CONFIG = CertifyConfig(seq_len=SEQ_LEN, progress=False, seed=4)
NUMBERS: dict[str, int] = {
    "permutations": 3,
    "error_permutations": 24,
    "matched_permutations": 2,
    "random_decoders": 2,
    "random_unit_decoders": 1,
}
KINDS = {"permuted": 3, "matched": 2, "random_decoder": 2, "random_unit_decoder": 1}


def shuffle(
    config: CertifyConfig = CONFIG, output: Path | None = None, **numbers: int
) -> Experiment:
    return feature_shuffling(
        hooked_transformer(), make_sae(), calibration=make_tokens(20, seed=1),
        evaluation=make_tokens(30, seed=2), config=config, output=output, **{**NUMBERS, **numbers},
    )  # fmt: skip


@functools.cache
def experiment() -> Experiment:
    return shuffle()


def certificate() -> Certificate:
    return experiment().certificates["shuffling"]


def test_one_row_a_proxy() -> None:
    found, evidence = experiment(), certificate()
    assert found.kind == "feature_shuffling"
    assert len({tuple(row) for row in found.rows}) == 1
    expected = [("sae", None), *((k, i) for k, n in KINDS.items() for i in range(n))]
    assert [(row["kind"], row["index"]) for row in found.rows] == [
        *expected,
        ("error_permutations", None),
    ]
    base = evidence.column("loss_base")
    for row in found.rows[:-1]:
        name = "sae" if row["kind"] == "sae" else f"{row['kind']}_{row['index']}"
        suffix = "" if name == "sae" else f"_{name}"
        losses = evidence.column(f"loss_{name}")
        gaps = np.abs(base - losses)
        assert row["risk"] == pytest.approx(losses.mean())
        assert row["gap"] == pytest.approx(gaps.mean())
        assert row["gap_p10"] == pytest.approx(np.quantile(gaps, 0.1))
        assert row["gap_p50"] == pytest.approx(np.median(gaps))
        assert row["gap_p90"] == pytest.approx(np.quantile(gaps, 0.9))
        assert row["kl"] == pytest.approx(evidence.column(f"kl{suffix}").mean())
        assert row["mse"] == pytest.approx(evidence.column(f"mse{suffix}").mean())
        assert row["mse_no_first"] == pytest.approx(evidence.column(f"mse_no_first{suffix}").mean())
        assert row["n"] == KINDS.get(str(row["kind"]))
        if row["kind"] == "sae":
            assert row["p_value"] is row["effect"] is None
            continue
        test = evidence.shuffle_tests[str(row["kind"])]
        assert (row["p_value"], row["effect"]) == (test.p_value, test.effect)
        assert (row["effect_lower"], row["effect_upper"]) == (test.lower, test.upper)


def test_squared_errors_are_those_of_decoding_with_the_permutation() -> None:
    """Each of R permutations, by SAELens's own decoder."""
    sae, model = make_sae(), hooked_transformer()
    tokens = make_tokens(30, seed=2)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        x = cache[sae.cfg.metadata.hook_name]
        codes = sae.encode(x)
        errors = []
        for r in range(24):
            moved = torch.zeros_like(codes)
            moved[..., feature_permutation(D_SAE, 4, r).long()] = codes
            errors.append((sae.decode(moved) - x).double().square().sum(-1))
        own = (sae.decode(codes) - x).double().square().sum(-1)
    tests = error_tests(certificate())
    for column, part in ((ERRORS, slice(0, None)), (ERRORS_NO_FIRST, slice(1, None))):
        expected = [float(e[:, part].mean()) for e in errors]
        np.testing.assert_allclose(tests[column].errors, expected, rtol=1e-5)
        assert tests[column].error == pytest.approx(float(own[:, part].mean()), rel=1e-5)
        b = sum(e <= float(own[:, part].mean()) for e in expected)
        assert tests[column].p_value == pytest.approx((1 + b) / 25)
    last = experiment().rows[-1]
    assert last["n"] == 24
    assert last["mse"] == pytest.approx(np.mean(tests[ERRORS].errors))
    assert last["mse_no_first"] == pytest.approx(np.mean(tests[ERRORS_NO_FIRST].errors))
    assert last["mse_p_value"] == tests[ERRORS].p_value
    assert last["mse_p_value_no_first"] == tests[ERRORS_NO_FIRST].p_value
    assert last["risk"] is None
    # The first ones are those that the model is run on.
    for r in range(3):
        mse = certificate().column(f"mse_permuted_{r}").mean()
        assert tests[ERRORS].errors[r] == pytest.approx(mse, rel=1e-9)


def edited(change: dict[str, np.ndarray]) -> Certificate:
    """The certificate with other evidence in some columns."""
    found = certificate()
    table = found.evidence
    for name, values in change.items():
        column: Any = pa.array(values.ravel())
        if values.ndim == 2:
            column = pa.FixedSizeListArray.from_arrays(column, values.shape[1])
        table = table.set_column(table.column_names.index(name), name, column)
    return Certificate(found.manifest, found.calibration, table)


def test_p_value_of_the_squared_error_counts_ties_and_positions_apart() -> None:
    own = certificate().column("mse")
    same = np.repeat(own[:, None], 24, axis=1)
    tied = error_tests(edited({ERRORS: same}))
    assert tied[ERRORS].p_value == 1.0
    better = same * 1.5
    better[:, 5] = own * 0.99
    better[:, 9] = own[::-1]  # the same numbers on other sequences: the same mean
    found = edited({ERRORS: better})
    assert error_tests(found)[ERRORS].p_value == pytest.approx(3 / 25)
    assert error_tests(found)[ERRORS_NO_FIRST].p_value == pytest.approx(1 / 25)
    assert any("not both significant at 0.05" in said for said in shuffling_findings(found))


def test_findings_say_whether_shuffling_destroys_the_gap() -> None:
    said = " ".join(experiment().findings)
    assert "Shuffled features: gap" in said
    assert "Random unit decoder: gap" in said
    assert "p = 0.25 with R = 3; 0.05 is out of reach with fewer than 19 copies" in said
    assert "p = 0.04, without position 0 p = 0.04, both significant at 0.05" in said
    assert "Support sizes are preserved" in said
    test = certificate().shuffle_tests["permuted"]
    assert f"is larger by {test.lower:.3f} to {test.upper:.3f}" in said


@pytest.mark.parametrize(
    ("share", "sentence"),
    [
        (1.0, "What the SAE keeps is destroyed, as the paper found"),
        (0.1, "The gap widens, but to less than 2 times"),
        (-0.3, "against the paper's finding"),
        (0.0, "The difference may be zero: the paper's finding is not seen here"),
    ],
)
def test_every_outcome_has_its_sentence(share: float, sentence: str) -> None:
    """Gaps of 2 bits for the SAE and 2 + 6 * share for its copies, on 400 sequences."""
    found = certificate()
    table = pa.concat_tables([found.evidence] * 14)
    n = table.num_rows
    base = np.full(n, 1.5)
    columns = {"loss_base": base, "loss_sae": base + 2, "loss_pool": base + 2}
    columns |= {f"loss_permuted_{r}": base + 2 + 3 * share for r in range(3)}
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    said = shuffling_findings(Certificate(found.manifest, found.calibration, table))
    about = [text for text in said if text.startswith("Shuffled features: gap")]
    assert sentence in about[0]


def test_what_is_left_is_compared_with_the_baselines() -> None:
    unigram, uniform = certificate().baselines["unigram"], certificate().baselines["uniform"]
    n = certificate().evidence.num_rows
    for risk, end in (
        (min(unigram, uniform) - 0.1, "still better than a unigram model and a uniform guess."),
        (max(unigram, uniform) + 0.1, "worse than either."),
    ):
        found = edited({f"loss_permuted_{r}": np.full(n, risk) for r in range(3)})
        about = [s for s in shuffling_findings(found) if s.startswith("With shuffled features")]
        assert about[0].endswith(end)


def test_significance_is_that_of_the_share_of_delta() -> None:
    config = dataclasses.replace(CONFIG, delta=0.3)
    assert any(
        "p = 0.25 with R = 3, significant at 0.3: alignment" in said
        for said in shuffle(config).findings
    )
    shared = dataclasses.replace(config, simultaneous=2)
    assert any(
        "0.15 is out of reach with fewer than 6 copies" in s for s in shuffle(shared).findings
    )


def test_only_errors_or_only_losses() -> None:
    none: dict[str, Any] = dict.fromkeys(NUMBERS, 0)
    errors = shuffle(**{**none, "error_permutations": 19})
    assert [row["kind"] for row in errors.rows] == ["sae", "error_permutations"]
    assert len(errors.findings) == 1
    losses = shuffle(**{**none, "permutations": 1})
    assert [row["kind"] for row in losses.rows] == ["sae", "permuted"]
    assert error_tests(losses.certificates["shuffling"]) == {}
    drawn: Any = losses.figure
    assert {trace.type for trace in drawn.data} == {"scatter"}
    with pytest.raises(CertifyError, match="are all 0: there is nothing to compare"):
        shuffle(**none)
    with pytest.raises(CertifyError, match="until='nonvacuous'.*no shuffle test is valid"):
        shuffle(dataclasses.replace(CONFIG, until="nonvacuous"))


def test_the_figure_shows_the_evidence() -> None:
    drawn: Any = shuffling_figure(certificate())
    lines = [trace for trace in drawn.data if trace.type == "scatter"]
    assert lines[-1].name == "this SAE"
    gaps = np.abs(certificate().column("loss_base") - certificate().column("loss_sae"))
    np.testing.assert_allclose(np.sort(lines[-1].x), np.maximum(np.sort(gaps), 1e-4))
    assert len(lines) == 1 + sum(KINDS.values())
    assert sum(bool(trace.showlegend) for trace in lines) == 5
    bars = [trace for trace in drawn.data if trace.type == "histogram"]
    np.testing.assert_allclose(bars[0].x, error_tests(certificate())[ERRORS].errors)
    np.testing.assert_allclose(bars[1].x, error_tests(certificate())[ERRORS_NO_FIRST].errors)
    at = [shape.x0 for shape in drawn.layout.shapes]
    assert at == [pytest.approx(certificate().column(c).mean()) for c in ("mse", "mse_no_first")]


def test_a_run_of_its_own_is_left_behind(tmp_path: Path) -> None:
    found = shuffle(output=tmp_path / "study")
    checked = verify(tmp_path / "study" / "shuffling")
    assert checked.certificate.shuffle_tests == found.certificates["shuffling"].shuffle_tests
    assert shuffling_rows(checked.certificate) == found.rows
    for suffix in ("csv", "json", "html"):
        assert (tmp_path / "study" / f"feature_shuffling.{suffix}").stat().st_size > 100

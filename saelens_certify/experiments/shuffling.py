"""Feature shuffling: is it which feature goes with which direction that keeps the model's predictions?

Copies of the SAE with the same codes, in which only the alignment of features with decoder rows is random, against
the SAE itself (arXiv:2606.18383, feature-identity shuffling).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saelens_certify.bounds.shuffle import ShuffleTest, permutation_p_value
from saelens_certify.certificate import Certificate
from saelens_certify.certification import read_sides
from saelens_certify.config import CertifyConfig
from saelens_certify.controls import BEYOND, control_names
from saelens_certify.errors import CertifyError
from saelens_certify.experiments.result import Experiment, Row
from saelens_certify.experiments.running import saved
from saelens_certify.report.experiments.shuffling import shuffling_figure
from saelens_certify.report.terms import CONTROLS, control_label
from saelens_certify.rounding import percent
from saelens_certify.study import Setting, View, certify_many

KIND = "feature_shuffling"

ERRORS = "mse_error_permutations"
ERRORS_NO_FIRST = "mse_no_first_error_permutations"

# "Destroys": the copies' gap is at least so many times that of the SAE, and larger with confidence.
_DESTROYS = 2.0


@dataclass(frozen=True)
class ErrorTest:
    """The squared error of the real SAE against that of R feature permutations.

    Attributes:
        error: Mean squared error of the SAE, per token.
        errors: Those of the permutations [R].
        p_value: (1 + b) / (1 + R), b permutations having an error at most the SAE's (`permutation_p_value`):
            exact under the null hypothesis of the permuted controls, whether or not the sequences are
            independent.
    """

    error: float
    errors: NDArray[np.float64]
    p_value: float


def feature_shuffling(
    model: Any,
    sae: Any,
    *,
    calibration: Any,
    evaluation: Any,
    permutations: int = 19,
    error_permutations: int = 100,
    matched_permutations: int = 0,
    random_decoders: int = 1,
    random_unit_decoders: int = 1,
    config: CertifyConfig | None = None,
    output: str | Path | None = None,
) -> Experiment:
    """Compare an SAE with copies of it in which only the alignment is random, in one run.

    Every copy decodes the SAE's own codes: the same number of active features on every token, with the same values.
    A permutation is one fixed permutation of the whole dictionary for all sequences, as published.

    Args:
        model: As for `certify`.
        sae: As for `certify`.
        calibration: As for `certify`.
        evaluation: As for `certify`.
        permutations: Feature permutations that the model is run on. The shuffle test of their losses reaches
            p = 0.05 with 19 or more; its effect and interval need no such number.
        error_permutations: Feature permutations of which only squared errors are measured, without the
            model; the first are those of ``permutations``.
        matched_permutations: Permutations within deciles of calibration frequency.
        random_decoders: Decoders with random directions and the norms of the SAE's rows.
        random_unit_decoders: Decoders with random directions of norm 1.
        config: Settings; the five numbers above take the place of those in it.
        output: Folder of the results.

    Returns:
        Rows: see `shuffling_rows`. The certificate is that of the SAE, with every copy among its controls.

    Raises:
        CertifyError: Before any long work, if there is nothing to compare with, for ``until``, or as
            `certify` raises.
    """
    config = CertifyConfig.check(config)
    numbers = {
        "permutations": permutations,
        "error_permutations": error_permutations,
        "matched_permutations": matched_permutations,
        "random_decoders": random_decoders,
        "random_unit_decoders": random_unit_decoders,
    }
    config = dataclasses.replace(config, **numbers)
    if not any(numbers.values()):
        raise CertifyError(
            f"{', '.join(numbers)} are all 0: there is nothing to compare the SAE with; ask for at least one"
        )
    if config.until is not None:
        raise CertifyError(
            f"until={config.until!r} lets the SAE's own losses decide how many sequences there are, so its "
            "copies are not exchangeable with it and no shuffle test is valid; use until=None"
        )
    sides = read_sides(model, calibration, evaluation, config)
    setting = Setting(sae, View(sides[0]), View(sides[1]), config)
    certificates = certify_many(model, {"shuffling": setting}, output=output)
    certificate = certificates["shuffling"]
    experiment = Experiment(
        kind=KIND,
        title=(
            f"Feature shuffling: {certificate.manifest['model']['name']}, "
            f"{certificate.manifest['identity']['hook_out']}"
        ),
        certificates=certificates,
        rows=shuffling_rows(certificate),
        findings=shuffling_findings(certificate),
        figure=shuffling_figure(certificate),
    )
    return saved(experiment, output)


def shuffling_rows(certificate: Certificate) -> tuple[Row, ...]:
    """Return one row a proxy: the real SAE, every copy, and the error-only permutations together.

    Args:
        certificate: A certificate with controls.

    Returns:
        Rows with ``kind``, ``label``, ``index`` and ``n`` (copies of this kind); ``risk`` and ``gap`` (means over
        sequences of the loss and of |loss of M - loss of the proxy|), quantiles of the gap over
        sequences, ``kl`` from M, all in bits per token; squared errors per token; the shuffle test of the
        kind (p-value; effect with interval, bits per token) and the p-values of the squared error.
    """
    tests = certificate.shuffle_tests
    by_kind = {kind: test.n_permutations for kind, test in tests.items()}
    rows = [_proxy_row(certificate, "sae", "this SAE", "sae", None, None, None)]
    for name in control_names(certificate):
        kind, _, index = name.rpartition("_")
        rows.append(
            _proxy_row(
                certificate, kind, control_label(name), name, int(index), by_kind.get(kind), tests.get(kind)
            )
        )  # fmt: skip
    errors = error_tests(certificate)
    if errors:
        everywhere, later = errors[ERRORS], errors[ERRORS_NO_FIRST]
        n = len(everywhere.errors)
        rows.append(
            {
                **dict.fromkeys(rows[0]),
                "kind": "error_permutations",
                "label": "shuffled features, errors only",
                "n": n,
                "mse": float(everywhere.errors.mean()),
                "mse_no_first": float(later.errors.mean()),
                "mse_p_value": everywhere.p_value,
                "mse_p_value_no_first": later.p_value,
            }
        )
    return tuple(rows)


def error_tests(certificate: Certificate) -> dict[str, ErrorTest]:
    """Test the SAE's squared error against the permutations of which only errors were measured.

    Returns:
        By evidence column: with position 0 (an outlier in many models that may decide alone) and without
        it. Empty if there are no such columns.
    """
    found: dict[str, ErrorTest] = {}
    for column, own in ((ERRORS, "mse"), (ERRORS_NO_FIRST, "mse_no_first")):
        if column not in certificate.evidence.column_names:
            continue
        errors = np.stack(list(certificate.column(column)))
        if errors.shape[1]:
            statistic, controls = _mean(certificate.column(own)), [_mean(e) for e in errors.T]
            p_value = permutation_p_value(statistic, controls)
            found[column] = ErrorTest(statistic, np.array(controls), p_value)
    return found


def shuffling_findings(certificate: Certificate) -> tuple[str, ...]:
    """Say what the rows say: does shuffling destroy the gap, by how much, and is that significant?"""
    delta = certificate.config.share
    said: list[str] = []
    for kind, test in certificate.shuffle_tests.items():
        said += [_effect(kind, test), _significance(kind, test, delta)]
    if "permuted" in certificate.shuffle_tests:
        said.append(_what_is_left(certificate))
    errors = error_tests(certificate)
    if errors:
        everywhere, later = errors[ERRORS], errors[ERRORS_NO_FIRST]
        n, worst = len(everywhere.errors), max(everywhere.p_value, later.p_value)
        times = everywhere.errors.mean() / max(everywhere.error, 1e-300)
        said.append(
            f"Squared error against {n} permutations: p = {everywhere.p_value:.2g}, without position 0 "
            f"p = {later.p_value:.2g}, {'both' if worst <= delta else 'not both'} significant at {delta:g}. The "
            f"permutations' mean squared error is {times:.3g} times that of the SAE."
        )
    config = certificate.config
    if config.permutations or config.matched_permutations:
        said.append(
            "Support sizes are preserved: every permutation was checked to be one of the whole dictionary, and on "
            "every batch its codes to have as many features a token as the SAE's."
        )
    if len(certificate.shuffle_tests) > 1:
        said.append(
            "Each p-value is for its kind of copy by itself, not corrected for their number."
        )
    return tuple(said)


def _proxy_row(
    certificate: Certificate,
    kind: str,
    label: str,
    name: str,
    index: int | None,
    n: int | None,
    test: ShuffleTest | None,
) -> Row:
    gaps = np.abs(certificate.column("loss_base") - certificate.column(f"loss_{name}"))
    low, middle, high = (float(q) for q in np.quantile(gaps, (0.1, 0.5, 0.9)))
    suffix = "" if name == "sae" else f"_{name}"
    gap = certificate.measured.gap if name == "sae" else certificate.controls[name]["gap"]
    return {
        "kind": kind,
        "label": label,
        "index": index,
        "n": n,
        "risk": certificate.mean(f"loss_{name}"),
        "gap": gap,
        "gap_p10": low,
        "gap_p50": middle,
        "gap_p90": high,
        "kl": certificate.mean(f"kl{suffix}"),
        "mse": _mean(certificate.column(f"mse{suffix}")),
        "mse_no_first": _mean(certificate.column(f"mse_no_first{suffix}")),
        "p_value": None if test is None else test.p_value,
        "effect": None if test is None else test.effect,
        "effect_lower": None if test is None else test.lower,
        "effect_upper": None if test is None else test.upper,
        "mse_p_value": None,
        "mse_p_value_no_first": None,
    }


def _effect(kind: str, test: ShuffleTest) -> str:
    """How much larger the gap of the copies is, and what follows."""
    times = f"{test.control_gap / test.gap:.3g} times" if test.gap > 0.0 else "against none"
    numbers = (
        f"{CONTROLS[kind].capitalize()}: gap {test.control_gap:.3f} bits per token (mean of "
        f"{test.n_permutations}), this SAE {test.gap:.3f} ({times}); at {percent(test.confidence)} confidence the "
        f"copies' is larger by {test.lower:.3f} to {test.upper:.3f}."
    )
    if test.lower > 0.0 and test.control_gap >= _DESTROYS * test.gap:
        paper = ", as the paper found" if kind == "permuted" else ""
        return f"{numbers} What the SAE keeps is destroyed{paper}."
    if test.lower > 0.0:
        return f"{numbers} The gap widens, but to less than {_DESTROYS:g} times: most of it is there without alignment."
    if test.upper < 0.0:
        return f"{numbers} The copies are closer to the model than the SAE: against the paper's finding."
    return f"{numbers} The difference may be zero: the paper's finding is not seen here."


def _significance(kind: str, test: ShuffleTest, delta: float) -> str:
    said = f"{CONTROLS[kind].capitalize()}: shuffle test p = {test.p_value:.2g} with R = {test.n_permutations}"
    if test.p_value <= delta:
        return f"{said}, significant at {delta:g}: {BEYOND[kind]}."
    if test.smallest_p_value > delta:
        needed = math.ceil(1 / delta) - 1
        return f"{said}; {delta:g} is out of reach with fewer than {needed} copies, whatever they show."
    return f"{said}, not significant at {delta:g}."


def _what_is_left(certificate: Certificate) -> str:
    """Where the shuffled SAE stands between the model and knowing nothing of the context."""
    names = [name for name in certificate.controls if name.startswith("permuted_")]
    risk = _mean(np.array([certificate.controls[name]["risk"] for name in names]))
    unigram, uniform = certificate.baselines["unigram"], certificate.baselines["uniform"]
    beaten = [
        n for n, value in (("unigram model", unigram), ("uniform guess", uniform)) if risk < value
    ]
    better = " and a ".join(beaten)
    return (
        f"With shuffled features the risk is {risk:.3f} bits per token ({certificate.measured.risk_base:.3f} of the model "
        f"itself, {unigram:.3f} of a unigram model, {uniform:.3f} of a uniform guess): "
        + (f"still better than a {better}." if beaten else "worse than either.")
    )


def _mean(values: NDArray[Any]) -> float:
    """The mean, correctly rounded: equal columns have equal means in whatever order."""
    return math.fsum(values) / len(values)

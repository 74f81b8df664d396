"""Bounds against the number of evaluation sequences (arXiv:2606.18383, Figure 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saelens_certify.certificate import Certificate
from saelens_certify.config import CertifyConfig
from saelens_certify.curves import Curve, any_time_curves, check_grid, fixed_curves
from saelens_certify.errors import CertifyError
from saelens_certify.experiments.result import Experiment, Row
from saelens_certify.experiments.running import certify_saes, saved
from saelens_certify.report.experiments.bound_curves import bound_curves_figure
from saelens_certify.report.terms import bound_label

KIND = "bound_curves"

FIXED = ("u_sae_occam", "u_sae", "direct_base", "direct_pool", "sharp_betting")
"""Bounds that hold at each number of sequences that was fixed in advance."""

ANY_TIME = "sharp_betting"
"""The bound that is also given time-uniformly: at all numbers of sequences at once."""


def bound_curves(
    model: Any,
    saes: Mapping[str, Any] | Sequence[Any],
    *,
    calibration: Any,
    evaluation: Any,
    grid: Sequence[int] | None = None,
    config: CertifyConfig | None = None,
    output: str | Path | None = None,
) -> Experiment:
    """Certify SAEs and follow their bounds as the number of evaluation sequences grows.

    Args:
        model: As for `certify`.
        saes: SAEs by name; or a list of them, named by their hooks.
        calibration: As for `certify`.
        evaluation: As for `certify`.
        grid: Numbers of sequences; those beyond the run's are left out. Default: `looks`, each up to 64, then
            eight for every doubling.
        config: Settings of every certificate.
        output: Folder of the results.

    Returns:
        Rows: see `bound_curve_rows`.

    Raises:
        CertifyError: Before any long work, for no SAEs or an impossible grid, or as `certify` raises.
    """
    config = CertifyConfig.check(config)
    if grid is not None:
        check_grid(grid)
    documents = {"calibration": calibration, "evaluation": evaluation}
    certificates = certify_saes(model, saes, **documents, config=config, output=output, grid=grid)
    return saved(bound_curves_experiment(certificates, grid), output)


def bound_curves_experiment(
    certificates: Mapping[str, Certificate], grid: Sequence[int] | None = None
) -> Experiment:
    """Make the experiment of finished certificates, also of several models.

    Args:
        certificates: By name, none with ``until``.
        grid: As for `bound_curves`.

    Raises:
        CertifyError: For no certificates, one of a run that could stop early, or an impossible grid.
    """
    if not certificates:
        raise CertifyError("certificates is empty: give at least one, {name: certificate}")
    early = [name for name, one in certificates.items() if one.time_uniform]
    if early:
        raise CertifyError(
            f"certificate {early[0]!r} is of a run with until={certificates[early[0]].config.until!r}: bounds for a "
            "number of sequences fixed in advance do not exist there; use until=None"
        )
    rows = bound_curve_rows(certificates, grid)
    return Experiment(
        kind=KIND,
        title="Bounds against the number of sequences",
        certificates=certificates,
        rows=rows,
        findings=bound_curve_findings(rows),
        figure=bound_curves_figure(rows),
    )


def bound_curve_rows(
    certificates: Mapping[str, Certificate], grid: Sequence[int] | None = None
) -> tuple[Row, ...]:
    """Return one row for each certificate and number of sequences.

    Args:
        certificates: By name.
        grid: As for `bound_curves`.

    Returns:
        Rows with ``name``, ``model``, ``hook``, ``n`` (sequences; clusters where sequences were clustered), every
        bound of `FIXED` on the first ``n`` (it holds if this ``n`` was fixed in advance),
        ``sharp_betting_any_time`` (holds at all n at once) and ``uniform``, log2 V; all in bits per token.
    """
    rows: list[Row] = []
    for name, certificate in certificates.items():
        curves = fixed_curves(certificate, FIXED, grid)
        always = any_time_curves(certificate, [ANY_TIME], grid)[ANY_TIME]
        at = dict(zip(always.n.tolist(), always.values.tolist(), strict=True))
        for index, n in enumerate(_numbers(curves)):
            rows.append(
                {
                    "name": name,
                    "model": certificate.manifest["model"]["name"],
                    "hook": certificate.manifest["identity"]["hook_out"],
                    "n": n,
                    **{key: float(curve.values[index]) for key, curve in curves.items()},
                    f"{ANY_TIME}_any_time": at[n],
                    "uniform": certificate.baselines["uniform"],
                }
            )
    return tuple(rows)


def bound_curve_findings(rows: Sequence[Row]) -> tuple[str, ...]:
    """Say where each bound is first below log2 V, and what it is at the end."""
    said = []
    for name in dict.fromkeys(str(row["name"]) for row in rows):
        inside = [row for row in rows if row["name"] == name]
        last = inside[-1]
        parts = []
        for key in ("u_sae_occam", "u_sae", f"{ANY_TIME}_any_time"):
            below = [row for row in inside if _number(row, key) < _number(row, "uniform")]
            label = bound_label(key.removesuffix("_any_time"))
            kind = "valid there" if key.endswith("_any_time") else "descriptive"
            first = f"first at N = {_number(below[0], 'n'):,.0f} ({kind})" if below else "nowhere"
            parts.append(f"{label} {first}, {_number(last, key):.2f} at the end")
        said.append(
            f"{name}: of {len(inside)} numbers of sequences up to {_number(last, 'n'):,.0f}, below log2 V = "
            f"{_number(last, 'uniform'):.2f} bits per token: {'; '.join(parts)}."
        )
    return tuple(said)


def _numbers(curves: Mapping[str, Curve]) -> list[int]:
    return next(iter(curves.values())).n.tolist()


def _number(row: Row, key: str) -> float:
    value = row[key]
    assert isinstance(value, (int, float))
    return float(value)

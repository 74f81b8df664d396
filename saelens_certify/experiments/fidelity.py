"""Output fidelity: how far the next-token distributions of S∘M and h_G are from the model's.

A certificate bounds the model's own risk by way of the SAE. It is small where the proxies predict the *text* as
well as the model does; whether they predict what the *model* predicts is another question, answered here from the
same evidence (arXiv:2606.18383, Figure 2, output fidelity): KL divergence, agreement of the most likely token, change
of the true token's log-probability, and losses.

The columns are named and defined as in the tables that the paper's authors published. With each come either
confidence limits of its expectation, where the quantity is bounded (agreement, losses), or quantiles over sequences, where
it is not (KL, change of log-probability): no confidence statement about the mean of an unbounded quantity can be made without
assumptions on its tails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saelens_certify.bounds import Risk, risk_interval
from saelens_certify.certificate import Certificate
from saelens_certify.config import CertifyConfig
from saelens_certify.errors import CertifyError
from saelens_certify.experiments.result import Experiment, Row
from saelens_certify.experiments.running import certify_saes, saved
from saelens_certify.report.experiments.fidelity import fidelity_figure
from saelens_certify.report.terms import layer_of, sae_labels
from saelens_certify.rounding import percent, rounded_down, rounded_up
from saelens_certify.saes.coding import Coding

KIND = "output_fidelity"

# Column of the evidence without its suffix, and how the published tables call it.
_UNBOUNDED = {"kl": "KL_M_vs_{}", "gold_logprob_gap": "AbsGoldLogProbDiff_M_vs_{}"}
_AGREEMENT = "Top1Agree_M_vs_{}"
_PROXIES = {"sae": "SoM", "pool": "hG"}
_QUANTILES = {"q10": 0.1, "q50": 0.5, "q90": 0.9}


def measure_fidelity(
    model: Any,
    saes: Mapping[str, Any] | Sequence[Any],
    *,
    calibration: Any,
    evaluation: Any,
    config: CertifyConfig | None = None,
    output: str | Path | None = None,
) -> Experiment:
    """Certify SAEs of one model and compare what their proxies predict with what the model predicts.

    Args:
        model: As for `certify`.
        saes: SAEs by name; or a list of them, named by their hooks.
        calibration: As for `certify`.
        evaluation: As for `certify`.
        config: Settings of every certificate.
        output: Folder of the results; every certificate is a run below it.

    Returns:
        Rows: see `fidelity_rows`.

    Raises:
        CertifyError: Before any long work, for no SAEs, or as `certify` raises.
    """
    config = CertifyConfig.check(config)
    documents = {"calibration": calibration, "evaluation": evaluation}
    certificates = certify_saes(model, saes, **documents, config=config, output=output)
    return saved(output_fidelity(certificates), output)


def output_fidelity(certificates: Mapping[str, Certificate] | Certificate) -> Experiment:
    """Read output fidelity from finished certificates: each has measured it.

    Args:
        certificates: By name, or one.

    Raises:
        CertifyError: For no certificates, or something else.
    """
    if isinstance(certificates, Certificate):
        certificates = {certificates.manifest["identity"]["hook_out"]: certificates}
    if (
        not isinstance(certificates, Mapping)
        or not certificates
        or not all(isinstance(each, Certificate) for each in certificates.values())
    ):
        raise CertifyError(
            "output_fidelity takes a certificate, or {name: certificate} with at least one; "
            "Certificate.load(folder) reads one"
        )
    rows = fidelity_rows(certificates)
    return Experiment(
        kind=KIND,
        title=f"Output fidelity: {rows[0]['Model']}, {len(rows)} SAEs",
        certificates=certificates,
        rows=rows,
        findings=fidelity_findings(rows),
        figure=fidelity_figure({str(row["label"]): certificates[str(row["name"])] for row in rows}),
    )


def fidelity_rows(certificates: Mapping[str, Certificate]) -> tuple[Row, ...]:
    """Return one row an SAE, with the columns of the published tables.

    Args:
        certificates: By name.

    Returns:
        Rows with

        - ``Model``, ``Layer``, ``TopK`` (None for the SAE's own coding), ``SeqLen``, ``Tokens``, ``N`` (sequences),
          ``N_units`` (independent draws), ``m``, ``P``, ``P_over_m``, ``delta`` (of each pair of limits);
        - ``KL_M_vs_X`` and ``AbsGoldLogProbDiff_M_vs_X`` for X = SoM and hG, bits per token: means over sequences, and
          ``_q10``, ``_q50``, ``_q90``: quantiles over sequences (of each sequence's mean over its positions). They
          describe the sequences measured; they are no confidence limits;
        - ``Top1Agree_M_vs_X``, share of positions, and ``Loss_M``, ``Loss_SoM``, ``Loss_hG``, smoothed losses in bits per
          token: means, with ``_lower`` and ``_upper``: two-sided confidence limits of the expectation by
          betting, each pair holding with probability 1 - delta by itself;
        - ``Excess_X``: Loss_X minus Loss_M, with limits of this difference (paired, so tighter than those of the two).

        Means and limits count clusters of sequences as one, where the run had any; quantiles count every sequence.
    """
    hooks = {name: c.manifest["identity"]["hook_out"] for name, c in certificates.items()}
    labels = sae_labels(hooks)
    return tuple(_row(name, labels[name], each) for name, each in certificates.items())


def fidelity_findings(rows: Sequence[Row]) -> tuple[str, ...]:
    """Say what the rows say: who predicts most like the model, and whether the pool costs anything."""
    said = [
        f"Confidence limits hold with {percent(1 - _number(rows[0], 'delta'))} confidence, each pair by itself. KL and |Δ log p| "
        "are not bounded: their quantiles describe the sequences measured."
    ]
    for row in rows:
        said.append(
            f"{row['label']}: with the SAE spliced in, KL from the model is {_number(row, 'KL_M_vs_SoM'):.3f} bits per token, the "
            f"most likely token is the same at {100 * _number(row, 'Top1Agree_M_vs_SoM'):.1f}% of positions "
            f"({_limits_text(row, 'Top1Agree_M_vs_SoM', 100, 1)}), and the loss differs by "
            f"{_number(row, 'Excess_SoM'):+.3f} bits per token ({_limits_text(row, 'Excess_SoM')})."
        )
    worst = max(rows, key=_cost_of_pool)
    said.append(
        f"Restricting the SAE to its pool changes KL by at most {_cost_of_pool(worst):.2g} bits per token"
        + (f" (at {worst['label']})." if len(rows) > 1 else ".")
    )
    if len(rows) > 1:
        best = {
            "KL": min(rows, key=lambda row: _number(row, "KL_M_vs_SoM")),
            "top-1 agreement": max(rows, key=lambda row: _number(row, "Top1Agree_M_vs_SoM")),
            "loss": min(rows, key=lambda row: _number(row, "Loss_SoM")),
        }
        names = {str(row["label"]) for row in best.values()}
        said.append(
            f"By KL, top-1 agreement and loss the SAE at {names.pop()} is the most faithful."
            if len(names) == 1
            else "The most faithful SAE depends on the measure: "
            + ", ".join(f"{row['label']} by {measure}" for measure, row in best.items())
            + "."
        )
    return tuple(said)


def _row(name: str, label: str, certificate: Certificate) -> Row:
    config, hook = certificate.config, certificate.manifest["identity"]["hook_out"]
    n_sequences = certificate.evidence.num_rows
    row: Row = {
        "name": name,
        "label": label,
        "Model": certificate.manifest["model"]["name"],
        "hook": hook,
        "Layer": layer_of(hook),
        "TopK": Coding.parse(config.coding).k,
        "SeqLen": config.seq_len,
        "Tokens": n_sequences * config.seq_len,
        "N": n_sequences,
        "N_units": certificate.measured.n_sequences,
        "P": certificate.pool.size,
        "m": certificate.dict_size,
        "P_over_m": certificate.pool.size / certificate.dict_size,
        "delta": config.share,
    }
    for key, column in _UNBOUNDED.items():
        for proxy, short in _PROXIES.items():
            row |= _unbounded(certificate, _column(key, proxy), column.format(short))
    for proxy, short in _PROXIES.items():
        agreement = certificate.losses.units(certificate.column(_column("top1_agreement", proxy)))
        row |= _limits(_AGREEMENT.format(short), _interval(certificate, agreement, 0.0, 1.0))
    losses = certificate.losses
    for short, x in (
        ("M", losses.loss("base")),
        ("SoM", losses.loss("sae")),
        ("hG", losses.loss("pool")),
    ):
        row |= _limits(f"Loss_{short}", _interval(certificate, x.samples, x.low, x.high))
    for proxy, short in _PROXIES.items():
        bound = certificate.bounds[f"excess_{proxy}_two_sided"]
        row[f"Excess_{short}"] = bound.terms[f"excess_{proxy}"]
        row[f"Excess_{short}_lower"] = bound.lower
        row[f"Excess_{short}_upper"] = bound.value
    return row


def _unbounded(certificate: Certificate, column: str, label: str) -> Row:
    values = certificate.column(column)
    found: Row = {label: certificate.mean(column)}
    return found | {f"{label}_{q}": float(np.quantile(values, p)) for q, p in _QUANTILES.items()}


def _interval(certificate: Certificate, units: np.ndarray, low: float, high: float) -> Risk:
    return risk_interval(
        units, low, high, certificate.config.share, time_uniform=certificate.time_uniform
    )


def _limits(label: str, risk: Risk) -> Row:
    return {label: risk.value, f"{label}_lower": risk.lower, f"{label}_upper": risk.upper}


def _column(key: str, proxy: str) -> str:
    """Name a column of the evidence: S∘M's carry no suffix."""
    return key if proxy == "sae" else f"{key}_{proxy}"


def _cost_of_pool(row: Row) -> float:
    return abs(_number(row, "KL_M_vs_hG") - _number(row, "KL_M_vs_SoM"))


def _limits_text(row: Row, name: str, factor: float = 1.0, digits: int = 3) -> str:
    """Both limits, rounded outwards."""
    low = rounded_down(factor * _number(row, f"{name}_lower"), digits)
    high = rounded_up(factor * _number(row, f"{name}_upper"), digits)
    return f"{low:.{digits}f} to {high:.{digits}f}"


def _number(row: Row, name: str) -> float:
    value = row[name]
    assert isinstance(value, (int, float))
    return float(value)

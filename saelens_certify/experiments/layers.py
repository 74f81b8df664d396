"""Layer sweep: at which layers of a model an SAE can be certified, by which bound, and from how many sequences on.

SAEs at many layers of one model share the base pass and the calibration pass. Each gets a certificate of its own; here
they become one table: bounds, what they are made of, the first N at which each says something, and what it tends to
(arXiv:2606.18383, Figure 2).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from saelens_certify.bounds import asymptotic_floor, floor_sequence, sharp_floor
from saelens_certify.certificate import Certificate
from saelens_certify.config import CertifyConfig
from saelens_certify.curves import any_time_curves, check_grid, fixed_curves
from saelens_certify.errors import CertifyError
from saelens_certify.experiments.naming import named_saes
from saelens_certify.experiments.result import Experiment, Row
from saelens_certify.experiments.running import certify_saes, saved
from saelens_certify.report.experiments.layers import layers_figure
from saelens_certify.report.terms import bound_label, layer_of, sae_labels
from saelens_certify.rounding import percent, rounded_up

KIND = "layer_sweep"

PUBLISHED = ("u_sae", "u_sae_occam")
SHARP = ("sharp_betting", "sharp_measured", "sharp_occam")
BOUNDS = (*PUBLISHED, *SHARP, "sharp_occam_tau")

# Of a trend with depth: the largest p-value that shows one, and up to how many values all orders are tried.
_SIGNIFICANT = 0.05
_ALL_ORDERS = 8


def layer_sweep(
    model: Any,
    saes: Mapping[str, Any] | Sequence[Any],
    *,
    calibration: Any,
    evaluation: Any,
    config: CertifyConfig | None = None,
    grid: Sequence[int] | None = None,
    simultaneous: bool = False,
    output: str | Path | None = None,
) -> Experiment:
    """Certify SAEs at many layers of one model, with one base pass and one calibration pass for all.

    Args:
        model: As for `certify`.
        saes: SAEs by name; or a list of them, named by their hooks.
        calibration: As for `certify`.
        evaluation: As for `certify`.
        config: Settings of every certificate.
        grid: Numbers of sequences at which each bound is looked at for the first N that it certifies; default each
            up to 64, then eight for every doubling.
        simultaneous: Whether all certificates are to hold at once with probability 1 - delta: each then spends
            delta / number of SAEs (``config.simultaneous``), so that the best layer may be chosen after
            looking. If not, each holds by itself.
        output: Folder of the results; every certificate is a run below it.

    Returns:
        Rows: see `layer_rows`.

    Raises:
        CertifyError: Before any long work, for no SAEs or an impossible grid, or as `certify` raises.
    """
    config = CertifyConfig.check(config)
    if grid is not None:
        check_grid(grid)
    opened = named_saes(saes)
    if simultaneous:
        together = max(config.simultaneous, len(opened))
        config = dataclasses.replace(config, simultaneous=together)
    documents = {"calibration": calibration, "evaluation": evaluation}
    certificates = certify_saes(model, opened, **documents, config=config, output=output, grid=grid)
    return saved(layer_experiment(certificates, grid), output)


def layer_experiment(
    certificates: Mapping[str, Certificate], grid: Sequence[int] | None = None
) -> Experiment:
    """Make the sweep of finished certificates, such as `Certificate.load` reads.

    Args:
        certificates: By name, of SAEs of one model.
        grid: As for `layer_sweep`.

    Raises:
        CertifyError: For no certificates, or an impossible grid.
    """
    if not certificates:
        raise CertifyError("certificates is empty: a layer sweep needs at least one")
    rows = layer_rows(certificates, grid)
    model = next(iter(certificates.values())).manifest["model"]["name"]
    return Experiment(
        kind=KIND,
        title=f"Layer sweep: {model}, {len(rows)} SAEs",
        certificates=certificates,
        rows=rows,
        findings=layer_findings(rows),
        figure=layers_figure(certificates, rows, grid),
    )


def layer_rows(
    certificates: Mapping[str, Certificate], grid: Sequence[int] | None = None
) -> tuple[Row, ...]:
    """Return one row an SAE, ordered by layer.

    Args:
        certificates: By name.
        grid: As for `layer_sweep`.

    Returns:
        Rows with what was measured, every bound, its floor and its first N:

        - ``risk_base``, ``risk_sae``, ``risk_pool``, ``gap``, bounds and baselines in bits per token; ``eta`` a
          share of sequences; ``confidence`` that of each certificate, or of the ``simultaneous`` ones at once.
        - ``floor_X``: what the bound tends to for ever more sequences, as measured. ``floor_X_at_least``: its lower
          confidence bound at delta (sharp bounds), so that "never" is a statement with confidence.
        - ``first_n_X``: first number of sequences of the grid at which the bound of the form whose N is fixed in
          advance is below log2 V. **Descriptive**: N was found by looking. ``first_n_X_any_time``: that of
          the time-uniform bound, which is valid there. None where there is none.

        Published bounds, and bounds for an N fixed in advance, are None if the run could stop early.
    """
    hooks = {name: c.manifest["identity"]["hook_out"] for name, c in certificates.items()}
    labels = sae_labels(hooks)
    found = [_row(name, labels[name], each, grid) for name, each in certificates.items()]
    return tuple(sorted(found, key=_place))


def layer_findings(rows: Sequence[Row]) -> tuple[str, ...]:
    """Say what the rows say: which layers certify, whether later ones are easier, which never will."""
    family = max(_number(row, "simultaneous") for row in rows)
    alone = "each by itself" if family == 1 else f"all {family:.0f} certificates at once"
    confidence = percent(_number(rows[0], "confidence"))
    shown = [name for name in BOUNDS if any(row[name] is not None for row in rows)]
    return (
        f"Every bound holds with {confidence} confidence, {alone}.",
        *_who_certifies(shown, rows),
        *_trends(shown, rows),
        *_never(rows),
        *_first_numbers(rows),
    )


def _row(name: str, label: str, certificate: Certificate, grid: Sequence[int] | None) -> Row:
    measured, identity = certificate.measured, certificate.manifest["identity"]
    fixed = fixed_curves(certificate, (*PUBLISHED, "sharp_betting"), grid)
    any_time = any_time_curves(certificate, ("sharp_betting", "sharp_measured"), grid)
    bounds = {key: certificate.bounds.get(key) for key in (*BOUNDS, "sharp_unigram")}
    first = {f"first_n_{key}": fixed.get(key) for key in (*PUBLISHED, "sharp_betting")}
    first |= {f"first_n_{key}_any_time": curve for key, curve in any_time.items()}
    crossings = {key: None if curve is None else curve.crossing for key, curve in first.items()}
    return {
        "name": name,
        "label": label,
        "hook": identity["hook_out"],
        "layer": layer_of(identity["hook_out"]),
        "architecture": certificate.manifest["sae"]["architecture"],
        "d_sae": certificate.dict_size,
        "pool_size": certificate.pool.size,
        "n_sequences": measured.n_sequences,
        "confidence": 1 - certificate.config.delta,
        "simultaneous": certificate.config.simultaneous,
        "risk_base": measured.risk_base,
        "risk_sae": measured.risk_sae,
        "risk_pool": measured.risk_pool,
        "gap": measured.gap,
        "eta": measured.eta,
        **{key: None if bound is None else bound.value for key, bound in bounds.items()},
        "uniform": certificate.baselines["uniform"],
        "unigram": certificate.baselines["unigram"],
        **_floors(certificate),
        **{key: None if at is None else at.n for key, at in crossings.items()},
        "explained_variance": certificate.explained_variance(),
    }


def _floors(certificate: Certificate) -> dict[str, float | None]:
    measured, losses = certificate.measured, certificate.losses
    floors: dict[str, float | None] = {}
    for name in PUBLISHED:
        value = asymptotic_floor(
            bound=name,
            vocab_size=certificate.vocab_size,
            risk_pool=measured.risk_pool,
            gap=measured.gap,
            eta=measured.eta,
            dict_size=certificate.dict_size,
            pool_size=certificate.pool.size,
            alpha=certificate.config.alpha,
        )
        floors[f"floor_{name}"] = None if certificate.time_uniform else float(value)
    for name in SHARP:
        floors[f"floor_{name}"] = sharp_floor(name, losses)
    # The price of the choice vanishes too, and without it the smallest threshold is best.
    floors["floor_sharp_occam_tau"] = floors["floor_sharp_occam"]
    for name in ("sharp_betting", "sharp_measured"):
        lower = floor_sequence(name, losses, certificate.config.share)
        floors[f"floor_{name}_at_least"] = float(lower[-1])
    return floors


def _who_certifies(names: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Which SAEs have a bound below log2 V, bounds that agree in one sentence."""
    agreeing: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        below = [
            str(r["label"])
            for r in rows
            if _given(r, name) and _number(r, name) < _number(r, "uniform")
        ]
        agreeing.setdefault(tuple(below), []).append(name)
    said = []
    for below, which in agreeing.items():
        who = "none of" if not below else "all" if len(below) == len(rows) else f"{len(below)} of"
        listed = f": {', '.join(below)}" if 0 < len(below) < len(rows) else ""
        best = [
            f"{bound_label(name)} ({rounded_up(_number(row, name), 2):.2f} at {row['label']})"
            for name in which
            for row in [min((r for r in rows if _given(r, name)), key=lambda r: _number(r, name))]
        ]  # fmt: skip
        said.append(
            f"Below a uniform guess ({_number(rows[0], 'uniform'):.2f} bits per token) for {who} {len(rows)} "
            f"SAEs{listed}, by {'; '.join(best)}. In brackets the smallest bound."
        )
    return said


def _trends(names: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Whether bounds fall with depth, by Spearman's rank correlation of bound and layer."""
    verdicts: dict[str, list[str]] = {}
    for name in names:
        inside = [row for row in rows if row["layer"] is not None and row[name] is not None]
        layers = [_number(row, "layer") for row in inside]
        values = [_number(row, name) for row in inside]
        if len(set(layers)) < 3 or len(set(values)) < 2:
            continue
        correlation, p_value = rank_correlation(layers, values)
        if p_value > _SIGNIFICANT:
            verdict = (
                "No trend with depth is shown (the paper found later layers easier to certify)"
            )
        elif correlation < 0:
            verdict = "Later layers are easier to certify, as the paper found"
        else:
            verdict = "Later layers are harder to certify, against the paper's finding"
        said = f"{bound_label(name)} ({correlation:+.2f}, p = {p_value:.2g})"
        verdicts.setdefault(verdict, []).append(said)
    return [
        f"{verdict}: {'; '.join(which)}. In brackets Spearman's correlation of bound and layer over {len(rows)} SAEs, "
        "and its two-sided p-value; SAEs also differ in quality."
        for verdict, which in verdicts.items()
    ]


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Return Spearman's rank correlation and its two-sided permutation p-value.

    Args:
        x: Values.
        y: Values of the same things.

    Returns:
        The correlation, and the share of orders of ``y`` whose correlation is at least as large in size: of all orders
        up to 8 values, else of 20,000 random ones and this one.
    """
    ranks = [stats.rankdata(values) for values in (x, y)]
    a, b = (each - each.mean() for each in ranks)
    scale = float(np.sqrt((a @ a) * (b @ b)))
    observed = float(a @ b) / scale
    if len(b) <= _ALL_ORDERS:
        orders = np.array(list(itertools.permutations(range(len(b)))))
    else:
        rng = np.random.default_rng(0)
        orders = np.stack([np.arange(len(b)), *(rng.permutation(len(b)) for _ in range(20_000))])
    others = b[orders] @ a / scale
    return observed, float(np.mean(np.abs(others) >= abs(observed) - 1e-12))


def _never(rows: Sequence[Row]) -> list[str]:
    """Where no number of sequences helps: floors at or above log2 V."""
    said = []
    never = [row for row in rows if _at_least(row, "floor_u_sae", "uniform")]
    if never:
        said.append(
            f"The published bounds never certify {_names(never)} with these pools: what is measured (risk of h_G, gap "
            "and Δη, without any margin) is already at or above log2 V."
        )
    elif any(row["floor_u_sae"] is not None for row in rows):
        said.append(
            "The published bounds certify every SAE from enough sequences on, if what was measured stays the same."
        )
    for name in ("sharp_betting", "sharp_measured"):
        never = [row for row in rows if _at_least(row, f"floor_{name}_at_least", "uniform")]
        if never:
            said.append(
                f"With confidence, {bound_label(name)} never certifies {_names(never)} with these pools: a lower "
                "confidence bound of what it tends to is at or above log2 V."
            )
    return said


def _first_numbers(rows: Sequence[Row]) -> list[str]:
    """From how many sequences on each bound says something."""
    said = []
    for name in (*PUBLISHED, "sharp_betting", "sharp_measured"):
        suffix = "" if name in PUBLISHED else "_any_time"
        kind = (
            "descriptive: N was found by looking"
            if name in PUBLISHED
            else "valid there, for each SAE and bound by itself"
        )
        which = bound_label(name) + (", looked at all the time," if suffix else "")
        key = f"first_n_{name}{suffix}"
        inside = [row for row in rows if row[key] is not None]
        if inside:
            at = ", ".join(f"{_number(row, key):,.0f} ({row['label']})" for row in inside)
            said.append(f"First of the N looked at where {which} certifies: {at}; {kind}.")
    return said


def _place(row: Row) -> tuple[bool, float]:
    """Sort by layer, SAEs outside all blocks last; equal ones stay in the order given."""
    return row["layer"] is None, 0.0 if row["layer"] is None else _number(row, "layer")


def _at_least(row: Row, name: str, limit: str) -> bool:
    return row[name] is not None and _number(row, name) >= _number(row, limit)


def _names(rows: Sequence[Row]) -> str:
    return ", ".join(str(row["label"]) for row in rows)


def _given(row: Row, name: str) -> bool:
    return row[name] is not None


def _number(row: Row, name: str) -> float:
    value = row[name]
    assert isinstance(value, (int, float))
    return float(value)

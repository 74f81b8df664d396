"""Sensitivities: what a certificate owes to K, the calibration budget, tau, alpha and the sequence length.

One factor at a time is moved away from the settings of a base certificate; all settings share one calibration pass and one
evaluation pass (arXiv:2606.18383, Tables 2 and 8).
"""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saelens_certify.bounds import log_binom, loss_range
from saelens_certify.certificate import Certificate
from saelens_certify.certification import read_sides
from saelens_certify.config import CertifyConfig
from saelens_certify.errors import CertifyError
from saelens_certify.experiments.result import Experiment, Row
from saelens_certify.experiments.running import saved
from saelens_certify.experiments.sensitivity_findings import sensitivity_findings
from saelens_certify.pool import Calibration, Pool
from saelens_certify.report.experiments.sensitivity import sensitivity_figure
from saelens_certify.saes import Coding, adapt
from saelens_certify.saes.loading import open_sae
from saelens_certify.study import Setting, View, certify_many

KIND = "sensitivity"

BASE = "base"
"""Name of the setting from which one factor at a time is moved."""

FACTORS = ("K", "budget", "tau", "alpha", "L")
"""What is varied: features per token, calibration sequences, frequency threshold, smoothing, tokens per sequence."""

BOUNDS = (
    "u_sae",
    "u_sae_occam",
    "sharp_betting",
    "sharp_bernstein",
    "sharp_measured",
    "sharp_occam",
)

TERMS = ("mismatch", "t_eta", "t_proxy", "t_occ", "t_eps")
"""The terms of the published bounds besides ``risk_pool`` and ``gap``."""

PUBLISHED_TAUS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
"""Thresholds of the published preview (Table 8)."""


def sensitivity(
    model: Any,
    sae: Any,
    *,
    calibration: Any,
    evaluation: Any,
    ks: Sequence[int] = (),
    budgets: Sequence[int] = (),
    budget_tokens: Sequence[int] = (),
    taus: Sequence[int] = (),
    alphas: Sequence[float] = (),
    lengths: Sequence[int] = (),
    config: CertifyConfig | None = None,
    output: str | Path | None = None,
) -> Experiment:
    """Certify one SAE under many settings, one factor at a time.

    Each certificate is the one that `certify` gives at its setting. A value that ``config`` has already is not measured
    twice. Each certificate holds by itself; to choose the best after looking, set ``config.simultaneous`` to the number
    of settings, base included.

    Args:
        model: As for `certify`.
        sae: As for `certify`.
        calibration: As for `certify`.
        evaluation: As for `certify`.
        ks: Coding rules ``topk:K``: the K largest of what ``sae.encode`` makes active, in place of ``config.coding``. Where
            a token has K active features or fewer, that is the native rule: larger K change neither S∘M nor
            the pool. They do not change h_G either, unless the SAE has a top-k of its own: by that rule
            the next features of the pool take the place of those outside, by ``topk:K`` none is left to.
        budgets: Calibration sequences, the first so many in the order of their hashes: smaller budgets are contained
            in larger ones.
        budget_tokens: The same in tokens, rounded up to whole sequences.
        taus: Frequency thresholds of the pool.
        alphas: Smoothing weights. They change the loss itself: bounds at different alpha are about different risks.
        lengths: Tokens per sequence, at most ``config.seq_len``: the first so many tokens of the same documents.
            Documents shorter than ``config.seq_len`` are left out at every length. Of documents that begin alike one counts,
            and calibration documents that begin like an evaluation document are left out.
        config: Settings of the base.
        output: Folder of the results; every certificate is a run below it.

    Returns:
        Rows: see `sensitivity_rows`.

    Raises:
        CertifyError: Before any long work, if nothing is varied or a value is out of range, or as `certify` raises.
    """
    config = CertifyConfig.check(config)
    opened = open_sae(sae)
    configs = _configs(adapt(opened.sae).d_sae, config, ks, taus, alphas, lengths)
    sizes = [_whole("budgets", n) for n in budgets]
    sizes += [math.ceil(_whole("budget_tokens", n) / config.seq_len) for n in budget_tokens]
    if not configs and not sizes:
        raise CertifyError(
            "nothing is varied: give values other than the base's for ks, budgets, budget_tokens, taus, alphas or lengths"
        )
    known, seen = read_sides(model, calibration, evaluation, config)
    base = Setting(opened, View(known), View(seen), config)
    settings = {BASE: base}
    for n in sorted(set(sizes)):
        if n > len(known):
            raise CertifyError(
                f"a budget of {n} calibration sequences, there are {len(known)}: lower it, or give more documents"
            )
        if n < len(known):
            settings[setting_name("budget", n)] = dataclasses.replace(
                base, calibration=View(known, first=n)
            )
    for name, changed in configs.items():
        length = None if changed.seq_len == config.seq_len else changed.seq_len
        settings[name] = Setting(
            opened, View(known, length=length), View(seen, length=length), changed
        )
    return saved(sensitivity_experiment(certify_many(model, settings, output=output)), output)


def sensitivity_experiment(certificates: Mapping[str, Certificate]) -> Experiment:
    """Make the experiment of finished certificates, such as `Certificate.load` reads.

    Args:
        certificates: By setting, named as `sensitivity` names them: `BASE`, ``K=64``, ``budget=1120``, ``tau=2``,
            ``alpha=0.3``, ``L=16``.

    Raises:
        CertifyError: If the base is missing, or a name is none of these.
    """
    rows = sensitivity_rows(certificates)
    one = certificates[BASE]
    return Experiment(
        kind=KIND,
        title=f"Sensitivities: {one.manifest['model']['name']}, {one.manifest['identity']['hook_out']}",
        certificates=certificates,
        rows=rows,
        findings=sensitivity_findings(rows),
        figure=sensitivity_figure(rows),
    )


def sensitivity_rows(certificates: Mapping[str, Certificate]) -> tuple[Row, ...]:
    """Return one row a setting: the base, then factor by factor with rising values.

    Args:
        certificates: As for `sensitivity_experiment`.

    Returns:
        ``setting``, ``factor`` (``base`` or one of `FACTORS`) and ``value`` (None for the base); the settings themselves
        (``K``, None under the native rule; ``budget``, ``tau``, ``alpha``, ``L``); ``calibration_tokens``, those that were
        coded; ``n_sequences``, independent draws, which may fall with L; ``dict_size`` m, ``pool_size`` P and ``pool_share``
        P / m; ``complexity``, ln C(m, P) in nats; risks, ``gap``, every term of the published bounds, the bounds,
        ``loss_range`` and baselines in bits per token; ``eta``, the share of sequences that violate the pool;
        ``nonvacuous_X``, whether a bound is below log2 V. What a certificate cannot say is None.

    Raises:
        CertifyError: As `sensitivity_experiment`.
    """
    if BASE not in certificates:
        raise CertifyError(
            f"sensitivities need a certificate named {BASE!r}; got {sorted(certificates)}"
        )
    rows = [_row(name, certificate) for name, certificate in certificates.items()]
    return tuple(sorted(rows, key=_place))


def pool_preview(calibration: Calibration, taus: Sequence[int] = PUBLISHED_TAUS) -> tuple[Row, ...]:
    """Return the pool and its complexity at every frequency threshold, from the calibration alone.

    Args:
        calibration: What a calibration pass left behind (`Certificate.calibration`).
        taus: Thresholds: on how many calibration tokens a feature has to be active.

    Returns:
        Rows of ``tau``, ``pool_size`` P, ``dict_size`` m, ``pool_share`` P / m and ``complexity``, ln C(m, P) in nats: what
        U_SAE+Occam pays for the choice. It is largest where half of the features are in the pool, and what it does not show
        is the share of violations, which rises with tau.

    Raises:
        CertifyError: For a threshold below 1.
    """
    rows: list[Row] = []
    for tau in taus:
        size = Pool.from_counts(calibration.counts, _whole("taus", tau)).size
        rows.append({"tau": int(tau), **_pool_columns(calibration.counts.numel(), size)})
    return tuple(rows)


def setting_name(factor: str, value: float) -> str:
    """Return the name of the setting in which a factor has another value: K=64, alpha=0.3."""
    return f"{factor}={value!r}"


def _configs(
    d_sae: int,
    config: CertifyConfig,
    ks: Sequence[int],
    taus: Sequence[int],
    alphas: Sequence[float],
    lengths: Sequence[int],
) -> dict[str, CertifyConfig]:
    """The settings that differ from the base, by name."""
    found: dict[str, CertifyConfig] = {}
    for k in sorted({_whole("ks", k) for k in ks}):
        if k > d_sae:
            raise CertifyError(f"ks has {k}, but the SAE has {d_sae} features; lower it")
        found[setting_name("K", k)] = dataclasses.replace(config, coding=f"topk:{k}")
    for tau in sorted({_whole("taus", tau) for tau in taus}):
        found[setting_name("tau", tau)] = dataclasses.replace(config, tau=tau)
    for changed in [dataclasses.replace(config, alpha=alpha) for alpha in alphas]:
        found[setting_name("alpha", changed.alpha)] = changed
    for length in sorted({_whole("lengths", length) for length in lengths}):
        if length > config.seq_len:
            raise CertifyError(
                f"lengths has {length}, but sequences of seq_len = {config.seq_len} tokens are read; "
                "raise config.seq_len to the longest"
            )
        found[setting_name("L", length)] = dataclasses.replace(config, seq_len=length)
    return {name: changed for name, changed in found.items() if changed != config}


def _row(name: str, certificate: Certificate) -> Row:
    config, measured = certificate.config, certificate.measured
    settings: dict[str, int | float | None] = {
        "K": Coding.parse(config.coding).k,
        "budget": certificate.manifest["data"]["calibration"]["n_sequences"],
        "tau": config.tau,
        "alpha": config.alpha,
        "L": config.seq_len,
    }
    factor = _factor(name)
    bounds = {key: certificate.bounds.get(key) for key in BOUNDS}
    terms: dict[str, float] = {}
    for key in ("u_sae", "u_sae_occam"):
        bound = bounds[key]
        terms |= {} if bound is None else bound.terms
    uniform = certificate.baselines["uniform"]
    row: Row = {
        "setting": name,
        "factor": factor,
        "value": settings.get(factor),
        **settings,
        "calibration_tokens": certificate.calibration.n_tokens,
        "n_sequences": measured.n_sequences,
        "confidence": 1 - config.delta,
        "simultaneous": config.simultaneous,
        **_pool_columns(certificate.dict_size, certificate.pool.size),
        "risk_base": measured.risk_base,
        "risk_sae": measured.risk_sae,
        "risk_pool": measured.risk_pool,
        "gap": measured.gap,
        "eta": measured.eta,
    }
    row |= {term: terms.get(term) for term in TERMS}
    row |= {key: None if bound is None else bound.value for key, bound in bounds.items()}
    row |= {
        "loss_range": float(loss_range(certificate.vocab_size, config.alpha)),
        "uniform": uniform,
        "unigram": certificate.baselines["unigram"],
    }
    for key, bound in bounds.items():
        row[f"nonvacuous_{key}"] = None if bound is None else bound.nonvacuous(uniform)
    return row


def _pool_columns(dict_size: int, pool_size: int) -> Row:
    return {
        "dict_size": dict_size,
        "pool_size": pool_size,
        "pool_share": pool_size / dict_size,
        "complexity": float(log_binom(dict_size, pool_size)),
    }


def _factor(name: str) -> str:
    """The factor that a setting's name says is varied."""
    if name == BASE:
        return BASE
    match = re.fullmatch(rf"({'|'.join(FACTORS)})=\S+", name)
    if match is None:
        raise CertifyError(
            f"{name!r} is no setting of a sensitivity: name it {BASE!r}, or {', '.join(f'{f}=...' for f in FACTORS)}"
        )
    return match.group(1)


def _place(row: Row) -> tuple[int, float]:
    value = row["value"]
    factor = row["factor"]
    place = -1 if factor == BASE else FACTORS.index(str(factor))
    return place, float(value) if isinstance(value, (int, float)) else 0.0


def _whole(name: str, value: Any) -> int:
    try:
        whole = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        whole = None
    if whole is None or whole < 1:
        raise CertifyError(f"{name} must hold whole numbers from 1, got {value!r}")
    return whole

"""Distribution shift: what a pool that was made on one kind of text is worth on another.

The pool, the SAE and the coding rule stay; the evaluation documents are corrupted token by token, at rates up to random
tokens, or replaced by other data. Each condition gets a certificate of its own, and the terms of the decomposition say
what the shift costs: the proxy's risk, the reconstruction gap, or the mismatch of the pool (arXiv:2606.18383).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saelens_certify.certificate import Certificate
from saelens_certify.certification import read_sides
from saelens_certify.config import CertifyConfig
from saelens_certify.data import Sequences, check_disjoint
from saelens_certify.data.corruption import check_rate, corrupted, one_document_per_cluster
from saelens_certify.data.near_duplicates import find_clusters
from saelens_certify.errors import CertifyError
from saelens_certify.experiments.result import Experiment, Row
from saelens_certify.experiments.running import saved
from saelens_certify.experiments.shift_findings import shift_findings
from saelens_certify.positions import special_token_ids
from saelens_certify.preparation import sequences_for
from saelens_certify.report.experiments.shift import shift_figure
from saelens_certify.saes.loading import open_sae
from saelens_certify.study import Setting, View, certify_many

KIND = "distribution_shift"

RATES = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0)
"""Corruption rates looked at unless others are given."""

UNCHANGED = "unchanged"
"""Name of the condition in which the evaluation documents are as they are."""

BOUNDS = ("u_sae", "u_sae_occam", "sharp_betting", "sharp_measured")
"""The bounds that are compared."""

TERMS = {
    "u_sae": ("risk_pool", "gap", "mismatch", "t_eta", "t_proxy", "t_eps"),
    "sharp_betting": ("risk_pool", "gap", "mismatch", "t_sharp"),
}
"""The terms of the bounds that are taken apart; they add up to the bound."""

_MEASURED = ("kl", "top1_agreement", "l0", "outside")


def distribution_shift(
    model: Any,
    sae: Any,
    *,
    calibration: Any,
    evaluation: Any,
    rates: Sequence[float] = RATES,
    others: Mapping[str, Any] | None = None,
    config: CertifyConfig | None = None,
    output: str | Path | None = None,
) -> Experiment:
    """Certify one SAE with one pool on shifted documents.

    Conditions: the evaluation documents as they are (always), the same with a share of their tokens replaced by random
    ones (`corrupted`; position 0 and special tokens stay, seed ``config.seed``), and other data. Documents that repeat
    each other count as one draw in every condition, also where corruption hides that they do. Each certificate holds by
    itself, for the distribution of its own condition; for all at once set ``config.simultaneous`` to their number.

    Args:
        model: As for `certify`.
        sae: As for `certify`.
        calibration: As for `certify`; the pool is the same in all conditions.
        evaluation: As for `certify`.
        rates: Probabilities of replacement, each in [0, 1]; 1: random tokens.
        others: Further evaluation data by name, each what `certify` takes and disjoint from calibration.
        config: Settings of every certificate.
        output: Folder of the results; every certificate is a run below it.

    Returns:
        Rows: see `shift_rows`.

    Raises:
        CertifyError: Before any long work, for impossible rates or names, or as `certify` raises.
    """
    config = CertifyConfig.check(config)
    asked = sorted({check_rate(rate) for rate in rates} - {0.0})
    others = _check_others(others, [UNCHANGED, *map(rate_name, asked)])
    opened = open_sae(sae)
    known, plain = read_sides(model, calibration, evaluation, config)
    conditions = {UNCHANGED: plain}
    for rate, moved in _corrupted_documents(model, plain, asked, config).items():
        conditions[rate_name(rate)] = moved
    for name, data in others.items():
        try:
            _, conditions[name] = read_sides(model, known, data, config)
        except CertifyError as error:
            raise CertifyError(f"others[{name!r}]: {error}") from None
    pool = View(known)
    for name, sequences in conditions.items():
        try:
            check_disjoint(known, sequences)
        except CertifyError as error:
            raise CertifyError(f"{name}: {error}") from None
    settings = {
        name: Setting(opened, pool, View(side), config) for name, side in conditions.items()
    }
    return saved(shift_experiment(certify_many(model, settings, output=output)), output)


def shift_experiment(certificates: Mapping[str, Certificate]) -> Experiment:
    """Make the experiment of finished certificates, such as `Certificate.load` reads.

    Args:
        certificates: By condition, named as `distribution_shift` names them; `UNCHANGED` is among them.

    Raises:
        CertifyError: If the documents as they are are missing, or the pools differ.
    """
    rows = shift_rows(certificates)
    one = certificates[UNCHANGED]
    return Experiment(
        kind=KIND,
        title=f"Distribution shift: {one.manifest['model']['name']}, {one.manifest['identity']['hook_out']}",
        certificates=certificates,
        rows=rows,
        findings=shift_findings(rows),
        figure=shift_figure(rows),
    )


def shift_rows(certificates: Mapping[str, Certificate]) -> tuple[Row, ...]:
    """Return one row a condition: unchanged, by rising rate, then other data in the order given.

    Args:
        certificates: As for `shift_experiment`.

    Returns:
        ``name``; ``rate``, None for other data; ``n_sequences``, independent draws; risks, ``gap``, every bound, each
        term of ``u_sae`` and of ``sharp_betting`` (``u_sae_gap``, ``sharp_betting_t_sharp``, …; of a bound its terms are the
        sum), ``kl`` and the baselines in bits per token; ``eta``, the share of sequences that violate the pool;
        ``outside``, active features outside the pool per coded token; ``outside_share``, that as a share of all active
        features; ``nonvacuous_X``, whether the bound is below log2 V. What a certificate cannot say is None.

    Raises:
        CertifyError: As `shift_experiment`.
    """
    if UNCHANGED not in certificates:
        raise CertifyError(
            f"a distribution shift needs a certificate named {UNCHANGED!r}, on the documents as they are; "
            f"got {sorted(certificates)}"
        )
    pool = certificates[UNCHANGED].pool.mask
    for name, certificate in certificates.items():
        if not pool.equal(certificate.pool.mask):
            raise CertifyError(
                f"the certificate {name!r} has another pool than {UNCHANGED!r}: all conditions share one"
            )
    rows = [_row(name, certificate) for name, certificate in certificates.items()]
    # Sorting is stable: other data stay in their order.
    return tuple(sorted(rows, key=_place))


def rate_name(rate: float) -> str:
    """Return the name of the condition with a corruption rate: rate=0.05."""
    return f"rate={float(rate)!r}".removesuffix(".0")


def _corrupted_documents(
    model: Any, plain: Sequences, rates: Sequence[float], config: CertifyConfig
) -> dict[float, Sequences]:
    """Corrupt evaluation documents at each rate; what repeats each other stays one draw."""
    if not rates:
        return {}
    named = plain
    if config.dependence != "ignore":
        named = one_document_per_cluster(plain, find_clusters(plain))
    special = set(special_token_ids(model))
    if plain.source.prepends_bos and plain.source.first_token is not None:
        special.add(plain.source.first_token)  # BOS, also where there is no tokenizer to ask
    d_vocab = int(model.cfg.d_vocab)
    moved = {}
    for rate in rates:
        made = corrupted(
            named, rate, seed=config.seed, d_vocab=d_vocab, keep=tuple(sorted(special))
        )
        # Read again: should two documents have become one, the copy is dropped and counted.
        moved[rate] = sequences_for(model, made, config).canonical
    return moved


def _check_others(others: Any, taken: Sequence[str]) -> Mapping[str, Any]:
    if others is None:
        return {}
    if not isinstance(others, Mapping):
        raise CertifyError(
            f"others must be further evaluation data by name, {{name: data}}, got {type(others).__name__}"
        )
    for name in others:
        if not isinstance(name, str) or not name.strip():
            raise CertifyError(f"others has the name {name!r}; give a word for it")
        if name in taken or name.startswith("rate="):
            raise CertifyError(
                f"others has the name {name!r}, which is that of a corruption of the evaluation documents; "
                "rename it"
            )
    return others


def _row(name: str, certificate: Certificate) -> Row:
    measured, uniform = certificate.measured, certificate.baselines["uniform"]
    bounds = {key: certificate.bounds.get(key) for key in BOUNDS}
    row: Row = {
        "name": name,
        "rate": _rate_of(name),
        "n_sequences": measured.n_sequences,
        "pool_size": certificate.pool.size,
        "confidence": 1 - certificate.config.delta,
        "simultaneous": certificate.config.simultaneous,
        "risk_base": measured.risk_base,
        "risk_sae": measured.risk_sae,
        "risk_pool": measured.risk_pool,
        "gap": measured.gap,
        "eta": measured.eta,
    }
    for key, bound in bounds.items():
        row[key] = None if bound is None else bound.value
    for key, terms in TERMS.items():
        bound = bounds[key]
        row |= {f"{key}_{term}": None if bound is None else bound.terms[term] for term in terms}
    row |= {"uniform": uniform, "unigram": certificate.baselines["unigram"]}
    for key, bound in bounds.items():
        row[f"nonvacuous_{key}"] = None if bound is None else bound.nonvacuous(uniform)
    row |= {key: certificate.mean(key) for key in _MEASURED}
    l0 = certificate.mean("l0")
    row["outside_share"] = certificate.mean("outside") / l0 if l0 else 0.0
    return row


def _rate_of(name: str) -> float | None:
    if name == UNCHANGED:
        return 0.0
    return float(name.removeprefix("rate=")) if name.startswith("rate=") else None


def _place(row: Row) -> float:
    rate = row["rate"]
    return float(rate) if isinstance(rate, float) else 2.0

"""Bounds as statements: value, confidence, theorem, assumptions, terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from numpy.typing import ArrayLike

from saelens_certify.bounds.baselines import FITTED_BASELINE
from saelens_certify.bounds.checks import MAX_INTEGER, integer
from saelens_certify.bounds.complexity import log_binom
from saelens_certify.bounds.joint import Losses
from saelens_certify.bounds.means import Measured
from saelens_certify.bounds.planner import PROFILES
from saelens_certify.bounds.quantities import Quantities
from saelens_certify.bounds.samples import log_threshold
from saelens_certify.bounds.sharp import SHARP, Sharp, sharp_value
from saelens_certify.bounds.thresholds import BestThreshold, best_threshold
from saelens_certify.errors import CertifyError

PAPER = "Bandyopadhyay & Ekbal, arXiv:2606.18383"
HOEFFDING = "Hoeffding (1963), Theorem 2"

WAUDBY_SMITH = "Waudby-Smith & Ramdas, JRSS-B 86(1), 2024"
MAURER_PONTIL = "Maurer & Pontil (2009), Theorem 4"

SMALLEST_SHARE = 1e-300
"""Of delta: smaller ones lose accuracy as doubles."""

INDEPENDENT = (
    "The evaluation sequences are independent draws from one distribution, one per document; the bound is "
    "about the expected loss under that distribution and no other."
)
FIXED_NUMBER = "The number of sequences was fixed before looking at their results."
CLUSTERS = (
    "Clusters of sequences (several of one document, or near duplicates) are independent draws from one "
    "distribution of clusters, and each counts by its mean: R stands for the expected mean loss of a cluster."
)
ANY_TIME = (
    "Time-uniform: how many of the evaluation documents were measured may depend on their results; the bound "
    "holds whenever and for whatever reason one stops. The set of documents was fixed in advance: another run "
    "on more of them is another statement, with a delta of its own."
)
IN_HASH_ORDER = (
    "The sequences are taken in the order of their content hashes, clusters of them at the place of a hash of their "
    "name, which says nothing about their losses."
)
SAMPLING = (INDEPENDENT, FIXED_NUMBER)
FIXED_SAE = "Model, SAE and coding rule were fixed before looking at the evaluation sequences."
FIXED_PROXY = (
    "Model, SAE, coding rule and pool were fixed before looking at the evaluation sequences; calibration "
    "and evaluation documents are disjoint.",
    "On a sequence that does not violate the pool, h_G and S∘M are the same function.",
)
LOSS = (
    "The loss is the smoothed loss in bits per token with the stated alpha and vocabulary size, averaged "
    "over the predicted positions of a sequence; losses are taken as measured (rounding in the model's own "
    "arithmetic is not covered)."
)


@dataclass(frozen=True)
class Bound:
    """An upper bound on an expected loss, or on a difference of two.

    Attributes:
        name: Key of the bound: ``u_sae``, ``sharp_betting``, ...
        value: Bits per token, never below the real value of the formula.
        confidence: 1 - delta: probability, over the draw of the evaluation sequences, that the bound holds.
        theorem: What is bounded, by which formula, from which source.
        assumptions: What must be true for the confidence to be right.
        terms: The terms whose sum is the value, in bits per token, in the order of the formula.
        lower: Lower end of a two-sided statement, bits per token; None for an upper bound alone.
    """

    name: str
    value: float
    confidence: float
    theorem: str
    assumptions: tuple[str, ...]
    terms: Mapping[str, float]
    lower: float | None = None

    def nonvacuous(self, baseline: float) -> bool:
        """Whether the bound is strictly below a baseline (bits per token), such as log2 V."""
        return self.value < baseline


_THEOREMS = {
    "u_sae": (
        "R(M) <= risk_pool + gap + Delta eta + 2 t_eta + t_eps: certificate U_SAE for the fixed pool "
        f"({PAPER}); {HOEFFDING} on three terms at delta/3 each, two-sided for the gap."
    ),
    "u_sae_occam": (
        "R(M) <= risk_pool + gap + Delta eta + t_eta + t_occ + t_eps: certificate U_SAE+Occam "
        f"({PAPER}); {HOEFFDING} as for U_SAE, with the risk of h_G bounded for all C(m, P) pools of P "
        "features at once."
    ),
    "direct_base": f"R(M) <= risk_base + Delta sqrt(ln(1/delta) / 2N): {HOEFFDING} on the losses of M.",
    "direct_pool": (
        f"R(h_G) <= risk_pool + Delta sqrt(ln(1/delta) / 2N): {HOEFFDING} on the losses of h_G. "
        "It bounds the proxy h_G, not M."
    ),
    "preprint": (
        "R(M) <= risk_pool + gap + B eta + t_eta + t_occ + t_eps in the arithmetic of version 1 of "
        f"{PAPER} (B for Delta, P ln(em/P) for ln C(m, P), delta split in two); {HOEFFDING} on the risk of "
        "h_G for all pools of P features and on gap and mismatch jointly."
    ),
}

_SEPARATE = (
    "Spends all of delta by itself: a separate statement, not simultaneous with the other bounds."
)
_ONE_POOL = (
    "The mismatch rate is that of the one pool fixed in advance: the Occam term does not license choosing "
    "the pool on the evaluation sequences."
)

_ANY_POOL = (
    "Holds for all pools of this size at once, mismatch included: the pool may even have been chosen on the "
    "evaluation sequences, but not its size."
)

_ASSUMPTIONS = {
    "u_sae": (*SAMPLING, *FIXED_PROXY, LOSS),
    "u_sae_occam": (*SAMPLING, *FIXED_PROXY, LOSS, _ONE_POOL),
    "direct_base": (*SAMPLING, LOSS, _SEPARATE),
    "direct_pool": (*SAMPLING, FIXED_PROXY[0], LOSS, _SEPARATE),
    "preprint": (*SAMPLING, *FIXED_PROXY, LOSS, _ONE_POOL),
}


def certificates(
    measured: Measured,
    *,
    vocab_size: int,
    dict_size: int,
    pool_size: int,
    alpha: float = 0.5,
    delta: float = 0.05,
) -> dict[str, Bound]:
    """Every published bound and the preprint's, from the measured terms of one evaluation.

    Each bound holds with probability 1 - delta by itself. u_sae and u_sae_occam hold together (the second
    is never below the first); the direct bounds each spend all of delta and are separate statements.

    Args:
        measured: Terms measured on the evaluation sequences.
        vocab_size: V, the model's true vocabulary size.
        dict_size: m, features of the SAE.
        pool_size: P, features of the pool.
        alpha: Smoothing weight with which the losses were formed.
        delta: Failure probability of each bound.

    Returns:
        ``u_sae``, ``u_sae_occam``, ``direct_base``, ``direct_pool``, ``preprint``; bits per token.

    Raises:
        CertifyError: For an impossible value (see :func:`saelens_certify.bounds.published`).
    """
    q = Quantities.check(
        risk_base=measured.risk_base,
        risk_pool=measured.risk_pool,
        gap=measured.gap,
        eta=measured.eta,
        n=measured.n_sequences,
        vocab_size=vocab_size,
        dict_size=dict_size,
        pool_size=pool_size,
        alpha=alpha,
        delta=delta,
    )
    n = q.need("n", "certificates")
    bounds = {}
    for name, make in PROFILES.items():
        profile = make(q)
        bounds[name] = Bound(
            name=name,
            value=float(profile.value(n)),
            confidence=1.0 - delta,
            theorem=_THEOREMS[name],
            assumptions=_ASSUMPTIONS[name],
            terms={term: float(value) for term, value in profile.terms(n).items()},
        )
    return bounds


def sharp_certificates(
    losses: Losses,
    *,
    dict_size: int,
    pool_size: int,
    delta: float,
    rarest: ArrayLike | None = None,
    thresholds: Mapping[int, int] | None = None,
    time_uniform: bool = False,
) -> dict[str, Bound]:
    """Every sharp bound, from the losses of one evaluation.

    Each holds with probability 1 - delta by itself, and each is a separate statement.

    Args:
        losses: The evidence, in the order of the documents' hashes.
        dict_size: m, features of the SAE.
        pool_size: P, features of the pool.
        delta: Failure probability of each bound.
        rarest: As for :func:`best_threshold`; with ``thresholds`` the result has ``sharp_occam_tau``.
        thresholds: {tau: P} to choose from, fixed by calibration.
        time_uniform: Whether the number of sequences may depend on their losses.

    Returns:
        The bounds of `SHARP` by name, sharp_unigram if the unigram model was measured; bits per token.

    Raises:
        CertifyError: For an impossible value.
    """
    complexity = float(log_binom(dict_size, pool_size))
    bounds = {}
    for name, sharp in SHARP.items():
        if name == "sharp_unigram" and losses.unigram is None:
            continue
        found = sharp_value(name, losses, delta, complexity=complexity, time_uniform=time_uniform)
        bounds[name] = Bound(
            name=name,
            value=found.value,
            confidence=1.0 - delta,
            theorem=_sharp_theorem(sharp, time_uniform),
            assumptions=_sharp_assumptions(sharp, time_uniform),
            terms=found.terms,
            lower=found.lower,
        )
    if rarest is not None and thresholds is not None:
        best = best_threshold(
            losses,
            rarest,
            thresholds,
            dict_size=dict_size,
            delta=delta,
            time_uniform=time_uniform,
        )
        bounds["sharp_occam_tau"] = _threshold_bound(best, delta, time_uniform)
    return bounds


def with_assumptions(
    bounds: Mapping[str, Bound], confidence: float, *further: str, clusters: bool = False
) -> dict[str, Bound]:
    """Restate bounds with the confidence of the whole statement and further assumptions.

    Args:
        bounds: Bounds by name.
        confidence: Of the whole.
        *further: Assumptions to add.
        clusters: Whether clusters of sequences, not sequences, are the independent draws.
    """

    def restated(bound: Bound) -> tuple[str, ...]:
        named = (CLUSTERS if clusters and a == INDEPENDENT else a for a in bound.assumptions)
        return (*named, *further)

    return {
        name: replace(bound, confidence=confidence, assumptions=restated(bound))
        for name, bound in bounds.items()
    }


def shared_delta(number: int) -> tuple[str, ...]:
    """What is to be said of each of several certificates that were computed at delta / number.

    Bonferroni: the probability that the bound of some name fails in any of so many certificates is at
    most delta, however they depend on each other.
    """
    if number == 1:
        return ()
    return (
        f"One of {number} certificates that share delta (Bonferroni): each spends delta / {number}, and this "
        "bound holds in all of them at once with the stated confidence.",
    )


def check_family(delta: float, number: int) -> None:
    """Check a failure probability and the number of certificates that share it.

    Raises:
        CertifyError: If delta is not in (0, 1), or the number not a whole number of at least 1.
    """
    log_threshold(delta, 0.0)
    if isinstance(number, int) and number > MAX_INTEGER:
        raise CertifyError(
            "simultaneous is too large: count the certificates that are to hold at once."
        )
    integer("simultaneous", number, 1, "count the certificates that are to hold at once")
    if delta / number < SMALLEST_SHARE:
        raise CertifyError(
            f"delta / simultaneous = {delta / number!r} is below {SMALLEST_SHARE}: raise delta, or share it among "
            "fewer certificates."
        )


def _threshold_bound(best: BestThreshold, delta: float, time_uniform: bool) -> Bound:
    sharp = SHARP["sharp_occam"]
    return Bound(
        name="sharp_occam_tau",
        value=best.bound.value,
        confidence=1.0 - delta,
        theorem=(
            f"{_sharp_theorem(sharp, time_uniform)} Smallest of {best.n_thresholds} thresholds, each at delta / "
            f"{best.n_thresholds}: tau = {best.tau}, P = {best.pool_size}."
        ),
        assumptions=(
            *_sharp_assumptions(sharp, time_uniform),
            "The thresholds that were compared were fixed by the calibration documents.",
        ),
        terms=best.bound.terms,
    )


def _sharp_theorem(sharp: Sharp, time_uniform: bool) -> str:
    if sharp.mismatch is None:
        upper = f"{sharp.claim} <= an upper confidence bound of its mean over sequences"
    else:
        third = "Delta 1[violation]" if sharp.mismatch == "charged" else "|loss(S∘M) - loss(h_G)|"
        upper = (
            f"{sharp.claim} <= E min(loss(h_G) + |loss(M) - loss(S∘M)| + {third}, B) <= its upper "
            "confidence bound"
        )
    if sharp.occam:
        upper += ", at level delta / C(m, P): for all pools of P features at once"
    if sharp.lower is not None:
        upper += "; at delta / 2, and likewise from below"
    source = {
        (
            "betting",
            False,
        ): f"betting ({WAUDBY_SMITH}, hedged capital, stakes that follow the variance)",
        (
            "betting",
            True,
        ): f"betting ({WAUDBY_SMITH}; mixture of constant bets, Ville's inequality)",
        ("bernstein", False): f"empirical Bernstein ({MAURER_PONTIL})",
        ("bernstein", True): f"empirical Bernstein confidence sequence ({WAUDBY_SMITH}, Theorem 2)",
    }[sharp.method, time_uniform]
    return f"{upper}; {source}."


def _sharp_assumptions(sharp: Sharp, time_uniform: bool) -> tuple[str, ...]:
    order_matters = sharp.method == "betting" or time_uniform
    proxy = FIXED_PROXY if sharp.involves_pool and not sharp.occam else (FIXED_SAE,)
    if sharp.occam:
        proxy = (FIXED_SAE, _ANY_POOL, FIXED_PROXY[1])
    return (
        INDEPENDENT,
        ANY_TIME if time_uniform else FIXED_NUMBER,
        *((IN_HASH_ORDER,) if order_matters else ()),
        *(proxy if sharp.term != "risk_base" else ()),
        *((FITTED_BASELINE,) if sharp.term == "excess_unigram" else ()),
        LOSS,
        _SEPARATE,
    )

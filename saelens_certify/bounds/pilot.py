"""From a pilot, the number of sequences that a target or a margin needs, for every bound.

The pilot's per-sequence values stand for their distribution. Each replicate draws a pilot of the same size from them, with
replacement (what another pilot might have been), and from that one a stream of evaluation sequences, and
counts how many the bound needs to reach its goal. The median of these counts and two of their quantiles are the plan. So the
interval covers both that the pilot is small and that the evaluation sequences are random.

**What a pilot cannot see.** An event that none of n sequences shows may still have a probability of 3 / n (rule of
three, at 95 % confidence), such as a pool violation, or a loss at the end of the range. At that probability
it adds up to 3 (high - low) / n to the mean: 0.3 bits for a pilot of 200 and a range of 18. A plan whose room between
mean and target is smaller than that should be taken as optimistic; `Plan.unseen` and `Plan.unseen_cost` say how much.

A plan is a forecast, not a certificate: certify on other sequences than the pilot's, with the N that was
planned, or with a time-uniform bound, which may then stop at any N.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from saelens_certify.bounds.checks import integer, real, refuse
from saelens_certify.bounds.complexity import log_binom
from saelens_certify.bounds.hoeffding import deviation
from saelens_certify.bounds.joint import Losses
from saelens_certify.bounds.planner import PROFILES
from saelens_certify.bounds.quantities import Quantities
from saelens_certify.bounds.resampling import (
    LONGEST,
    METHODS,
    Goal,
    Rule,
    Stream,
    closed_form_rule,
    draws_needed,
    rules,
)
from saelens_certify.bounds.rounding import FloatArray
from saelens_certify.bounds.samples import Samples, log_threshold
from saelens_certify.bounds.sharp import SHARP
from saelens_certify.errors import CertifyError

QUANTILES = (0.1, 0.9)
"""Of the counts, at the ends of a plan's interval."""

_UNSEEN_RISK = 0.05


@dataclass(frozen=True)
class Plan:
    """How many sequences a bound needs.

    Attributes:
        n: Median count; ``math.inf`` if half of the replicates never reach the goal.
        n_low: The 10 % quantile.
        n_high: The 90 % quantile.
        reachable: Share of replicates that reach the goal at some N.
        extrapolated: Whether n is beyond the longest simulated stream, hence a 1 / sqrt(N) extrapolation.
        bound: Name of the bound.
        target: What the bound is to be at most, in the unit of the values; None for a margin.
        margin: How far above the sample mean the bound may be; None for a target.
        delta: Failure probability of the bound.
        pilot_size: Number of values in the pilot.
        replicates: Number of replicates.
        seed: Their seed.
        unseen: Largest probability of an event that a pilot of this size misses with probability 5 %.
        unseen_cost: What such an event adds to the mean at most, in the unit of the values.
    """

    n: int | float
    n_low: int | float
    n_high: int | float
    reachable: float
    extrapolated: bool
    bound: str
    target: float | None
    margin: float | None
    delta: float
    pilot_size: int
    replicates: int
    seed: int
    unseen: float
    unseen_cost: float


def plan_mean(
    samples: ArrayLike,
    low: float,
    high: float,
    delta: float,
    *,
    target: float | None = None,
    margin: float | None = None,
    method: str = "betting",
    complexity: float = 0.0,
    seed: int = 0,
    replicates: int = 200,
) -> Plan:
    """Plan an upper confidence bound of a mean.

    Args:
        samples: The pilot: independent values of the bounded variable, one per sequence [n], n at least 2.
        low: Smallest possible value.
        high: Largest possible value.
        delta: Failure probability of the bound.
        target: The bound is to be at most this. For "strictly below x" give ``math.nextafter(x, -math.inf)``.
        margin: The bound is to be at most this above the sample mean. Exactly one of the two is given.
        method: ``hoeffding``, ``bernstein``, ``betting``, ``betting_constant`` for one N fixed in advance; or
            ``hoeffding_sequence``, ``bernstein_sequence``, ``betting_sequence``: with a target, N is the first at
            which the sequence is at most the target.
        complexity: Nats added to ln(1 / delta), as in the bounds.
        seed: Of the replicates.
        replicates: Number of replicates.

    Raises:
        CertifyError: For an unknown method, neither or both goals, or impossible values.
    """
    if method not in METHODS:
        raise CertifyError(f"method={method!r} is unknown: choose one of {', '.join(METHODS)}.")
    log_threshold(delta, complexity)
    values = Samples.check(samples, low, high).values
    goal = _goal(target, margin)
    rule = rules(float(low), float(high), float(delta), float(complexity), margin is None)[method]
    return _plan(
        values,
        rule,
        goal,
        name=method,
        low=float(low),
        high=float(high),
        delta=delta,
        seed=seed,
        replicates=replicates,
    )


def plan_published(
    losses: Losses,
    *,
    bound: str,
    vocab_size: int,
    target: float | None = None,
    margin: float | None = None,
    dict_size: int | None = None,
    pool_size: int | None = None,
    alpha: float = 0.5,
    delta: float = 0.05,
    seed: int = 0,
    replicates: int = 200,
) -> Plan:
    """Plan a published certificate.

    Each is the mean over the sequences of its measured terms, and a margin that depends on N alone.

    Args:
        losses: The pilot.
        bound: ``u_sae``, ``u_sae_occam``, ``direct_base``, ``direct_pool`` or ``preprint``.
        vocab_size: V.
        target: As for :func:`plan_mean`, bits per token.
        margin: As for :func:`plan_mean`: what the certificate adds to its measured terms.
        dict_size: m; for u_sae_occam and preprint.
        pool_size: P; for the same two.
        alpha: Smoothing weight of the losses.
        delta: Failure probability.
        seed: Of the replicates.
        replicates: Number of replicates.

    Raises:
        CertifyError: For an unknown bound, a missing size, or as :func:`plan_mean`.
    """
    if bound not in PROFILES:
        raise CertifyError(f"bound={bound!r} is unknown: choose one of {', '.join(PROFILES)}.")
    measured = losses.measured
    q = Quantities.check(
        vocab_size=vocab_size,
        risk_base=measured.risk_base,
        risk_pool=measured.risk_pool,
        gap=measured.gap,
        eta=measured.eta,
        dict_size=dict_size,
        pool_size=pool_size,
        alpha=alpha,
        delta=delta,
    )
    profile = PROFILES[bound](q)
    charge = float(q.loss_cap if bound == "preprint" else q.loss_range)
    columns = {
        "risk_base": losses.base,
        "risk_pool": losses.pool,
        "gap": np.abs(losses.base - losses.sae),
        "mismatch": charge * losses.violation,
    }
    total = np.sum([columns[name] for name in profile.fixed], axis=0)
    widths = list(profile.deviations.values())

    def added(x: FloatArray) -> float:
        n = np.array(float(x.size))
        return sum(float(deviation(width, log_term, n)) for width, log_term in widths)

    spread = losses.width * len(profile.fixed)
    return _plan(
        losses.units(total),
        closed_form_rule(added),
        _goal(target, margin),
        name=bound,
        low=losses.low,
        high=max(losses.low + spread, float(total.max())),
        delta=delta,
        seed=seed,
        replicates=replicates,
    )


def plan(
    bound: str,
    losses: Losses,
    *,
    vocab_size: int,
    target: float | None = None,
    margin: float | None = None,
    dict_size: int | None = None,
    pool_size: int | None = None,
    alpha: float = 0.5,
    delta: float = 0.05,
    time_uniform: bool = False,
    seed: int = 0,
    replicates: int = 200,
) -> Plan:
    """Plan any bound by its name: a published certificate or a sharp one.

    Args:
        bound: A key of `SHARP` (``sharp_betting``, ``excess_sae``, ...), or as for :func:`plan_published`.
        losses: The pilot.
        vocab_size: V.
        target: What the bound is to be at most, bits per token. With neither a target nor a margin: strictly
            below log2 V, the loss of a uniform guess; for ``sharp_unigram`` strictly below 0.
        margin: How far above the sample mean the bound may be.
        dict_size: m; for u_sae_occam, sharp_occam and preprint.
        pool_size: P; for the same three.
        alpha: Smoothing weight of the losses.
        delta: Failure probability.
        time_uniform: For a sharp bound: whether the run may stop at any N; n is then when it is expected to.
        seed: Of the replicates.
        replicates: Number of replicates.

    Raises:
        CertifyError: For an unknown bound, a missing size, or as :func:`plan_mean`.
    """
    if target is None and margin is None:
        target = _verdict(bound, losses)
    if bound not in SHARP:
        if bound not in PROFILES:
            names = ", ".join([*PROFILES, *SHARP])
            raise CertifyError(f"bound={bound!r} is unknown: choose one of {names}.")
        if time_uniform:
            raise CertifyError(
                f"bound={bound!r} has no time-uniform form: plan it for one N, or a sharp bound."
            )
        return plan_published(
            losses,
            bound=bound,
            vocab_size=vocab_size,
            target=target,
            margin=margin,
            dict_size=dict_size,
            pool_size=pool_size,
            alpha=alpha,
            delta=delta,
            seed=seed,
            replicates=replicates,
        )
    sharp = SHARP[bound]
    complexity = 0.0
    if sharp.occam:
        if dict_size is None or pool_size is None:
            raise CertifyError(f"bound={bound!r} needs dict_size= and pool_size=.")
        complexity = float(log_binom(dict_size, pool_size))
    x = sharp.variable(losses)
    found = plan_mean(
        x.samples,
        x.low,
        x.high,
        delta / sharp.shares,
        target=target,
        margin=margin,
        method=f"{sharp.method}_sequence" if time_uniform else sharp.method,
        complexity=complexity,
        seed=seed,
        replicates=replicates,
    )
    return replace(found, bound=bound, delta=delta)


def _verdict(bound: str, losses: Losses) -> float:
    """The target at which a bound is a verdict: below log2 V, or below 0 for the excess over the unigram model."""
    if bound == "sharp_unigram":
        return math.nextafter(0.0, -math.inf)
    if bound in SHARP and SHARP[bound].variable(losses).low < 0.0:
        raise CertifyError(
            f"bound={bound!r} is about a difference of losses, which has no baseline: give target= or margin=."
        )
    return math.nextafter(losses.baseline, -math.inf)


def _goal(target: float | None, margin: float | None) -> Goal:
    if (target is None) == (margin is None):
        raise CertifyError(
            f"target={target!r} and margin={margin!r}: give one of them, the value that the bound is to reach "
            "or its distance from the sample mean."
        )
    if target is not None:
        return Goal(float(real("target", target)), None)
    room = real("margin", margin)  # pyright: ignore[reportArgumentType]
    refuse("margin", room, room <= 0.0, "above 0", "no bound is below the sample mean")
    return Goal(None, float(room))


def _plan(
    values: FloatArray,
    rule: Rule,
    goal: Goal,
    *,
    name: str,
    low: float,
    high: float,
    delta: float,
    seed: int,
    replicates: int,
) -> Plan:
    """Count on every replicate, and take quantiles."""
    if values.size < 2:
        raise CertifyError("samples has 1 value: a pilot needs at least 2, better 100.")
    repeat = int(integer("replicates", replicates, 1, "give the number of replicates, such as 200"))
    counts = np.empty(repeat)
    for r in range(repeat):
        rng = np.random.default_rng([seed, r])
        law = values[rng.integers(values.size, size=values.size)]
        counts[r] = draws_needed(Stream(law, rng), rule, goal)
    # Quantiles that are counts: inf has no average with anything.
    quantiles = (
        np.quantile(counts, QUANTILES[0], method="lower"),
        np.quantile(counts, 0.5, method="inverted_cdf"),
        np.quantile(counts, QUANTILES[1], method="higher"),
    )
    n_low, n, n_high = (int(v) if math.isfinite(v) else math.inf for v in quantiles)
    unseen = -math.expm1(math.log(_UNSEEN_RISK) / values.size)
    return Plan(
        n=n,
        n_low=n_low,
        n_high=n_high,
        reachable=float(np.isfinite(counts).mean()),
        extrapolated=LONGEST < n < math.inf,
        bound=name,
        target=goal.target,
        margin=goal.margin,
        delta=delta,
        pilot_size=values.size,
        replicates=repeat,
        seed=seed,
        unseen=unseen,
        unseen_cost=unseen * (high - low),
    )

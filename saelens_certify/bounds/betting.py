"""Betting bounds of a bounded mean: as sharp as the variance allows, for one n or for all n at once.

Waudby-Smith & Ramdas, Estimating means of bounded random variables by betting, JRSS-B 86(1), 2024. Proofs and
comparison with the other bounds: docs/statistics.md. `wealth` has the mechanism.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from saelens_certify.bounds.rounding import FloatArray
from saelens_certify.bounds.samples import Samples, log_threshold
from saelens_certify.bounds.times import check_times
from saelens_certify.bounds.wealth import (
    LARGEST_CAP,
    SMALLEST_MEAN,
    Impl,
    largest_refuted,
    log_wealth_down,
    wealth_native,
)
from saelens_certify.errors import CertifyError

Bets = Literal["adaptive", "constant"]

_CAPS: FloatArray = np.array([0.5, 0.75, LARGEST_CAP])
_CAP_WEIGHTS: FloatArray = np.array([0.25, 0.25, 0.5])

CONSTANT_CAPS: FloatArray = LARGEST_CAP * 2.0 ** (np.arange(34.0) / -2.0)
CONSTANT_WEIGHTS: FloatArray = 1.0 / (np.arange(34.0) + 2.0) ** 1.5
# A double less than normalised: together at most 1 in real arithmetic, too.
CONSTANT_WEIGHTS *= (1.0 - 2.0**-50) / CONSTANT_WEIGHTS.sum()


def betting_upper(
    samples: ArrayLike,
    low: float,
    high: float,
    delta: float,
    *,
    complexity: float = 0.0,
    bets: Bets = "adaptive",
    impl: Impl = "auto",
) -> float:
    """Upper confidence bound of a mean by betting, for a number of samples fixed in advance.

    Waudby-Smith & Ramdas (2024), hedged capital, one-sided: with y = (high - x) / (high - low), a claim
    "the mean of y is at most m" is refuted if the wealth of bets against it reaches 1 / delta. The bound is
    that of the largest refuted claim. The probability that it is below the mean is at most delta.

    With ``bets="adaptive"`` the stakes follow the variance of the samples before (their predictable
    plug-in for fixed n). The margin then approaches sd sqrt(2 ln(1/delta) / n), the best that is possible.
    It **depends on the order** of the samples: fix the order by something that says nothing about
    their values, such as the hashes of the documents.

    With ``bets="constant"`` stakes do not change: a mixture of 34 constant bets, the same one that
    :func:`betting_sequence` uses. It **does not depend on the order** (but for rounding, which only
    raises it): a product has no order. Its margin is a fifth to a third wider.

    Args:
        samples: Independent values with one mean, one per sequence [n].
        low: Smallest possible value, fixed in advance.
        high: Largest possible value, fixed in advance.
        delta: Failure probability in (0, 1).
        complexity: Nats added to ln(1 / delta). exp(complexity) such bounds then hold at once, so that
            ln C(m, P) gives a statement for every pool without forming delta / C(m, P).
        bets: How stakes are chosen. Choose before looking at the samples.
        impl: "auto", "native" (compiled) or "numpy"; the same number.

    Returns:
        The bound: in [mean, high], ``high`` if there are too few samples for any other; never below the
        real value of its definition.

    Raises:
        CertifyError: For samples outside [low, high], another impossible value or an unknown name.
    """
    wealth_native(impl)
    checked = Samples.check(samples, low, high)
    threshold = log_threshold(delta, complexity)
    y, n = checked.distances, checked.n
    if bets == "adaptive":
        limits, caps, weights = adaptive_bets(y, threshold)
    elif bets == "constant":
        limits, caps, weights = None, CONSTANT_CAPS, CONSTANT_WEIGHTS
    else:
        raise CertifyError(f"bets={bets!r} is unknown: choose 'adaptive' or 'constant'.")
    found = largest_refuted(
        lambda mean: log_wealth_down(y, limits, mean, caps, weights, impl),
        threshold,
        SMALLEST_MEAN,
        float(np.mean(y)),
        _guess(float(np.var(y)), n, threshold),
    )
    return float(checked.upper(np.array(0.0 if found is None else found)))


def betting_sequence(
    samples: ArrayLike,
    low: float,
    high: float,
    delta: float,
    times: ArrayLike | None = None,
    *,
    complexity: float = 0.0,
    impl: Impl = "auto",
) -> FloatArray:
    """Upper confidence bounds of a mean by betting, valid for all numbers of samples at once.

    The wealth of a mixture of 34 constant bets (Waudby-Smith & Ramdas, 2024; the mixture is Robbins's) ever
    reaches 1 / delta with probability at most delta (Ville). So with probability 1 - delta no bound is
    below the mean, at whatever time and for whatever reason one looks or stops. Their running minimum is
    returned, which is allowed for the same reason.

    Before the minimum is taken, the bound after n samples does not depend on their order. Which are the
    first n does: fix the order by something that says nothing about the values.

    Args:
        samples: Values whose mean, given all earlier ones, is the same; independent ones, say [n].
        low: Smallest possible value, fixed in advance.
        high: Largest possible value, fixed in advance.
        delta: Probability that any of the bounds fails, in (0, 1).
        times: Numbers of samples after which to give the bound, increasing; default
            :func:`log_times` of n.
        complexity: Nats added to ln(1 / delta); see :func:`betting_upper`.
        impl: "auto", "native" (compiled) or "numpy"; the same numbers.

    Returns:
        One bound for each of ``times``, non-increasing, at most ``high``.

    Raises:
        CertifyError: As for :func:`betting_upper`, or for times that do not increase within [1, n].
    """
    wealth_native(impl)
    checked = Samples.check(samples, low, high)
    threshold = log_threshold(delta, complexity)
    when = check_times(times, checked.n)
    y = checked.distances
    means, squares = np.cumsum(y)[when - 1] / when, np.cumsum(y * y)[when - 1] / when
    spread = np.maximum(squares - means * means, 0.0)
    best, found = 0.0, np.empty(len(when))
    for k, t in enumerate(when.tolist()):
        refuted = largest_refuted(
            lambda mean, t=t: log_wealth_down(
                y[:t], None, mean, CONSTANT_CAPS, CONSTANT_WEIGHTS, impl
            ),
            threshold,
            max(best, SMALLEST_MEAN),
            float(means[k]),
            _guess(float(spread[k]), t, threshold),
        )
        best = best if refuted is None else max(best, refuted)
        found[k] = best
    return checked.upper(found)


def adaptive_bets(
    values: FloatArray, threshold: float
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Limits, caps and weights of the bets for a fixed number of values (see ``wealth``).

    Args:
        values: In [0, 1], [n].
        threshold: ln(1 / delta).
    """
    return adaptive_limits(values, threshold), _CAPS, _CAP_WEIGHTS


def adaptive_limits(values: FloatArray, threshold: float) -> FloatArray:
    """Stakes per unit of the claimed mean that win most at the end, going by the values before each.

    Args:
        values: In [0, 1], [n].
        threshold: ln(1 / delta).

    Returns:
        sqrt(2 threshold / (n variance)), with the variance of the earlier values, which begin with one
        made-up value at 1/2 of squared deviation 1/4. Any other function of the earlier values would give
        a valid bound, too: rounding here costs nothing.
    """
    n = len(values)
    seen = np.arange(2.0, n + 2.0)
    means = (0.5 + np.cumsum(values)) / seen
    variances = (0.25 + np.cumsum((values - means) ** 2)) / seen
    before = np.concatenate([[0.25], variances[:-1]])
    return np.sqrt(2.0 * threshold / (n * before))


def _guess(variance: float, n: int, threshold: float) -> float:
    """About the distance between the sample mean and the bound."""
    return float(np.sqrt(2.0 * variance * threshold / n) + threshold / n)

"""Confidence sequences in closed form: Hoeffding's by a mixture, and the empirical Bernstein one."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from saelens_certify.bounds.rounding import FloatArray
from saelens_certify.bounds.samples import Samples, log_threshold
from saelens_certify.bounds.times import check_times

_SHARPEST_AT = 500.0  # sequences: about where certificates are decided
_HALVINGS = 60


def hoeffding_sequence(
    samples: ArrayLike,
    low: float,
    high: float,
    delta: float,
    times: ArrayLike | None = None,
    *,
    complexity: float = 0.0,
) -> FloatArray:
    """Hoeffding's upper confidence bounds of a mean, valid for all numbers of samples at once.

    Howard, Ramdas, McAuliffe & Sekhon (2021), Proposition 6, the one-sided normal mixture: with D the sum of
    the mean minus the samples, in units of the width, exp(l D - l^2 n / 8) is a nonnegative
    supermartingale for every l > 0 (Hoeffding's lemma), hence so is its mixture over a half-normal
    l, which exceeds 1 / delta at some time with probability at most delta (Ville). Running minimum.

    Args:
        samples: Values whose mean, given all earlier ones, is the same [n].
        low: Smallest possible value, fixed in advance.
        high: Largest possible value, fixed in advance.
        delta: Probability that any of the bounds fails, in (0, 1).
        times: Numbers of samples after which to give the bound; default :func:`log_times` of n.
        complexity: Nats added to ln(1 / delta), so that exp(complexity) such sequences hold at once.

    Returns:
        One bound for each of ``times``, non-increasing, at most ``high``. Each depends on which samples
        came first and, but for the minimum, not on their order.

    Raises:
        CertifyError: For an impossible value.
    """
    checked = Samples.check(samples, low, high)
    threshold = log_threshold(delta, complexity)
    when = check_times(times, checked.n)
    t = when.astype(np.float64)
    precision = _SHARPEST_AT / 4.0 / (2.0 * threshold + math.log1p(2.0 * threshold))
    reached = t / 4.0 + precision
    needed = threshold + 0.5 * np.log(reached / precision)
    margin = np.sqrt(reached) * np.array([_mixture_root(r) for r in needed.tolist()]) / t
    mean = np.cumsum(checked.distances)[when - 1] / t
    # A sum of t terms and a quotient are right within (1 + 2^-53)^(t + 1), the margin within 2^-49.
    lower = mean * (1.0 - (t + 4.0) * 2.0**-53) - margin * (1.0 + 2.0**-48)
    return checked.upper(np.maximum.accumulate(lower))


def bernstein_sequence(
    samples: ArrayLike,
    low: float,
    high: float,
    delta: float,
    times: ArrayLike | None = None,
    *,
    complexity: float = 0.0,
) -> FloatArray:
    """Empirical Bernstein upper confidence bounds of a mean, valid for all numbers of samples at once.

    Waudby-Smith & Ramdas (2024), Theorem 2, one-sided: with y = (high - x) / (high - low), l_i in (0, 1/2] and
    c_i any functions of the values before y_i, and psi(l) = -ln(1 - l) - l, the mean of y is at least

        (sum l_i y_i - ln(1/delta) - sum (y_i - c_i)^2 psi(l_i)) / sum l_i

    for all n at once with probability 1 - delta. l_i is their sqrt(2 ln(1/delta) / (variance i ln(1 + i))),
    c_i the mean, both of the values before. Running minimum of the bounds.

    The bounds **depend on the order** of the samples: fix it by something that says nothing about their
    values, such as the hashes of the documents.

    Args:
        samples: Values whose mean, given all earlier ones, is the same [n].
        low: Smallest possible value, fixed in advance.
        high: Largest possible value, fixed in advance.
        delta: Probability that any of the bounds fails, in (0, 1).
        times: Numbers of samples after which to give the bound; default :func:`log_times` of n.
        complexity: Nats added to ln(1 / delta), so that exp(complexity) such sequences hold at once.

    Returns:
        One bound for each of ``times``, non-increasing, at most ``high``.

    Raises:
        CertifyError: For an impossible value.
    """
    checked = Samples.check(samples, low, high)
    threshold = log_threshold(delta, complexity)
    when = check_times(times, checked.n)
    y, i = checked.distances, np.arange(1.0, checked.n + 1.0)
    means = (0.5 + np.cumsum(y)) / (i + 1.0)
    variances = (0.25 + np.cumsum((y - means) ** 2)) / (i + 1.0)
    centre = np.concatenate([[0.5], means[:-1]])
    variance = np.concatenate([[0.25], variances[:-1]])
    stake = np.minimum(0.5, np.sqrt(2.0 * threshold / (variance * i * np.log1p(i))))
    won = np.cumsum(stake * y)[when - 1]
    paid = np.cumsum((y - centre) ** 2 * (-np.log1p(-stake) - stake))[when - 1] + threshold
    staked = np.cumsum(stake)[when - 1]
    # psi is right within 2^-51 l, which is 2^-51 of what was staked; every sum of t terms and the few
    # operations around it within (1 + 2^-53)^(t + 8).
    wrong = ((when + 8.0) * 2.0**-52 * (won + paid)) / staked + 2.0**-50
    return checked.upper(np.maximum.accumulate((won - paid) / staked - wrong))


def _mixture_root(needed: float) -> float:
    """A z with ln 2 + z^2 / 2 + ln Phi(z) >= needed >= 0, the smallest but for rounding."""
    low, high = 0.0, math.sqrt(2.0 * needed) + 1e-6
    target = needed + 2.0**-40 * (1.0 + needed)
    for _ in range(_HALVINGS):
        z = (low + high) / 2.0
        reached = z * z / 2.0 + math.log(math.erfc(-z / math.sqrt(2.0)))
        low, high = (low, z) if reached >= target else (z, high)
    return high

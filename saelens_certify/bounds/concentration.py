"""Upper confidence bounds of a bounded mean in closed form: Hoeffding's and the empirical Bernstein bound."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from saelens_certify.bounds.hoeffding import deviation
from saelens_certify.bounds.means import mean_up
from saelens_certify.bounds.rounding import add_up, div_up, mul_up, sqrt_up, sum_up
from saelens_certify.bounds.samples import Samples, log_threshold


def hoeffding_upper(
    samples: ArrayLike, low: float, high: float, delta: float, *, complexity: float = 0.0
) -> float:
    """Hoeffding's upper confidence bound of a mean, for a number of samples fixed in advance.

    Hoeffding (1963), Theorem 2: mean + (high - low) sqrt(ln(1/delta) / (2n)). The probability that it is
    below the mean is at most delta. It does not depend on the order of the samples.

    Args:
        samples: Independent values with one mean, one per sequence [n].
        low: Smallest possible value, fixed in advance.
        high: Largest possible value, fixed in advance.
        delta: Failure probability in (0, 1).
        complexity: Nats added to ln(1 / delta), so that exp(complexity) such bounds hold at once.

    Returns:
        The bound, rounded up, at most ``high``.

    Raises:
        CertifyError: For samples outside [low, high] or another impossible value.
    """
    checked = Samples.check(samples, low, high)
    log_term = np.array(log_threshold(delta, complexity))
    margin = deviation(np.array(checked.width), log_term, np.array(float(checked.n)))
    return min(float(add_up(np.array(mean_up(checked.values)), margin)), checked.high)


def bernstein_upper(
    samples: ArrayLike, low: float, high: float, delta: float, *, complexity: float = 0.0
) -> float:
    """The empirical Bernstein upper confidence bound, for a number of samples fixed in advance.

    Maurer & Pontil (2009), Theorem 4: mean + sqrt(2 V ln(2/delta) / n) + 7 (high - low) ln(2/delta) / (3 (n - 1)),
    with the sample variance V (divisor n - 1). The probability that it is below the mean is at most
    delta. It does not depend on the order of the samples.

    Args:
        samples: Independent values of one distribution, one per sequence [n].
        low: Smallest possible value, fixed in advance.
        high: Largest possible value, fixed in advance.
        delta: Failure probability in (0, 1).
        complexity: Nats added to ln(2 / delta), so that exp(complexity) such bounds hold at once.

    Returns:
        The bound, rounded up, at most ``high``; ``high`` for a single sample, which has no variance.

    Raises:
        CertifyError: For samples outside [low, high] or another impossible value.
    """
    checked = Samples.check(samples, low, high)
    log_term = np.array(log_threshold(delta, complexity, parts=2))
    if checked.n == 1:
        return checked.high
    n, mean = float(checked.n), mean_up(checked.values)
    # Deviations from any other number than the mean have a larger sum of squares, so the rounding of
    # the mean is on the safe side; (1 + 2^-53)^4 covers the difference, the product and the sum.
    squares = math.fsum(((checked.values - mean) ** 2).tolist())
    variance = div_up(mul_up(np.array(squares), np.array(1.0 + 2.0**-50)), np.array(n - 1.0))
    spread = sqrt_up(div_up(mul_up(2.0 * variance, log_term), np.array(n)))
    remainder = mul_up(
        np.array(checked.width), div_up(mul_up(np.array(7.0), log_term), np.array(3.0 * (n - 1.0)))
    )
    return min(float(sum_up(np.array(mean), spread, remainder)), checked.high)

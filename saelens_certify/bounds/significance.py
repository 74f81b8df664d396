"""p-values of "the mean is at least this", and several of them at once."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from saelens_certify.bounds.betting import CONSTANT_CAPS, CONSTANT_WEIGHTS, adaptive_bets
from saelens_certify.bounds.checks import real, refuse
from saelens_certify.bounds.rounding import add_up, div_up
from saelens_certify.bounds.samples import Samples, log_threshold
from saelens_certify.bounds.times import looks
from saelens_certify.bounds.wealth import SMALLEST_MEAN, Impl, log_wealth_down
from saelens_certify.errors import CertifyError


def betting_p_value(
    samples: ArrayLike,
    low: float,
    high: float,
    claim: float,
    delta: float,
    *,
    complexity: float = 0.0,
    time_uniform: bool = False,
    impl: Impl = "auto",
) -> float:
    """p-value of the claim that a mean is at least ``claim``: one over the wealth of bets against it.

    Waudby-Smith & Ramdas (2024): while the claim holds, wealth has a mean of at most 1, so it reaches 1 / p with
    probability at most p (Markov). The bets are those of :func:`betting_upper` at level ``delta`` or, for a
    number of samples that depends on them, those of :func:`betting_sequence` (Ville). p <= delta if
    and only if that bound is below the claim, but for the last bits.

    Args:
        samples: Independent values with one mean, one per sequence [n]; their order matters, see
            :func:`betting_upper`.
        low: Smallest possible value, fixed in advance.
        high: Largest possible value, fixed in advance.
        claim: The mean that is claimed at least.
        delta: Level for which the stakes are chosen, before looking at the samples.
        complexity: Nats by which the p-value grows, so that exp(complexity) of them hold at once.
        time_uniform: Whether the number of samples may depend on the samples: the largest wealth ever held
            counts, at the numbers at which `saelens_certify.bounds.times.looks` looks.
        impl: "auto", "native" (compiled) or "numpy"; the same number.

    Returns:
        In (0, 1], rounded up.

    Raises:
        CertifyError: For samples outside [low, high] or another impossible value.
    """
    checked = Samples.check(samples, low, high)
    threshold = log_threshold(delta, complexity)
    wanted = real("claim", claim)
    if wanted.ndim:
        raise CertifyError(f"claim has shape {wanted.shape}: give one number.")
    far = float(add_up(np.array(checked.high), -wanted))
    distance = 0.0 if far <= 0.0 else float(div_up(np.array(far), np.array(checked.width)))
    if distance >= 1.0:
        return 1.0
    # Widened, the division by a width rounded up included: a larger distance is harder to refute.
    distance = max(distance * (1.0 + 2.0**-50), SMALLEST_MEAN)
    y, claimed = checked.distances, min(distance, 1.0)
    if time_uniform:
        wealth = max(
            log_wealth_down(y[:n], None, claimed, CONSTANT_CAPS, CONSTANT_WEIGHTS, impl)
            for n in looks(checked.n).tolist()
        )
    else:
        limits, caps, weights = adaptive_bets(y, threshold)
        wealth = log_wealth_down(y, limits, claimed, caps, weights, impl)
    log_p = min(float(real("complexity", complexity)) - wealth, 0.0)
    return min(1.0, math.nextafter(math.exp(log_p) * (1.0 + 2.0**-40), 1.0))


def holm(p_values: Mapping[str, float], delta: float) -> dict[str, bool]:
    """Which of several hypotheses are rejected, all rejections being right with probability 1 - delta.

    Holm (1979), step-down: the smallest p-value is compared with delta / k, the next with delta / (k - 1), and so
    on until one is not small enough. Never rejects less than Bonferroni; assumes nothing about how the
    p-values depend on each other.

    Args:
        p_values: By name.
        delta: Probability of any wrong rejection, in (0, 1).

    Returns:
        Whether each is rejected, in the order given.

    Raises:
        CertifyError: For p-values outside [0, 1], or an impossible delta.
    """
    log_threshold(delta, 0.0)
    values = real("p_values", list(p_values.values()))
    refuse("p_values", values, (values < 0.0) | (values > 1.0), "in [0, 1]", "give probabilities")
    rejected = dict.fromkeys(p_values, False)
    for place, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        if p_values[name] * (len(p_values) - place) > delta:
            break
        rejected[name] = True
    return rejected

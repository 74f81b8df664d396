"""What the certificate's evidence says about a stream like the one it was measured on.

Three numbers are computed for each sequence, each in [0, 1]:

- ``violation``: 1 if any token has an active feature outside the pool.
- ``outside``: share of the active features that are outside the pool.
- ``error``: squared error of the reconstruction over the activation's squared distance from the
  calibration mean, position 0 left out (a sink whose norm hides every other position in many
  models), at most 1: an SAE that explains nothing.

A pool that evaluation never violated makes every violation news, and ``violation`` has the power. Where
half or all of the sequences violate a small pool anyway, it has little, and ``outside`` has it.

The evidence yields an upper confidence bound on the mean of each. For ``violation`` the exact binomial
one (Clopper & Pearson, 1934). For the others, `bounds.betting_upper` with constant bets: the argument of
`wealth` turned around. It does not depend on the order of the sequences, and it adapts to the
variance, which is why it is used rather than Hoeffding's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from saelens_certify.bounds import betting_upper
from saelens_certify.errors import CertifyError
from saelens_certify.monitor.wealth import FloatArray, check_values

STATISTICS = ("violation", "outside", "error")

_STEPS = 60  # of bisection: more than a double has bits


@dataclass(frozen=True)
class Reference:
    """Means of the statistics on the evaluation sequences, and bounds on what they estimate.

    Attributes:
        means: Measured means, in the order of `STATISTICS`.
        bounds: Upper confidence bounds on the expectations, all of them hold at once with
            probability at least 1 - delta.
        n: Sequences of evidence.
        delta: See ``bounds``.
    """

    means: tuple[float, ...]
    bounds: tuple[float, ...]
    n: int
    delta: float

    @classmethod
    def from_values(cls, values: FloatArray, delta: float) -> Reference:
        """Bound the means behind the evidence.

        Args:
            values: Output of `sequence_values`, of shape [n, statistics].
            delta: Probability that one of the bounds fails; each gets an equal share.
        """
        check_values(values)
        share = delta / len(STATISTICS)
        violation, *others = values.T
        bounds = [binomial_upper(int(violation.sum()), len(values), share)]
        bounds += [mean_upper(other, share) for other in others]
        means = tuple(math.fsum(column) / len(values) for column in values.T)
        return cls(means, tuple(bounds), len(values), delta)


def sequence_values(
    violation: ArrayLike,
    outside: ArrayLike,
    l0: ArrayLike,
    mse: ArrayLike,
    variance: ArrayLike,
) -> FloatArray:
    """Compute the statistics from columns of evidence.

    Args:
        violation: Whether the sequence violates the pool.
        outside: Active features outside the pool per token.
        l0: Active features per token.
        mse: Squared error per token, without position 0.
        variance: Squared distance from the calibration mean per token, without position 0.

    Returns:
        Values in [0, 1] of shape [n, statistics], in the order of `STATISTICS`.
    """
    return np.stack(
        [
            np.asarray(violation, dtype=np.float64),
            _share(outside, l0),
            _share(mse, variance),
        ],
        axis=-1,
    )


def binomial_upper(successes: int, n: int, delta: float) -> float:
    """Exact upper confidence bound on a probability.

    Args:
        successes: Number of successes.
        n: Number of independent trials, at least 1.
        delta: Probability that the bound is below the true probability.

    Returns:
        The smallest p at which so few successes have a probability of at most delta.
    """
    if not 0 <= successes <= n or n < 1:
        raise CertifyError(f"{successes} successes in {n} trials are impossible")
    if successes == n:
        return 1.0
    k = np.arange(successes + 1)
    whole = math.lgamma(n + 1)
    log_choose = np.array(
        [whole - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(successes + 1)]
    )

    def excluded(p: float) -> bool:
        terms = log_choose + k * math.log(p) + (n - k) * math.log1p(-p)
        largest = float(terms.max())
        return largest + math.log(math.fsum(np.exp(terms - largest))) <= math.log(delta)

    return _first(excluded, successes / n)


def mean_upper(values: FloatArray, delta: float) -> float:
    """Upper confidence bound on a mean, by betting.

    Args:
        values: Independent values in [0, 1] of one law, at least one.
        delta: Probability that the bound is below the true mean.

    Returns:
        The bound; 1 if there are too few values for any other.
    """
    check_values(values)
    if not len(values):
        raise CertifyError("a mean of no values has no bound: the evidence is empty")
    return betting_upper(values, 0.0, 1.0, delta, bets="constant")


def _first(excluded: Callable[[float], bool], low: float) -> float:
    """Smallest excluded number above ``low``, from above, where all numbers beyond it are excluded."""
    high = 1.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if not 0 < middle < 1:
            break
        low, high = (low, middle) if excluded(middle) else (middle, high)
    return high


def _share(part: ArrayLike, whole: ArrayLike) -> FloatArray:
    """``part / whole``, at most 1; of nothing, 0 if there is no part and 1 if there is."""
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(whole > 0, part / whole, (part > 0).astype(np.float64))
    return np.clip(ratio, 0.0, 1.0)

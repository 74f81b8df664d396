"""Betting that a mean is larger than claimed: wealth that may not grow while the claim holds.

The claim is about values x_1, x_2, ... in [0, 1]: given what came before, each has a mean of at most m.
Whoever bets the share c of his wealth on the next value holds

    1 - c + c x / m

times as much afterwards, which is 1 on average at best while the claim holds, whatever the law of x.
Several shares are bet side by side, each with an equal part of the wealth: no share has to be chosen,
and the product of the best one is reached up to the number of shares.

Wealth that lost a little on each of a million quiet values could not win it back when the stream
changes. So it is not all bet from the start: a part w_j waits for value j, where w_1 + w_2 + ... = 1.
With M_n for what has been bet and W_n = w_1 + ... + w_n,

    M_n = (M_{n-1} + w_n) (1 - c + c x_n / m),        E_n = M_n + 1 - W_n.

E_n is nonnegative, starts at 1 and is not larger on average after a value than before it, so by Ville's
inequality the chance that it ever reaches 1/a is at most a (an *e-process*). After a change at value j
it grows as if betting had begun there, but for the factor w_j, here about ln 2 / (j ln^2 j): 19 nats after
a million values, 6 after a hundred.

With w_j = 1 for every j the same recursion gives the Shiryaev-Roberts sum, whose mean is at most n
after n values: the first time that it reaches r is then, on average, not before value r (an
*e-detector*: Shin, Ramdas & Rinaldo, 2022). That bounds the average run length, not the probability of a
false alarm.

Everything is kept as logarithms: there is no number of values after which it overflows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saelens_certify.errors import CertifyError

FloatArray = NDArray[np.float64]

BETS: FloatArray = np.array([*(2.0**-j for j in range(10, 0, -1)), 0.75, 0.9, 0.98])
"""Shares bet side by side. Not all of the wealth: one x = 0 would end the bet."""


def log_factors(values: FloatArray, bounds: FloatArray) -> FloatArray:
    """Return by what each bet multiplies its wealth, as logarithms.

    Args:
        values: In [0, 1], of shape [n, statistics].
        bounds: Claimed largest mean of each statistic, in (0, 1].

    Returns:
        Logarithms of shape [n, statistics, bets].
    """
    gain = values / bounds - 1.0
    return np.log1p(BETS * gain[..., None])


def log_mean_exp(values: FloatArray, axes: tuple[int, ...]) -> FloatArray:
    """Logarithm of the mean of exponentials, without ever forming one that overflows."""
    largest = np.max(values, axis=axes, keepdims=True)
    safe = np.where(np.isfinite(largest), largest, 0.0)
    with np.errstate(divide="ignore"):  # log(0) where nothing has been bet yet
        mean = np.log(np.mean(np.exp(values - safe), axis=axes, keepdims=True))
    return np.squeeze(mean + safe, axis=axes)


@dataclass(frozen=True)
class Wealth:
    """What has been bet so far on several statistics, and what still waits.

    Attributes:
        log_bet: Logarithm of M_n, of shape [statistics, bets].
        n: Values seen.
        renewed: Whether one unit is added before every value (e-detector), rather than one unit
            spread over all values to come (e-process).
    """

    log_bet: FloatArray
    n: int = 0
    renewed: bool = False

    @classmethod
    def start(cls, n_statistics: int, renewed: bool = False) -> Wealth:
        """Return the wealth before the first value: nothing has been bet."""
        return cls(np.full((n_statistics, len(BETS)), -np.inf), 0, renewed)

    def after(self, values: FloatArray, bounds: FloatArray) -> tuple[Wealth, FloatArray]:
        """Bet on further values, in their order.

        Args:
            values: In [0, 1], of shape [n, statistics].
            bounds: Claimed largest mean of each statistic.

        Returns:
            The wealth after them, and the logarithm of E after each value for each statistic (for
            an e-detector: of the sum), of shape [n, statistics].
        """
        if not len(values):
            return self, np.empty((0, len(self.log_bet)))
        gains = np.cumsum(log_factors(values, bounds), axis=0)
        ends = self.n + np.arange(1, len(values) + 1)
        waiting = np.zeros(len(values)) if self.renewed else log_weights(ends)
        # M_n = exp(gains_n) (M_0 + sum_j w_j exp(-gains_{j-1})): each part in units of its own start.
        before = np.concatenate([np.zeros_like(gains[:1]), gains[:-1]])
        joined = np.concatenate([self.log_bet[None], waiting[:, None, None] - before])
        log_bet = gains + np.logaddexp.accumulate(joined, axis=0)[1:]
        log_e = log_mean_exp(log_bet, (2,))
        if not self.renewed:
            log_e = np.logaddexp(log_e, log_waiting(ends)[:, None])
        return Wealth(log_bet[-1], int(ends[-1]), self.renewed), log_e


def log_weights(j: NDArray[np.integer]) -> FloatArray:
    """Logarithm of w_j = 1 / log2(j + 1) - 1 / log2(j + 2), whose sum over all j >= 1 is 1."""
    first = np.log(j + 1.0)
    second = np.log(j + 2.0)
    step = np.log1p(1.0 / (j + 1.0))  # second - first, without cancellation
    return np.log(step) + math.log(math.log(2.0)) - np.log(first) - np.log(second)


def log_waiting(n: NDArray[np.integer]) -> FloatArray:
    """Logarithm of 1 - W_n, what still waits after n values."""
    return -np.log(np.log2(n + 2.0))


def check_values(values: FloatArray) -> None:
    """Check that the betting argument applies.

    Raises:
        CertifyError: If a value is outside [0, 1] or not finite.
    """
    if not bool(np.all((values >= 0) & (values <= 1))):
        raise CertifyError("values that are bet on must lie in [0, 1]")

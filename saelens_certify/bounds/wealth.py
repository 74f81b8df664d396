"""Betting that a mean is larger than claimed: the wealth of several bets, and the claims it refutes.

The claim is that values y_1, y_2, ... in [0, 1] have, given what came before, means of at most m. Whoever
stakes the share s_i of his wealth on the i-th holds (1 - s_i) + s_i y_i / m times as much afterwards: 1 on
average at best while the claim holds, if s_i was chosen before y_i was seen. Several bets run side by side,
each with a fixed part of the wealth. The wealth is a test: while the claim holds it is a nonnegative
supermartingale that starts at 1, so the probability that it reaches 1 / delta after n values is at most
delta (Markov), and that it ever does so, too (Ville).

Bet j stakes s_i = min(limit_i m, cap_j). Every factor is then non-increasing in m: at a larger m it is
1 - cap + cap y / m, which is; or, while limit_i m is below the cap, 1 + limit_i (y_i - m), which is. So the
refuted claims are all those up to some m, and that m is found by bracketing.

Rounding. With u = 2^-53 and a share of at most 0.98, the computed factor is within (1 + u)^64 of the real
one (rounding the share by a factor 1 + u moves the factor by at most 0.98 / 0.02 = 49 u of itself; four
roundings follow), and every product adds one u: n factors are right within 64 n u. That, and what the
logarithms may lose, is subtracted before wealth is compared with 1 / delta.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from saelens_certify.bounds.rounding import FloatArray
from saelens_certify.errors import CertifyError

try:
    from saelens_certify import _native
except ImportError:
    _native = None

Impl = Literal["auto", "native", "numpy"]

SMALLEST_MEAN = 2.0**-40
"""Claims below it are not tested: 16 factors could overflow."""

LARGEST_CAP = 0.98

_FACTORS, _GROUP = 16, 256  # as in csrc/stats/wealth.h
_TOLERANCE = 2.0**-44
_NEVER_SLOW = 60  # steps after which bracketing falls back to halving


def wealth_native(impl: Impl) -> bool:
    """Whether to use the compiled products; both forms give the same bits.

    Args:
        impl: "auto" takes the compiled form if it was built, "native" insists on it, "numpy" does without.

    Raises:
        CertifyError: The name is unknown, or "native" is asked for and was not built.
    """
    if impl not in ("auto", "native", "numpy"):
        raise CertifyError(f"impl={impl!r} is unknown: choose 'auto', 'native' or 'numpy'.")
    if impl == "native" and _native is None:
        raise CertifyError(
            "impl='native' needs the compiled extension, which was not built here: choose 'auto'; "
            "saelens_certify.build_info() says why."
        )
    return impl != "numpy" and _native is not None


def products(
    values: FloatArray,
    limits: FloatArray | None,
    mean: float,
    caps: FloatArray,
    impl: Impl = "auto",
) -> tuple[FloatArray, NDArray[np.int64]]:
    """By what each bet has multiplied its wealth: mantissas in [0.5, 1) and binary exponents.

    Args:
        values: In [0, 1], [n], in the order in which they are bet on.
        limits: Stake at most this times ``mean`` on each value [n]; None: as the caps say.
        mean: The claim, in [SMALLEST_MEAN, 1].
        caps: Stake at most this, for each bet [bets], in (0, LARGEST_CAP].
        impl: See :func:`wealth_native`.
    """
    if wealth_native(impl) and _native is not None:
        return _native.wealth(values, limits, mean, caps)
    total, exponents = np.ones(len(caps)), np.zeros(len(caps), np.int64)
    for begin in range(0, len(values), _FACTORS * _GROUP):
        here = slice(begin, begin + _FACTORS * _GROUP)
        ratio = (values[here] / mean)[:, None]
        if limits is None:
            factors = (1.0 - caps) + caps * ratio
        else:
            share = np.minimum((limits[here] * mean)[:, None], caps)
            factors = (1.0 - share) + share * ratio
        rest = -len(factors) % _FACTORS
        factors = np.concatenate([factors, np.ones((rest, len(caps)))])
        factors = factors.reshape(-1, _FACTORS, len(caps))
        product = factors[:, 0]
        for k in range(1, _FACTORS):
            product = product * factors[:, k]
        mantissas, powers = np.frexp(product)
        # accumulate multiplies strictly from left to right; reduce may not.
        group, group_power = np.frexp(np.multiply.accumulate(mantissas, axis=0)[-1])
        total, power = np.frexp(total * group)
        exponents += powers.sum(axis=0, dtype=np.int64) + group_power + power
    return total, exponents


def log_wealth_down(
    values: FloatArray,
    limits: FloatArray | None,
    mean: float,
    caps: FloatArray,
    weights: FloatArray,
    impl: Impl = "auto",
) -> float:
    """Logarithm of the wealth of all bets together, never above the real one.

    Args:
        values: As for :func:`products`.
        limits: As for :func:`products`.
        mean: As for :func:`products`.
        caps: As for :func:`products`.
        weights: Part of the wealth with which each bet begins [bets], positive, at most 1 in all.
        impl: See :func:`wealth_native`.
    """
    mantissas, exponents = products(values, limits, mean, caps, impl)
    logs = np.log(mantissas) + exponents * np.log(2.0) + np.log(weights)
    logs -= len(values) * 2.0**-47 + np.abs(exponents) * 2.0**-50 + 2.0**-40
    largest = float(np.max(logs))
    return largest + float(np.log(np.sum(np.exp(logs - largest))))


def largest_refuted(
    log_wealth: Callable[[float], float], threshold: float, floor: float, mean: float, step: float
) -> float | None:
    """The largest claim that is refuted, to a relative 2^-44, from below; None if ``floor`` is not.

    Args:
        log_wealth: Logarithm of the wealth for a claim, decreasing.
        threshold: Claims whose log wealth reaches it are refuted.
        floor: Smallest claim to look at.
        mean: Sample mean: claims from here on are not looked at (constant bets hold at most 1 there).
        step: A guess of the distance between the sample mean and the answer.
    """
    root = np.sqrt(threshold)

    def height(value: float) -> float:
        # About linear in the claim: log wealth is about quadratic in its distance from the mean.
        return float(np.sqrt(max(value, 0.0)) - root)

    value = log_wealth(floor)
    if value < threshold or mean <= floor:
        return floor if value >= threshold else None
    low, at_low, high, at_high = floor, height(value), mean, -float(root)
    trial = mean - step
    while low < trial < high:
        value = log_wealth(trial)
        if value >= threshold:
            low, at_low = trial, height(value)
            break
        high, at_high = trial, height(value)
        trial -= step
        step *= 2.0
    last = 0
    for number in range(2 * _NEVER_SLOW):
        tolerance = _TOLERANCE * high
        if high - low <= tolerance:
            break
        part = at_low / (at_low - at_high) if number < _NEVER_SLOW else 0.5
        trial = low + (high - low) * part
        trial = min(max(trial, low + tolerance / 4), high - tolerance / 4)
        value = log_wealth(trial)
        # Illinois: an end that stays put twice counts half, so that both ends move.
        if value >= threshold:
            low, at_low = trial, height(value)
            at_high, last = (at_high / 2, 1) if last == 1 else (at_high, 1)
        else:
            high, at_high = trial, height(value)
            at_low, last = (at_low / 2, -1) if last == -1 else (at_low, -1)
    return low

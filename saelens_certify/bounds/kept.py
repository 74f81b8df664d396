"""How much of what a model knows survives in a proxy: a ratio of differences of risks, with confidence limits.

    f = (R(baseline) - R(proxy)) / (R(baseline) - R(M))

is 1 for a proxy as good as M and 0 for one that is no better than the baseline (uniform or unigram). It may be
negative, or above 1.

**Limits by inversion (Fieller's idea).** At the true f the variable W = (b - p) - f (b - m), formed of the three losses of one
sequence, has mean 0. For every f, bets that the mean of W is positive and bets that it is negative test that claim
at delta / 2 each; the true f survives both tests with probability 1 - delta. The limits are the ends of an interval
that holds every f that survives. With M no better than the baseline, f says nothing. If E[b - m] > 0 is not
established by the same bets (it is the test at f = -infinity), there are no limits, and none are returned.
So the probability that limits are returned and the true ratio is not between them is at most delta, always.

**Why the interval holds all survivors.** W, scaled to at least -1, is w = u (b - p) - v (b - m) with (u, v) on a polyline from
f = v / u = -infinity over 0 and 1 to +infinity; within an edge (u, v) is linear in its length, and W is scaled
by a linear interpolation of its scales at f = 0, 1 and at both ends. Stakes s_i in [0, 1) come from the values before the
i-th and are the same for all f, so each bet's log wealth, sum of ln(1 + s_i w_i), is concave along an edge. Between
two points a bet therefore never holds less than the smaller of what it holds there: if the bets' smaller
wealths together reach 2 / delta, all f between are refuted. The search starts at -infinity (for the upper limit
at +infinity), goes from corner to corner as long as the whole edge is refuted, brackets in the first edge that is not,
and starts again from where it came to while that leads further.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from saelens_certify.bounds.baselines import loss_within
from saelens_certify.bounds.checks import real
from saelens_certify.bounds.rounding import FloatArray
from saelens_certify.bounds.samples import log_threshold
from saelens_certify.bounds.statements import ANY_TIME, FIXED_NUMBER
from saelens_certify.bounds.wealth import LARGEST_CAP, largest_refuted
from saelens_certify.errors import CertifyError

_CAPS: FloatArray = np.array([0.5, 0.75, LARGEST_CAP])
_LOG_WEIGHTS: FloatArray = np.log(np.array([0.25, 0.25, 0.5]))
_RESTARTS = 20
_CORNERS = ((0.0, -1.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0))
"""(u, v) at f = -infinity, 0, 1, +infinity."""

KEPT_ASSUMPTIONS = (
    "The baseline was fixed before looking at the evaluation sequences (a unigram model: fitted on calibration "
    "documents).",
    "All three losses were measured on the same sequences, which are independent draws from one distribution, taken "
    "in an order that says nothing about the losses.",
    "Limits exist only if the model is established to be better than the baseline; the confidence is that of "
    "no limits, or limits with the ratio between them.",
)


@dataclass(frozen=True)
class Kept:
    """The share of the model's advantage over a baseline that a proxy keeps.

    Attributes:
        value: Ratio of the measured differences; None if the measured loss of M is not below the baseline's.
        lower: Lower end of the two-sided statement; None if M is not established to be better than the
            baseline, at delta / 2: then nothing is said about the ratio.
        upper: Upper end of it; None likewise.
        lower_alone: Lower limit that spends all of delta, a statement of its own; None likewise, at delta.
        confidence: 1 - delta.
        baseline: Name of the baseline.
        assumptions: What must be true for the confidence to be right.
    """

    value: float | None
    lower: float | None
    upper: float | None
    lower_alone: float | None
    confidence: float
    baseline: str
    assumptions: tuple[str, ...]


@dataclass(frozen=True)
class _Triple:
    """Differences of the three losses on every sequence, in units of the interval's width.

    Attributes:
        a: Baseline minus proxy [n].
        c: Baseline minus M [n].
        least: Smallest possible loss of the baseline, above `low`.
        most: Largest.
    """

    a: FloatArray
    c: FloatArray
    least: float
    most: float

    def scale(self, u: float, v: float) -> float:
        """Largest possible value of -(u (b - p) - v (b - m)), or a little more, for losses in [0, 1]."""
        lowest = min((u - v) * self.least, (u - v) * self.most) - max(u, 0.0) + min(v, 0.0)
        return max(-lowest, 2.0**-20) * (1.0 + 2.0**-40)


def information_kept(
    loss_baseline: ArrayLike,
    loss_base: ArrayLike,
    loss_proxy: ArrayLike,
    low: float,
    high: float,
    delta: float,
    *,
    baseline: str = "unigram",
    time_uniform: bool = False,
) -> Kept:
    """Fraction of the model's information that a proxy keeps, with confidence limits.

    Argument and proof: the module's docstring. The limits **depend on the order** of the sequences: fix it by something
    that says nothing about the losses.

    Args:
        loss_baseline: Loss of the baseline, bits per token [n_sequences]; or one number, the loss of a
            uniform guess, log2 V.
        loss_base: Loss of M on the same sequences [n_sequences].
        loss_proxy: Loss of S∘M or h_G, or another variable in [low, high] such as Z of ``joint``, for a lower limit
            of what is kept by way of the SAE [n_sequences].
        low: B - Delta, smallest possible loss.
        high: B, largest possible loss.
        delta: Probability that limits are returned and the ratio is not between them.
        baseline: Name of the baseline, for the record.
        time_uniform: Whether the number of sequences may depend on their losses. Stakes then do not depend on it
            either, and wealth is a nonnegative supermartingale in it: Ville's inequality in place of
            Markov's. The limits are wider by a factor of about sqrt(ln n).

    Returns:
        The ratio and its limits; lower limits are rounded down, upper ones up. The two-sided limits and the lower
        limit alone are separate statements.

    Raises:
        CertifyError: For losses outside [low, high], different lengths or an impossible delta.
    """
    two_sided, one_sided = log_threshold(delta, 0.0, parts=2), log_threshold(delta, 0.0)
    base = loss_within("loss_base", loss_base, low, high)
    proxy = loss_within("loss_proxy", loss_proxy, low, high)
    constant = np.ndim(loss_baseline) == 0
    given = np.atleast_1d(real("loss_baseline", loss_baseline))
    above = loss_within("loss_baseline", given, low, high)
    sizes = {"loss_base": base.size, "loss_proxy": proxy.size}
    if not constant:
        sizes["loss_baseline"] = above.size
    if len(set(sizes.values())) > 1:
        lengths = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise CertifyError(f"Lengths differ: {lengths}. Give one value per sequence in each.")
    width = high - low
    place = (float(above[0]) - low) / width
    triple = _Triple(
        (above - proxy) / width,
        (above - base) / width,
        *((place - 2.0**-50, place + 2.0**-50) if constant else (0.0, 1.0)),
    )
    value = _ratio(triple)
    lower = _limit(triple, two_sided, 1, time_uniform)
    upper = _limit(triple, two_sided, -1, time_uniform)
    alone = _limit(triple, one_sided, 1, time_uniform)
    if (
        value is not None
    ):  # Adaptive bets may refute the measured ratio: limits are only widened here.
        lower = None if lower is None else min(lower, value)
        upper = None if upper is None else max(upper, value)
        alone = None if alone is None else min(alone, value)
    if lower is None or upper is None:
        lower = upper = None
    return Kept(
        value=value,
        lower=lower,
        upper=upper,
        lower_alone=alone,
        confidence=1.0 - delta,
        baseline=baseline,
        assumptions=(*KEPT_ASSUMPTIONS, ANY_TIME if time_uniform else FIXED_NUMBER),
    )


def _ratio(x: _Triple) -> float | None:
    total = math.fsum(x.c.tolist())
    return math.fsum(x.a.tolist()) / total if total > 0.0 else None


def _limit(x: _Triple, threshold: float, sign: Literal[1, -1], time_uniform: bool) -> float | None:
    """The last ratio up to which all are refuted, from -infinity (sign 1) or +infinity (sign -1); None: not even that.

    Args:
        x: The losses.
        threshold: Logarithm of the wealth at which a claim is refuted.
        sign: 1: bets that the mean of W is positive; -1: that it is negative.
        time_uniform: Whether stakes may not depend on the number of sequences.
    """
    stakes = _stakes(x, threshold, sign, time_uniform)
    corners = []
    for u, v in _CORNERS[::sign]:
        scale = x.scale(sign * u, sign * v)
        corners.append((sign * u / scale, sign * v / scale))
    for start, end in zip(corners[:-1], corners[1:], strict=True):
        edge = _Edge(x, stakes, start, end)
        if _together(edge.at_start) < threshold:
            return None
        if edge.refuted_up_to(1.0) >= threshold:
            continue
        for _ in range(_RESTARTS):
            reached = largest_refuted(edge.refuted_up_to, threshold, 0.0, 1.0, 0.25) or 0.0
            edge = replace(edge, start=edge.point(reached))
            # More is refuted here than is needed, if some bet held less where the search began.
            if _together(edge.at_start) < threshold + 1e-9:
                break
        u, v = edge.start
        return None if u == 0.0 else v / u - sign * (1.0 + abs(v / u)) * 2.0**-46
    return None


@dataclass(frozen=True)
class _Edge:
    """An edge of the polyline, and the bets along it.

    Attributes:
        losses: The losses.
        stakes: Stakes of each bet on each sequence [bets, n].
        start: (u, v) at its start, already refuted.
        end: (u, v) at its end.
    """

    losses: _Triple
    stakes: FloatArray
    start: tuple[float, float]
    end: tuple[float, float]

    def point(self, t: float) -> tuple[float, float]:
        """(u, v) at the part t of the edge."""
        (u0, v0), (u1, v1) = self.start, self.end
        return u0 + t * (u1 - u0), v0 + t * (v1 - v0)

    @cached_property
    def at_start(self) -> FloatArray:
        """Log wealth of each bet at the start."""
        return self.log_wealths(0.0)

    def log_wealths(self, t: float) -> FloatArray:
        """Log wealth of each bet at the part t of the edge, never above the real one [bets]."""
        u, v = self.point(t)
        # 2^-48 is more than rounding has done to differences and products; w >= -1 by its scale.
        won = u * self.losses.a - v * self.losses.c - (abs(u) + abs(v)) * 2.0**-48
        logs = np.log1p(self.stakes * np.maximum(won, -1.0)).sum(axis=1)
        # A factor of at least 0.02 amplifies rounding fifty times; sums of n logarithms add the rest.
        return logs + _LOG_WEIGHTS - (self.stakes.shape[1] * 2.0**-43 + 2.0**-40)

    def refuted_up_to(self, t: float) -> float:
        """A log wealth that is at most that of all bets together anywhere between the start and t."""
        return _together(np.minimum(self.at_start, self.log_wealths(t)))


def _together(logs: FloatArray) -> float:
    """Logarithm of the sum of the wealths of all bets."""
    largest = float(logs.max())
    return largest + math.log(sum(math.exp(v - largest) for v in logs.tolist()))


def _stakes(x: _Triple, threshold: float, sign: Literal[1, -1], time_uniform: bool) -> FloatArray:
    """What each bet stakes on each sequence [bets, n]: a function of the sequences before it, the same for all ratios.

    sqrt(2 threshold / (n variance)), with the variance of w at the ratio of the earlier sequences, both begun with one
    made-up value: the bet that would win most at the end if these were the true ones. Time-uniform, i ln(1 + i) in
    place of n for the i-th (the predictable plug-in of Waudby-Smith & Ramdas, 2024, for either case).
    """
    n = len(x.c)
    seen = np.arange(float(n))
    count = np.maximum(seen, 1.0)

    def before(values: FloatArray) -> FloatArray:
        return np.concatenate([[0.0], np.cumsum(values)[:-1]])

    a, c = before(x.a), before(x.c)
    f = np.clip(np.where(c > 0.0, a / np.where(c > 0.0, c, 1.0), 1.0), 0.0, 1.0)
    # `_Triple.scale` at (1, f) and (-1, -f).
    scale = 1.0 - (1.0 - f) * x.least if sign == 1 else f + (1.0 - f) * x.most
    total = a - f * c
    squares = before(x.a * x.a) - 2.0 * f * before(x.a * x.c) + f * f * before(x.c * x.c)
    spread = np.maximum(squares - total * total / count, 0.0) / np.maximum(scale, 2.0**-20) ** 2
    horizon = (seen + 1.0) * np.log(seen + 2.0) if time_uniform else float(n)
    limits = np.sqrt(2.0 * threshold * (seen + 1.0) / (horizon * (1.0 + spread)))
    return np.minimum(limits, _CAPS[:, None])

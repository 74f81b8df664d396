"""Baselines with confidence: the risk of the unigram model, and whether a certified loss is below it.

A bound below log2 V has beaten a uniform guess, whose loss is known exactly. A unigram model does better than that
without reading a word of context. Its risk has to be estimated, from the same evaluation sequences as
everything else, so "the bound is below the measured unigram loss" is no verdict: the measured loss may lie
above its expectation. Two ways out are here. An interval for the unigram model's risk by itself; and, sharper,
one bound of the *paired* difference: sequences that are hard for one are hard for the other, so that differences
vary less than either loss, and a single test suffices.

The unigram model is fitted on calibration documents, which are disjoint from the evaluation documents: given
the former it is a fixed function, and its losses are independent draws like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from saelens_certify.bounds.betting import betting_sequence, betting_upper
from saelens_certify.bounds.checks import real, refuse
from saelens_certify.bounds.exact import per_sequence
from saelens_certify.bounds.joint import Interval
from saelens_certify.bounds.means import mean_up
from saelens_certify.bounds.quantities import LOSS_TOLERANCE
from saelens_certify.bounds.rounding import FloatArray, add_up
from saelens_certify.bounds.times import looks
from saelens_certify.errors import CertifyError

FITTED_BASELINE = "The unigram model was fitted on calibration documents, which are disjoint from the evaluation documents."
"""What has to hold, besides the assumptions on the sequences, for a statement about the unigram model."""


@dataclass(frozen=True)
class Risk:
    """The risk of a baseline, with confidence limits.

    Attributes:
        value: Mean loss on the evaluation sequences, rounded up, bits per token.
        lower: Lower limit.
        upper: Upper limit.
        confidence: Probability that the risk is between the limits.
    """

    value: float
    lower: float
    upper: float
    confidence: float


def loss_within(name: str, losses: ArrayLike, low: float, high: float) -> FloatArray:
    """Check per-sequence losses; put on the end of the interval what rounding took out of it.

    Args:
        name: The argument's name, for the message.
        losses: Bits per token [n_sequences].
        low: B - Delta.
        high: B.

    Raises:
        CertifyError: For losses that are not finite, not one per sequence, or outside the interval by
            more than 1e-4 bits, which is what single precision may do.
    """
    ends = real("low", low), real("high", high)
    refuse("high", ends[1], ends[1] <= ends[0], f"above low={low!r}", "give B - Delta and B")
    found = per_sequence(name, losses)
    refuse(
        name,
        found,
        (found < low - LOSS_TOLERANCE) | (found > high + LOSS_TOLERANCE),
        f"in [B - Delta, B] = [{float(low):.6g}, {float(high):.6g}] bits",
        "use smoothed losses in bits (log2), with the alpha and vocab_size of that interval",
    )
    return np.clip(found, low, high)


def risk_limit(
    losses: ArrayLike,
    low: float,
    high: float,
    delta: float,
    side: Literal["upper", "lower"] = "upper",
    *,
    complexity: float = 0.0,
    time_uniform: bool = False,
) -> float:
    """One-sided confidence limit of an expected loss by betting.

    ``betting_upper`` or, time-uniform, ``betting_sequence`` on the losses, or, for a lower limit, on their negatives. The
    probability that the limit is on the wrong side of the expected loss is at most delta.

    Args:
        losses: Smoothed losses of one model, bits per token [n_sequences], in an order that says nothing about
            them (that of the documents' hashes).
        low: B - Delta, smallest possible loss.
        high: B, largest possible loss.
        delta: Failure probability.
        side: "upper" or "lower".
        complexity: Nats added to ln(1 / delta).
        time_uniform: Whether the number of sequences may depend on their losses.

    Returns:
        Bits per token in [low, high], rounded away from the mean.

    Raises:
        CertifyError: For losses outside the interval or another impossible value.
    """
    if side not in ("upper", "lower"):
        raise CertifyError(f"side={side!r} is unknown: choose 'upper' or 'lower'.")
    found = loss_within("losses", losses, low, high)
    if side == "upper":
        return _upper(Interval(found, low, high), delta, complexity, time_uniform)
    return -_upper(Interval(-found, -high, -low), delta, complexity, time_uniform)


def risk_interval(
    losses: ArrayLike, low: float, high: float, delta: float, *, time_uniform: bool = False
) -> Risk:
    """Mean loss with two-sided confidence limits by betting, delta / 2 on each side.

    Args:
        losses: As for :func:`risk_limit`, like the others.
        low: See there.
        high: See there.
        delta: Probability that the risk is outside the limits.
        time_uniform: See there.

    Raises:
        CertifyError: As :func:`risk_limit`.
    """
    found = loss_within("losses", losses, low, high)
    lower, upper = (
        risk_limit(found, low, high, delta / 2.0, "lower", time_uniform=time_uniform),
        risk_limit(found, low, high, delta / 2.0, "upper", time_uniform=time_uniform),
    )
    return Risk(mean_up(found), lower, upper, 1.0 - delta)


def paired_excess(values: ArrayLike, loss_baseline: ArrayLike, low: float, high: float) -> Interval:
    """Differences of two losses of the same sequences, rounded up, and the interval in which they lie.

    Any bound of a bounded mean takes them: at one N, for all N at once, or in a plan.

    Args:
        values: Losses, or another variable in [low, high] such as Z of ``joint`` [n_sequences].
        loss_baseline: The baseline's loss on the same sequences [n_sequences]; or one number, the loss of
            a uniform guess, log2 V.
        low: B - Delta.
        high: B.

    Returns:
        values - loss_baseline, in [low - high, high - low]; in [low - c, high - c] for a baseline of loss c.

    Raises:
        CertifyError: For values outside [low, high], or different lengths.
    """
    found = loss_within("values", values, low, high)
    constant = np.ndim(loss_baseline) == 0
    given = np.atleast_1d(real("loss_baseline", loss_baseline))
    baseline = loss_within("loss_baseline", given, low, high)
    if not constant and baseline.size != found.size:
        raise CertifyError(
            f"Lengths differ: values has {found.size}, loss_baseline has {baseline.size}. Give one value "
            "per sequence in each, in the same order."
        )
    least, most = (float(baseline[0]), float(baseline[0])) if constant else (low, high)
    # Ends rounded outwards, differences upwards: never outside, never too small.
    top = float(add_up(np.array(float(high)), np.array(-least)))
    bottom = -float(add_up(np.array(most), np.array(-float(low))))
    return Interval(add_up(found, -baseline), bottom, top)


def beats_baseline(
    values: ArrayLike,
    loss_baseline: ArrayLike,
    low: float,
    high: float,
    delta: float,
    *,
    complexity: float = 0.0,
    time_uniform: bool = False,
) -> float:
    """Upper confidence bound of how much more a baseline's loss is exceeded: negative if it is beaten.

    With values Z, E[Z - loss of the baseline] >= R(M) - R(baseline). So with probability 1 - delta M's expected
    loss, as certified by way of the SAE, is below that of the baseline by at least minus the result. One paired
    test by betting.

    Args:
        values: As for :func:`paired_excess`, in an order that says nothing about them.
        loss_baseline: See there.
        low: See there.
        high: See there.
        delta: Failure probability.
        complexity: Nats added to ln(1 / delta).
        time_uniform: Whether the number of sequences may depend on their losses.

    Returns:
        Bits per token, rounded up. Below 0: the baseline is beaten, with confidence 1 - delta.

    Raises:
        CertifyError: As :func:`paired_excess`, or for an impossible delta.
    """
    x = paired_excess(values, loss_baseline, low, high)
    return _upper(x, delta, complexity, time_uniform)


def _upper(x: Interval, delta: float, complexity: float, time_uniform: bool) -> float:
    if not time_uniform:
        return betting_upper(x.samples, x.low, x.high, delta, complexity=complexity)
    when = looks(x.samples.size)
    found = betting_sequence(x.samples, x.low, x.high, delta, when, complexity=complexity)
    return float(found[-1])

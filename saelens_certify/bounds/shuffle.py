"""Shuffle test: is the real SAE better than copies of it in which only the alignment is random?

A copy pairs the features with other decoder rows, or has random rows. If the pairing of the real SAE says nothing,
it is one more copy drawn like the others, and it is the best of 1 + R with probability 1 / (1 + R).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from saelens_certify.bounds.betting import betting_upper
from saelens_certify.bounds.checks import real, refuse
from saelens_certify.bounds.clusters import Labels, cluster_means
from saelens_certify.bounds.loss import cap_up, check_alpha, check_vocab_size, range_up
from saelens_certify.bounds.means import mean_distance_up, mean_up
from saelens_certify.bounds.quantities import LOSS_TOLERANCE
from saelens_certify.bounds.rounding import FloatArray, add_up, div_up
from saelens_certify.bounds.samples import log_threshold
from saelens_certify.errors import CertifyError

NULL = "The real SAE and its R random copies are exchangeable: in any order equally likely."

_DRAWN = (
    "The R copies were drawn independently of each other and of the data, as the null hypothesis says, with a "
    "seed fixed before looking; the p-value needs nothing else, the sequences may depend on each other."
)
_SEQUENCES = (
    "Effect and interval are about the R copies that were drawn: expected values over sequences (or clusters of "
    "them), which are independent draws from one distribution, their number fixed before looking."
)
_ALONE = "One test by itself: p-values of several tests are not corrected for their number."


@dataclass(frozen=True)
class ShuffleTest:
    """How the real SAE compares with R random copies of it.

    The statistic is the gap: the mean over sequences of |loss of M - loss of the proxy|, bits per token.

    Attributes:
        p_value: (1 + b) / (1 + R), rounded up. If the null hypothesis is true, it is at most a with
            probability at most a, for every a.
        n_permutations: R, number of copies.
        b: How many of them have a gap at most that of the real SAE; ties count.
        gap: Gap of the real SAE, rounded up.
        control_gap: Mean gap of the copies, rounded down.
        effect: Mean gap of the copies minus gap of the real SAE, bits per token, rounded down.
        lower: Lower confidence limit of the effect.
        upper: Upper confidence limit of the effect.
        confidence: 1 - delta: probability, over the draw of the sequences, that the expected effect
            of these copies is in [lower, upper].
        null: The null hypothesis.
        assumptions: What must be true for p-value and confidence to be right.
    """

    p_value: float
    n_permutations: int
    b: int
    gap: float
    control_gap: float
    effect: float
    lower: float
    upper: float
    confidence: float
    null: str
    assumptions: tuple[str, ...]

    @property
    def smallest_p_value(self) -> float:
        """1 / (1 + R): no result gives a smaller p-value with R copies."""
        return permutation_p_value(0.0, np.ones(self.n_permutations))

    @property
    def share(self) -> float:
        """Effect without a unit, in [-1, 1]: effect / the larger of the two gaps; an estimate.

        Positive: the share of the copies' gap that the real SAE does not have; 1 if it has none. Zero:
        no difference. Negative: the share of the real SAE's gap that its copies do not have.
        """
        larger = max(self.gap, self.control_gap)
        return max(-1.0, min(1.0, self.effect / larger)) if larger > 0.0 else 0.0


def permutation_p_value(statistic: float, controls: ArrayLike) -> float:
    """(1 + b) / (1 + R), b being how many of R controls are at most the statistic (smaller is better).

    Phipson & Smyth (2010); Davison & Hinkley (1997), section 4.3. If statistic and controls are exchangeable, the
    statistic is among the k best of 1 + R, ties counted against it, with probability at most k / (1 + R): the
    p-value is exact, not an approximation of one with all permutations.

    Args:
        statistic: That of the real SAE.
        controls: Those of its copies, one each [R].

    Returns:
        The p-value in [1 / (1 + R), 1], rounded up.

    Raises:
        CertifyError: For no controls, or numbers that are not finite.
    """
    own, others = real("statistic", statistic), real("controls", controls)
    if others.ndim != 1 or others.size == 0:
        raise CertifyError(
            f"controls has shape {others.shape}: give one number per random copy, [R], at least one; with R "
            "copies no p-value is below 1 / (1 + R), so 0.05 takes at least 19."
        )
    if own.ndim:
        raise CertifyError(f"statistic has shape {own.shape}: give one number.")
    return mean_up(np.append(others <= own, True).astype(np.float64))


def shuffle_test(
    loss_base: ArrayLike,
    loss_sae: ArrayLike,
    loss_controls: ArrayLike,
    *,
    vocab_size: int,
    alpha: float = 0.5,
    delta: float = 0.05,
    null: str = NULL,
    clusters: Labels | None = None,
) -> ShuffleTest:
    """Compare the gap of the real SAE with the gaps of R random copies.

    The p-value: :func:`permutation_p_value` of the gaps, which without clusters are compared in exact
    arithmetic. The interval: on every
    sequence the copies' mean |loss of M - loss of the copy| minus |loss of M - loss of S∘M| lies in
    [-Delta, Delta]; :func:`betting_upper` bounds the expectation of this difference and of its negative, at
    delta / 2 each.

    Args:
        loss_base: Smoothed losses of M, bits per token, one per sequence [n_sequences], in an order that says
            nothing about their values.
        loss_sae: Losses of S∘M [n_sequences].
        loss_controls: Losses of the copies [R, n_sequences].
        vocab_size: V, tokens.
        alpha: Smoothing weight of the losses.
        delta: Probability that the interval fails, in (0, 1).
        null: The null hypothesis, in words.
        clusters: Clusters of sequences that depend on each other, as :func:`cluster_means` takes them: the
            mean of each counts as one value. None: every sequence by itself.

    Raises:
        CertifyError: For R = 0, arrays that do not fit together, losses outside [B - Delta, B], or an
            impossible vocab_size, alpha or delta.
    """
    losses = _Losses.check(loss_base, loss_sae, loss_controls, vocab_size, alpha)
    log_threshold(delta, 0.0)  # refuses impossible ones before any work
    base, sae, controls, width = losses.base, losses.sae, losses.controls, losses.width
    labels = None if clusters is None else tuple(clusters)
    gap = _gap_up(base, sae, labels)
    gaps = np.array([_gap_up(base, control, labels) for control in controls])
    p_value = permutation_p_value(gap, gaps)
    n = len(controls)
    own_up, own_down = _distance_up(base, sae), _distance_down(base, sae)
    above, below = np.zeros(len(base)), np.zeros(len(base))
    for control in controls:
        above = add_up(above, _distance_up(base, control))
        below = -add_up(-below, -_distance_down(base, control))
    others_up = div_up(above, np.array(float(n)))
    others_down = np.maximum(np.nextafter(below / n, -np.inf), 0.0)
    # The copies' mean distance minus that of the real SAE, and the reverse, both rounded up.
    difference = _units(np.clip(add_up(others_up, -own_down), -width, width), labels)
    reverse = _units(np.clip(add_up(own_up, -others_down), -width, width), labels)
    return ShuffleTest(
        p_value=p_value,
        n_permutations=n,
        b=int(np.count_nonzero(gaps <= gap)),
        gap=gap,
        control_gap=max(0.0, -mean_up(_units(-others_down, labels))),
        effect=-mean_up(reverse),
        lower=-betting_upper(reverse, -width, width, delta / 2),
        upper=betting_upper(difference, -width, width, delta / 2),
        confidence=1.0 - delta,
        null=null,
        assumptions=(_DRAWN, _SEQUENCES, _ALONE),
    )


@dataclass(frozen=True)
class _Losses:
    """Checked losses within their interval, and its width."""

    base: FloatArray
    sae: FloatArray
    controls: FloatArray
    width: float

    @classmethod
    def check(
        cls,
        loss_base: ArrayLike,
        loss_sae: ArrayLike,
        loss_controls: ArrayLike,
        vocab_size: int,
        alpha: float,
    ) -> _Losses:
        """Check shapes and range; losses that rounding took out of [B - Delta, B] are put on its end."""
        v, a = check_vocab_size(vocab_size), check_alpha(alpha)
        if v.ndim or a.ndim:
            raise CertifyError("vocab_size and alpha are one number each: call again for another.")
        high = cap_up(v, a)
        low = -add_up(range_up(v, a), -high)
        given = {"loss_base": loss_base, "loss_sae": loss_sae, "loss_controls": loss_controls}
        arrays = {name: real(name, values) for name, values in given.items()}
        base, sae, controls = arrays.values()
        if controls.ndim != 2 or controls.shape[0] == 0:
            raise CertifyError(
                f"loss_controls has shape {controls.shape}: give the losses of R >= 1 random copies, [R, "
                "n_sequences]; with R copies no p-value is below 1 / (1 + R), so 0.05 takes at least 19."
            )
        if base.ndim != 1 or base.size == 0 or {sae.shape, controls.shape[1:]} != {base.shape}:
            shapes = ", ".join(f"{name} has shape {array.shape}" for name, array in arrays.items())
            raise CertifyError(
                f"{shapes}: give one loss per sequence, [n_sequences], at least one, and as many of each copy."
            )
        for name, values in arrays.items():
            refuse(
                name,
                values,
                (values < low - LOSS_TOLERANCE) | (values > high + LOSS_TOLERANCE),
                f"in [B - Delta, B] = [{float(low):.6g}, {float(high):.6g}] bits",
                "use smoothed losses in bits (log2), with the alpha and vocab_size given here",
            )
        base, sae, controls = (np.clip(values, low, high) for values in arrays.values())
        return cls(base, sae, controls, float(add_up(high, -low)))


def _units(values: FloatArray, clusters: tuple[Hashable, ...] | None) -> FloatArray:
    """One value per sequence -> one per independent unit, rounded up."""
    return values if clusters is None else cluster_means(values, clusters)


def _gap_up(a: FloatArray, b: FloatArray, clusters: tuple[Hashable, ...] | None) -> float:
    """The mean over units of |a - b|, rounded up."""
    if clusters is None:
        return mean_distance_up(a, b)
    return mean_up(cluster_means(_distance_up(a, b), clusters))


def _distance_up(a: FloatArray, b: FloatArray) -> FloatArray:
    """|a - b|, rounded up."""
    return np.maximum(add_up(a, -b), add_up(b, -a))


def _distance_down(a: FloatArray, b: FloatArray) -> FloatArray:
    """|a - b|, rounded down."""
    return np.maximum(-add_up(b, -a), -add_up(a, -b))

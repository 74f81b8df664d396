"""One bounded variable per sequence whose mean bounds the risk of M: the four terms of a certificate in one.

For every sequence, with the losses of M, S∘M and h_G and the indicator v of a violation,

    loss(M) <= Z = min( loss(h_G) + |loss(M) - loss(S∘M)| + Delta v,                          B )
    loss(M) <= Z'= min( loss(h_G) + |loss(M) - loss(S∘M)| + |loss(S∘M) - loss(h_G)|,          B )

by the triangle inequality, because h_G is S∘M where v = 0 and losses lie in an interval of width Delta, and because
no loss exceeds B. Both lie in [B - Delta, B], the interval of the losses themselves. So R(M) <= E[Z], and one test
of one mean replaces three. A violation charges B, the worst there is; a larger pool never has a larger Z.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from saelens_certify.bounds.checks import real, refuse
from saelens_certify.bounds.clusters import cluster_means
from saelens_certify.bounds.loss import (
    baseline_down,
    cap_up,
    check_alpha,
    check_vocab_size,
    range_up,
)
from saelens_certify.bounds.means import Measured
from saelens_certify.bounds.quantities import LOSS_TOLERANCE
from saelens_certify.bounds.rounding import FloatArray, add_up
from saelens_certify.errors import CertifyError

Mismatch = Literal["charged", "measured"]


@dataclass(frozen=True)
class Interval:
    """Values of one bounded variable, one per unit, and the interval in which they lie.

    Attributes:
        samples: The values [n_units], in the order of the evidence.
        low: Smallest possible value.
        high: Largest possible value.
    """

    samples: FloatArray
    low: float
    high: float


@dataclass(frozen=True)
class Losses:
    """Losses of M, S∘M and h_G on every evaluation sequence, within their interval; bits per token.

    Attributes:
        base: Loss of M [n_sequences].
        sae: Loss of S∘M.
        pool: Loss of h_G.
        violation: 1.0 where the sequence violates the pool, else 0.0.
        low: B - Delta, smallest possible loss, rounded down.
        high: B, largest possible loss, rounded up.
        width: Delta, rounded up.
        baseline: log2 V, rounded down.
        clusters: Name of the cluster to which each sequence belongs; None: every sequence by itself.
        unigram: Loss of the unigram model [n_sequences]; None if it was not measured.
    """

    base: FloatArray
    sae: FloatArray
    pool: FloatArray
    violation: FloatArray
    low: float
    high: float
    width: float
    baseline: float
    clusters: tuple[str, ...] | None = None
    unigram: FloatArray | None = None

    @classmethod
    def check(
        cls,
        *,
        loss_base: ArrayLike,
        loss_sae: ArrayLike,
        loss_pool: ArrayLike,
        violation: ArrayLike,
        vocab_size: int,
        alpha: float,
        clusters: tuple[str, ...] | None = None,
        loss_unigram: ArrayLike | None = None,
    ) -> Losses:
        """Check the evidence; losses that rounding took out of [B - Delta, B] are put on its end.

        Args:
            loss_base: As for :meth:`Measured.from_sequences`, like the next three.
            loss_sae: See there.
            loss_pool: See there.
            violation: See there.
            vocab_size: V.
            alpha: Smoothing weight of the losses.
            clusters: Clusters of dependent sequences: the mean of each counts as one value.
            loss_unigram: Loss of the unigram model of the calibration documents, bits per token.

        Raises:
            CertifyError: As :meth:`Measured.from_sequences`, and for losses outside the interval by more
                than rounding.
        """
        Measured.from_sequences(
            loss_base=loss_base, loss_sae=loss_sae, loss_pool=loss_pool, violation=violation
        )
        v, a = check_vocab_size(vocab_size), check_alpha(alpha)
        high, width = cap_up(v, a), range_up(v, a)
        low = -add_up(width, -high)
        losses = {"base": loss_base, "sae": loss_sae, "pool": loss_pool}
        if loss_unigram is not None:
            losses["unigram"] = loss_unigram
        inside = {}
        for name, given in losses.items():
            values = real(f"loss_{name}", given)
            refuse(
                f"loss_{name}",
                values,
                (values < low - LOSS_TOLERANCE) | (values > high + LOSS_TOLERANCE),
                f"in [B - Delta, B] = [{float(low):.6g}, {float(high):.6g}] bits",
                "use smoothed losses in bits (log2), with the alpha and vocab_size given here",
            )
            inside[name] = np.clip(values, low, high)
        violated = real("violation", violation)
        # Without a violation h_G is S∘M, so the larger of two measured losses is on the safe side.
        inside["pool"] = np.where(
            violated > 0.0, inside["pool"], np.maximum(inside["pool"], inside["sae"])
        )
        return cls(
            **inside,
            violation=violated,
            low=float(low),
            high=float(high),
            width=float(width),
            baseline=float(baseline_down(v)),
            clusters=clusters,
        )

    @property
    def measured(self) -> Measured:
        """The measured terms, each rounded up."""
        return Measured.from_sequences(
            loss_base=self.base,
            loss_sae=self.sae,
            loss_pool=self.pool,
            violation=self.violation,
            clusters=self.clusters,
        )

    def parts(self, mismatch: Mismatch = "charged") -> dict[str, FloatArray]:
        """What each term adds to Z, sequence by sequence: nothing beyond B.

        Args:
            mismatch: "charged": Delta for every violation; "measured": |loss of S∘M - loss of h_G|.

        Returns:
            ``risk_pool``, ``gap`` and ``mismatch``, in the order in which they are added, each at least 0.
        """
        gap = np.abs(self.base - self.sae)
        third = self.width * self.violation
        if mismatch == "measured":
            third = np.abs(self.sae - self.pool)
        room = self.high - self.pool
        gap = np.minimum(gap, room)
        return {"risk_pool": self.pool, "gap": gap, "mismatch": np.minimum(third, room - gap)}

    def joint(self, mismatch: Mismatch = "charged") -> Interval:
        """Z or Z' of every unit, rounded up."""
        return self._interval(self._joint(mismatch), self.low, self.high)

    def loss(self, of: Literal["base", "sae", "pool", "unigram"]) -> Interval:
        """Loss of M, S∘M, h_G or the unigram model on every unit."""
        return self._interval(getattr(self, of), self.low, self.high)

    def excess(self, of: Literal["sae", "pool"], sign: Literal[1, -1] = 1) -> Interval:
        """Loss of a proxy minus loss of M on every unit, rounded up, in [-Delta, Delta].

        Args:
            of: The proxy.
            sign: -1: loss of M minus loss of the proxy.
        """
        proxy = getattr(self, of)
        difference = add_up(proxy, -self.base) if sign == 1 else add_up(self.base, -proxy)
        return self._interval(difference, -self.width, self.width)

    def over_unigram(self) -> Interval:
        """Z minus the loss of the unigram model on every unit, rounded up, in [-Delta, Delta].

        Raises:
            CertifyError: If the unigram model was not measured.
        """
        if self.unigram is None:
            raise CertifyError(
                "loss_unigram is missing: the bound 'sharp_unigram' needs it. Pass loss_unigram=."
            )
        difference = add_up(self._joint("charged"), -self.unigram)
        return self._interval(difference, -self.width, self.width)

    def units(self, values: FloatArray) -> FloatArray:
        """One value per sequence [n_sequences] -> one per independent unit [n_units]."""
        return values if self.clusters is None else cluster_means(values, self.clusters)

    def _joint(self, mismatch: Mismatch) -> FloatArray:
        pool, gap, third = self.parts(mismatch).values()
        total = add_up(add_up(pool, np.nextafter(gap, np.inf)), np.nextafter(third, np.inf))
        if mismatch == "charged":
            total = np.where(self.violation > 0.0, self.high, total)
        return np.minimum(total, self.high)

    def _interval(self, values: FloatArray, low: float, high: float) -> Interval:
        return Interval(np.clip(self.units(values), low, high), low, high)

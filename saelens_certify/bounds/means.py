"""From per-sequence values to the measured terms of a certificate."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saelens_certify.bounds.checks import refuse
from saelens_certify.bounds.clusters import Labels, cluster_codes
from saelens_certify.bounds.exact import divide_up, exact_distances, exact_sum_up, per_sequence
from saelens_certify.bounds.rounding import FloatArray
from saelens_certify.errors import CertifyError

SAME_PROXY_TOLERANCE = 1e-3
"""Bits by which the losses of S∘M and h_G may differ on a sequence that does not violate the pool."""


def mean_up(values: ArrayLike) -> float:
    """The mean of the values, rounded up: never below the exact mean, at most three doubles above.

    The sum is exact (:func:`math.fsum`) before it is rounded, so the result does not depend on the order
    of the values, on batches or on threads.

    Args:
        values: One value per sequence, 1-D, at least one, finite.

    Returns:
        The mean, in the unit of the values.

    Raises:
        CertifyError: For an empty array, another number of dimensions, NaN or inf.
    """
    array = per_sequence("values", values)
    return divide_up(exact_sum_up(array.tolist()), array.size)


def mean_distance_up(a: ArrayLike, b: ArrayLike) -> float:
    """The mean of |a - b|, rounded up as by :func:`mean_up`; no difference is rounded before.

    So a mean distance that is at most another in exact arithmetic is at most the other here.

    Args:
        a: One value per sequence, 1-D, at least one, finite.
        b: As many values.

    Raises:
        CertifyError: As for :func:`mean_up`, or for different lengths.
    """
    first, second = per_sequence("a", a), per_sequence("b", b)
    if first.size != second.size:
        raise CertifyError(
            f"Lengths differ: a has {first.size}, b has {second.size}. Give one value per sequence."
        )
    return divide_up(
        exact_sum_up(np.concatenate(exact_distances(first, second)).tolist()), first.size
    )


@dataclass(frozen=True)
class Measured:
    """The measured terms of a certificate; each mean is rounded up as by :func:`mean_up`.

    Attributes:
        risk_base: Mean loss of M, bits per token.
        risk_sae: Mean loss of S∘M, bits per token.
        risk_pool: Mean loss of h_G, bits per token.
        gap: Mean over sequences of |loss of M - loss of S∘M|, bits per token.
        eta: Share of sequences that violate the pool.
        n_sequences: Number of independent draws: sequences, or clusters where sequences were clustered.
    """

    risk_base: float
    risk_sae: float
    risk_pool: float
    gap: float
    eta: float
    n_sequences: int

    @classmethod
    def from_sequences(
        cls,
        *,
        loss_base: ArrayLike,
        loss_sae: ArrayLike,
        loss_pool: ArrayLike,
        violation: ArrayLike,
        clusters: Labels | None = None,
    ) -> Measured:
        """Average the evidence; the result does not depend on the order of the sequences.

        With ``clusters`` every term is the mean over clusters of the mean within a cluster, ``eta`` the mean share of
        a cluster's sequences that violate the pool, and ``n_sequences`` the number of clusters. The values that
        Hoeffding's inequality is applied to are then the clusters' means: they lie in the same intervals (the
        shares in [0, 1]), so the certificates hold for expected cluster means (see `bounds.clusters`).

        Args:
            loss_base: Loss of M, bits per token, one per sequence [n_sequences].
            loss_sae: Loss of S∘M, likewise.
            loss_pool: Loss of h_G, likewise; the loss of S∘M where the pool is not violated.
            violation: Whether any token of the sequence has an active feature outside the pool: booleans,
                or numbers 0 and 1.
            clusters: The cluster of each sequence, in any order; None if all sequences are independent.

        Raises:
            CertifyError: For arrays that are empty, of different lengths or not finite, violations other
                than 0 and 1, a loss of h_G that differs from that of S∘M without a violation, or clusters
                of another length.
        """
        base = per_sequence("loss_base", loss_base)
        sae = per_sequence("loss_sae", loss_sae)
        pool = per_sequence("loss_pool", loss_pool)
        violated = per_sequence("violation", violation)
        sizes = {"loss_base": base, "loss_sae": sae, "loss_pool": pool, "violation": violated}
        if len({array.size for array in sizes.values()}) > 1:
            lengths = ", ".join(f"{name} has {array.size}" for name, array in sizes.items())
            raise CertifyError(f"Lengths differ: {lengths}. Give one value per sequence in each.")
        refuse(
            "violation",
            violated,
            (violated != 0.0) & (violated != 1.0),
            "0 or 1",
            "say for each sequence whether it violates the pool, not how often",
        )
        refuse(
            "loss_pool",
            pool,
            (violated == 0.0) & (np.abs(pool - sae) > SAME_PROXY_TOLERANCE),
            "the loss of S∘M on a sequence without a violation",
            "h_G is S∘M there, so copy loss_sae; if it was measured, pool and violations do not match",
        )
        codes = np.arange(base.size) if clusters is None else cluster_codes(clusters)
        if codes.size != base.size:
            raise CertifyError(
                f"Lengths differ: clusters has {codes.size}, loss_base has {base.size}. Give one each per sequence."
            )
        size_of = np.bincount(codes)
        sizes_of = size_of[codes]
        return cls(
            risk_base=_mean_of_means_up(sizes_of, base),
            risk_sae=_mean_of_means_up(sizes_of, sae),
            risk_pool=_mean_of_means_up(sizes_of, pool),
            gap=_mean_of_means_up(sizes_of, *exact_distances(base, sae)),
            eta=min(1.0, _mean_of_means_up(sizes_of, violated)),
            n_sequences=size_of.size,
        )


def _mean_of_means_up(size: NDArray[np.int64], *parts: FloatArray) -> float:
    """The mean over clusters of the means within them, rounded up.

    Clusters of one size are added exactly before the sum is divided by that size, so that one rounding each is all.

    Args:
        size: For each sequence, the number of sequences in its cluster [n_sequences].
        *parts: Doubles whose sum is a sequence's value, [n_sequences] each.
    """
    totals, n_clusters = [], 0
    for members in np.unique(size).tolist():
        chosen = size == members
        n_clusters += int(np.count_nonzero(chosen)) // members
        values = np.concatenate([part[chosen] for part in parts]).tolist()
        totals.append(divide_up(exact_sum_up(values), members))
    return divide_up(exact_sum_up(totals), n_clusters)

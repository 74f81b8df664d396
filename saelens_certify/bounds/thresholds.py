"""The pool's threshold chosen after looking, and paid for: the Occam bound at the best of several tau.

G_tau holds the features that were active on at least tau calibration tokens. The pools are nested, so one number per
sequence, the smallest calibration count among its active features, says which of them it violates, and a violation
charges B whatever h_G would have predicted: every tau is evaluated from the evidence of one.

For the fixed-pool bound there is nothing to choose: a larger pool never has a larger Z, so the smallest tau is best.
The Occam bound pays ln C(m, P), which a larger tau may lower.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from saelens_certify.bounds.checks import real
from saelens_certify.bounds.complexity import log_binom
from saelens_certify.bounds.joint import Losses
from saelens_certify.bounds.sharp import SharpValue, sharp_value
from saelens_certify.errors import CertifyError


@dataclass(frozen=True)
class BestThreshold:
    """The threshold with the smallest Occam bound.

    Attributes:
        tau: The threshold, calibration tokens.
        pool_size: P, features of its pool.
        n_thresholds: Number T of thresholds that were compared: each had delta / T.
        bound: The bound: value and terms.
    """

    tau: int
    pool_size: int
    n_thresholds: int
    bound: SharpValue


def doubling_thresholds(counts: ArrayLike, smallest: int) -> dict[int, int]:
    """Thresholds smallest, 2 smallest, 4 smallest, ... and the sizes of their pools, as long as these shrink.

    Args:
        counts: On how many calibration tokens each feature was active [d_sae].
        smallest: The first threshold.

    Returns:
        {tau: P}, a function of the calibration alone; pools of no feature are left out.
    """
    found = real("counts", counts)
    sizes: dict[int, int] = {}
    tau = smallest
    while (size := int(np.count_nonzero(found >= tau))) > 0:
        if size not in sizes.values():
            sizes[tau] = size
        tau *= 2
    return sizes


def best_threshold(
    losses: Losses,
    rarest: ArrayLike,
    pool_sizes: Mapping[int, int],
    *,
    dict_size: int,
    delta: float,
    time_uniform: bool = False,
) -> BestThreshold:
    """The smallest Occam bound over several thresholds, at level delta / (T C(m, P)) each.

    Args:
        losses: The evidence at the smallest of the thresholds, in the order of the documents' hashes.
        rarest: For every sequence, the smallest calibration count among the features active in it.
        pool_sizes: {tau: P}, fixed by calibration; see :func:`doubling_thresholds`.
        dict_size: m, features of the SAE.
        delta: Failure probability of the result, the choice included.
        time_uniform: Whether the number of sequences may depend on their losses.

    Raises:
        CertifyError: If there is no threshold, ``rarest`` has another length, or it contradicts the violations.
    """
    smallest = real("rarest", rarest)
    if not pool_sizes or smallest.shape != losses.base.shape:
        raise CertifyError(
            f"best_threshold got {len(pool_sizes)} thresholds and rarest of shape {smallest.shape} for "
            f"{losses.base.size} sequences: give at least one, and one count per sequence."
        )
    violated = {tau: (smallest < tau).astype(np.float64) for tau in pool_sizes}
    if (violated[min(pool_sizes)] < losses.violation).any():
        raise CertifyError(
            f"rarest says that some sequence does not violate the pool of tau = {min(pool_sizes)}, its "
            "violation says that it does: both must be of one calibration."
        )
    found: list[BestThreshold] = []
    for tau, size in pool_sizes.items():
        here = dataclasses.replace(
            losses,
            violation=violated[tau],
            pool=np.where(violated[tau] > 0.0, losses.pool, losses.sae),
        )
        if found and float(np.mean(here.joint().samples)) > min(b.bound.value for b in found):
            continue  # no bound is below the mean
        bound = sharp_value(
            "sharp_occam",
            here,
            delta / len(pool_sizes),
            complexity=float(log_binom(dict_size, size)),
            time_uniform=time_uniform,
        )
        found.append(BestThreshold(tau, size, len(pool_sizes), bound))
    return min(found, key=lambda each: each.bound.value)

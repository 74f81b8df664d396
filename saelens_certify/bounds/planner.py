"""How many sequences a target bound needs, and the best that any number of sequences can give.

Both hold the measured terms fixed, as if more data would repeat them. They serve to plan: a number of
sequences chosen by looking at the data it is then certified on is not covered by the certificate. How far the
measured terms of a pilot may be off, and plans for all other bounds: ``pilot``.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saelens_certify.bounds.checks import MAX_INTEGER, common_shape, real
from saelens_certify.bounds.loss import Value, deliver
from saelens_certify.bounds.preprint import preprint_profile
from saelens_certify.bounds.profile import Profile
from saelens_certify.bounds.published import PUBLISHED
from saelens_certify.bounds.quantities import Quantities
from saelens_certify.errors import CertifyError

PROFILES = {**PUBLISHED, "preprint": preprint_profile}
"""Every bound that can be planned, by name."""


def sequences_needed(
    target: ArrayLike,
    *,
    bound: str,
    vocab_size: ArrayLike,
    risk_base: ArrayLike | None = None,
    risk_pool: ArrayLike | None = None,
    gap: ArrayLike | None = None,
    eta: ArrayLike | None = None,
    dict_size: ArrayLike | None = None,
    pool_size: ArrayLike | None = None,
    alpha: ArrayLike = 0.5,
    delta: ArrayLike = 0.05,
) -> int | float | NDArray[np.float64]:
    """Smallest N whose bound is at most ``target``, the measured terms held fixed.

    The answer is exact for the bounds as computed: bound(N) <= target, and bound(N - 1) > target if N > 1.

    Args:
        target: Bits per token, finite. For a non-vacuous verdict (strictly below the baseline) pass
            ``math.nextafter(uniform_baseline(V), 0)``.
        bound: ``u_sae``, ``u_sae_occam``, ``direct_base``, ``direct_pool`` or ``preprint``.
        vocab_size: V.
        risk_base: Mean loss of M, bits; needed by ``direct_base``.
        risk_pool: Mean loss of h_G, bits; needed by all others.
        gap: Mean absolute difference of the losses of M and S∘M, bits; for u_sae, u_sae_occam, preprint.
        eta: Share of sequences that violate the pool; for the same three.
        dict_size: m; for u_sae_occam and preprint.
        pool_size: P; for the same two.
        alpha: Smoothing weight of the loss.
        delta: Failure probability.

    Returns:
        Numbers in: an int, or ``math.inf`` if no N up to 2**53 reaches the target (the floor of
        :func:`asymptotic_floor` is at or above it). Arrays in: a float64 array of whole numbers and inf.

    Raises:
        CertifyError: For an unknown bound, a missing term, or as :func:`saelens_certify.bounds.published`.
    """
    profile, q = _profile(
        bound,
        vocab_size=vocab_size,
        risk_base=risk_base,
        risk_pool=risk_pool,
        gap=gap,
        eta=eta,
        dict_size=dict_size,
        pool_size=pool_size,
        alpha=alpha,
        delta=delta,
    )
    goal = real("target", target)
    shape = common_shape({"target": goal, "measured terms": np.empty(q.shape)})

    # The computed bound is non-increasing in n (every rounding is monotone), so bisection is exact.
    too_few = np.zeros(shape)
    enough = np.full(shape, float(MAX_INTEGER))
    reachable = profile.value(enough) <= goal
    while np.any(enough - too_few > 1.0):
        middle = np.floor(too_few + (enough - too_few) / 2.0)
        middle = np.maximum(middle, 1.0)
        reached = profile.value(middle) <= goal
        enough = np.where(reached, middle, enough)
        too_few = np.where(reached, too_few, middle)
    needed = np.where(reachable, enough, np.inf)
    if shape == ():
        return int(needed) if math.isfinite(float(needed)) else math.inf
    return needed


def asymptotic_floor(
    *,
    bound: str,
    vocab_size: ArrayLike,
    risk_base: ArrayLike | None = None,
    risk_pool: ArrayLike | None = None,
    gap: ArrayLike | None = None,
    eta: ArrayLike | None = None,
    dict_size: ArrayLike | None = None,
    pool_size: ArrayLike | None = None,
    alpha: ArrayLike = 0.5,
    delta: ArrayLike = 0.05,
) -> Value:
    """The bound's limit for N to infinity: its measured terms alone.

    A floor at or above log2 V says that no amount of further data certifies this pool.

    Args:
        bound: As in :func:`sequences_needed`, like all other arguments.
        vocab_size: See there.
        risk_base: See there.
        risk_pool: See there.
        gap: See there.
        eta: See there.
        dict_size: See there.
        pool_size: See there.
        alpha: See there.
        delta: See there; the floor does not depend on it.

    Returns:
        Bits per token, rounded up: a float for numbers, else an array.

    Raises:
        CertifyError: As :func:`sequences_needed`.
    """
    profile, q = _profile(
        bound,
        vocab_size=vocab_size,
        risk_base=risk_base,
        risk_pool=risk_pool,
        gap=gap,
        eta=eta,
        dict_size=dict_size,
        pool_size=pool_size,
        alpha=alpha,
        delta=delta,
    )
    return deliver(profile.floor(), q.shape)


def _profile(
    bound: str,
    *,
    vocab_size: ArrayLike,
    risk_base: ArrayLike | None,
    risk_pool: ArrayLike | None,
    gap: ArrayLike | None,
    eta: ArrayLike | None,
    dict_size: ArrayLike | None,
    pool_size: ArrayLike | None,
    alpha: ArrayLike,
    delta: ArrayLike,
) -> tuple[Profile, Quantities]:
    if bound not in PROFILES:
        raise CertifyError(f"bound={bound!r} is unknown: choose one of {', '.join(PROFILES)}.")
    q = Quantities.check(
        vocab_size=vocab_size,
        risk_base=risk_base,
        risk_pool=risk_pool,
        gap=gap,
        eta=eta,
        dict_size=dict_size,
        pool_size=pool_size,
        alpha=alpha,
        delta=delta,
    )
    return PROFILES[bound](q), q

"""Bounds as functions of the number of sequences, from the evidence of one run, and where they first say something.

The first n sequences of a run (clusters, where sequences repeat each other), in the order of their hashes, are a run of
n. Their measured terms come from running sums, which are exact, so that every value here is the double that
`certificates` returns for these n sequences, and a whole grid of n costs one pass over the evidence.

Two kinds of "first N below log2 V" are told apart:

- **Descriptive.** Each published bound, and each sharp bound of the fixed form, holds for an N named in advance. The first
  N of a grid at which it is below log2 V was found by looking, as the ``Crossing N`` of the published tables was: it
  says how fast a bound falls. It does not say that a run that stopped there had that confidence.
- **Valid.** A time-uniform bound holds at all N at once, so also at the first at which it is below log2 V.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saelens_certify.bounds.checks import real
from saelens_certify.bounds.clusters import check_together, cluster_codes
from saelens_certify.bounds.exact import RunningSum, divide_up, exact_distances, exact_sum_up
from saelens_certify.bounds.joint import Losses
from saelens_certify.bounds.means import mean_up
from saelens_certify.bounds.planner import PROFILES
from saelens_certify.bounds.quantities import Quantities
from saelens_certify.bounds.rounding import FloatArray
from saelens_certify.bounds.sharp import find_sharp, fixed_bound, sharp_sequence
from saelens_certify.bounds.times import check_times, looks
from saelens_certify.errors import CertifyError


@dataclass(frozen=True)
class Growth:
    """The measured terms of the first n units, each mean rounded up as in `Measured`, for a grid of n.

    Attributes:
        n: Numbers of units: sequences, or whole clusters [n_times].
        risk_base: Mean loss of M, bits per token [n_times].
        risk_sae: Mean loss of S∘M.
        risk_pool: Mean loss of h_G.
        gap: Mean over sequences of |loss of M - loss of S∘M|.
        eta: Share of sequences that violate the pool.
    """

    n: NDArray[np.int64]
    risk_base: FloatArray
    risk_sae: FloatArray
    risk_pool: FloatArray
    gap: FloatArray
    eta: FloatArray

    @classmethod
    def of(cls, losses: Losses, times: ArrayLike | None = None) -> Growth:
        """Average the first n units for every n of a grid.

        Args:
            losses: The evidence, in the order of the documents' hashes, clusters together.
            times: Increasing numbers of units; default :func:`saelens_certify.bounds.log_times`.

        Returns:
            Terms equal to ``Measured.from_sequences`` of the first n units, bit for bit.

        Raises:
            CertifyError: For impossible times, or clusters whose members are apart.
        """
        sizes = _unit_sizes(losses)
        when = check_times(times, sizes.size)
        means = _Prefixes(sizes, when)
        return cls(
            n=when,
            risk_base=means(losses.base),
            risk_sae=means(losses.sae),
            risk_pool=means(losses.pool),
            gap=means(*exact_distances(losses.base, losses.sae)),
            eta=np.minimum(1.0, means(losses.violation)),
        )

    def bounds(
        self,
        names: Iterable[str] | None = None,
        *,
        vocab_size: int,
        dict_size: int,
        pool_size: int,
        alpha: float = 0.5,
        delta: float = 0.05,
    ) -> dict[str, FloatArray]:
        """The published bounds of the first n units.

        Args:
            names: Which of u_sae, u_sae_occam, direct_base, direct_pool and preprint; None: all.
            vocab_size: V, the model's true vocabulary size.
            dict_size: m, features of the SAE.
            pool_size: P, features of the pool.
            alpha: Smoothing weight with which the losses were formed.
            delta: Failure probability of each bound at each n, by itself.

        Returns:
            Bits per token by name [n_times], equal to `certificates` of the first n units.

        Raises:
            CertifyError: For an unknown name or an impossible value.
        """
        chosen = list(PROFILES) if names is None else list(names)
        unknown = [name for name in chosen if name not in PROFILES]
        if unknown:
            raise CertifyError(f"bound={unknown[0]!r} is unknown: choose of {', '.join(PROFILES)}.")
        q = Quantities.check(
            risk_base=self.risk_base,
            risk_pool=self.risk_pool,
            gap=self.gap,
            eta=self.eta,
            n=self.n,
            vocab_size=vocab_size,
            dict_size=dict_size,
            pool_size=pool_size,
            alpha=alpha,
            delta=delta,
        )
        n = q.need("n", "growth")
        return {name: PROFILES[name](q).value(n) for name in chosen}


def sharp_growth(
    name: str,
    losses: Losses,
    delta: float,
    times: ArrayLike | None = None,
    *,
    complexity: float = 0.0,
) -> FloatArray:
    """A sharp bound of the fixed form on the first n units, for every n of a grid.

    Each value holds with probability 1 - delta if that n was fixed in advance; together they do not. What
    holds at all n at once is :func:`saelens_certify.bounds.sharp_sequence`.

    Args:
        name: A key of `saelens_certify.bounds.SHARP`; the upper end of a two-sided one.
        losses: As for :meth:`Growth.of`.
        delta: Failure probability of each value by itself.
        times: See there.
        complexity: ln C(m, P) in nats, used by the Occam bound only.

    Returns:
        Bits per token [n_times], equal to ``sharp_value`` of the first n units. Stakes depend on n, so each n is
        computed anew: a grid costs the sum of its n.

    Raises:
        CertifyError: For an unknown name or impossible times.
    """
    found = _fixed_values(name, losses, delta, times, complexity)
    return np.array([value for _, value in found], dtype=np.float64)


def sharp_floor(name: str, losses: Losses) -> float:
    """What a sharp bound tends to for N to infinity, as measured: the mean of its variable, rounded up.

    The price of all pools at once (ln C(m, P)) is spread over ever more sequences, so the Occam bound tends to the
    same. A lower confidence bound of the limit is the last entry of `floor_sequence`.

    Args:
        name: A key of `saelens_certify.bounds.SHARP`.
        losses: The evidence.

    Raises:
        CertifyError: For an unknown name.
    """
    return mean_up(find_sharp(name).variable(losses).samples)


@dataclass(frozen=True)
class Crossing:
    """The first number of units, on a grid, at which a bound is below a limit.

    Attributes:
        n: Sequences, or whole clusters.
        value: The bound there, bits per token.
        valid: Whether the bound's confidence covers that n was found by looking (time-uniform bounds). If not, n
            is descriptive: the bound holds for an n fixed in advance.
    """

    n: int
    value: float
    valid: bool


def first_below(
    times: ArrayLike, values: ArrayLike, limit: float, *, valid: bool = False
) -> Crossing | None:
    """The first entry below a limit.

    Args:
        times: Numbers of units, increasing [n_times].
        values: A bound after each [n_times], bits per token.
        limit: For a non-vacuous bound log2 V, as `uniform_baseline` rounds it.
        valid: Whether the bounds hold at all times at once.

    Returns:
        The crossing, or None if no entry is below the limit.

    Raises:
        CertifyError: For arrays of different shapes, or numbers that are none.
    """
    when, found = real("times", times), real("values", values)
    if when.ndim != 1 or when.shape != found.shape:
        raise CertifyError(
            f"times has shape {when.shape}, values has {found.shape}: give one bound for each number of units."
        )
    below = np.flatnonzero(found < limit)
    if not below.size:
        return None
    return Crossing(int(when[below[0]]), float(found[below[0]]), valid)


def first_fixed(
    name: str,
    losses: Losses,
    delta: float,
    times: ArrayLike | None = None,
    *,
    limit: float | None = None,
    complexity: float = 0.0,
) -> Crossing | None:
    """The first n of a grid at which a sharp bound of the fixed form is below a limit: descriptive.

    Args:
        name: As for :func:`sharp_growth`, like the others.
        losses: See there.
        delta: See there.
        times: See there; nothing beyond the crossing is computed.
        limit: Bits per token; None: log2 V.
        complexity: See there.

    Raises:
        CertifyError: See there.
    """
    bar = losses.baseline if limit is None else limit
    found = _fixed_values(name, losses, delta, times, complexity)
    return next((Crossing(n, value, False) for n, value in found if value < bar), None)


def first_any_time(
    name: str,
    losses: Losses,
    delta: float,
    times: ArrayLike | None = None,
    *,
    limit: float | None = None,
    complexity: float = 0.0,
) -> Crossing | None:
    """The first n of a grid at which the time-uniform sharp bound is below a limit: itself valid.

    With probability 1 - delta the bound is right at every n, hence at the one returned: whoever had stopped there
    had a certificate.

    Args:
        name: As for :func:`saelens_certify.bounds.sharp_sequence`, like the others.
        losses: See there.
        delta: See there.
        times: Increasing numbers of units; default each up to 64, then eight for every doubling.
        limit: Bits per token; None: log2 V.
        complexity: See there.

    Raises:
        CertifyError: See there.
    """
    when = looks(_unit_sizes(losses).size) if times is None else times
    values = sharp_sequence(name, losses, delta, when, complexity=complexity)
    bar = losses.baseline if limit is None else limit
    return first_below(when, values, bar, valid=True)


def _fixed_values(
    name: str, losses: Losses, delta: float, times: ArrayLike | None, complexity: float
) -> Iterator[tuple[int, float]]:
    """Each number of units and the bound on so many, computed as it is asked for."""
    sharp = find_sharp(name)
    x = sharp.variable(losses)
    for n in check_times(times, x.samples.size).tolist():
        yield n, fixed_bound(sharp, x, delta, complexity, n)


def _unit_sizes(losses: Losses) -> NDArray[np.int64]:
    """Number of sequences in each unit, in their order.

    Raises:
        CertifyError: If the members of a cluster are apart: no prefix is then made of whole clusters.
    """
    if losses.clusters is None:
        return np.ones(losses.base.size, dtype=np.int64)
    codes = cluster_codes(losses.clusters)
    check_together(codes)
    return np.bincount(codes)


class _Prefixes:
    """Means over the first n units of the means within them, rounded as `means.Measured` rounds them.

    That is: units of one size are added exactly, the sum is divided by that size and rounded up; these
    totals are added exactly and divided by n.
    """

    def __init__(self, sizes: NDArray[np.int64], times: NDArray[np.int64]) -> None:
        self._of_sequence = np.repeat(sizes, sizes)
        self._times = times
        # How many units of each size are among the first n.
        self._members = {
            size: np.cumsum(sizes == size)[times - 1] for size in np.unique(sizes).tolist()
        }

    def __call__(self, *parts: FloatArray) -> FloatArray:
        """Average values that are each the sum of as many doubles [n_sequences] as there are parts."""
        columns = []
        for size, units in self._members.items():
            chosen = self._of_sequence == size
            sums = RunningSum.of(*(part[chosen] for part in parts))
            columns.append([divide_up(sums.up(k * size), size) for k in units.tolist()])
        return np.array(
            [
                divide_up(exact_sum_up(list(totals)), n)
                for n, totals in zip(self._times.tolist(), zip(*columns, strict=True), strict=True)
            ],
            dtype=np.float64,
        )

"""The bounds of a certificate as functions of the number of sequences, from its own evidence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64
from numpy.typing import ArrayLike, NDArray

from saelens_certify.bounds import Crossing, Growth, first_below, sharp_growth, sharp_sequence
from saelens_certify.bounds.checks import integer
from saelens_certify.bounds.planner import PROFILES
from saelens_certify.bounds.times import looks
from saelens_certify.certificate import Certificate
from saelens_certify.errors import CertifyError


@dataclass(frozen=True)
class Curve:
    """One bound after each of several numbers of units.

    Attributes:
        n: Sequences, or whole clusters where sequences were clustered [n_times].
        values: The bound, bits per token [n_times].
        any_time: Whether the values hold at all n at once (time-uniform). If not, each holds by itself if its n
            was fixed in advance, and the first n at which it says something is descriptive.
        baseline: log2 V, rounded down.
    """

    n: Int64[NDArray, " n_times"]
    values: Float64[NDArray, " n_times"]
    any_time: bool
    baseline: float

    @property
    def crossing(self) -> Crossing | None:
        """The first n at which the bound is non-vacuous."""
        return first_below(self.n, self.values, self.baseline, valid=self.any_time)


def fixed_curves(
    certificate: Certificate, names: Iterable[str], grid: ArrayLike | None = None
) -> dict[str, Curve]:
    """Bounds of the form whose N is fixed in advance, on the first n sequences for every n of a grid.

    Args:
        certificate: The certificate.
        names: Published bounds and sharp ones (`saelens_certify.bounds.SHARP`).
        grid: Numbers of units; those beyond the run's are left out. None: each up to 64, then eight for every
            doubling.

    Returns:
        By name. Empty if the run could stop when it pleased: its N is then no fixed one.

    Raises:
        CertifyError: For an unknown name, or a grid without a number from 1 to that of the run.
    """
    if certificate.time_uniform:
        return {}
    n = grid_within(grid, certificate.measured.n_sequences)
    config, names = certificate.config, list(names)
    published = [name for name in names if name in PROFILES]
    values = Growth.of(certificate.losses, n).bounds(
        published,
        vocab_size=certificate.vocab_size,
        dict_size=certificate.dict_size,
        pool_size=certificate.pool.size,
        alpha=config.alpha,
        delta=config.share,
    )
    nats = certificate.complexity
    for name in names:
        if name not in PROFILES:
            values[name] = sharp_growth(name, certificate.losses, config.share, n, complexity=nats)
    return {name: Curve(n, values[name], False, certificate.losses.baseline) for name in names}


def any_time_curves(
    certificate: Certificate, names: Iterable[str], grid: ArrayLike | None = None
) -> dict[str, Curve]:
    """Time-uniform sharp bounds: each holds at all n at once.

    Args:
        certificate: The certificate.
        names: Keys of `saelens_certify.bounds.SHARP`.
        grid: Numbers of units at which to look besides the usual ones: each up to 64, then eight for every
            doubling.

    Returns:
        By name.

    Raises:
        CertifyError: As `fixed_curves`.
    """
    units = certificate.measured.n_sequences
    n = looks(units) if grid is None else np.union1d(looks(units), grid_within(grid, units))
    return {
        name: Curve(
            n,
            sharp_sequence(
                name, certificate.losses, certificate.config.share, n, complexity=certificate.complexity
            ),
            True,
            certificate.losses.baseline,
        )
        for name in names
    }  # fmt: skip


def grid_within(grid: ArrayLike | None, units: int) -> NDArray[np.int64]:
    """Return the numbers of a grid that a run reaches, sorted, each once.

    Args:
        grid: Whole numbers of at least 1, in any order; None: each up to 64, then eight for every doubling.
        units: Number of independent draws of the run.

    Raises:
        CertifyError: If none is left, or one is no such number.
    """
    if grid is None:
        return looks(units)
    given = np.unique(check_grid(grid))
    found = given[given <= units]
    if not found.size:
        raise CertifyError(
            f"grid begins at {given[0]}, but the run has {units} independent evaluation sequences: give a smaller "
            "number, or more sequences"
        )
    return found


def check_grid(grid: ArrayLike) -> NDArray[np.int64]:
    """Check numbers of sequences that somebody gave.

    Raises:
        CertifyError: If there are none, or one is not a whole number of at least 1.
    """
    found = np.atleast_1d(integer("grid", grid, 1, "give numbers of sequences"))
    if found.ndim != 1 or not found.size:
        raise CertifyError(f"grid has shape {found.shape}: give one or more numbers of sequences")
    return found.astype(np.int64)

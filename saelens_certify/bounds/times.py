"""The numbers of samples at which a confidence sequence is given."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saelens_certify.bounds.checks import integer, refuse
from saelens_certify.errors import CertifyError

_PER_DOUBLING = 8
_EVERY = 64  # samples up to which every number is looked at


def log_times(n: int) -> NDArray[np.int64]:
    """Whole numbers from 1 to n, eight for every doubling.

    Args:
        n: Number of samples, at least 1.

    Returns:
        Increasing numbers; the last is n.

    Raises:
        CertifyError: If n is not a whole number of at least 1.
    """
    last = float(integer("n", n, 1, "count the samples"))
    powers = np.arange(int(np.log2(last) * _PER_DOUBLING) + 1)
    grid = np.floor(2.0 ** (powers / _PER_DOUBLING)).astype(np.int64)
    return np.unique(np.append(grid[grid <= last], np.int64(last)))


def looks(n: int) -> NDArray[np.int64]:
    """Numbers of samples after which a run that may stop is looked at: each at first, then :func:`log_times`.

    Args:
        n: Number of samples so far, at least 1.

    Returns:
        Increasing numbers; the last is n.

    Raises:
        CertifyError: If n is not a whole number of at least 1.
    """
    return np.union1d(np.arange(1, min(n, _EVERY) + 1), log_times(n))


def check_times(times: ArrayLike | None, n: int) -> NDArray[np.int64]:
    """Check the times given, or take the default ones.

    Args:
        times: Increasing whole numbers in [1, n]; None: :func:`log_times`.
        n: Number of samples.

    Raises:
        CertifyError: For anything else.
    """
    if times is None:
        return log_times(n)
    found = integer("times", times, 1, "count samples")
    if found.ndim != 1 or found.size == 0:
        raise CertifyError(f"times has shape {found.shape}: give one or more numbers of samples.")
    refuse("times", found, found > n, f"at most the number of samples, {n}", "give more samples")
    behind = np.concatenate([[False], found[1:] <= found[:-1]])
    refuse("times", found, behind, "above the one before", "sort them and name each once")
    return found.astype(np.int64)

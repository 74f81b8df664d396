"""Sums that are exact before they are rounded, and quotients that are never too small."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saelens_certify.bounds.checks import real
from saelens_certify.bounds.rounding import FloatArray
from saelens_certify.errors import CertifyError


def per_sequence(name: str, values: ArrayLike) -> FloatArray:
    """Check one value per sequence.

    Args:
        name: The argument's name, for the message.
        values: Values [n_sequences].

    Raises:
        CertifyError: For an empty array, another number of dimensions, NaN or inf.
    """
    array = real(name, values)
    if array.ndim != 1 or array.size == 0:
        raise CertifyError(
            f"{name} has shape {array.shape}: give one value per sequence, [n_sequences], at least one."
        )
    return array


def exact_distances(a: FloatArray, b: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Two doubles for each |a - b| whose exact sum is the exact distance: rounded, and its error."""
    difference = a - b
    part = difference - a
    error = (a - (difference - part)) - (b + part)
    # Where the rounded difference is zero, so is its error: the sign of a nonzero one is exact.
    sign = np.sign(difference)
    return sign * difference, sign * error


def exact_sum_up(values: list[float]) -> float:
    """The smallest double that is at least the exact sum."""
    total = math.fsum(values)
    return math.nextafter(total, math.inf) if math.fsum([*values, -total]) > 0.0 else total


def divide_up(total: float, n: int) -> float:
    """The smallest double that is at least total / n."""
    quotient = total / n
    exact = Fraction(total) / n
    return math.nextafter(quotient, math.inf) if Fraction(quotient) < exact else quotient


@dataclass(frozen=True)
class RunningSum:
    """Exact sums of the first 0, 1, 2, ... values, in one pass.

    Doubles are whole multiples of a small enough power of two, and Python adds whole numbers of any size.

    Attributes:
        totals: The sums as whole numbers of units [n + 1].
        unit: What one unit is worth.
    """

    totals: NDArray[np.object_]
    unit: Fraction

    @classmethod
    def of(cls, *parts: FloatArray) -> RunningSum:
        """Add up values; each is the sum of as many doubles as there are parts.

        Args:
            *parts: Finite doubles [n] each.
        """
        split = [np.frexp(part) for part in parts]
        used = np.concatenate([powers[mantissas != 0.0] for mantissas, powers in split])
        lowest = int(used.min()) if used.size else 0
        totals = np.zeros(len(parts[0]) + 1, dtype=object)
        for mantissas, powers in split:
            whole = np.ldexp(mantissas, 53).astype(np.int64).astype(object)
            totals[1:] += whole << np.maximum(powers - lowest, 0).astype(object)
        return cls(np.cumsum(totals), Fraction(2) ** (lowest - 53))

    def up(self, n: int) -> float:
        """The smallest double that is at least the sum of the first n values."""
        exact = self.totals[n] * self.unit
        total = float(exact)
        return math.nextafter(total, math.inf) if Fraction(total) < exact else total

"""Sums that are exact before they are rounded, and quotients that are never too small."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike

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

"""Samples of a bounded variable, checked, and what every bound of their mean needs of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from saelens_certify.bounds.checks import real, refuse
from saelens_certify.bounds.hoeffding import log_inverse_up
from saelens_certify.bounds.rounding import FloatArray, add_up
from saelens_certify.errors import CertifyError


@dataclass(frozen=True)
class Samples:
    """Values in [low, high] and their distances from the upper end.

    A bound from above on the mean of x is a bound from below on the mean of (high - x) / width. The
    distances are rounded *down*, so they belong to a variable whose mean is no larger: what holds for it
    holds for x.

    Attributes:
        values: The samples [n], in their order.
        low: Smallest possible value.
        high: Largest possible value.
        width: High - low, rounded up.
        distances: (high - values) / width, rounded down, in [0, 1].
    """

    values: FloatArray
    low: float
    high: float
    width: float
    distances: FloatArray

    @classmethod
    def check(cls, samples: ArrayLike, low: float, high: float) -> Samples:
        """Check samples and their interval.

        Raises:
            CertifyError: For samples that are not one-dimensional, empty, not finite or outside the
                interval, or an interval that is empty or not finite.
        """
        ends = {name: real(name, end) for name, end in (("low", low), ("high", high))}
        for name, end in ends.items():
            if end.ndim:
                raise CertifyError(
                    f"{name} has shape {end.shape}: give one number for all samples."
                )
        width = add_up(ends["high"], -ends["low"])
        bad = (width <= 0.0) | ~np.isfinite(width)
        refuse(
            "high", ends["high"], bad, f"above low={low!r}", "give the smallest and largest value"
        )
        values = real("samples", samples)
        if values.ndim != 1 or values.size == 0:
            raise CertifyError(
                f"samples has shape {values.shape}: give one value per sequence, [n], at least one."
            )
        refuse(
            "samples",
            values,
            (values < ends["low"]) | (values > ends["high"]),
            f"in [low, high] = [{low!r}, {high!r}]",
            "the bound holds for values in that interval only: widen it; clip rounding errors",
        )
        values = np.ascontiguousarray(values)
        far = -add_up(values, -ends["high"])  # high - values, rounded down
        share = far / width
        exact = (far == 0.0) | (far == width)
        distances = np.where(exact, share, np.nextafter(share, 0.0))
        return cls(values, float(low), float(high), float(width), distances)

    @property
    def n(self) -> int:
        """Number of samples."""
        return self.values.size

    def upper(self, distance: FloatArray) -> FloatArray:
        """Turn lower bounds of the mean distance into upper bounds of the mean, rounded up.

        Args:
            distance: Lower bounds; negative ones say nothing.
        """
        covered = np.nextafter(self.width * np.maximum(distance, 0.0), 0.0)
        return np.minimum(add_up(np.array(self.high), -covered), self.high)


def log_threshold(delta: float, complexity: float, parts: int = 1) -> float:
    """ln(parts / delta) + complexity in nats, rounded up: what an e-value has to reach.

    Args:
        delta: Failure probability in (0, 1).
        complexity: Logarithm of the number of statements that share delta.
        parts: Further equal shares of delta.

    Raises:
        CertifyError: If delta is not in (0, 1), or complexity negative or not finite.
    """
    found = real("delta", delta)
    bad = (found <= 0.0) | (found >= 1.0)
    refuse("delta", found, bad, "in the open interval (0, 1)", "the published protocol uses 0.05")
    nats = real("complexity", complexity)
    refuse("complexity", nats, nats < 0.0, "at least 0", "give ln(number of statements), in nats")
    if found.ndim or nats.ndim:
        raise CertifyError("delta and complexity are one number each: call again for another.")
    return float(add_up(log_inverse_up(parts, found), nats))

"""Numbers as people see them: rounded to the side on which the statement stays true."""

from __future__ import annotations

from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal


def rounded_up(value: float, digits: int = 4) -> float:
    """Round upwards to so many digits behind the point, going by the double's exact value."""
    return float(Decimal(value).quantize(Decimal(1).scaleb(-digits), ROUND_CEILING))


def rounded_down(value: float, digits: int = 4) -> float:
    """Round downwards to so many digits behind the point, going by the double's exact value."""
    return float(Decimal(value).quantize(Decimal(1).scaleb(-digits), ROUND_FLOOR))


def percent(confidence: float) -> str:
    """Write a confidence without rounding it up: 95%, 99.9%.

    A few units in the last place are taken for the rounding of 1 - delta.
    """
    return f"{rounded_down(100 * confidence * (1 + 2**-50), 10):.12g}%"

"""Numbers as people see them: rounded to the side on which the statement stays true."""

from __future__ import annotations

from decimal import ROUND_CEILING, Decimal


def rounded_up(value: float, digits: int = 4) -> float:
    """Round upwards to so many digits behind the point; four units in the last place are not shown.

    Bounds have been rounded up before, by more than that.
    """
    shown = value - abs(value) * 2.0**-50
    return float(Decimal(shown).quantize(Decimal(1).scaleb(-digits), ROUND_CEILING)) + 0.0


def rounded_down(value: float, digits: int = 4) -> float:
    """Round downwards to so many digits behind the point; the opposite of `rounded_up`."""
    return -rounded_up(-value, digits) + 0.0


def percent(confidence: float) -> str:
    """Write a confidence without rounding it up: 95%, 99.9%."""
    return f"{rounded_down(100 * confidence, 10):.12g}%"

"""When a run may stop: as soon as its verdict is valid, or it is clear that there will be none.

Everything here rests on confidence sequences, so it is valid however often one looks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from saelens_certify.bounds.betting import betting_sequence
from saelens_certify.bounds.joint import Losses
from saelens_certify.bounds.sharp import find_sharp, sharp_sequence
from saelens_certify.bounds.times import looks
from saelens_certify.errors import CertifyError

Reason = Literal["nonvacuous", "target", "futile"]


@dataclass(frozen=True)
class Stop:
    """Why and when a run was decided.

    Attributes:
        reason: "nonvacuous": the bound is below log2 V. "target": it is at most the target. "futile": with
            confidence 1 - delta no number of sequences makes it non-vacuous.
        n: Number of units (sequences, or whole clusters) after which that was so.
        value: The bound then, bits per token; for "futile" the lower bound of its limit.
    """

    reason: Reason
    n: int
    value: float


def floor_sequence(name: str, losses: Losses, delta: float) -> NDArray[np.float64]:
    """Lower confidence bounds of the limit of a bound for N to infinity, at all `looks` at once.

    The limit is the mean of the bounded variable. The lower bounds are those of the negated variable from above,
    with an error probability of their own: with probability 1 - delta none ever exceeds the limit.

    Args:
        name: A key of `SHARP`.
        losses: The evidence, in the order of the documents' hashes.
        delta: Probability that any of them fails.

    Returns:
        Bits per token, one for each look, non-decreasing.
    """
    x = find_sharp(name).variable(losses)
    return -betting_sequence(-x.samples, -x.high, -x.low, delta, looks(len(x.samples)))


def first_stop(
    losses: Losses, until: str | float, delta: float, *, name: str = "sharp_betting"
) -> Stop | None:
    """The first look at which a run is decided, or None if it is not yet.

    With probability 1 - delta a verdict "nonvacuous" or "target" is right, and with probability 1 - delta a
    verdict "futile" is: two statements, each with delta of its own.

    Args:
        losses: The evidence so far, in the order of the documents' hashes.
        until: "nonvacuous": stop when the bound is below log2 V. "decided": also when it is clear that it
            never will be. A number: when the bound is at most so many bits per token.
        delta: Failure probability.
        name: The bound that decides: a key of `SHARP`.

    Raises:
        CertifyError: For another rule.
    """
    rule = check_until(until)
    if rule is None:
        raise CertifyError("until must be a rule for stopping, got None")
    when = looks(len(find_sharp(name).variable(losses).samples))
    values = sharp_sequence(name, losses, delta, when)
    reached = values < losses.baseline if isinstance(rule, str) else values <= rule
    stops: list[Stop] = []
    if reached.any():
        k = int(np.argmax(reached))
        reason: Reason = "nonvacuous" if isinstance(rule, str) else "target"
        stops.append(Stop(reason, int(when[k]), float(values[k])))
    if rule == "decided":
        floors = floor_sequence(name, losses, delta)
        if (floors >= losses.baseline).any():
            k = int(np.argmax(floors >= losses.baseline))
            stops.append(Stop("futile", int(when[k]), float(floors[k])))
    return min(stops, key=lambda stop: stop.n, default=None)


def check_until(until: object) -> str | float | None:
    """Check a rule for stopping; None is none.

    Raises:
        CertifyError: If it is neither a name nor a number of bits.
    """
    if until is None or until in ("nonvacuous", "decided"):
        return until  # pyright: ignore[reportReturnType]
    try:
        bits = float(until)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        bits = float("nan")
    if isinstance(until, bool) or not np.isfinite(bits) or bits <= 0.0:
        raise CertifyError(
            f"until must be 'nonvacuous', 'decided' or a positive number of bits per token, got {until!r}"
        )
    return bits

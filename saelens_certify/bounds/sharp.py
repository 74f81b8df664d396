"""The sharp bounds: one test of one bounded mean each, for a number of sequences fixed in advance or at any time.

What is bounded, by which variable (``joint``) and which inequality, is one table, `SHARP`. The fixed form
serves certificates whose N was fixed in advance, the time-uniform form those that may stop when they please.
Proofs: docs/statistics.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from numpy.typing import ArrayLike

from saelens_certify.bounds.betting import betting_sequence, betting_upper
from saelens_certify.bounds.concentration import bernstein_upper
from saelens_certify.bounds.joint import Interval, Losses, Mismatch
from saelens_certify.bounds.means import mean_up
from saelens_certify.bounds.rounding import FloatArray
from saelens_certify.bounds.sequences import bernstein_sequence
from saelens_certify.bounds.times import looks
from saelens_certify.errors import CertifyError

Method = Literal["betting", "bernstein"]


@dataclass(frozen=True)
class Sharp:
    """How one sharp bound comes about.

    Attributes:
        claim: What is at most the bound.
        variable: The bounded variable whose mean is tested.
        term: Name of that mean in the terms; for a joint variable, of its part that is the mismatch.
        method: The inequality.
        mismatch: Which joint variable it is, if one of these; None: another variable.
        involves_pool: Whether the pool is part of the statement.
        occam: Whether it holds for all pools of P features at once.
        lower: Values whose upper bound, negated, is the lower end of a two-sided statement.
    """

    claim: str
    variable: Callable[[Losses], Interval]
    term: str
    method: Method = "betting"
    mismatch: Mismatch | None = None
    involves_pool: bool = True
    occam: bool = False
    lower: Callable[[Losses], Interval] | None = None

    @property
    def shares(self) -> int:
        """Equal shares into which delta is divided."""
        return 1 if self.lower is None else 2


def _joint(mismatch: Mismatch, method: Method = "betting", occam: bool = False) -> Sharp:
    term = "mismatch" if mismatch == "charged" else "mismatch_measured"
    return Sharp("R(M)", lambda x: x.joint(mismatch), term, method, mismatch, occam=occam)


def _excess(of: Literal["sae", "pool"], two_sided: bool = False) -> Sharp:
    claim = (
        "R(S∘M) - R(M), what splicing in the SAE loses"
        if of == "sae"
        else "R(h_G) - R(M), what the proxy restricted to the pool loses"
    )
    return Sharp(
        claim,
        lambda x: x.excess(of),
        f"excess_{of}",
        involves_pool=of == "pool",
        lower=(lambda x: x.excess(of, -1)) if two_sided else None,
    )


SHARP: dict[str, Sharp] = {
    "sharp_betting": _joint("charged"),
    "sharp_bernstein": _joint("charged", "bernstein"),
    "sharp_occam": _joint("charged", occam=True),
    "sharp_measured": _joint("measured"),
    "sharp_direct_base": Sharp("R(M)", lambda x: x.loss("base"), "risk_base", involves_pool=False),
    "sharp_direct_sae": Sharp("R(S∘M)", lambda x: x.loss("sae"), "risk_sae", involves_pool=False),
    "sharp_direct_pool": Sharp("R(h_G)", lambda x: x.loss("pool"), "risk_pool"),
    "sharp_unigram": Sharp(
        "R(M) - R(unigram), by way of the SAE", lambda x: x.over_unigram(), "excess_unigram"
    ),
    "excess_sae": _excess("sae"),
    "excess_pool": _excess("pool"),
    "excess_sae_two_sided": _excess("sae", two_sided=True),
    "excess_pool_two_sided": _excess("pool", two_sided=True),
}
"""The sharp bounds by name."""

_UPPER = {"betting": betting_upper, "bernstein": bernstein_upper}
_SEQUENCE = {"betting": betting_sequence, "bernstein": bernstein_sequence}


@dataclass(frozen=True)
class SharpValue:
    """A sharp bound as a number.

    Attributes:
        value: The bound, bits per token.
        lower: Lower end of a two-sided statement, else None.
        terms: Means of the parts of the variable, and what the inequality adds; their sum is the value.
    """

    value: float
    lower: float | None
    terms: Mapping[str, float]


def sharp_value(
    name: str, losses: Losses, delta: float, *, complexity: float = 0.0, time_uniform: bool = False
) -> SharpValue:
    """Compute one sharp bound.

    Args:
        name: A key of `SHARP`.
        losses: The evidence, in an order that says nothing about the losses (that of the documents'
            hashes).
        delta: Failure probability.
        complexity: ln C(m, P) in nats, used by the Occam bound only.
        time_uniform: Whether the number of sequences may depend on their losses.

    Raises:
        CertifyError: For an unknown name or an impossible delta.
    """
    sharp = find_sharp(name)
    samples = sharp.variable(losses)
    level, nats = delta / sharp.shares, complexity if sharp.occam else 0.0

    def bound(of: Interval) -> float:
        if time_uniform:
            sequence = _SEQUENCE[sharp.method]
            when = looks(len(of.samples))
            return float(sequence(of.samples, of.low, of.high, level, when, complexity=nats)[-1])
        return fixed_bound(sharp, of, delta, complexity)

    value = bound(samples)
    lower = None if sharp.lower is None else -bound(sharp.lower(losses))
    return SharpValue(value, lower, _terms(sharp, losses, samples, value))


def fixed_bound(
    sharp: Sharp, x: Interval, delta: float, complexity: float, n: int | None = None
) -> float:
    """The upper bound of a sharp statement from the first n values of its variable, for n fixed in advance.

    Args:
        sharp: An entry of `SHARP`.
        x: Its variable, or that of the other end of a two-sided statement.
        delta: Failure probability of the statement.
        complexity: As for :func:`sharp_value`.
        n: How many values; None: all.
    """
    nats = complexity if sharp.occam else 0.0
    level = delta / sharp.shares
    return _UPPER[sharp.method](x.samples[:n], x.low, x.high, level, complexity=nats)


def sharp_sequence(
    name: str,
    losses: Losses,
    delta: float,
    times: ArrayLike | None = None,
    *,
    complexity: float = 0.0,
) -> FloatArray:
    """A sharp bound after each of several numbers of units: valid at all of them at once.

    Args:
        name: A key of `SHARP`; the upper end of a two-sided one.
        losses: As for :func:`sharp_value`.
        delta: Probability that any of the bounds fails.
        times: Numbers of units (sequences, or whole clusters); default
            :func:`saelens_certify.bounds.log_times`.
        complexity: As for :func:`sharp_value`.

    Returns:
        Bits per token, one for each of ``times``, non-increasing.

    Raises:
        CertifyError: As :func:`sharp_value`, or for impossible times.
    """
    sharp = find_sharp(name)
    x = sharp.variable(losses)
    return _SEQUENCE[sharp.method](
        x.samples,
        x.low,
        x.high,
        delta / sharp.shares,
        times,
        complexity=complexity if sharp.occam else 0.0,
    )


def find_sharp(name: str) -> Sharp:
    """Return an entry of `SHARP`.

    Raises:
        CertifyError: If there is none of that name.
    """
    if name not in SHARP:
        raise CertifyError(f"bound={name!r} is unknown: choose one of {', '.join(SHARP)}.")
    return SHARP[name]


def _terms(sharp: Sharp, losses: Losses, samples: Interval, value: float) -> dict[str, float]:
    if sharp.mismatch is None:
        terms = {sharp.term: mean_up(samples.samples)}
    else:
        parts = losses.parts(sharp.mismatch)
        parts[sharp.term] = parts.pop("mismatch")
        terms = {name: mean_up(losses.units(part)) for name, part in parts.items()}
    return {**terms, "t_sharp": value - math.fsum(terms.values())}

"""How many draws a bound needs to reach a goal, on one stream of draws from a known law.

The rules below say of a prefix of the stream whether the bound after it has reached its goal. They are for planning:
plain arithmetic, without the care for rounding that the bounds themselves take, and one test of one claim where a
bound would be bracketed. A goal is a target for the bound, or a margin between the bound and the sample mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import TypeVar

import numpy as np

from saelens_certify.bounds.betting import (
    CONSTANT_CAPS,
    CONSTANT_WEIGHTS,
    Bets,
    adaptive_bets,
    betting_sequence,
    betting_upper,
)
from saelens_certify.bounds.rounding import FloatArray
from saelens_certify.bounds.sequences import bernstein_sequence, hoeffding_sequence
from saelens_certify.bounds.times import log_times
from saelens_certify.bounds.wealth import SMALLEST_MEAN, log_wealth_down, products

LONGEST = 2**17
"""Draws in the longest stream; what is not reached by then is extrapolated."""

_COARSE = 1.0 / 64.0


Mean = TypeVar("Mean", float, FloatArray)


@dataclass(frozen=True)
class Goal:
    """What the bound is to reach.

    Attributes:
        target: The bound is at most this; None for a margin.
        margin: The bound is at most this above the sample mean; None for a target.
    """

    target: float | None
    margin: float | None

    def claim(self, mean: Mean) -> Mean | float:
        """The value that the bound is to reach if the sample mean is this."""
        return mean + (self.margin or 0.0) if self.target is None else self.target


@dataclass(frozen=True)
class Rule:
    """A bound, for planning.

    Attributes:
        reached: Whether the bound of a prefix is at most a value.
        value: The bound of a prefix.
        first: For a sequence: the first number of draws at which its bound has reached a goal, looked at eight
            times a doubling, or None. Where there is none, crossings are searched with ``reached``.
        coarse: Relative accuracy to which to search.
        highest: The bound is never above it, whatever the values.
    """

    reached: Callable[[FloatArray, float], bool]
    value: Callable[[FloatArray], float]
    first: Callable[[FloatArray, Goal], int | None] | None = None
    coarse: float = 0.0
    highest: float = math.inf


def closed_form_rule(margin: Callable[[FloatArray], float]) -> Rule:
    """A bound that is the sample mean and a margin, a function of the prefix."""

    def value(x: FloatArray) -> float:
        return float(x.mean()) + margin(x)

    return Rule(lambda x, goal: value(x) <= goal, value)


def rules(
    low: float, high: float, delta: float, complexity: float, targeted: bool = True
) -> dict[str, Rule]:
    """Every bound of a mean, by name.

    Args:
        low: Smallest possible value.
        high: Largest.
        delta: Failure probability, in (0, 1).
        complexity: Nats added to ln(1 / delta).
        targeted: Whether the goal is a target. The first time at which the betting sequence is near its moving mean is
            not looked for: a crossing is.
    """
    width = high - low
    once, twice = math.log(1.0 / delta) + complexity, math.log(2.0 / delta) + complexity

    def hoeffding(x: FloatArray) -> float:
        return width * math.sqrt(once / (2.0 * x.size))

    def bernstein(x: FloatArray) -> float:
        if x.size == 1:
            return width
        spread = math.sqrt(2.0 * float(x.var(ddof=1)) * twice / x.size)
        return spread + 7.0 * width * twice / (3.0 * (x.size - 1))

    def refuted(x: FloatArray, goal: float, adaptive: bool) -> bool:
        y, claim = (high - x) / width, (high - goal) / width
        if claim < SMALLEST_MEAN:
            return claim <= 0.0
        if claim >= y.mean():
            return False
        bets = adaptive_bets(y, once) if adaptive else (None, CONSTANT_CAPS, CONSTANT_WEIGHTS)
        limits, caps, weights = bets
        return log_wealth_down(y, limits, claim, caps, weights) >= once

    def first_bet(x: FloatArray, goal: Goal) -> int | None:
        times, begin = log_times(x.size), 0
        claim = (high - goal.claim(0.0)) / width
        if claim < SMALLEST_MEAN or claim >= 1.0:
            return 1 if claim <= 0.0 else None
        y, logs = (high - x) / width, np.empty((times.size, CONSTANT_CAPS.size))
        for k, end in enumerate(times.tolist()):
            mantissas, exponents = products(y[begin:end], None, claim, CONSTANT_CAPS)
            logs[k], begin = np.log(mantissas) + exponents * math.log(2.0), end
        wealth = np.logaddexp.reduce(np.cumsum(logs, axis=0) + np.log(CONSTANT_WEIGHTS), axis=1)
        return _first(times, wealth >= once)

    def first_bernstein(x: FloatArray, goal: Goal) -> int | None:
        times = log_times(x.size)
        found = bernstein_sequence(x, low, high, delta, times, complexity=complexity)
        return _first(times, found <= goal.claim(_means(x, times)))

    @lru_cache(maxsize=64)
    def hoeffding_margins(n: int) -> FloatArray:
        # The margin depends on n alone: it is the bound of zeros. Where it is the whole range it says nothing.
        zeros, times = np.zeros(n), log_times(n)
        found = hoeffding_sequence(zeros, 0.0, width, delta, times, complexity=complexity)
        return np.where(found < width, found, np.inf)

    def first_hoeffding(x: FloatArray, goal: Goal) -> int | None:
        times = log_times(x.size)
        means = _means(x, times)
        return _first(times, means + hoeffding_margins(x.size) <= goal.claim(means))

    def last(sequence: Callable[..., FloatArray]) -> Callable[[FloatArray], float]:
        return lambda x: float(sequence(x, low, high, delta, [x.size], complexity=complexity)[-1])

    def betting(bets: Bets) -> Rule:
        return Rule(
            partial(refuted, adaptive=bets == "adaptive"),
            lambda x: betting_upper(x, low, high, delta, complexity=complexity, bets=bets),
            coarse=_COARSE,
        )

    bernstein_last, betting_last = last(bernstein_sequence), last(betting_sequence)
    found = {
        "hoeffding": closed_form_rule(hoeffding),
        "bernstein": closed_form_rule(bernstein),
        "betting": betting("adaptive"),
        "betting_constant": betting("constant"),
        "hoeffding_sequence": replace(
            closed_form_rule(lambda x: float(hoeffding_margins(x.size)[-1])), first=first_hoeffding
        ),
        "bernstein_sequence": Rule(
            lambda x, goal: bernstein_last(x) <= goal, bernstein_last, first_bernstein
        ),
        "betting_sequence": replace(
            betting("constant"), value=betting_last, first=first_bet if targeted else None
        ),
    }
    return {name: replace(rule, highest=high) for name, rule in found.items()}


METHODS = tuple(rules(0.0, 1.0, 0.5, 0.0))
"""Names of the bounds of a mean that can be planned."""


@dataclass
class Stream:
    """Draws with replacement, made as they are needed.

    Attributes:
        law: Values that are equally likely [n].
        rng: Source of randomness.
        drawn: The draws so far.
    """

    law: FloatArray
    rng: np.random.Generator
    drawn: FloatArray = field(default_factory=lambda: np.empty(0))

    def first(self, n: int) -> FloatArray:
        """The first n draws."""
        if n > self.drawn.size:
            more = self.law[self.rng.integers(self.law.size, size=n - self.drawn.size)]
            self.drawn = np.concatenate([self.drawn, more])
        return self.drawn[:n]


def draws_needed(stream: Stream, rule: Rule, goal: Goal) -> float:
    """The number of draws after which a bound has reached its goal.

    By doubling, then, for one number of draws, by bisection to the rule's accuracy (the bound need not decrease with
    every draw; a crossing is found). Beyond `LONGEST` draws, the distance of the bound from the mean is taken to
    shrink like one over the root of the number.

    Args:
        stream: The draws.
        rule: The bound.
        goal: What it is to reach.

    Returns:
        A whole number, or ``math.inf`` if the law's mean is not below the target.
    """
    mean = float(stream.law.mean())
    if goal.target is not None and goal.target >= rule.highest:
        return 1.0
    if goal.target is not None and mean >= goal.target:
        return math.inf
    n = 1
    while not _reached(stream.first(n), rule, goal):
        if n == LONGEST:
            return _extrapolated(stream, rule, goal, mean)
        n *= 2
    if rule.first is not None and (found := rule.first(stream.first(n), goal)) is not None:
        return float(found)
    too_few = n // 2
    while n - too_few > max(1.0, rule.coarse * n):
        middle = (too_few + n) // 2
        if _reached(stream.first(middle), rule, goal):
            n = middle
        else:
            too_few = middle
    return float(n)


def _reached(x: FloatArray, rule: Rule, goal: Goal) -> bool:
    if rule.first is not None:
        return rule.first(x, goal) is not None
    return rule.reached(x, goal.claim(float(x.mean())))


def _extrapolated(stream: Stream, rule: Rule, goal: Goal, mean: float) -> float:
    x = stream.first(LONGEST)
    if goal.target is None:
        excess, room = rule.value(x) - float(x.mean()), goal.margin or 0.0
    else:
        excess, room = rule.value(x) - mean, goal.target - mean
    if room <= 0.0:
        return math.inf
    return float(math.ceil(LONGEST * max(1.0, excess / room) ** 2))


def _means(x: FloatArray, times: np.ndarray) -> FloatArray:
    """Sample means after these numbers of draws."""
    return np.cumsum(x)[times - 1] / times


def _first(times: np.ndarray, reached: np.ndarray) -> int | None:
    return int(times[np.argmax(reached)]) if reached.any() else None

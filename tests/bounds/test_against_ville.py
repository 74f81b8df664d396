"""Betting and time-uniform bounds, against the independent implementation in `ville` (PyPI, used in tests only).

Its capital processes, predictable plug-ins, empirical Bernstein sequence and normal mixture share no line with ours.
Its own intervals come from a grid of 10,000 means; here its capital is inverted by root finding instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import ville
import ville.sequential
from numpy.typing import NDArray
from scipy.optimize import brentq
from ville.means import _PlugIn

from saelens_certify import bounds
from saelens_certify.bounds.betting import adaptive_limits
from saelens_certify.bounds.wealth import log_wealth_down

Array = NDArray[np.float64]
CLOSE = 1e-6
CAPS = ((0.5, 0.25), (0.75, 0.25), (0.98, 0.5))
CONSTANT = tuple((0.98 * 2.0 ** (-k / 2.0), (k + 2.0) ** -1.5) for k in range(34))
TOTAL = sum(weight for _, weight in CONSTANT)


def cases() -> dict[str, tuple[Any, float, float, float]]:
    rng = np.random.default_rng(20_261_123)
    spike = np.where(rng.random(400) < 0.03, 17.0, rng.uniform(3.4, 5.1, 400))
    return {
        "losses": (rng.normal(7.0, 1.0, 300), 0.6, 17.3, 0.05),
        "rare spikes": (spike, 0.0, 17.6, 0.05),
        "coins": ((rng.random(250) < 0.5) * 1.0, 0.0, 1.0, 0.1),
        "differences": (rng.normal(-0.3, 0.4, 500), -16.0, 16.0, 0.01),
        "few": (rng.random(12), 0.0, 1.0, 0.3),
    }


CASES = cases()


def log_capital(x: Array, low: float, high: float, claim: float, cap: float) -> Array:
    """Log capital of a bet that the mean is below the claim, after each value."""
    test = ville.BettingTest(claim, bounds=(low, high), alternative="less", c=cap)
    return test.fit(x).log_e_values_


def largest_kept(
    log_wealth: Callable[[float], float], low: float, high: float, delta: float
) -> float:
    """The claim at which the wealth is 1 / delta: those above are refuted."""

    def excess(claim: float) -> float:
        return log_wealth(claim) - math.log(1.0 / delta)

    first, last = low + 1e-9 * (high - low), high - 1e-12 * (high - low)
    found: Any = high if excess(last) < 0.0 else brentq(excess, first, last, xtol=1e-13)
    return float(found)


def mixture(
    x: Array, low: float, high: float, bets: tuple[tuple[float, float], ...], claim: float
) -> Array:
    """Log wealth after each value, of bets with these caps and weights."""
    logs = [log_capital(x, low, high, claim, cap) + math.log(weight) for cap, weight in bets]
    return np.asarray(np.logaddexp.reduce(np.array(logs), axis=0), dtype=np.float64)


def fixed_n_stakes(n: int, delta: float) -> Callable[..., Array]:
    """The plug-in of ville, with the schedule for one number of samples in place of that for all."""
    return lambda _i, variance, _alpha: np.sqrt(2.0 * math.log(1.0 / delta) / (n * variance))


@pytest.mark.parametrize("name", CASES)
def test_betting_upper(name: str, monkeypatch: pytest.MonkeyPatch):
    x, low, high, delta = CASES[name]
    monkeypatch.setattr(ville.sequential, "_plugin_lambda", fixed_n_stakes(len(x), delta))
    theirs = largest_kept(
        lambda claim: float(mixture(x, low, high, CAPS, claim)[-1]), low, high, delta
    )
    assert abs(bounds.betting_upper(x, low, high, delta) - theirs) < CLOSE


def bold(_i: Any, variance: Array, _alpha: float) -> Array:
    """Stakes beyond every cap, so that the caps alone decide."""
    return np.full_like(variance, 1e300)


@pytest.mark.parametrize("name", CASES)
def test_betting_upper_with_constant_bets(name: str, monkeypatch: pytest.MonkeyPatch):
    x, low, high, delta = CASES[name]
    monkeypatch.setattr(ville.sequential, "_plugin_lambda", bold)
    bets = tuple((cap, weight / TOTAL) for cap, weight in CONSTANT)
    theirs = largest_kept(
        lambda claim: float(mixture(x, low, high, bets, claim)[-1]), low, high, delta
    )
    assert abs(bounds.betting_upper(x, low, high, delta, bets="constant") - theirs) < CLOSE


@pytest.mark.parametrize("name", CASES)
def test_betting_sequence(name: str, monkeypatch: pytest.MonkeyPatch):
    x, low, high, delta = CASES[name]
    times = np.unique(np.linspace(1, len(x), 12).astype(int))
    monkeypatch.setattr(ville.sequential, "_plugin_lambda", bold)
    bets = tuple((cap, weight / TOTAL) for cap, weight in CONSTANT)
    theirs = [
        largest_kept(
            lambda claim, t=t: float(mixture(x[:t], low, high, bets, claim)[-1]), low, high, delta
        )
        for t in times.tolist()
    ]
    found = bounds.betting_sequence(x, low, high, delta, times)
    np.testing.assert_allclose(found, np.minimum.accumulate(theirs), rtol=0, atol=CLOSE)


@pytest.mark.parametrize("name", CASES)
def test_bernstein_sequence(name: str):
    """Theirs is two-sided at alpha / 2 each."""
    x, low, high, delta = CASES[name]
    theirs = ville.EmpiricalBernsteinCS((low, high), alpha=2.0 * delta, c=0.5).fit(x).upper_
    found = bounds.bernstein_sequence(x, low, high, delta, np.arange(1, len(x) + 1))
    np.testing.assert_allclose(found, theirs, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("name", CASES)
def test_hoeffding_sequence(name: str):
    """A bounded variable is sub-Gaussian with half its width; the precision is that of our docstring."""
    x, low, high, delta = CASES[name]
    t = np.arange(1, len(x) + 1)
    threshold = math.log(1.0 / delta)
    precision = 125.0 / (2.0 * threshold + math.log1p(2.0 * threshold))
    radius = ville.normal_mixture(t / 4.0, delta, precision, one_sided=True) / t
    theirs = np.minimum(np.cumsum(x) / t + (high - low) * radius, high)
    found = bounds.hoeffding_sequence(x, low, high, delta, t)
    np.testing.assert_allclose(found, np.minimum.accumulate(theirs), rtol=0, atol=CLOSE)


def test_plug_in_and_capital():
    """The parts: predictable variances, and the wealth at claims far from the bound."""
    x, low, high, delta = CASES["losses"]
    y = (high - x) / (high - low)
    _, _, variances = _PlugIn().step(y)
    limits = adaptive_limits(y, math.log(1.0 / delta))
    expected = np.sqrt(2.0 * math.log(1.0 / delta) / (len(x) * variances))
    np.testing.assert_allclose(limits, expected, rtol=1e-12)
    i = np.arange(1, len(x) + 1)
    theirs_limits = np.sqrt(2.0 * math.log(2.0 / 0.1) / (variances * i * np.log1p(i)))
    for claim in (0.2, 0.5, 0.61, 0.9):
        test = ville.BettingTest(claim, alternative="greater", alpha=0.1, c=0.98).fit(y)
        ours = log_wealth_down(y, theirs_limits, claim, np.array([0.98]), np.array([1.0]))
        assert ours == pytest.approx(test.log_e_values_[-1], abs=CLOSE)

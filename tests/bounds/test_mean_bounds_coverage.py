"""Bounds of a mean and confidence sequences fail as rarely as they say, and the simulation can fail.

A small share of ``python -m benchmarks.coverage``: the same laws, fewer trials, fixed seeds.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from benchmarks import coverage
from saelens_certify import bounds

TRIALS = 400
DELTA = coverage.DELTA


@pytest.mark.parametrize("name", coverage.upper_bounds(DELTA))
@pytest.mark.parametrize("law", coverage.LAWS)
def test_coverage(law: str, name: str):
    bound = coverage.upper_bounds(DELTA)[name]
    for n in coverage.SIZES:
        assert coverage.failures(law, bound, TRIALS, n) <= coverage.allowed(TRIALS), n


@pytest.mark.parametrize("name", coverage.sequences(DELTA))
@pytest.mark.parametrize("law", coverage.LAWS)
def test_coverage_at_all_times(law: str, name: str):
    """Looking after every sample, and stopping as soon as the bound is good enough."""
    found = coverage.peek(law, coverage.sequences(DELTA)[name], 120, 150)
    assert found.ever <= coverage.allowed(120)
    assert found.stopped <= found.ever


@pytest.mark.parametrize("name", coverage.upper_bounds(DELTA))
def test_part_of_the_margin_is_not_enough(name: str):
    bound = coverage.upper_bounds(DELTA)[name]
    scale = 0.25 if name == "bernstein_upper" else 0.4
    rate = coverage.failures("two points, even", bound, TRIALS, 201, scale)
    assert rate > coverage.allowed(TRIALS)


@pytest.mark.parametrize("name", coverage.sequences(DELTA))
def test_part_of_the_margin_is_not_enough_at_all_times(name: str):
    sequence = coverage.sequences(DELTA)[name]

    def shrunk(x: coverage.Array, times: Any) -> coverage.Array:
        means = np.cumsum(x)[times - 1] / times
        return means + 0.4 * (sequence(x, times) - means)

    found = coverage.peek("two points, even", shrunk, 120, 150)
    assert found.ever > coverage.allowed(120)


def test_a_bound_for_one_n_does_not_survive_peeking():
    """What the sequences are for: Hoeffding's bound for fixed n, looked at again and again, fails."""
    law, delta, trials = "two points, even", 0.2, 300
    times = bounds.log_times(20_000)
    means = np.cumsum(coverage.sample(law, trials, 20_000), axis=1)[:, times - 1] / times
    high, truth = coverage.HIGH, coverage.LAWS[law].mean
    margins = [bounds.hoeffding_upper(np.zeros(n), 0.0, high, delta) for n in times]
    failed = means + margins < truth
    assert failed.mean(axis=0).max() <= coverage.allowed(trials, delta)
    assert failed.any(axis=1).mean() > coverage.allowed(trials, delta)


@pytest.mark.parametrize("name", coverage.upper_bounds(DELTA))
@pytest.mark.parametrize("n", [5, 20, 100, 500])
def test_events_never_seen(name: str, n: int):
    """A rare event that n samples missed: without simulation, the worst rate is just above the bound."""
    u = coverage.upper_bounds(DELTA)[name](np.zeros(n)) / coverage.HIGH
    assert (1.0 - u) ** n <= DELTA
    if name == "betting_upper":
        # ln of what the bound wastes: half of the wealth is bet almost whole.
        assert n * math.log(1.0 - u) >= math.log(DELTA) - 1.2 - 0.03 * n * u


COINS = ((np.arange(2**8)[:, None] >> np.arange(8)) & 1).astype(float)
"""All sequences of eight tosses."""


def worst_failure(found: coverage.Array) -> float:
    """Largest probability, over all coins, that a bound is below the coin's mean: no simulation.

    Args:
        found: The bound for each of COINS, on [0, 1].
    """
    heads = COINS.sum(axis=1)
    worst = 0.0
    # A coin just above a bound is the worst one up to the next bound.
    for p in np.unique(found[found < 1.0]) + 1e-9:
        chances = p**heads * (1.0 - p) ** (COINS.shape[1] - heads)
        worst = max(worst, float(chances[found < p].sum()))
    return worst


@pytest.mark.parametrize("delta", [0.05, 0.3])
@pytest.mark.parametrize("bets", ["adaptive", "constant"])
def test_no_coin_fails_the_betting_bound_too_often(bets: Any, delta: float):
    found = np.array([bounds.betting_upper(row, 0, 1, delta, bets=bets) for row in COINS])
    assert 0.2 * delta < worst_failure(found) <= delta
    means = COINS.mean(axis=1)
    assert worst_failure(means + 0.6 * (found - means)) > delta


@pytest.mark.parametrize("delta", [0.05, 0.3])
@pytest.mark.parametrize("name", coverage.sequences(DELTA))
def test_no_coin_fails_a_sequence_too_often_at_any_time(name: str, delta: float):
    sequence = getattr(bounds, name)
    found = np.array([sequence(row, 0, 1, delta, np.arange(1, 9))[-1] for row in COINS])
    assert worst_failure(found) <= delta
    if name == "betting_sequence":
        assert worst_failure(found) > 0.2 * delta


def test_the_laws_have_the_means_that_they_name():
    for name, law in coverage.LAWS.items():
        x = coverage.sample(name, 1000, 200)
        assert x.min() >= 0.0
        assert x.max() <= coverage.HIGH
        sd = x.std() / math.sqrt(x.size)
        assert abs(x.mean() - law.mean) < 4.5 * sd, name


def test_betting_is_sharp_where_losses_vary_little():
    """Sequences needed for a margin of half a bit: hundreds by Hoeffding's bound, tens by betting."""
    x = coverage.sample("losses", 1, 2000)[0]
    needed = {
        name: next(n for n in range(10, 2001, 10) if bound(x[:n]) - x[:n].mean() < 0.5)
        for name, bound in coverage.upper_bounds(DELTA).items()
    }
    assert needed["betting_upper"] <= 0.1 * needed["hoeffding_upper"]
    assert needed["betting_upper"] <= 0.4 * needed["bernstein_upper"]
    assert needed["betting_upper"] <= needed["betting_upper constant"]


def test_the_margin_approaches_the_best_possible():
    x = coverage.sample("losses", 1, 20_000)[0]
    best = x.std() * math.sqrt(2.0 * math.log(1.0 / DELTA) / len(x))
    assert bounds.betting_upper(x, 0.0, coverage.HIGH, DELTA) - x.mean() < 1.05 * best


def test_command(capsys: pytest.CaptureFixture[str], tmp_path):
    target = tmp_path / "coverage.json"
    assert coverage.main(["--trials", "3", "--timed", "1000", "--json", str(target)]) == 0
    assert "hold as often as they say" in capsys.readouterr().out
    assert '"covered": true' in target.read_text()

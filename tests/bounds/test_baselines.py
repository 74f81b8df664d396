"""Confidence limits of the baselines, and the paired test against them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from bounds_strategies import DETERMINISTIC
from hypothesis import given
from hypothesis import strategies as st
from plan_oracle import betting_upper

from saelens_certify import bounds
from saelens_certify.bounds.baselines import (
    beats_baseline,
    paired_excess,
    risk_interval,
    risk_limit,
)
from saelens_certify.errors import CertifyError

V = 50257
HIGH = float(bounds.loss_cap(V))
LOW = HIGH - float(bounds.loss_range(V))
DELTA = 0.05


def pair(n: int) -> tuple[Any, Any]:
    """Z and the unigram model's loss on the same sequences."""
    rng = np.random.default_rng(n)
    hard = rng.normal(0.0, 1.0, n)
    z = np.where(rng.random(n) < 0.03, HIGH, 8.0 + hard + rng.normal(0.0, 0.3, n))
    return z, 10.5 + 0.6 * hard + rng.normal(0.0, 0.3, n)


@pytest.mark.parametrize("n", [1, 20, 150])
def test_limits_against_plain_arithmetic(n: int):
    _, u = pair(n)
    found = risk_interval(u, LOW, HIGH, DELTA)
    level = math.log(2.0 / DELTA)
    assert found.upper == pytest.approx(betting_upper(u.tolist(), LOW, HIGH, level), abs=1e-9)
    negated = betting_upper((-u).tolist(), -HIGH, -LOW, level)
    assert found.lower == pytest.approx(-negated, abs=1e-9)
    assert found.value == pytest.approx(u.mean(), abs=1e-12)
    assert found.confidence == 1.0 - DELTA
    level = math.log(1.0 / DELTA)
    upper, lower = (risk_limit(u, LOW, HIGH, DELTA, side) for side in ("upper", "lower"))
    assert upper == pytest.approx(betting_upper(u.tolist(), LOW, HIGH, level), abs=1e-9)
    assert lower == pytest.approx(-betting_upper((-u).tolist(), -HIGH, -LOW, level), abs=1e-9)
    assert LOW <= found.lower <= lower <= found.value <= upper <= found.upper <= HIGH


@pytest.mark.parametrize("n", [1, 20, 150])
def test_paired_excess_against_plain_arithmetic(n: int):
    z, u = pair(n)
    width = HIGH - LOW
    expected = betting_upper((z - u).tolist(), -width, width, math.log(1.0 / DELTA))
    assert beats_baseline(z, u, LOW, HIGH, DELTA) == pytest.approx(expected, abs=1e-9)


def test_any_time():
    z, u = pair(150)
    when = np.union1d(np.arange(1, 65), bounds.log_times(150))
    upper = bounds.betting_sequence(u, LOW, HIGH, DELTA / 2, when)[-1]
    lower = -bounds.betting_sequence(-u, -HIGH, -LOW, DELTA / 2, when)[-1]
    found = risk_interval(u, LOW, HIGH, DELTA, time_uniform=True)
    assert (found.lower, found.upper) == (lower, upper)
    x = paired_excess(z, u, LOW, HIGH)
    excess = bounds.betting_sequence(x.samples, x.low, x.high, DELTA, when)[-1]
    assert beats_baseline(z, u, LOW, HIGH, DELTA, time_uniform=True) == excess


def test_paired_is_sharper_than_two_bounds():
    """The verdict that two separate bounds at delta / 2 give needs more sequences."""
    z, u = pair(3000)
    u = u - 1.5

    def first(beaten: Any) -> int:
        return next(n for n in range(10, 3001, 10) if beaten(z[:n], u[:n]))

    paired = first(lambda a, b: beats_baseline(a, b, LOW, HIGH, DELTA) < 0.0)
    separate = first(
        lambda a, b: (
            risk_limit(a, LOW, HIGH, DELTA / 2) < risk_limit(b, LOW, HIGH, DELTA / 2, "lower")
        )
    )
    assert paired < 0.8 * separate


def test_uniform_baseline_is_a_shift():
    z, _ = pair(150)
    uniform = float(bounds.uniform_baseline(V))
    found = beats_baseline(z, uniform, LOW, HIGH, DELTA)
    assert found == pytest.approx(bounds.betting_upper(z, LOW, HIGH, DELTA) - uniform, abs=1e-9)
    x = paired_excess(z, uniform, LOW, HIGH)
    assert x.high == pytest.approx(1.0, abs=1e-9)
    assert x.low == pytest.approx(LOW - uniform, abs=1e-9)


CELL = st.floats(LOW, HIGH)


@DETERMINISTIC
@given(st.lists(st.tuples(CELL, CELL), min_size=1, max_size=50), st.sampled_from([0.05, 0.5]))
def test_invariants(rows: list[tuple[float, float]], delta: float):
    z, u = np.array(rows).T
    x = paired_excess(z, u, LOW, HIGH)
    assert x.samples.min() >= x.low
    assert x.samples.max() <= x.high
    assert all(
        math.fsum([found, -a, b]) >= 0.0 for found, (a, b) in zip(x.samples, rows, strict=True)
    )
    excess = beats_baseline(z, u, LOW, HIGH, delta)
    assert bounds.mean_up(x.samples) <= excess + 1e-12 <= x.high + 1e-9
    shared = beats_baseline(z, u, LOW, HIGH, delta, complexity=math.log(4.0))
    assert shared >= excess
    interval = risk_interval(u, LOW, HIGH, delta)
    assert LOW <= interval.lower <= interval.value + 1e-12
    assert interval.value - 1e-12 <= interval.upper <= HIGH
    for k in (0.0, float(u[0])):
        if k >= LOW:
            y = paired_excess(z, k, LOW, HIGH)
            assert y.low <= y.samples.min() <= y.samples.max() <= y.high


def test_rounding_beyond_the_interval_is_put_on_its_end():
    u = np.array([LOW - 5e-5, HIGH + 5e-5, 10.0])
    assert risk_interval(u, LOW, HIGH, 0.5).upper <= HIGH
    x = paired_excess(u[::-1], u, LOW, HIGH)
    assert x.samples[2] == -x.samples[0] or x.samples[2] == pytest.approx(LOW - 10.0, abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([9.0, 20.0], [9.0, 9.0]), ["values[1]=20.0", "[B - Delta, B]"]),
        (([9.0, 9.0], [9.0, 0.1]), ["loss_baseline[1]=0.1"]),
        (([9.0, 9.0], [9.0]), ["Lengths differ", "values has 2", "loss_baseline has 1"]),
        (([9.0, 9.0], 18.0), ["loss_baseline[0]=18.0"]),
        (([9.0, 9.0], [[9.0, 9.0]]), ["loss_baseline has shape (1, 2)"]),
        (([], []), ["values has shape (0,)"]),
    ],
)
def test_bad_input(arguments: tuple[Any, Any], words: list[str]):
    with pytest.raises(CertifyError) as caught:
        beats_baseline(*arguments, LOW, HIGH, DELTA)
    for word in words:
        assert word in str(caught.value)


def test_bad_names_and_levels():
    with pytest.raises(CertifyError, match="side='left' is unknown"):
        risk_limit([9.0], LOW, HIGH, DELTA, "left")  # pyright: ignore[reportArgumentType]
    with pytest.raises(CertifyError, match="delta=1.0"):
        risk_interval([9.0], LOW, HIGH, 2.0)
    with pytest.raises(CertifyError, match="above low"):
        risk_interval([9.0], HIGH, LOW, DELTA)

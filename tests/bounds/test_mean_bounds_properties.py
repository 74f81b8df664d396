"""What must hold of upper confidence bounds of a mean for any samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from bounds_strategies import DETERMINISTIC
from hypothesis import given
from hypothesis import strategies as st
from mpmath import log, log1p, mp, mpf, sqrt
from numpy.typing import NDArray

from saelens_certify import bounds

Array = NDArray[np.float64]

unit = st.one_of(st.floats(0.0, 1.0), st.sampled_from([0.0, 1.0, 5e-324, 1.0 - 2.0**-53]))
samples = st.lists(unit, min_size=1, max_size=60)
deltas = st.one_of(st.just(0.05), st.floats(1e-9, 0.99))


def constant(x: Any, low: float, high: float, delta: float) -> float:
    return bounds.betting_upper(x, low, high, delta, bets="constant")


UPPER = (bounds.hoeffding_upper, bounds.bernstein_upper, bounds.betting_upper, constant)
SEQUENCES = (bounds.hoeffding_sequence, bounds.bernstein_sequence, bounds.betting_sequence)
Upper = Callable[[Any, float, float, float], float]
Sequential = Callable[..., Array]


@pytest.mark.parametrize("bound", UPPER)
@given(x=samples, delta=deltas)
@DETERMINISTIC
def test_between_the_mean_and_the_upper_end(bound: Upper, x: list[float], delta: float):
    assert bounds.mean_up(x) <= bound(x, 0.0, 1.0, delta) * (1 + 1e-15) <= 1.0 + 1e-15
    assert bound(x, 0.0, 1.0, delta) <= 1.0


@pytest.mark.parametrize("bound", UPPER)
@given(x=samples, delta=deltas, smaller=st.floats(0.001, 1.0))
@DETERMINISTIC
def test_more_confidence_costs(bound: Upper, x: list[float], delta: float, smaller: float):
    assert bound(x, 0.0, 1.0, delta * smaller) >= bound(x, 0.0, 1.0, delta) - 1e-10


@pytest.mark.parametrize("bound", [*UPPER, *SEQUENCES])
@given(x=samples, shift=st.floats(-100.0, 100.0), power=st.integers(-20, 20))
@DETERMINISTIC
def test_the_unit_does_not_matter(bound: Upper, x: list[float], shift: float, power: int):
    """Shifted and stretched with the interval, the bound is shifted and stretched."""
    stretch = 2.0**power
    low, high = shift, shift + stretch
    moved = np.clip(shift + stretch * np.array(x), low, high)
    expected = shift + stretch * np.asarray(bound(x, 0.0, 1.0, 0.05))
    slack = 1e-8 * stretch + 1e-12 * (abs(shift) + stretch)
    # Far from zero an interval this small has few doubles left.
    if stretch > 1e-3 * abs(shift):
        np.testing.assert_allclose(bound(moved, low, high, 0.05), expected, rtol=0, atol=slack)


@pytest.mark.parametrize("bound", [bounds.hoeffding_upper, bounds.bernstein_upper, constant])
@given(x=samples, delta=deltas, seed=st.integers(0, 1000))
@DETERMINISTIC
def test_order_does_not_matter(bound: Upper, x: list[float], delta: float, seed: int):
    shuffled = np.random.default_rng(seed).permutation(x)
    assert bound(shuffled, 0.0, 1.0, delta) == pytest.approx(bound(x, 0.0, 1.0, delta), abs=1e-11)


def test_order_matters_where_it_is_said_to():
    x = np.repeat([0.0, 0.7], [30, 10])
    forward, backward = (bounds.betting_upper(y, 0, 1, 0.05) for y in (x, x[::-1]))
    assert abs(forward - backward) > 1e-3


@pytest.mark.parametrize("bound", [bounds.hoeffding_upper, constant])
@given(x=samples, place=st.integers(0, 59), share=unit)
@DETERMINISTIC
def test_a_larger_sample_value_raises_the_bound(
    bound: Upper, x: list[float], place: int, share: float
):
    raised = list(x)
    place %= len(x)
    raised[place] = min(1.0, x[place] + share * (1.0 - x[place]))
    assert bound(raised, 0.0, 1.0, 0.05) >= bound(x, 0.0, 1.0, 0.05) - 1e-10


@pytest.mark.parametrize("bound", UPPER)
@given(x=samples)
@DETERMINISTIC
def test_the_same_data_many_times_over_sharpens_the_bound(bound: Upper, x: list[float]):
    once, often = bound(x, 0.0, 1.0, 0.05), bound(x * 40, 0.0, 1.0, 0.05)
    assert often <= once + 1e-10


@pytest.mark.parametrize("sequence", SEQUENCES)
@given(x=samples, delta=deltas)
@DETERMINISTIC
def test_sequences_only_fall_and_say_the_same_whatever_follows(
    sequence: Sequential, x: list[float], delta: float
):
    every = np.arange(1, len(x) + 1)
    found = sequence(x, 0.0, 1.0, delta, every)
    assert found.shape == every.shape
    assert (np.diff(found) <= 0.0).all()
    assert (found <= 1.0).all()
    half = (len(x) + 1) // 2
    np.testing.assert_allclose(
        found[:half], sequence(x[:half], 0.0, 1.0, delta, every[:half]), rtol=0, atol=1e-12
    )
    # Looking more often is never worse.
    rare = bounds.log_times(len(x))
    assert (found[rare - 1] <= sequence(x, 0.0, 1.0, delta) + 1e-10).all()


@pytest.mark.parametrize("sequence", SEQUENCES)
@given(x=samples, delta=deltas, smaller=st.floats(0.001, 1.0))
@DETERMINISTIC
def test_more_confidence_costs_at_all_times(
    sequence: Sequential, x: list[float], delta: float, smaller: float
):
    wide, narrow = sequence(x, 0.0, 1.0, delta * smaller), sequence(x, 0.0, 1.0, delta)
    if sequence is bounds.betting_sequence:
        assert (wide >= narrow - 1e-10).all()
    else:
        # What these stake depends on delta: the sum of both is not ordered at every time.
        assert wide[-1] >= narrow[-1] - 0.05


@given(x=samples, delta=deltas)
@DETERMINISTIC
def test_the_last_look_alone_is_the_bound_of_constant_bets(x: list[float], delta: float):
    last = bounds.betting_sequence(x, 0.0, 1.0, delta, [len(x)])
    assert last[0] == pytest.approx(constant(x, 0.0, 1.0, delta), abs=1e-11)


@given(x=samples, delta=st.sampled_from([0.05, 0.5]))
@DETERMINISTIC
def test_bernstein_sequence_is_never_below_its_definition(x: list[float], delta: float):
    found = bounds.bernstein_sequence(x, 0.0, 1.0, delta, np.arange(1, len(x) + 1))
    with mp.workdps(40):
        target, total, squares = log(1 / mpf(delta)), mpf("0.5"), mpf("0.25")
        mean, variance, won, paid, staked, best = total, squares, mpf(0), target, mpf(0), mpf(1)
        for i, value in enumerate(x, start=1):
            y = 1 - mpf(value)
            stake = min(mpf("0.5"), sqrt(2 * target / (variance * i * log1p(i))))
            won, staked = won + stake * y, staked + stake
            paid += (y - mean) ** 2 * (-log1p(-stake) - stake)
            total += y
            mean = total / (i + 1)
            squares += (y - mean) ** 2
            variance = squares / (i + 1)
            best = min(best, 1 - (won - paid) / staked)
            # The computed stakes differ by rounding, which is allowed: compare within that.
            assert abs(mpf(float(found[i - 1])) - best) <= mpf("1e-12")


@given(n=st.integers(1, 200), delta=deltas)
@DETERMINISTIC
def test_hoeffding_sequence_is_never_below_its_definition(n: int, delta: float):
    found = bounds.hoeffding_sequence(np.full(n, 0.25), 0.0, 1.0, delta, [n])[0]
    with mp.workdps(40):
        target = log(1 / mpf(delta))
        precision = mpf(125) / (2 * target + log1p(2 * target))
        v = mpf(n) / 4 + precision
        distance = (mpf(float(found)) - mpf("0.25")) * n
        reached = log(2) + log(precision / v) / 2 + distance**2 / (2 * v)
        reached += log(mp.ncdf(distance / sqrt(v)))
        if found < 1.0:
            assert reached >= target
            assert reached <= target + mpf("1e-9") * (1 + target)

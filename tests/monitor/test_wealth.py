"""Bets: nonnegative, fair at the bound, never overflowing, the same in one call or in many."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saelens_certify.errors import CertifyError
from saelens_certify.monitor.reference import (
    Reference,
    binomial_upper,
    mean_upper,
    sequence_values,
)
from saelens_certify.monitor.wealth import BETS, Wealth, log_factors, log_waiting, log_weights

UNIT = st.floats(0, 1)


def test_parts_that_wait_add_up_to_the_whole() -> None:
    for n in (1, 2, 10, 100_000):
        committed = math.fsum(np.exp(log_weights(np.arange(1, n + 1))))
        assert committed + math.exp(float(log_waiting(np.array(n)))) == pytest.approx(1, abs=1e-12)


def test_weights_stay_exact_far_out() -> None:
    j = 10**12
    expected = math.log(2) / (j * math.log(j) ** 2)
    assert math.exp(float(log_weights(np.array(j)))) == pytest.approx(expected, rel=1e-9)


@given(bound=st.floats(1e-6, 1), first=UNIT, second=UNIT, mix=UNIT)
def test_no_bet_gains_on_average_at_the_bound(bound, first, second, mix) -> None:
    """For any two-point law of mean <= bound the factor's mean is at most 1."""
    mean = mix * first + (1 - mix) * second
    scale = min(1.0, bound / mean) if mean > 0 else 1.0
    points = np.array([[first * scale], [second * scale]])
    factors = np.exp(log_factors(points, np.array([bound])))[:, 0]
    assert (factors >= 0).all()
    assert (mix * factors[0] + (1 - mix) * factors[1] <= 1 + 1e-9).all()


def test_expected_e_value_is_one_at_the_bound() -> None:
    """All 2^10 sequences of a fair coin, weighted: the e-value's mean is exactly its start."""
    sequences = (np.arange(2**10)[:, None] >> np.arange(10)) & 1
    p = 0.3
    total, total_sum = 0.0, 0.0
    for row in sequences:
        weight = p ** row.sum() * (1 - p) ** (10 - row.sum())
        values = row[:, None].astype(float)
        _, log_e = Wealth.start(1).after(values, np.array([p]))
        _, log_sum = Wealth.start(1, renewed=True).after(values, np.array([p]))
        total += weight * math.exp(log_e[-1, 0])
        total_sum += weight * math.exp(log_sum[-1, 0])
    assert total == pytest.approx(1, abs=1e-12)
    assert total_sum == pytest.approx(10, abs=1e-10)


@given(
    st.lists(st.tuples(UNIT, UNIT), min_size=1, max_size=30),
    st.integers(0, 30),
    st.booleans(),
)
def test_one_call_or_two_are_the_same(rows, cut, renewed) -> None:
    values, bounds = np.array(rows), np.array([0.2, 0.7])
    whole, log_e = Wealth.start(2, renewed).after(values, bounds)
    part, first = Wealth.start(2, renewed).after(values[:cut], bounds)
    part, second = part.after(values[cut:], bounds)
    assert part.n == whole.n == len(values)
    np.testing.assert_allclose(part.log_bet, whole.log_bet, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(np.concatenate([first, second]), log_e, rtol=1e-9, atol=1e-9)


@given(st.lists(UNIT, min_size=1, max_size=40))
def test_recursion_is_the_one_of_the_docstring(values) -> None:
    bound, invested, waits = 0.3, np.zeros(len(BETS)), 1.0
    for j, x in enumerate(values, start=1):
        part = math.exp(float(log_weights(np.array(j))))
        waits -= part
        invested = (invested + part) * (1 - BETS + BETS * x / bound)
    _, log_e = Wealth.start(1).after(np.array(values)[:, None], np.array([bound]))
    assert math.exp(log_e[-1, 0]) == pytest.approx(invested.mean() + waits, rel=1e-9)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_million_values_do_not_overflow(value) -> None:
    wealth, bounds, log_e = Wealth.start(1), np.array([0.01]), np.zeros((1, 1))
    with np.errstate(over="raise", invalid="raise"):
        for _ in range(100):
            wealth, log_e = wealth.after(np.full((10_000, 1), value), bounds)
            assert np.isfinite(log_e).all()
    assert wealth.n == 10**6
    assert (log_e[-1, 0] > 10**6) == (value == 1.0)


def test_quiet_past_costs_nats_not_values() -> None:
    """After a million quiet values a change is found about as fast as after none."""
    bounds = np.array([0.01])
    quiet = Wealth.start(1)
    for _ in range(100):
        quiet, _ = quiet.after(np.zeros((10_000, 1)), bounds)
    shifted = np.tile([[0.0], [1.0]], (50, 1))
    needed = [
        int(np.argmax(wealth.after(shifted, bounds)[1][:, 0] > math.log(200))) + 1
        for wealth in (Wealth.start(1), quiet)
    ]
    assert needed[0] <= 6
    assert needed[1] <= needed[0] + 10


@pytest.mark.parametrize("n", [1, 20, 400])
@pytest.mark.parametrize("delta", [0.5, 0.05, 0.001])
def test_binomial_bound_without_successes_has_a_closed_form(n, delta) -> None:
    assert binomial_upper(0, n, delta) == pytest.approx(1 - delta ** (1 / n), rel=1e-9)


@given(n=st.integers(1, 60), data=st.data())
def test_binomial_bound_covers(n, data) -> None:
    """Exact coverage: outcomes whose bound is below p have a probability of at most delta."""
    p, delta = data.draw(st.floats(0.001, 0.999)), 0.1
    missed = [
        math.comb(n, k) * p**k * (1 - p) ** (n - k)
        for k in range(n + 1)
        if binomial_upper(k, n, delta) < p
    ]
    assert math.fsum(missed) <= delta + 1e-9


def test_binomial_bound_refuses_the_impossible() -> None:
    with pytest.raises(CertifyError, match="3 successes in 2 trials"):
        binomial_upper(3, 2, 0.1)
    assert binomial_upper(2, 2, 0.1) == 1.0


def test_mean_bound_covers_and_adapts_to_the_variance() -> None:
    generator = np.random.default_rng(0)
    misses = sum(mean_upper(generator.beta(0.5, 4.5, 200), 0.1) < 0.1 for _ in range(300))
    assert misses <= 300 * 0.1
    narrow = mean_upper(np.clip(generator.normal(0.1, 0.01, 2000), 0, 1), 0.01)
    assert 0.1 < narrow < 0.106  # Hoeffding's is 0.134
    coin = (generator.random(2000) < 0.1).astype(float)
    exact = binomial_upper(int(coin.sum()), 2000, 0.01)
    assert exact < mean_upper(coin, 0.01) < exact + 0.012


@given(st.lists(UNIT, min_size=1, max_size=50), st.sampled_from([0.3, 0.01]))
def test_mean_bound_is_above_the_mean_and_ignores_order(values, delta) -> None:
    bound = mean_upper(np.array(values), delta)
    assert np.mean(values) - 1e-9 <= bound <= 1
    assert mean_upper(np.array(values[::-1]), delta) == pytest.approx(bound, abs=1e-12)
    assert mean_upper(np.array(values), delta / 2) >= bound


def test_reference_splits_its_probability() -> None:
    values = np.zeros((100, 3))
    reference = Reference.from_values(values, 0.03)
    assert reference.bounds[0] == pytest.approx(1 - 0.01 ** (1 / 100))
    assert reference.means == (0.0, 0.0, 0.0)
    assert all(b > 0 for b in reference.bounds)


def test_values_are_shares_even_of_nothing() -> None:
    values = sequence_values(
        violation=[True, False, False, True],
        outside=[1.0, 0.0, 0.0, 2.0],
        l0=[4.0, 0.0, 5.0, 2.0],
        mse=[1.0, 0.0, 3.0, 9.0],
        variance=[2.0, 0.0, 0.0, 3.0],
    )
    expected = [[1, 0.25, 0.5], [0, 0, 0], [0, 0, 1], [1, 1, 1]]
    np.testing.assert_array_equal(values, expected)


def test_values_outside_the_unit_interval_are_refused() -> None:
    with pytest.raises(CertifyError, match=r"\[0, 1\]"):
        mean_upper(np.array([0.1, np.nan]), 0.1)

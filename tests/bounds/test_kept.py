"""Limits of the information kept, against a dense grid of ratios in plain arithmetic."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from bounds_strategies import DETERMINISTIC
from hypothesis import given
from hypothesis import strategies as st
from plan_oracle import KeptOracle

from saelens_certify import bounds
from saelens_certify.bounds.kept import Kept, information_kept
from saelens_certify.errors import CertifyError

LOW, HIGH, DELTA = 0.5, 17.5, 0.05


def three(name: str, n: int) -> tuple[Any, Any, Any]:
    """Losses of baseline, M and proxy."""
    rng = np.random.default_rng([len(name), n])
    hard = rng.normal(0.0, 1.0, n)
    b, m = 10.5 + 0.5 * hard + rng.normal(0, 0.3, n), 7.0 + hard + rng.normal(0, 0.2, n)
    p = m + 0.5 + rng.normal(0, 0.3, n)
    if name == "spikes":
        p = np.where(rng.random(n) < 0.05, HIGH, p)
    elif name == "useless":
        p = b + rng.normal(0.0, 0.2, n)
    elif name == "worse":
        p = b + 2.0 + rng.normal(0.0, 0.2, n)
    elif name == "better":
        p = m - 1.5 + rng.normal(0.0, 0.2, n)
    elif name == "coins":
        b, m = HIGH - 17.0 * (rng.random(n) < 0.3), HIGH - 17.0 * (rng.random(n) < 0.8)
        p = HIGH - 17.0 * (rng.random(n) < 0.6)
    return b, m, p


def limits(found: Kept) -> tuple[float, float, float]:
    assert found.lower is not None
    assert found.upper is not None
    assert found.lower_alone is not None
    return found.lower, found.upper, found.lower_alone


@pytest.mark.parametrize("any_time", [False, True])
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("name", ["losses", "spikes", "useless", "worse", "better", "coins"])
def test_dense_grid(name: str, uniform: bool, any_time: bool):
    """All ratios outside the limits are refuted, from the ends of a wide grid on; those just inside are not."""
    b, m, p = three(name, 150)
    if uniform:
        b = np.full_like(b, 15.6)
    found = information_kept(15.6 if uniform else b, m, p, LOW, HIGH, DELTA, time_uniform=any_time)
    lower, upper, alone = limits(found)
    for limit, sign, delta in ((lower, 1, DELTA / 2), (upper, -1, DELTA / 2), (alone, 1, DELTA)):
        oracle = KeptOracle(
            b.tolist(),
            m.tolist(),
            p.tolist(),
            LOW,
            HIGH,
            math.log(1 / delta),
            sign,
            uniform,
            any_time,
        )
        beyond = np.concatenate([[0.0], np.geomspace(1e-6, 1e5, 120)])
        assert all(oracle.refuted(limit - sign * (1e-9 + d)) for d in beyond.tolist()), limit
        if abs(limit - (found.value or 0.0)) > 1e-12:
            assert not oracle.refuted(limit + sign * 1e-8), limit


def test_value_by_hand():
    b, m, p = np.full(400, 10.0), np.full(400, 6.0), np.full(400, 7.0)
    found = information_kept(b, m, p, LOW, HIGH, DELTA, baseline="unigram")
    assert found.value == pytest.approx(0.75, rel=1e-14)
    lower, upper, alone = limits(found)
    assert lower < alone < 0.75 < upper
    assert found.confidence == 0.95
    assert found.baseline == "unigram"
    assert any("independent" in text for text in found.assumptions)
    assert any("fixed before looking at their results" in text for text in found.assumptions)
    later = information_kept(b, m, p, LOW, HIGH, DELTA, time_uniform=True)
    assert any(text.startswith("Time-uniform") for text in later.assumptions)


def test_bets_by_hand():
    """Constant differences of 0.2 and 0.1 of the range, 40 sequences: every stake is the cap, W / range = 0.1 - 0.2 f."""
    n, a, c = 40, 0.1, 0.2
    m = np.full(n, LOW + 17.0 * 0.1)
    found = information_kept(m + 17.0 * c, m, m + 17.0 * (c - a), LOW, HIGH, 0.9)
    lower, _, _ = limits(found)
    threshold = math.log(2.0 / 0.9)
    # The stakes are at least sqrt(2 * 0.798 / 40) = 0.2 and grow like sqrt(i): caps bind in between.
    stakes = np.sqrt(2.0 * threshold * np.arange(1.0, n + 1.0) / n)
    w = a - c * lower
    together = sum(
        weight * np.prod(1.0 + np.minimum(stakes, cap) * w)
        for cap, weight in ((0.5, 0.25), (0.75, 0.25), (0.98, 0.5))
    )
    assert math.log(together) == pytest.approx(threshold, abs=1e-9)


@pytest.mark.parametrize(
    ("b", "m"),
    [
        (np.full(300, 7.0), np.full(300, 7.0)),
        (np.full(300, 6.0), np.full(300, 7.0)),
        (np.array([8.0, 9.0]), np.array([6.0, 6.0])),
    ],
    ids=["equal", "worse", "too few"],
)
def test_no_limits_where_the_model_is_not_shown_to_beat_the_baseline(b: Any, m: Any):
    found = information_kept(b, m, m + 0.5, LOW, HIGH, DELTA)
    assert (found.lower, found.upper, found.lower_alone) == (None, None, None)
    assert (found.value is None) == bool(b.mean() <= m.mean())


def test_limits_exist_once_the_denominator_is_established():
    """The test at infinity is one of E[baseline - M] > 0: about as sharp as a betting bound of that difference."""
    rng = np.random.default_rng(5)
    m = rng.normal(7.0, 0.5, 200)
    b = m + rng.normal(0.0, 0.5, 200)
    exists, positive = [], []
    for shift in np.linspace(0.0, 2.0, 41).tolist():
        above = np.clip(b + shift, LOW, HIGH)
        exists.append(information_kept(above, m, m, LOW, HIGH, DELTA).lower is not None)
        positive.append(bounds.betting_upper(m - above, -17.0, 17.0, DELTA / 2) < 0.0)
    assert not exists[0]
    assert not positive[0]
    assert exists == sorted(exists)
    assert abs(sum(exists) - sum(positive)) <= 2
    assert sum(exists) > 20


def test_uniform_baseline_is_at_least_as_sharp_as_a_column_of_it():
    _, m, p = three("losses", 300)
    exact = limits(information_kept(15.6, m, p, LOW, HIGH, DELTA))
    column = limits(information_kept(np.full(300, 15.6), m, p, LOW, HIGH, DELTA))
    assert column[0] < exact[0] < exact[1] < column[1]


def test_more_sequences_narrow_the_limits():
    widths = []
    for n in (200, 1000, 5000):
        lower, upper, _ = limits(information_kept(*three("losses", n), LOW, HIGH, DELTA))
        widths.append(upper - lower)
    assert widths[2] < 0.5 * widths[1] < 0.25 * widths[0]
    # Close to the normal approximation when there are many.
    b, m, p = three("losses", 5000)
    w = (b - p) - (b - p).mean() / (b - m).mean() * (b - m)
    best = 2.0 * 1.96 * w.std() / math.sqrt(5000) / (b - m).mean()
    assert best < widths[2] < 2.5 * best


CELL = st.floats(LOW, HIGH, width=32)


@DETERMINISTIC
@given(st.lists(st.tuples(CELL, CELL, CELL), min_size=1, max_size=60), st.floats(0.02, 0.9))
def test_invariants(rows: list[tuple[float, float, float]], delta: float):
    b, m, p = np.array(rows).T
    found = information_kept(b, m, p, LOW, HIGH, delta)
    # Bits or another unit.
    u, v, w = (2.0 * x - 3.0 for x in (b, m, p))
    other = information_kept(u, v, w, 2 * LOW - 3, 2 * HIGH - 3, delta)
    for name in ("value", "lower", "upper", "lower_alone"):
        ours, theirs = getattr(found, name), getattr(other, name)
        assert (ours is None) == (theirs is None) or min(abs(ours or 0), abs(theirs or 0)) == 0
        if ours is not None and theirs is not None:
            assert theirs == pytest.approx(ours, rel=1e-6, abs=1e-6)
    assert (found.lower is None) == (found.upper is None)
    if found.value is None or found.lower is None or found.upper is None:
        return
    assert found.lower <= found.value <= found.upper
    same = information_kept(b, m, m, LOW, HIGH, delta)
    assert same.value == 1.0
    if same.lower is not None and same.upper is not None:
        assert same.lower <= 1.0 <= same.upper
    nothing = information_kept(b, m, b, LOW, HIGH, delta)
    assert nothing.value == 0.0


def test_stakes_of_the_first_sequences_know_nothing_of_the_later_ones():
    """Time-uniform limits from the wealth after n sequences do not change with what is not yet there; fixed ones do."""
    b, m, p = three("losses", 400)
    at = information_kept(b[:200], m[:200], p[:200], LOW, HIGH, DELTA, time_uniform=True)
    # The later sequences add nothing where all three losses are equal: W is 0.
    b[200:] = m[200:] = p[200:] = 9.0
    later = information_kept(b, m, p, LOW, HIGH, DELTA, time_uniform=True)
    assert limits(at) == pytest.approx(limits(later), abs=1e-9)
    fixed = information_kept(b, m, p, LOW, HIGH, DELTA)
    short = information_kept(b[:200], m[:200], p[:200], LOW, HIGH, DELTA)
    assert limits(fixed)[0] != pytest.approx(limits(short)[0], abs=1e-4)


def test_limits_do_not_pass_the_measured_ratio():
    """Bets that begin small and grow, on differences that are negative first and positive later, refute a mean of 0."""
    w = np.concatenate([[-0.4], np.full(40, 0.01)]) * 17.0
    m = np.full(41, 4.0)
    b = m + 8.5
    found = information_kept(b, m, b - 0.5 * 8.5 - w, LOW, HIGH, 0.99)
    assert found.value == pytest.approx(0.5, abs=1e-12)
    assert found.lower_alone == found.value
    mirrored = information_kept(b, m, b - 0.5 * 8.5 + w, LOW, HIGH, 0.99)
    assert mirrored.lower_alone is not None
    assert mirrored.lower_alone < 0.5 - 1e-3


def test_order_is_the_given_one_and_rounding_beyond_the_interval_is_taken():
    b, m, p = three("losses", 300)
    found = information_kept(b, m, p, LOW, HIGH, DELTA)
    assert found == information_kept(b.tolist(), m.tolist(), p.tolist(), LOW, HIGH, DELTA)
    m[0], b[1] = LOW - 5e-5, HIGH + 5e-5
    assert information_kept(b, m, p, LOW, HIGH, DELTA).lower is not None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss_base": [7.0]}, ["Lengths differ", "loss_base has 1", "loss_proxy has 3"]),
        ({"loss_baseline": [9.0, 9.0]}, ["Lengths differ", "loss_baseline has 2"]),
        ({"loss_proxy": [7.0, 18.0, 7.0]}, ["loss_proxy[1]=18.0", "[B - Delta, B]"]),
        ({"loss_baseline": 20.0}, ["loss_baseline[0]=20.0"]),
        ({"loss_base": [7.0, math.nan, 7.0]}, ["loss_base[1]=nan"]),
        ({"delta": 0.0}, ["delta=0.0"]),
        ({"high": LOW}, ["high=0.5", "above low"]),
    ],
)
def test_bad_input(change: dict[str, Any], words: list[str]):
    given = {
        "loss_baseline": [9.0, 9.0, 9.0],
        "loss_base": [7.0, 7.0, 7.0],
        "loss_proxy": [7.5, 7.5, 7.5],
        "low": LOW,
        "high": HIGH,
        "delta": DELTA,
    }
    with pytest.raises(CertifyError) as caught:
        information_kept(**{**given, **change})
    for word in words:
        assert word in str(caught.value)

"""The shuffle test against its definition in exact arithmetic."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from bounds_strategies import DETERMINISTIC
from hypothesis import given
from hypothesis import strategies as st

from saelens_certify import CertifyError, bounds
from saelens_certify.bounds.means import mean_distance_up
from saelens_certify.bounds.shuffle import ShuffleTest, permutation_p_value, shuffle_test

VOCAB = 1000
HIGH = float(bounds.loss_cap(VOCAB))
WIDTH = float(bounds.loss_range(VOCAB))
LOW = HIGH - WIDTH

# Few distinct values, so that there are ties; and any.
inside = st.one_of(
    st.integers(0, 4).map(lambda k: LOW + k * WIDTH / 5),
    st.floats(LOW, HIGH, allow_nan=False),
)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n, copies = draw(st.integers(1, 8)), draw(st.integers(1, 6))
    rows = draw(
        st.lists(st.lists(inside, min_size=n, max_size=n), min_size=copies + 2, max_size=copies + 2)
    )
    every = np.array(rows)
    return every[0], every[1], every[2:]


def exact_gap(base: np.ndarray, proxy: np.ndarray) -> Fraction:
    pairs = zip(base.tolist(), proxy.tolist(), strict=True)
    return sum((abs(Fraction(a) - Fraction(b)) for a, b in pairs), Fraction(0)) / len(base)


def test_of(base: Any, sae: Any, copies: Any, **more: Any) -> ShuffleTest:
    return shuffle_test(base, sae, copies, vocab_size=VOCAB, **more)


test_of.__test__ = False  # type: ignore[attr-defined]


@DETERMINISTIC
@given(worlds())
def test_every_number_against_exact_arithmetic(world) -> None:
    base, sae, copies = world
    found = test_of(*world)
    own, others = exact_gap(base, sae), [exact_gap(base, copy) for copy in copies]
    assert found.b == sum(other <= own for other in others)
    assert found.n_permutations == len(copies)
    p = Fraction(1 + found.b, 1 + len(copies))
    assert p <= Fraction(found.p_value) <= p + Fraction(1, 10**15)
    assert found.smallest_p_value <= found.p_value <= 1.0
    control_gap = sum(others, Fraction(0)) / len(others)
    assert own <= Fraction(found.gap) <= own + Fraction(1, 10**12)
    assert control_gap - Fraction(1, 10**12) <= Fraction(found.control_gap) <= control_gap
    effect = control_gap - own
    assert effect - Fraction(1, 10**12) <= Fraction(found.effect) <= effect
    assert -WIDTH - 1e-9 <= found.lower <= found.effect
    assert Fraction(found.upper) >= effect
    assert found.upper <= WIDTH + 1e-9
    larger = max(own, control_gap)
    assert abs(found.share - float(effect / larger if larger else 0)) < 1e-9 / max(
        float(larger), 1e-3
    )
    assert -1.0 <= found.share <= 1.0


@DETERMINISTIC
@given(worlds(), st.floats(0.01, 0.5))
def test_limits_are_betting_bounds_of_the_differences(world, delta) -> None:
    base, sae, copies = world
    found = test_of(*world, delta=delta)
    difference = np.abs(base - copies).mean(axis=0) - np.abs(base - sae)
    difference = np.clip(difference, -WIDTH, WIDTH)
    upper = bounds.betting_upper(difference, -WIDTH, WIDTH, delta / 2)
    lower = -bounds.betting_upper(-difference, -WIDTH, WIDTH, delta / 2)
    assert found.upper == pytest.approx(upper, abs=1e-9)
    assert found.lower == pytest.approx(lower, abs=1e-9)
    assert found.confidence == 1 - delta


@DETERMINISTIC
@given(st.lists(st.integers(0, 5), min_size=2, max_size=24))
def test_p_values_are_exact(statistics) -> None:
    """Whichever of 1 + R exchangeable numbers is the real one: at most a share a has a p-value of at most a."""
    p_values = [
        permutation_p_value(own, statistics[:i] + statistics[i + 1 :])
        for i, own in enumerate(statistics)
    ]
    for k in range(1, len(statistics) + 1):
        a = Fraction(k, len(statistics))
        share = Fraction(
            sum(Fraction(p) <= a + Fraction(1, 10**12) for p in p_values), len(p_values)
        )
        assert share <= a
        if len(set(statistics)) == len(statistics):
            assert share == a


def test_p_values_of_round_levels_reach_them() -> None:
    """1 / 20 is significant at 0.05, not a rounding error above it."""
    for n, level in ((19, 0.05), (99, 0.01), (9, 0.1), (199, 0.005), (4, 0.2)):
        assert permutation_p_value(0.0, np.ones(n)) == level


def test_ties_are_counted_where_rounding_hides_them() -> None:
    """A rearrangement has the same gap; a mean in floating point says that it is smaller, or larger."""
    rng = np.random.default_rng(0)
    base = np.full(50, 4.0)
    hidden = 0
    for _ in range(100):
        sae = rng.uniform(LOW, HIGH, 50)
        copy = rng.permutation(sae)
        hidden += np.abs(base - copy).mean() > np.abs(base - sae).mean()
        assert test_of(base, sae, copy[None]).p_value == 1.0
    assert hidden > 10


def test_what_the_numbers_depend_on() -> None:
    rng = np.random.default_rng(1)
    base = rng.uniform(3, 6, 30)
    sae, copies = base + rng.normal(0, 0.5, 30), base + rng.normal(0, 0.6, (7, 30))
    found = test_of(base, sae, copies)
    order = rng.permutation(30)
    for same in (
        test_of(base, sae, copies[::-1]),
        test_of(base[order], sae[order], copies[:, order]),
    ):
        assert (same.p_value, same.b, same.gap) == (found.p_value, found.b, found.gap)
        assert same.effect == pytest.approx(found.effect, abs=1e-12)
        # Limits depend on the order of the sequences, not on that of the copies.
        assert same.upper == pytest.approx(found.upper, abs=0.2)
    # A better SAE, all else the same.
    better = test_of(base, base + 0.5 * (sae - base), copies)
    assert better.p_value <= found.p_value
    assert better.effect > found.effect
    assert better.lower > found.lower
    assert better.share > found.share


def test_extremes() -> None:
    base = np.full(40, LOW)
    perfect = test_of(base, base, np.full((19, 40), HIGH))
    assert (perfect.p_value, perfect.b, perfect.share) == (0.05, 0, 1.0)
    assert perfect.effect == pytest.approx(WIDTH)
    assert 0.5 * WIDTH < perfect.lower <= perfect.effect
    worst = test_of(base, np.full(40, HIGH), np.stack([base] * 19))
    assert (worst.p_value, worst.b, worst.share) == (1.0, 19, -1.0)
    assert worst.upper < -0.5 * WIDTH
    same = test_of(base, base, np.stack([base] * 3))
    assert (same.p_value, same.effect, same.share) == (1.0, 0.0, 0.0)


def test_losses_that_rounding_took_out_of_their_interval() -> None:
    base = np.full(5, LOW - 5e-5)
    found = test_of(base, np.full(5, HIGH + 5e-5), np.full((2, 5), LOW))
    assert found.gap == pytest.approx(WIDTH)
    assert found.control_gap == 0.0


def test_members_of_a_cluster_count_once() -> None:
    rng = np.random.default_rng(2)
    base = rng.uniform(3, 6, 25)
    sae, copies = base + rng.normal(0, 0.3, 25), base + rng.normal(0, 1.0, (4, 25))
    once = test_of(base, sae, copies)
    often = np.repeat(np.arange(25), rng.integers(1, 5, 25))
    found = test_of(base[often], sae[often], copies[:, often], clusters=often.tolist())
    for name in ("p_value", "b", "n_permutations"):
        assert getattr(found, name) == getattr(once, name)
    for name in ("gap", "control_gap", "effect", "lower", "upper"):
        assert getattr(found, name) == pytest.approx(getattr(once, name), abs=1e-9)
    pretended = test_of(base[often], sae[often], copies[:, often])
    assert pretended.upper - pretended.lower < found.upper - found.lower


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"loss_controls": np.empty((0, 3))}, r"R >= 1 random copies.*0\.05 takes at least 19"),
        ({"loss_controls": np.full(3, 4.0)}, r"loss_controls has shape \(3,\)"),
        ({"loss_controls": np.full((2, 4), 4.0)}, r"loss_controls has shape \(2, 4\)"),
        ({"loss_sae": [4.0, 4.0]}, r"loss_sae has shape \(2,\)"),
        ({"loss_base": [], "loss_sae": [], "loss_controls": np.empty((2, 0))}, "at least one"),
        ({"loss_base": [4.0, 4.0, np.nan]}, r"loss_base\[2\]=nan"),
        ({"loss_sae": [4.0, 40.0, 4.0]}, r"loss_sae\[1\]=40\.0.*in \[B - Delta, B\]"),
        ({"loss_controls": [[4.0, 4.0, -1.0]]}, r"loss_controls\[0, 2\]=-1\.0"),
        ({"vocab_size": 1}, "vocab_size"),
        ({"vocab_size": [VOCAB, VOCAB]}, "one number each"),
        ({"alpha": 1.0}, "alpha"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"clusters": ["a", "b"]}, "Lengths differ"),
    ],
)
def test_impossible_values(change, match) -> None:
    given = {
        "loss_base": [4.0, 4.0, 4.0],
        "loss_sae": [4.0, 4.0, 4.0],
        "loss_controls": np.full((2, 3), 5.0),
        "vocab_size": VOCAB,
    }
    with pytest.raises(CertifyError, match=match):
        shuffle_test(**{**given, **change})


def test_p_values_need_copies() -> None:
    with pytest.raises(CertifyError, match=r"at least one; with R copies no p-value is below"):
        permutation_p_value(0.0, [])
    with pytest.raises(CertifyError, match=r"controls\[1\]=inf"):
        permutation_p_value(0.0, [1.0, np.inf])
    with pytest.raises(CertifyError, match="statistic has shape"):
        permutation_p_value([0.0], [1.0])  # type: ignore[arg-type]


@DETERMINISTIC
@given(st.lists(inside, min_size=1, max_size=8), st.randoms())
def test_mean_distances_are_those_of_exact_arithmetic(values, random) -> None:
    a = np.array(values)
    b = np.array(random.sample(values, len(values)))
    exact = exact_gap(a, b)
    found = Fraction(mean_distance_up(a, b))
    assert exact <= found <= exact * (1 + Fraction(1, 2**50))
    with pytest.raises(CertifyError, match="Lengths differ"):
        mean_distance_up(a, np.append(b, 1.0))

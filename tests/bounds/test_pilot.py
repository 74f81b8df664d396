"""Plans from pilots: against the bounds themselves, exact where nothing is random, calibrated where something is."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from bounds_strategies import DETERMINISTIC
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from saelens_certify import bounds
from saelens_certify.bounds.joint import Losses
from saelens_certify.bounds.pilot import Plan, plan, plan_mean, plan_published
from saelens_certify.bounds.planner import PROFILES
from saelens_certify.bounds.resampling import (
    LONGEST,
    METHODS,
    Goal,
    Stream,
    draws_needed,
    rules,
)
from saelens_certify.bounds.sharp import SHARP
from saelens_certify.errors import CertifyError

Array = NDArray[np.float64]
HIGH, DELTA, V = 17.6, 0.05, 50257
B, WIDTH = float(bounds.loss_cap(V)), float(bounds.loss_range(V))


def losses_law(rng: np.random.Generator, n: int) -> Array:
    return 7.0 + rng.uniform(-1.0, 1.0, (3, n)).sum(axis=0)


def spikes_law(rng: np.random.Generator, n: int) -> Array:
    return np.where(rng.random(n) < 0.05, HIGH, losses_law(rng, n))


def public(method: str, x: Array, complexity: float = 0.0) -> Array:
    """The bound that a method plans, from the library's own functions: after the last value, or at log_times."""
    name, _, kind = method.partition("_")
    if kind == "sequence":
        return getattr(bounds, method)(x, 0.0, HIGH, DELTA, complexity=complexity)
    options = {"bets": "constant"} if kind == "constant" else {}
    upper = getattr(bounds, f"{name}_upper")
    return np.array([upper(x, 0.0, HIGH, DELTA, complexity=complexity, **options)])


@pytest.mark.parametrize("complexity", [0.0, 5.0])
@pytest.mark.parametrize("method", METHODS)
def test_rules_are_the_bounds(method: str, complexity: float):
    rule = rules(0.0, HIGH, DELTA, complexity)[method]
    rng = np.random.default_rng(1)
    for draw in (losses_law, spikes_law):
        for n in (2, 37, 700):
            x = draw(rng, n)
            found = public(method, x, complexity)
            if rule.first is None:
                assert min(rule.value(x), HIGH) == pytest.approx(found[-1], abs=1e-9)
            if found[-1] < HIGH - 1e-6:
                assert _reaches(method, rule, x, found[-1] + 1e-8)
                assert not _reaches(method, rule, x, found[-1] - 1e-8)
            if rule.first is not None:
                for target in (8.0, 9.0, 12.0, HIGH - 1e-3):
                    below = np.flatnonzero(found <= target)
                    expected = bounds.log_times(n)[below[0]] if below.size else None
                    assert rule.first(x, Goal(target, None)) == expected


def _reaches(method: str, rule: Any, x: Array, value: float) -> bool:
    if method.endswith("sequence"):
        return rule.first(x, Goal(value, None)) is not None
    return rule.reached(x, value)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("margin", [0.5, 2.0])
def test_margins_are_those_of_the_bounds(method: str, margin: float):
    """At the planned N, on the same stream, the bound is as near to the mean as asked; at 0.8 N it is not."""
    law = losses_law(np.random.default_rng(2), 200)
    rule = rules(0.0, HIGH, DELTA, 0.0, targeted=False)[method]
    stream = Stream(law, np.random.default_rng(3))
    n = int(draws_needed(stream, rule, Goal(None, margin)))
    for count, near in ((n, True), (int(0.8 * n), False)):
        x = stream.first(count)
        assert (public(method, x)[-1] - x.mean() <= margin + 1e-9) == near


@pytest.mark.parametrize("method", METHODS)
def test_nothing_random(method: str):
    """Equal values: every replicate is the same, and the count is exact or within a 64th or an eighth of a doubling."""
    x = np.full(50, 7.0)
    found = plan_mean(x, 0.0, HIGH, DELTA, target=7.5, method=method, replicates=5)
    assert found.n_low == found.n == found.n_high
    n = int(found.n)

    def bound(count: int) -> float:
        return float(public(method, np.full(count, 7.0))[-1])

    assert bound(n) <= 7.5
    step = 1 if method in ("hoeffding", "bernstein") else max(1, n // 9)
    assert bound(n - step) > 7.5
    if method == "hoeffding":
        assert n == math.ceil((HIGH / 0.5) ** 2 * math.log(20.0) / 2.0)


def test_beyond_the_longest_stream():
    """Hoeffding's margin is proportional to 1 / sqrt(N), so that extrapolation is exact."""
    x = losses_law(np.random.default_rng(0), 100)
    found = plan_mean(x, 0.0, HIGH, DELTA, margin=0.02, method="hoeffding", replicates=3)
    exact = (HIGH / 0.02) ** 2 * math.log(20.0) / 2.0
    assert found.extrapolated
    assert found.n > LONGEST
    assert found.n == pytest.approx(exact, rel=1e-5)
    betting = plan_mean(x, 0.0, HIGH, DELTA, margin=0.004, method="betting", replicates=3)
    assert betting.extrapolated
    drawn = x[np.random.default_rng(1).integers(x.size, size=int(betting.n))]
    assert public("betting", drawn)[-1] - drawn.mean() == pytest.approx(0.004, rel=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_out_of_reach(method: str):
    x = losses_law(np.random.default_rng(4), 100)
    found = plan_mean(x, 0.0, HIGH, DELTA, target=6.0, method=method, replicates=8)
    assert (found.n, found.n_low, found.n_high) == (math.inf, math.inf, math.inf)
    assert found.reachable == 0.0
    assert not found.extrapolated
    unsure = plan_mean(x, 0.0, HIGH, DELTA, target=float(x.mean()), method=method, replicates=12)
    assert unsure.n_high == math.inf
    assert 0.0 < unsure.reachable < 1.0


@pytest.mark.parametrize("method", METHODS)
def test_reached_already(method: str):
    x = losses_law(np.random.default_rng(5), 2000)
    found = plan_mean(x, 0.0, HIGH, DELTA, target=12.0, method=method, replicates=9)
    assert found.n_high < 500
    assert public(method, x)[-1] < 12.0
    at_once = plan_mean(x, 0.0, HIGH, DELTA, target=HIGH, method=method, replicates=3)
    assert (at_once.n_low, at_once.n, at_once.n_high) == (1, 1, 1)


@pytest.mark.parametrize("draw", [losses_law, spikes_law])
@pytest.mark.parametrize(("method", "room"), [("betting", 1.0), ("betting_sequence", 1.0), ("hoeffding", 2.0)])  # fmt: skip
def test_calibration(draw: Callable[..., Array], method: str, room: float):
    """On fresh samples of the planned size the bound reaches the target in about half of the draws.

    The interval covers the right N, the median over fresh streams, at least as often as it says.
    """
    target = float(draw(np.random.default_rng(8), 10**6).mean()) + room
    rule = rules(0.0, HIGH, DELTA, 0.0)[method]
    whole = draw(np.random.default_rng(9), 200_000)
    fresh = [
        draws_needed(Stream(whole, np.random.default_rng([10, i])), rule, Goal(target, None))
        for i in range(150)
    ]
    right = float(np.median(fresh))
    covered, inside, reached = [], [], []
    for i in range(25):
        pilot = draw(np.random.default_rng([11, i]), 200)
        found = plan_mean(
            pilot, 0.0, HIGH, DELTA, target=target, method=method, seed=i, replicates=60
        )
        covered.append(found.n_low <= right <= found.n_high)
        inside.append(np.mean([found.n_low <= n <= found.n_high for n in fresh]))
        for k in range(8):
            x = draw(np.random.default_rng([12, i, k]), int(found.n))
            reached.append(_reaches(method, rule, x, target))
    # 0.8 less three standard deviations of 25 trials, and of the pilots' own spread.
    assert np.mean(covered) >= 0.8 - 3.0 * math.sqrt(0.8 * 0.2 / 25)
    assert np.mean(inside) >= 0.65
    assert 0.3 < np.mean(reached) < 0.7


def pilot_losses(n: int, constant: bool = False, violated: bool = False) -> Losses:
    rng = np.random.default_rng(n)
    base = np.full(n, 7.0) if constant else losses_law(rng, n)
    sae = base + (0.25 if constant else rng.uniform(0.0, 0.5, n))
    violation = np.full(n, violated * 1.0) if constant else (rng.random(n) < 0.04) * 1.0
    return Losses.check(
        loss_base=base,
        loss_sae=sae,
        loss_pool=sae + 0.1 * violation,
        violation=violation,
        loss_unigram=10.5 + 0.5 * (base - 7.0),
        vocab_size=V,
        alpha=0.5,
    )


SIZES: dict[str, Any] = {"vocab_size": V, "dict_size": 24_576, "pool_size": 20_000}


@pytest.mark.parametrize("name", PROFILES)
def test_published_against_sequences_needed(name: str):
    for constant, violated, target in (
        (True, False, 12.0),
        (True, True, 40.0),
        (False, False, 12.0),
    ):
        losses = pilot_losses(400, constant, violated)
        m = losses.measured
        needed = float(
            bounds.sequences_needed(
                target,
                bound=name,
                risk_base=m.risk_base,
                risk_pool=m.risk_pool,
                gap=m.gap,
                eta=m.eta,
                **SIZES,
            )
        )
        found = plan_published(losses, bound=name, target=target, replicates=60, **SIZES)
        if constant:
            # Beyond the longest stream to a few parts in a hundred thousand.
            assert found.n == pytest.approx(needed, rel=1e-4 if needed > LONGEST else 0)
            assert found.n_low == found.n_high
        else:
            assert found.n_low <= needed <= found.n_high
            assert found.n == pytest.approx(needed, rel=0.1)


def test_published_margin_is_the_deviations():
    found = plan_published(pilot_losses(50), bound="direct_base", margin=1.0, replicates=3, **SIZES)
    assert found.n == math.ceil(WIDTH**2 * math.log(20.0) / 2.0)
    assert found.target is None


def test_published_mean_is_that_of_the_certificate():
    """What is resampled has the certificate's floor as its mean: at the floor half of the replicates are out of reach."""
    losses = pilot_losses(300)
    m = losses.measured
    for name in PROFILES:
        floor = bounds.asymptotic_floor(
            bound=name, risk_base=m.risk_base, risk_pool=m.risk_pool, gap=m.gap, eta=m.eta, **SIZES
        )
        found = plan_published(losses, bound=name, target=float(floor), replicates=60, **SIZES)
        assert 0.25 < found.reachable < 0.75, name


@pytest.mark.parametrize("name", [*PROFILES, *SHARP])
def test_every_bound_by_name(name: str):
    losses = pilot_losses(120)
    target = 3.0 if name.startswith("excess") else None
    found = plan(name, losses, target=target, replicates=5, **SIZES)
    assert found.bound == name
    assert found.delta == DELTA
    assert found.pilot_size == 120
    assert found.n_low <= found.n <= found.n_high < math.inf
    if target is None:
        verdict = 0.0 if name == "sharp_unigram" else losses.baseline
        assert found.target == math.nextafter(verdict, -math.inf)
    else:
        with pytest.raises(CertifyError, match="give target= or margin="):
            plan(name, losses, **SIZES)
    if name in SHARP:
        later = plan(name, losses, target=target, replicates=5, time_uniform=True, **SIZES)
        assert later.n < math.inf
    else:
        with pytest.raises(CertifyError, match="no time-uniform form"):
            plan(name, losses, target=target, time_uniform=True, **SIZES)


def test_a_sharp_plan_is_what_the_sharp_bound_needs():
    """From a large pilot, against the certificate itself on many fresh draws of the planned size."""
    losses = pilot_losses(3000)
    found = plan("sharp_betting", losses, target=9.0, replicates=60, **SIZES)
    z = losses.joint().samples
    rng = np.random.default_rng(0)
    values = [
        bounds.betting_upper(z[rng.integers(z.size, size=int(found.n))], B - WIDTH, B, DELTA)
        for _ in range(60)
    ]
    assert 0.25 < np.mean(np.array(values) <= 9.0) < 0.75
    occam = plan("sharp_occam", losses, target=9.0, replicates=9, **SIZES)
    assert occam.n > found.n
    two_sided = plan("excess_sae_two_sided", losses, target=0.5, replicates=9, **SIZES)
    one_sided = plan("excess_sae", losses, target=0.5, delta=DELTA / 2, replicates=9, **SIZES)
    assert dataclasses.replace(one_sided, bound=two_sided.bound, delta=DELTA) == two_sided


@pytest.mark.parametrize("name", ["u_sae", "direct_base", "sharp_betting", "excess_sae"])
def test_clusters_count_as_one(name: str):
    losses = pilot_losses(60)
    pairs = dataclasses.replace(losses, clusters=tuple(f"cluster {i // 2}" for i in range(60)))
    found = plan(name, pairs, target=16.0, replicates=3, **SIZES)
    assert found.pilot_size == 30
    assert found.n < math.inf


@DETERMINISTIC
@given(
    st.lists(st.floats(0.0, 10.0), min_size=2, max_size=30),
    st.sampled_from(METHODS),
    st.integers(0, 10**6),
)
def test_invariants(values: list[float], method: str, seed: int):
    def found(target: float, complexity: float = 0.0) -> Plan:
        return plan_mean(
            values, 0.0, 10.0, 0.1, target=target, method=method, complexity=complexity, seed=seed,
            replicates=3,
        )  # fmt: skip

    near, far = found(9.5), found(9.8)
    assert near == found(9.5)
    assert 1 <= near.n_low <= near.n <= near.n_high
    assert far.n_low <= near.n_high
    assert near.n == math.inf or isinstance(near.n, int)
    assert found(9.5, complexity=3.0).n_high >= near.n_low
    assert 0.0 <= near.reachable <= 1.0
    assert (1.0 - near.unseen) ** len(values) == pytest.approx(0.05)
    assert near.unseen_cost == pytest.approx(10.0 * near.unseen)


def test_rule_of_three():
    found = plan_mean(np.full(200, 7.0), 0.0, 18.0, DELTA, target=9.0, replicates=2)
    assert found.unseen == pytest.approx(3.0 / 200, rel=0.02)
    assert found.unseen_cost == pytest.approx(0.27, rel=0.02)


def test_time_of_a_large_plan():
    x = losses_law(np.random.default_rng(6), 200)
    begin = time.process_time()
    found = plan_mean(x, 0.0, HIGH, DELTA, margin=0.008, replicates=50)
    assert 50_000 < found.n < LONGEST
    # A quarter of the default number of replicates in well under a quarter of ten seconds, with room for slow machines.
    assert time.process_time() - begin < 10.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "magic"}, ["method='magic' is unknown", "betting_sequence"]),
        ({"target": None}, ["target=None and margin=None", "give one"]),
        ({"margin": 1.0}, ["target=9.0 and margin=1.0"]),
        ({"target": None, "margin": 0.0}, ["margin=0.0", "above 0"]),
        ({"target": math.nan}, ["target=nan"]),
        ({"samples": [7.0]}, ["a pilot needs at least 2"]),
        ({"samples": [7.0, 19.0]}, ["samples[1]=19.0"]),
        ({"delta": 1.0}, ["delta=1.0"]),
        ({"complexity": -1.0}, ["complexity=-1.0"]),
        ({"replicates": 0}, ["replicates=0.0"]),
    ],
)
def test_bad_input(change: dict[str, Any], words: list[str]):
    given = {"samples": [7.0, 8.0], "low": 0.0, "high": HIGH, "delta": DELTA, "target": 9.0}
    with pytest.raises(CertifyError) as caught:
        plan_mean(**{**given, **change})
    for word in words:
        assert word in str(caught.value)


def test_bad_names():
    losses = pilot_losses(20)
    for call in (
        lambda: plan("u_sea", losses, target=9.0, **SIZES),
        lambda: plan_published(losses, bound="u_sea", target=9.0, **SIZES),
    ):
        with pytest.raises(CertifyError, match="bound='u_sea' is unknown"):
            call()
    with pytest.raises(CertifyError, match="needs dict_size"):
        plan("sharp_occam", losses, vocab_size=V)
    with pytest.raises(CertifyError, match="dict_size is missing"):
        plan("u_sae_occam", losses, vocab_size=V)
    assert "bound" in {f.name for f in dataclasses.fields(Plan)}

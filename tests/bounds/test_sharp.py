"""The joint variable and the bounds built on it, against plain arithmetic with fractions."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saelens_certify import bounds
from saelens_certify.bounds.joint import Losses
from saelens_certify.bounds.sharp import SHARP
from saelens_certify.bounds.stopping import check_until
from saelens_certify.bounds.times import looks
from saelens_certify.errors import CertifyError

VOCAB, ALPHA, DELTA = 1000, 0.5, 0.05
CAP = float(bounds.loss_cap(VOCAB, ALPHA))
WIDTH = float(bounds.loss_range(VOCAB, ALPHA))
LOW = CAP - WIDTH


@st.composite
def rows(draw: st.DrawFn, most: int = 30) -> dict[str, list[float]]:
    loss = st.floats(LOW + 1e-9, CAP - 1e-9)
    n = draw(st.integers(1, most))
    base, sae = (draw(st.lists(loss, min_size=n, max_size=n)) for _ in range(2))
    violation = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    pool = [draw(loss) if v else s for v, s in zip(violation, sae, strict=True)]
    return {
        "loss_base": base,
        "loss_sae": sae,
        "loss_pool": pool,
        "violation": [float(v) for v in violation],
    }


def check(evidence: dict[str, list[float]], clusters: tuple[str, ...] | None = None) -> Losses:
    return Losses.check(**evidence, vocab_size=VOCAB, alpha=ALPHA, clusters=clusters)


def drawn(n: int, seed: int = 0, eta: float = 0.1) -> Losses:
    rng = np.random.default_rng(seed)
    base = rng.uniform(4.0, 6.0, n)
    sae = base + rng.uniform(-0.1, 0.3, n)
    violation = (rng.random(n) < eta).astype(float)
    pool = np.where(violation > 0, sae + rng.uniform(0.0, 0.5, n), sae)
    return Losses.check(
        loss_base=base, loss_sae=sae, loss_pool=pool, violation=violation,
        vocab_size=VOCAB, alpha=ALPHA, loss_unigram=rng.uniform(5.0, 9.0, n),
    )  # fmt: skip


@given(rows())
def test_the_joint_variable_is_the_sum_of_its_terms_up_to_the_cap(evidence: dict[str, list[float]]):
    losses = check(evidence)
    for mismatch in ("charged", "measured"):
        found = losses.joint(mismatch)
        assert (found.low, found.high) == (losses.low, losses.high)
        for z, base, sae, pool, v in zip(found.samples, *evidence.values(), strict=True):
            third = WIDTH * v if mismatch == "charged" else abs(sae - pool)
            exact = Fraction(pool) + abs(Fraction(base) - Fraction(sae)) + Fraction(third)
            exact = min(exact, Fraction(CAP))
            # Never below the exact value, hence never below the loss of M, and hardly above.
            assert Fraction(base) <= Fraction(float(z))
            assert exact - Fraction(1, 10**9) <= Fraction(float(z)) <= exact + Fraction(1, 10**9)
            if mismatch == "charged" and v:
                assert z == CAP


@given(rows())
def test_parts_are_nonnegative_and_add_up(evidence: dict[str, list[float]]):
    losses = check(evidence)
    for mismatch in ("charged", "measured"):
        parts = losses.parts(mismatch)
        assert list(parts) == ["risk_pool", "gap", "mismatch"]
        assert all((part >= 0).all() for part in parts.values())
        np.testing.assert_allclose(
            sum(parts.values()), losses.joint(mismatch).samples, rtol=0, atol=1e-9
        )


@given(rows())
def test_measured_mismatch_is_never_worse_than_charged(evidence: dict[str, list[float]]):
    losses = check(evidence)
    assert (losses.joint("measured").samples <= losses.joint("charged").samples + 1e-9).all()


@given(rows(), st.integers(0, 2**32 - 1))
def test_a_larger_pool_never_has_a_larger_joint_variable(
    evidence: dict[str, list[float]], seed: int
):
    """So the smallest tau is the best for a fixed pool."""
    small = check(evidence)
    keep = np.random.default_rng(seed).random(len(small.base)) < 0.5
    large = dataclasses.replace(
        small,
        violation=np.where(keep, small.violation, 0.0),
        pool=np.where(keep, small.pool, small.sae),
    )
    assert (large.joint().samples <= small.joint().samples).all()


@given(rows())
def test_excess_is_the_difference_and_rounded_to_the_safe_side(evidence: dict[str, list[float]]):
    losses = check(evidence)
    for of in ("sae", "pool"):
        upper, lower = losses.excess(of).samples, -losses.excess(of, -1).samples
        for high, low, base, proxy in zip(
            upper, lower, evidence["loss_base"], evidence[f"loss_{of}"], strict=True
        ):
            exact = Fraction(proxy) - Fraction(base)
            assert Fraction(float(low)) <= exact <= Fraction(float(high))
            assert high - low < 1e-12


@pytest.mark.parametrize("name", SHARP)
@pytest.mark.parametrize("time_uniform", [False, True])
def test_values_are_those_of_the_inequalities(name: str, time_uniform: bool):
    """Each bound is one call of a bound of a mean, on the variable written out here."""
    losses, nats = drawn(150), 3.0
    base, sae, pool, v = losses.base, losses.sae, losses.pool, losses.violation
    unigram = losses.unigram
    assert unigram is not None
    charged = np.where(v > 0, CAP, np.minimum(pool + np.abs(base - sae), CAP))
    measured = np.minimum(pool + np.abs(base - sae) + np.abs(sae - pool), CAP)
    samples, low, high = {
        "sharp_betting": (charged, LOW, CAP),
        "sharp_bernstein": (charged, LOW, CAP),
        "sharp_occam": (charged, LOW, CAP),
        "sharp_measured": (measured, LOW, CAP),
        "sharp_direct_base": (base, LOW, CAP),
        "sharp_direct_sae": (sae, LOW, CAP),
        "sharp_direct_pool": (pool, LOW, CAP),
        "sharp_unigram": (charged - unigram, -WIDTH, WIDTH),
        "excess_sae": (sae - base, -WIDTH, WIDTH),
        "excess_pool": (pool - base, -WIDTH, WIDTH),
        "excess_sae_two_sided": (sae - base, -WIDTH, WIDTH),
        "excess_pool_two_sided": (pool - base, -WIDTH, WIDTH),
    }[name]
    method = "bernstein" if name == "sharp_bernstein" else "betting"
    level = DELTA / 2 if "two_sided" in name else DELTA
    complexity = nats if name == "sharp_occam" else 0.0
    times = looks(150)

    def expected(x: np.ndarray, a: float, b: float) -> float:
        if time_uniform:
            sequence = getattr(bounds, f"{method}_sequence")
            return float(sequence(x, a, b, level, times, complexity=complexity)[-1])
        return getattr(bounds, f"{method}_upper")(x, a, b, level, complexity=complexity)

    found = bounds.sharp_value(name, losses, DELTA, complexity=nats, time_uniform=time_uniform)
    clipped = np.clip(samples, losses.low if low == LOW else low, high)
    assert found.value == pytest.approx(
        expected(clipped, losses.low if low == LOW else low, high), abs=1e-9
    )
    assert math.fsum(found.terms.values()) == pytest.approx(found.value, abs=1e-12)
    if "two_sided" in name:
        assert found.lower == pytest.approx(-expected(-samples, -high, -low), abs=1e-9)
        assert found.lower is not None
        assert found.lower < found.value
    else:
        assert found.lower is None


def test_the_sharp_bound_needs_a_fraction_of_the_sequences():
    """What it is for: at N = 100 below what the published certificate reaches at N = 1,200."""
    published = drawn(1200, eta=0.0)
    constants = {"vocab_size": VOCAB, "dict_size": 10, "pool_size": 10}
    u_sae = bounds.certificates(published.measured, **constants)["u_sae"].value
    assert bounds.sharp_value("sharp_betting", drawn(100, eta=0.0), DELTA).value < u_sae


@pytest.mark.parametrize("name", SHARP)
def test_a_sequence_is_never_above_its_first_value_and_ends_at_the_time_uniform_bound(name: str):
    losses = drawn(90)
    values = bounds.sharp_sequence(name, losses, DELTA, looks(90))
    assert (np.diff(values) <= 0).all()
    assert values[-1] == bounds.sharp_value(name, losses, DELTA, time_uniform=True).value


def test_statements_say_what_they_rest_on():
    fixed = bounds.sharp_certificates(drawn(50), dict_size=20, pool_size=15, delta=DELTA)
    anytime = bounds.sharp_certificates(
        drawn(50), dict_size=20, pool_size=15, delta=DELTA, time_uniform=True
    )
    assert fixed.keys() == anytime.keys() == SHARP.keys()
    for name in SHARP:
        assert any("fixed before looking" in text for text in fixed[name].assumptions)
        assert any("Time-uniform" in text for text in anytime[name].assumptions)
        assert fixed[name].confidence == anytime[name].confidence == 1 - DELTA
        if name != "sharp_bernstein":  # two different inequalities
            assert fixed[name].value <= anytime[name].value + 1e-9
    assert "all pools" in fixed["sharp_occam"].theorem
    assert not any("pool were fixed" in text for text in fixed["sharp_occam"].assumptions)
    assert fixed["sharp_occam"].value > fixed["sharp_betting"].value
    assert not any("pool" in text for text in fixed["sharp_direct_base"].assumptions)


def test_clusters_count_as_one():
    """Two copies of every sequence in one cluster say what one copy says, and no more."""
    losses = drawn(40)
    names = tuple(f"c{i:03d}" for i in range(40) for _ in range(2))
    doubled = Losses.check(
        loss_base=np.repeat(losses.base, 2), loss_sae=np.repeat(losses.sae, 2),
        loss_pool=np.repeat(losses.pool, 2), violation=np.repeat(losses.violation, 2),
        vocab_size=VOCAB, alpha=ALPHA, clusters=names,
        loss_unigram=np.repeat(losses.unigram, 2),  # pyright: ignore[reportArgumentType, reportCallIssue]
    )  # fmt: skip
    for name in SHARP:
        once = bounds.sharp_value(name, losses, DELTA)
        assert bounds.sharp_value(name, doubled, DELTA).value == pytest.approx(once.value, abs=1e-9)


def test_best_threshold_is_the_smallest_of_its_thresholds():
    rng = np.random.default_rng(3)
    rarest = rng.integers(0, 40, 200)
    base = rng.uniform(4.0, 5.0, 200)
    sizes = {1: 29, 2: 25, 4: 20, 8: 10, 16: 3}
    by_hand = {}
    for tau, size in sizes.items():
        violation = rarest < tau
        losses = Losses.check(
            loss_base=base, loss_sae=base + 0.1, loss_pool=base + 0.1, violation=violation,
            vocab_size=VOCAB, alpha=ALPHA,
        )  # fmt: skip
        nats = math.log(math.comb(30, size))
        by_hand[tau] = bounds.sharp_value(
            "sharp_occam", losses, DELTA / len(sizes), complexity=nats
        ).value
    losses = Losses.check(
        loss_base=base, loss_sae=base + 0.1, loss_pool=base + 0.1, violation=rarest < 1,
        vocab_size=VOCAB, alpha=ALPHA,
    )  # fmt: skip
    best = bounds.best_threshold(losses, rarest, sizes, dict_size=30, delta=DELTA)
    assert best.tau == min(by_hand, key=by_hand.__getitem__)
    assert best.bound.value == pytest.approx(by_hand[best.tau], abs=1e-9)
    assert best.pool_size == sizes[best.tau]


def test_thresholds_double_until_the_pool_is_empty():
    counts = [0, 1, 1, 3, 3, 9, 100]
    assert bounds.doubling_thresholds(counts, 1) == {1: 6, 2: 4, 4: 2, 16: 1}
    assert bounds.doubling_thresholds(counts, 3) == {3: 4, 6: 2, 12: 1}


def test_rarest_and_violation_must_agree():
    losses = drawn(20, eta=1.0)
    with pytest.raises(CertifyError, match="one calibration"):
        bounds.best_threshold(losses, np.full(20, 5), {1: 3}, dict_size=4, delta=DELTA)
    with pytest.raises(CertifyError, match="rarest of shape"):
        bounds.best_threshold(losses, np.zeros(3), {1: 3}, dict_size=4, delta=DELTA)


def test_stop_is_the_first_look_below_the_baseline():
    losses = drawn(120, eta=0.0)
    stop = bounds.first_stop(losses, "nonvacuous", DELTA)
    assert stop is not None
    values = bounds.sharp_sequence("sharp_betting", losses, DELTA, np.arange(1, 65))
    first = int(np.argmax(values < losses.baseline))
    assert (stop.reason, stop.n, stop.value) == ("nonvacuous", first + 1, values[first])
    target = bounds.first_stop(losses, 6.5, DELTA)
    assert target is not None
    assert (target.reason, target.value <= 6.5, target.n > stop.n) == ("target", True, True)
    assert bounds.first_stop(losses, 4.0, DELTA) is None


def test_futile_needs_a_floor_above_the_baseline():
    hopeless = drawn(120, eta=0.98)
    stop = bounds.first_stop(hopeless, "decided", DELTA)
    assert stop is not None
    assert stop.reason == "futile"
    assert stop.value >= hopeless.baseline
    assert bounds.first_stop(hopeless, "nonvacuous", DELTA) is None
    # With the mismatch measured the same evidence certifies.
    measured = bounds.first_stop(hopeless, "decided", DELTA, name="sharp_measured")
    assert measured is not None
    assert measured.reason == "nonvacuous"


@settings(max_examples=20)
@given(st.integers(1, 60), st.integers(0, 1000))
def test_more_evidence_never_takes_a_stop_back(n: int, seed: int):
    losses = drawn(80, seed)

    def first(m: int) -> Losses:
        return dataclasses.replace(
            losses, base=losses.base[:m], sae=losses.sae[:m], pool=losses.pool[:m],
            violation=losses.violation[:m],
        )  # fmt: skip

    before = bounds.first_stop(first(n), "nonvacuous", DELTA)
    after = bounds.first_stop(losses, "nonvacuous", DELTA)
    if before is not None:
        assert after == before


def test_p_values_and_bounds_agree():
    """The claim "the mean is at least c" is rejected at delta exactly where the bound is below c."""
    x = drawn(60).joint()
    for time_uniform in (False, True):
        if time_uniform:
            bound = float(bounds.betting_sequence(x.samples, x.low, x.high, DELTA, looks(60))[-1])
        else:
            bound = bounds.betting_upper(x.samples, x.low, x.high, DELTA)

        def p(claim: float, time_uniform: bool = time_uniform) -> float:
            return bounds.betting_p_value(
                x.samples, x.low, x.high, claim, DELTA, time_uniform=time_uniform
            )

        assert p(bound + 1e-6) <= DELTA < p(bound - 1e-6)
        assert p(x.high) <= p(bound)
        assert p(float(np.mean(x.samples)) - 0.5) > 0.5
        assert p(x.low - 1.0) == 1.0


def holm_by_closed_testing(p: list[float], delta: float) -> list[bool]:
    """Holm is the closed procedure of Bonferroni tests: reject i if every set with i is rejected."""
    n = len(p)
    sets = [[i for i in range(n) if mask >> i & 1] for mask in range(1, 2**n)]
    rejected = [min(p[i] for i in s) * len(s) <= delta for s in sets]
    return [all(r for s, r in zip(sets, rejected, strict=True) if i in s) for i in range(n)]


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=6), st.floats(0.01, 0.5))
def test_holm_is_closed_testing(p: list[float], delta: float):
    named = {str(i): value for i, value in enumerate(p)}
    found = list(bounds.holm(named, delta).values())
    expected = holm_by_closed_testing(p, delta)
    # Ties of equal p-values are rejected together by both, but for rounding of the product.
    if all(abs(v * k - delta) > 1e-12 for v in p for k in range(1, len(p) + 1)):
        assert found == expected


@pytest.mark.parametrize("until", ["soon", True, float("nan"), float("inf"), -1.0, [1]])
def test_impossible_rules_are_refused(until: object):
    with pytest.raises(CertifyError, match="until must be"):
        check_until(until)


def test_rules_may_be_numbers_in_any_form():
    assert check_until("9.5") == check_until(9.5) == check_until(np.float32(9.5)) == 9.5
    assert check_until("decided") == "decided"
    assert check_until(None) is None


def test_unknown_bounds_are_refused():
    with pytest.raises(CertifyError, match="sharp_betting"):
        bounds.sharp_value("u_sae", drawn(5), DELTA)


@pytest.mark.parametrize("bad", [LOW - 0.1, CAP + 0.1, float("nan")])
def test_losses_outside_their_interval_are_refused(bad: float):
    with pytest.raises(CertifyError, match="loss_base"):
        check({"loss_base": [bad], "loss_sae": [5.0], "loss_pool": [5.0], "violation": [0.0]})


def test_rounding_of_the_model_is_put_on_the_end():
    losses = check(
        {"loss_base": [CAP + 5e-5], "loss_sae": [5.0], "loss_pool": [5.0], "violation": [0.0]}
    )
    assert losses.base[0] == losses.high


def test_a_p_value_pays_for_all_pools():
    """The Occam verdict: rejected at delta exactly where the Occam bound is below the claim."""
    x, nats = drawn(120).joint(), 4.0
    bound = bounds.betting_upper(x.samples, x.low, x.high, DELTA, complexity=nats)

    def p(claim: float) -> float:
        return bounds.betting_p_value(x.samples, x.low, x.high, claim, DELTA, complexity=nats)

    assert p(bound + 1e-6) <= DELTA < p(bound - 1e-6)


def test_a_loss_of_the_pool_below_that_of_the_sae_does_not_lower_the_bound():
    """Where the pool is not violated the two are one function; a difference is rounding."""
    losses = check(
        {"loss_base": [5.0], "loss_sae": [5.0], "loss_pool": [4.9995], "violation": [0.0]}
    )
    assert losses.joint().samples[0] >= 5.0
    assert losses.joint("measured").samples[0] >= 5.0


def test_a_rule_may_be_given_as_text():
    losses = drawn(120, eta=0.0)
    assert bounds.first_stop(losses, "6.5", DELTA) == bounds.first_stop(losses, 6.5, DELTA)
    with pytest.raises(CertifyError, match="rule"):
        bounds.first_stop(losses, None, DELTA)  # pyright: ignore[reportArgumentType]

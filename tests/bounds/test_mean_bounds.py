"""Upper confidence bounds of a bounded mean, against their definitions in 60-digit arithmetic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from mpmath import log, log1p, mp, mpf, sqrt
from numpy.typing import NDArray

from saelens_certify import bounds
from saelens_certify.bounds import wealth
from saelens_certify.bounds.samples import Samples
from saelens_certify.errors import CertifyError

Array = NDArray[np.float64]
CAPS = ((0.5, 0.25), (0.75, 0.25), (0.98, 0.5))


def cases() -> dict[str, tuple[Any, float, float, float]]:
    rng = np.random.default_rng(20_240_101)
    return {
        "losses": (rng.normal(7.0, 1.0, 60), -0.3, 17.3, 0.05),
        "spikes": (np.where(rng.random(80) < 0.05, 17.0, rng.uniform(6, 8, 80)), 0.0, 17.0, 0.05),
        "coins": ((rng.random(50) < 0.5) * 1.0, 0.0, 1.0, 0.1),
        "constant": (np.full(40, 3.1), 3.0, 5.0, 0.01),
        "lowest": (np.zeros(5), 0.0, 1.0, 0.05),
        "highest": (np.ones(30), 0.0, 1.0, 0.05),
        "one": (np.array([0.25]), 0.0, 1.0, 0.5),
        "two": (np.array([0.25, 0.5]), 0.0, 1.0, 0.9),
        "tiny delta": (rng.random(70), 0.0, 1.0, 1e-12),
        "negative": (rng.uniform(-9.0, -8.0, 33), -10.0, -1.0, 0.05),
    }


CASES = cases()


def root(log_wealth: Any, threshold: Any, guess: float) -> Any:
    """Largest m in (0, 1) with log_wealth(m) >= threshold, by halving; 0 if there is none."""
    low, high = max(mpf(0), mpf(guess) - mpf(2) ** -36), min(mpf(1), mpf(guess) + mpf(2) ** -36)
    if low > 0 and log_wealth(low) < threshold:
        low = mpf(0)
    if log_wealth(high) >= threshold:
        high = mpf(1)
    while high - low > mpf(2) ** -52:
        middle = (low + high) / 2
        low, high = (middle, high) if log_wealth(middle) >= threshold else (low, middle)
    return low


def log_mixture(logs_and_weights: Sequence[tuple[Any, Any]]) -> Any:
    return log(sum(w * mp.exp(value) for value, w in logs_and_weights))


def distances(x: Array, low: float, high: float) -> list[Any]:
    return [(mpf(high) - mpf(float(v))) / (mpf(high) - mpf(low)) for v in x]


def adaptive_oracle(x: Array, low: float, high: float, delta: float, found: float) -> Any:
    """From the definition: one value and one stake at a time."""
    y, target, n = distances(x, low, high), log(1 / mpf(delta)), len(x)
    stakes, total, squares = [], mpf(1) / 2, mpf(1) / 4
    for i, value in enumerate(y, start=1):
        stakes.append(sqrt(2 * target / (n * squares / i)))
        total += value
        squares += (value - total / (i + 1)) ** 2

    def log_wealth(m: Any) -> Any:
        logs = []
        for cap, weight in CAPS:
            gains = (log1p(min(s, mpf(cap) / m) * (v - m)) for s, v in zip(stakes, y, strict=True))
            logs.append((sum(gains), mpf(weight)))
        return log_mixture(logs)

    return mpf(high) - (mpf(high) - mpf(low)) * root(
        log_wealth, target, (high - found) / (high - low)
    )


def constant_oracle(x: Array, low: float, high: float, delta: float, found: float) -> Any:
    y, target = distances(x, low, high), log(1 / mpf(delta))
    raw = [mpf(k + 2) ** mpf(-1.5) for k in range(34)]

    def log_wealth(m: Any) -> Any:
        shares = [mpf(0.98) * mpf(2) ** (-mpf(k) / 2) for k in range(34)]
        logs = [sum(log1p(c * (v / m - 1)) for v in y) for c in shares]
        return log_mixture(list(zip(logs, [w / sum(raw) for w in raw], strict=True)))

    return mpf(high) - (mpf(high) - mpf(low)) * root(
        log_wealth, target, (high - found) / (high - low)
    )


def hoeffding_oracle(x: Array, low: float, high: float, delta: float, _: float) -> Any:
    mean = sum(mpf(float(v)) for v in x) / len(x)
    return mean + (mpf(high) - mpf(low)) * sqrt(log(1 / mpf(delta)) / (2 * len(x)))


def bernstein_oracle(x: Array, low: float, high: float, delta: float, _: float) -> Any:
    n, target = len(x), log(2 / mpf(delta))
    if n == 1:
        return mpf(high)
    pairs = itertools.combinations([mpf(float(v)) for v in x], 2)
    variance = sum((a - b) ** 2 for a, b in pairs) / (n * (n - 1))
    mean = sum(mpf(float(v)) for v in x) / n
    width = mpf(high) - mpf(low)
    return mean + sqrt(2 * variance * target / n) + 7 * width * target / (3 * (n - 1))


def compare(found: float, exact: Any, high: float, width: float) -> None:
    """Never understated, and hardly overstated."""
    exact = min(exact, mpf(high))
    assert mpf(found) >= exact
    assert float(mpf(found) - exact) <= 4e-12 * width
    assert found <= high


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("bound", "oracle", "options"),
    [
        (bounds.hoeffding_upper, hoeffding_oracle, {}),
        (bounds.bernstein_upper, bernstein_oracle, {}),
        (bounds.betting_upper, adaptive_oracle, {}),
        (bounds.betting_upper, constant_oracle, {"bets": "constant"}),
    ],
    ids=["hoeffding", "bernstein", "betting", "constant bets"],
)
def test_definition(name: str, bound: Any, oracle: Any, options: dict[str, str]):
    x, low, high, delta = CASES[name]
    with mp.workdps(40):
        found = bound(x, low, high, delta, **options)
        compare(found, oracle(x, low, high, delta, found), high, high - low)


def test_one_value_by_hand():
    """One value at the low end, delta = 1/2: bets of sqrt(2 ln 2 / (1/4)) m, up to their caps, gain c (1/m - 1)."""
    m = 1.0 - bounds.betting_upper([0.0], 0.0, 1.0, 0.5)
    stake = math.sqrt(8.0 * math.log(2.0))
    gained = sum(w * (1.0 + min(stake * m, c) * (1.0 / m - 1.0)) for c, w in CAPS)
    assert gained == pytest.approx(2.0, rel=1e-10)
    k = np.arange(34)
    w = (k + 2.0) ** -1.5
    expected = (w / w.sum() * 0.98 * 2.0 ** (-k / 2.0)).sum()
    m = 1.0 - bounds.betting_upper([0.0], 0.0, 1.0, 0.5, bets="constant")
    assert 1.0 + expected * (1.0 / m - 1.0) == pytest.approx(2.0, rel=1e-10)


def test_closed_forms_by_hand():
    x = [0.0, 1.0, 1.0, 0.0] * 25
    assert bounds.hoeffding_upper(x, 0, 10, 0.05) == pytest.approx(
        0.5 + 10 * math.sqrt(math.log(20) / 200), rel=1e-14
    )
    spread = math.sqrt(2 * (25 / 99) * math.log(4) / 100)
    assert bounds.bernstein_upper(x, 0, 2, 0.5) == pytest.approx(
        0.5 + spread + 7 * 2 * math.log(4) / (3 * 99), rel=1e-14
    )
    assert bounds.bernstein_upper([0.3], 0, 1, 0.05) == 1.0


@pytest.mark.parametrize("n", [1, 15, 16, 17, 4095, 4096, 4097, 20_001])
@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("n_caps", [1, 3, 8, 34])
def test_compiled_products_are_the_numpy_ones_bit_for_bit(n: int, limited: bool, n_caps: int):
    rng = np.random.default_rng([n, n_caps])
    y = np.where(rng.random(n) < 0.3, rng.random(n), 1.0 - rng.integers(0, 2, n))
    limits = rng.exponential(2.0, n) if limited else None
    if limits is not None:
        limits[rng.random(n) < 0.1] = np.inf
    caps = np.minimum(0.98, rng.random(n_caps) + 1e-6)
    for mean in (2.0**-40, 1e-3, 0.4, 1.0):
        compiled = wealth.products(y, limits, mean, caps, "native")
        plain = wealth.products(y, limits, mean, caps, "numpy")
        np.testing.assert_array_equal(compiled[0], plain[0])
        np.testing.assert_array_equal(compiled[1], plain[1])
        assert ((compiled[0] >= 0.5) & (compiled[0] < 1.0)).all()


@pytest.mark.parametrize("mean", [2.0**-40, 0.3])
def test_log_wealth_is_below_the_real_one(mean: float):
    rng = np.random.default_rng(1)
    y, limits = rng.random(3000), rng.exponential(2.0, 3000)
    caps, weights = np.array([0.01, 0.98]), np.array([0.5, 0.5])
    found = wealth.log_wealth_down(y, limits, mean, caps, weights)
    with mp.workdps(40):
        shares = [[min(mpf(li) * mpf(mean), mpf(c)) for li in limits.tolist()] for c in caps]
        logs = [
            sum(log1p(s * (mpf(v) / mpf(mean) - 1)) for s, v in zip(row, y.tolist(), strict=True))
            for row in shares
        ]
        exact = log_mixture([(value, mpf(0.5)) for value in logs])
        assert mpf(found) <= exact
        assert float(exact - mpf(found)) < 1e-8 + 1e-12 * float(abs(exact))


@pytest.mark.parametrize("name", CASES)
def test_both_forms_give_the_same_bounds(name: str):
    x, low, high, delta = CASES[name]
    for bets in ("adaptive", "constant"):
        found = {
            bounds.betting_upper(x, low, high, delta, bets=bets, impl=impl)
            for impl in ("auto", "native", "numpy")
        }
        assert len(found) == 1
    np.testing.assert_array_equal(
        bounds.betting_sequence(x, low, high, delta, impl="native"),
        bounds.betting_sequence(x, low, high, delta, impl="numpy"),
    )


def test_distances_are_rounded_down():
    rng = np.random.default_rng(3)
    x = rng.uniform(-0.3, 17.2, 500)
    checked = Samples.check(x, -0.3, 17.2)
    with mp.workdps(40):
        for value, found in zip(x.tolist(), checked.distances.tolist(), strict=True):
            exact = (mpf(17.2) - mpf(value)) / mpf(checked.width)
            assert mpf(found) <= exact
            assert float(exact - mpf(found)) <= 1e-15


def test_complexity_is_a_smaller_delta():
    x = np.random.default_rng(0).normal(7, 1, 200)
    for bound in (bounds.hoeffding_upper, bounds.bernstein_upper, bounds.betting_upper):
        shared = bound(x, 0, 17, 0.05, complexity=math.log(100.0))
        assert shared == pytest.approx(bound(x, 0, 17, 0.0005), abs=1e-10)
    for sequence in (
        bounds.hoeffding_sequence,
        bounds.bernstein_sequence,
        bounds.betting_sequence,
    ):
        shared = sequence(x, 0, 17, 0.05, complexity=math.log(100.0))
        np.testing.assert_allclose(shared, sequence(x, 0, 17, 0.0005), atol=1e-10)
    # A share of delta that no double can hold.
    many = np.tile(x, 500)
    assert 7.0 < bounds.betting_upper(many, 0, 17, 0.05, complexity=12_000.0) < 17.0


ALL = (
    bounds.hoeffding_upper,
    bounds.bernstein_upper,
    bounds.betting_upper,
    bounds.hoeffding_sequence,
    bounds.bernstein_sequence,
    bounds.betting_sequence,
)


@pytest.mark.parametrize("bound", ALL)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([], 0, 1, 0.05), ["samples has shape (0,)", "at least one"]),
        (([[0.5]], 0, 1, 0.05), ["shape (1, 1)"]),
        (([0.5, math.nan], 0, 1, 0.05), ["samples[1]=nan", "finite"]),
        (([0.5, 1.5], 0, 1, 0.05), ["samples[1]=1.5", "[low, high] = [0, 1]", "widen"]),
        (([-1e-9], 0, 1, 0.05), ["samples[0]=-1e-09"]),
        (([0.5], 1, 1, 0.05), ["high=1.0", "above low=1"]),
        (([0.5], 0, math.inf, 0.05), ["high=inf", "finite"]),
        (([0.5], [0, 0], 1, 0.05), ["low has shape (2,)", "one number"]),
        (([0.5], 0, 1, 0.0), ["delta=0.0", "(0, 1)"]),
        (([0.5], 0, 1, 1.0), ["delta=1.0"]),
        (([0.5], 0, 1, [0.1, 0.2]), ["one number"]),
        ((["a"], 0, 1, 0.05), ["samples", "not a real number"]),
    ],
)
def test_bad_input(bound: Any, arguments: tuple[Any, ...], words: list[str]):
    with pytest.raises(CertifyError) as caught:
        bound(*arguments)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("bound", ALL)
def test_bad_complexity(bound: Any):
    with pytest.raises(CertifyError, match="complexity=-1.0"):
        bound([0.5], 0, 1, 0.05, complexity=-1.0)


def test_bad_names():
    with pytest.raises(CertifyError, match="bets='bold' is unknown"):
        bounds.betting_upper([0.5], 0, 1, 0.05, bets="bold")  # pyright: ignore[reportArgumentType]
    for bound in (bounds.betting_upper, bounds.betting_sequence):
        with pytest.raises(CertifyError, match="impl='torch' is unknown"):
            bound([0.5], 0, 1, 0.05, impl="torch")  # pyright: ignore[reportArgumentType]


def test_native_is_asked_for_and_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(wealth, "_native", None)
    with pytest.raises(CertifyError, match="not built"):
        bounds.betting_upper([0.5], 0, 1, 0.05, impl="native")
    assert bounds.betting_upper([0.5], 0, 1, 0.05) <= 1.0


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ([0], "times[0]=0.0"),
        ([1, 4], "at most the number of samples, 3"),
        ([2, 2], "above the one before"),
        ([3, 1], "above the one before"),
        ([1.5], "whole number"),
        ([], "shape (0,)"),
    ],
)
def test_bad_times(times: list[float], words: str):
    for sequence in ALL[3:]:
        with pytest.raises(CertifyError) as caught:
            sequence([0.1, 0.2, 0.3], 0, 1, 0.05, times)
        assert words in str(caught.value)


def test_log_times():
    for n in (1, 2, 3, 100, 1023, 1024, 10**6):
        times = bounds.log_times(n)
        assert times[0] == 1
        assert times[-1] == n
        assert (np.diff(times) > 0).all()
        assert len(times) <= 8 * math.log2(n) + 2
    assert (np.diff(bounds.log_times(10**6)) <= 0.0906 * bounds.log_times(10**6)[:-1] + 1.1).all()
    with pytest.raises(CertifyError, match="n=0.0"):
        bounds.log_times(0)

"""How often the limits of baselines and of the information kept fail, on distributions chosen against them.

Laws of the losses of a baseline, M and a proxy on one sequence, [B - Delta, B] being [0, HIGH]. `cases` gives every claim
that is tested as a function from a number of trials to the share of trials in which it fails.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saelens_certify.bounds.baselines import beats_baseline, risk_interval, risk_limit
from saelens_certify.bounds.kept import information_kept

Array = NDArray[np.float64]
Three = tuple[Array, Array, Array]
Draw = Callable[[np.random.Generator, tuple[int, int]], Three]

HIGH = 17.6  # bits
UNIFORM = HIGH - 1.0
DELTA = 0.05
KEPT_SIZE = 100  # sequences in a trial of the information kept
SIZE = 40  # of everything else
LOOKS = (20, 40, 80, 160)


@dataclass(frozen=True)
class Law:
    """A joint distribution of three losses on [0, HIGH].

    Attributes:
        baseline: Expected loss of the baseline.
        base: Expected loss of M.
        proxy: Expected loss of the proxy.
        draw: Draws the three losses, arrays of the given shape each.
    """

    baseline: float
    base: float
    proxy: float
    draw: Draw

    def kept(self, uniform: bool = False) -> float:
        """The true share of information kept."""
        b = UNIFORM if uniform else self.baseline
        return (b - self.proxy) / (b - self.base)


def coins(p_baseline: float, p_base: float, p_proxy: float) -> Law:
    """Each loss is the largest or the smallest; one draw decides those of baseline and M."""

    def draw(rng: np.random.Generator, shape: tuple[int, int]) -> Three:
        u = rng.random(shape)
        other = rng.random(shape)
        return (
            np.where(u < p_baseline, HIGH, 0.0),
            np.where(u < p_base, HIGH, 0.0),
            np.where(other < p_proxy, HIGH, 0.0),
        )

    return Law(p_baseline * HIGH, p_base * HIGH, p_proxy * HIGH, draw)


def spikes(p: float) -> Law:
    """Quiet losses; the proxy's is the largest possible one with probability p, as when a pool is violated."""

    def draw(rng: np.random.Generator, shape: tuple[int, int]) -> Three:
        hard = rng.uniform(-1.0, 1.0, shape)
        base = 6.0 + hard
        proxy = np.where(rng.random(shape) < p, HIGH, base + rng.uniform(0.0, 0.4, shape))
        return 9.0 + 0.5 * hard + rng.uniform(-0.5, 0.5, shape), base, proxy

    return Law(9.0, 6.0, p * HIGH + (1.0 - p) * 6.2, draw)


def nearly_equal(difference: float) -> Law:
    """A baseline that M hardly beats: the ratio is of two small numbers and usually says nothing."""

    def draw(rng: np.random.Generator, shape: tuple[int, int]) -> Three:
        hard = rng.uniform(-2.0, 2.0, shape)
        base = 8.0 + hard + rng.uniform(-1.0, 1.0, shape)
        return 8.0 + difference + hard, base, base + HIGH / 8 * (rng.random(shape) < 0.1)

    return Law(8.0 + difference, 8.0, 8.0 + HIGH / 80, draw)


def losses() -> Law:
    """Moments like GPT-2's: a standard deviation of one bit, most of it shared."""

    def draw(rng: np.random.Generator, shape: tuple[int, int]) -> Three:
        hard = rng.uniform(-1.0, 1.0, (2, *shape)).sum(axis=0)
        own = rng.uniform(-0.5, 0.5, (3, *shape))
        return 10.5 + 0.5 * hard + own[0], 7.0 + hard + own[1], 7.4 + hard + own[1] + own[2] / 2

    return Law(10.5, 7.0, 7.4, draw)


LAWS: dict[str, Law] = {
    "coins": coins(0.6, 0.2, 0.35),
    "coins, kept above 1": coins(0.5, 0.3, 0.2),
    "coins, worse than the baseline": coins(0.5, 0.2, 0.7),
    "rare spikes": spikes(0.02),
    "nearly equal": nearly_equal(0.3),
    "losses": losses(),
}


def sample(name: str, trials: int, n: int) -> Three:
    """Losses of baseline, M and proxy [trials, n] each; the same for the same arguments."""
    seed = [20_261_123, sorted(LAWS).index(name), n]
    return LAWS[name].draw(np.random.default_rng(seed), (trials, n))


@functools.lru_cache(maxsize=2)
def kept_limits(name: str, trials: int, uniform: bool = False) -> Array:
    """Limits of the information kept in every trial.

    Args:
        name: Law.
        trials: Number of trials.
        uniform: Whether the baseline is a uniform guess.

    Returns:
        Two-sided lower and upper limit and the lower limit alone [trials, 3]; infinite where there is none.
    """
    found = []
    for b, m, p in zip(*sample(name, trials, KEPT_SIZE), strict=True):
        kept = information_kept(UNIFORM if uniform else b, m, p, 0.0, HIGH, DELTA)
        ends = (kept.lower, -np.inf), (kept.upper, np.inf), (kept.lower_alone, -np.inf)
        found.append([none if end is None else end for end, none in ends])
    return np.array(found)


def outside(limits: Array, truth: float, scale: float = 1.0) -> float:
    """Share of trials in which the two-sided limits exclude the truth.

    Args:
        limits: Of :func:`kept_limits`.
        truth: The information kept.
        scale: Multiplies the distance of finite limits from their middle: below 1, they are wrong.
    """
    lower, upper = limits[np.isfinite(limits[:, 0]), :2].T
    middle = (lower + upper) / 2.0
    excluded = np.abs(truth - middle) > scale * (upper - lower) / 2.0
    return float(np.count_nonzero(excluded) / len(limits))


def kept_fails(name: str, trials: int) -> float:
    """Two-sided limits of the information kept exist and exclude it."""
    return outside(kept_limits(name, trials), LAWS[name].kept())


def kept_lower_fails(name: str, trials: int) -> float:
    """The lower limit alone is above the information kept."""
    return float(np.mean(kept_limits(name, trials)[:, 2] > LAWS[name].kept()))


def kept_uniform_fails(name: str, trials: int) -> float:
    """As `kept_fails`, against a uniform guess."""
    return outside(kept_limits(name, trials, uniform=True), LAWS[name].kept(uniform=True))


def kept_any_time_fails(name: str, trials: int) -> float:
    """Time-uniform limits of the information kept exclude it at any of the looks."""
    truth, failed = LAWS[name].kept(), 0
    for b, m, p in zip(*sample(name, trials, LOOKS[-1]), strict=True):
        for n in LOOKS:
            at = information_kept(b[:n], m[:n], p[:n], 0.0, HIGH, DELTA, time_uniform=True)
            if at.lower is None or at.upper is None or at.lower <= truth <= at.upper:
                continue
            failed += 1
            break
    return failed / trials


def interval_fails(name: str, trials: int) -> float:
    """The two-sided interval of the baseline's risk excludes it."""
    truth = LAWS[name].baseline
    found = [risk_interval(b, 0.0, HIGH, DELTA) for b in sample(name, trials, SIZE)[0]]
    return sum(not r.lower <= truth <= r.upper for r in found) / trials


def lower_fails(name: str, trials: int) -> float:
    """The lower limit of the baseline's risk is above it."""
    found = [risk_limit(b, 0.0, HIGH, DELTA, "lower") for b in sample(name, trials, SIZE)[0]]
    return float(np.mean(np.array(found) > LAWS[name].baseline))


def excess_fails(name: str, trials: int) -> float:
    """The paired bound is below the true excess of the proxy over the baseline."""
    b, _, p = sample(name, trials, SIZE)
    rows = zip(p, b, strict=True)
    found = [beats_baseline(values, baseline, 0.0, HIGH, DELTA) for values, baseline in rows]
    return float(np.mean(np.array(found) < LAWS[name].proxy - LAWS[name].baseline))


HARDEST = ("coins", "rare spikes")
CLAIMS: dict[str, tuple[Callable[[str, int], float], tuple[str, ...]]] = {
    "kept": (kept_fails, tuple(LAWS)),
    "kept, lower limit": (kept_lower_fails, tuple(LAWS)),
    "kept, any time": (kept_any_time_fails, HARDEST[:1]),
    "kept, uniform": (kept_uniform_fails, HARDEST),
    "baseline interval": (interval_fails, HARDEST),
    "baseline lower": (lower_fails, HARDEST),
    "baseline excess": (excess_fails, tuple(LAWS)),
}
"""Share of failing trials of each claim, and the laws on which it is tried."""


def cases() -> dict[str, Callable[[int], float]]:
    """Every claim on its laws: from a number of trials to the share of them in which it fails."""
    order = sorted(LAWS)  # Claims on one law follow each other: the limits are computed once.
    return {
        f"{claim}: {law}": lambda trials, law=law, fails=fails: fails(law, trials)
        for law in order
        for claim, (fails, laws) in CLAIMS.items()
        if law in laws
    }

"""How often bounds on cluster means fail where sequences depend on each other within clusters.

Claimed: sequences depend on each other in any way within a cluster, clusters are independent draws, and their
sizes may have to do with the values. Not claimed: dependence between clusters, such as a moving average along
the order of the hashes; `demonstrations` shows that and other ways to fail.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from saelens_certify import bounds
from saelens_certify.bounds.clusters import cluster_means, cluster_order

Array = NDArray[np.float64]

HIGH = 17.6  # bits: about the range of GPT-2's smoothed loss
DELTA = 0.05
CLUSTERS = (10, 40)
LONGEST = 40

Draw = Callable[[np.random.Generator, int], tuple[Array, NDArray[np.int64]]]
Upper = Callable[[Array], float]
Sequential = Callable[[Array, NDArray[np.int64]], Array]


@dataclass(frozen=True)
class Law:
    """A distribution of clusters of sequences with losses in [0, HIGH].

    Attributes:
        mean: Expectation of the cluster mean.
        draw: Draws that many clusters: the losses of their sequences, cluster by cluster, and the sizes.
    """

    mean: float
    draw: Draw


def _windows(rng: np.random.Generator, n: int) -> tuple[Array, NDArray[np.int64]]:
    """Windows of a document share most of its loss; long documents are the hard ones, one in two."""
    hard = rng.random(n) < 0.5
    sizes = np.where(hard, 6, 1)
    common = np.repeat(np.where(hard, 0.85, 0.15), sizes)
    return HIGH * (common + rng.uniform(-0.15, 0.15, common.size)), sizes


def _blocks(rng: np.random.Generator, n: int) -> tuple[Array, NDArray[np.int64]]:
    """Five sequences that are all high, rarely, or all low."""
    sizes = np.full(n, 5)
    return np.repeat(np.where(rng.random(n) < 0.03, HIGH, 0.0), sizes), sizes


def _neighbours(rng: np.random.Generator, n: int) -> tuple[Array, NDArray[np.int64]]:
    """2-dependent: each of eight windows of a document is the mean of three coins, two shared with the next."""
    coins = (rng.random((n, 10)) < 0.2).astype(float)
    windows = (coins[:, :-2] + coins[:, 1:-1] + coins[:, 2:]) / 3.0
    return HIGH * windows.ravel(), np.full(n, 8)


LAWS: dict[str, Law] = {
    "windows of long, hard documents": Law(0.5 * HIGH, _windows),
    "blocks with a common rare spike": Law(0.03 * HIGH, _blocks),
    "2-dependent windows": Law(0.2 * HIGH, _neighbours),
}


def upper_bounds(delta: float) -> dict[str, Upper]:
    """The bounds for one number of clusters, by name."""
    return {
        "hoeffding_upper": lambda x: bounds.hoeffding_upper(x, 0.0, HIGH, delta),
        "bernstein_upper": lambda x: bounds.bernstein_upper(x, 0.0, HIGH, delta),
        "betting_upper": lambda x: bounds.betting_upper(x, 0.0, HIGH, delta),
    }


def sequences(delta: float) -> dict[str, Sequential]:
    """The confidence sequences, by name."""
    return {
        "hoeffding_sequence": lambda x, t: bounds.hoeffding_sequence(x, 0.0, HIGH, delta, t),
        "bernstein_sequence": lambda x, t: bounds.bernstein_sequence(x, 0.0, HIGH, delta, t),
        "betting_sequence": lambda x, t: bounds.betting_sequence(x, 0.0, HIGH, delta, t),
    }


@dataclass(frozen=True)
class Evidence:
    """Sequences of one trial as a certificate has them.

    Attributes:
        values: Losses, in the order of the hashes.
        clusters: Names of their clusters: the smallest hash of each.
        hashes: Their hashes, ascending.
    """

    values: Array
    clusters: list[str]
    hashes: list[str]

    @classmethod
    def draw(cls, law: str, seed: int, n: int) -> Evidence:
        """The same for the same arguments."""
        rng = np.random.default_rng([20_261_122, sorted(LAWS).index(law), n, seed])
        values, sizes = LAWS[law].draw(rng, n)
        hashes = rng.bytes(8 * len(values)).hex()
        names = [hashes[16 * i : 16 * i + 16] for i in range(len(values))]
        ends = np.cumsum(sizes)
        clusters = [
            min(names[end - size : end])
            for end, size in zip(ends.tolist(), sizes.tolist(), strict=True)
            for _ in range(size)
        ]
        order = sorted(range(len(names)), key=names.__getitem__)
        return cls(values[order], [clusters[i] for i in order], [names[i] for i in order])

    def means(self) -> Array:
        """Cluster means, as a certificate takes them."""
        order = cluster_order(self.clusters, self.hashes)
        return cluster_means(self.values[order], [self.clusters[i] for i in order])

    def means_as_completed(self) -> Array:
        """Cluster means in the order in which clusters are complete along the hashes: not an order to use."""
        last = {name: row for row, name in enumerate(self.clusters)}
        order = sorted(range(len(self.values)), key=lambda i: (last[self.clusters[i]], i))
        return cluster_means(self.values[order], [self.clusters[i] for i in order])


@lru_cache(maxsize=8)
def _means(law: str, trials: int, n: int) -> Array:
    return np.array([Evidence.draw(law, seed, n).means() for seed in range(trials)])


def failures(law: str, bound: Upper, trials: int, n: int, scale: float = 1.0) -> float:
    """Share of trials in which a bound on cluster means is below their expectation.

    Args:
        law: Name of the law.
        bound: Bound for one number of clusters.
        trials: Number of trials.
        n: Number of clusters in each.
        scale: Multiplies the margin between mean and bound: below 1, the bound is wrong.
    """
    x = _means(law, trials, n)
    found = np.array([bound(row) for row in x])
    means = x.mean(axis=1)
    return float(np.mean(means + scale * (found - means) < LAWS[law].mean))


def looks(n: int) -> NDArray[np.int64]:
    """When a sequence is looked at: often, from the first cluster on."""
    return np.union1d(np.arange(1, min(n, 10) + 1), np.arange(15, n + 1, 5))


def ever(law: str, sequence: Sequential, trials: int, n: int) -> float:
    """Share of trials in which a confidence sequence is below the expectation at any look."""
    found = [sequence(row, looks(n)) for row in _means(law, trials, n)]
    return float(np.mean((np.array(found) < LAWS[law].mean).any(axis=1)))


def cases() -> dict[str, Callable[[int], float]]:
    """Share of failing trials of each claim, by name; each is at most DELTA, up to chance."""
    found: dict[str, Callable[[int], float]] = {}
    for law in LAWS:
        for n in CLUSTERS:
            for name, bound in upper_bounds(DELTA).items():
                found[f"clusters, {law}: {name}, n = {n}"] = (
                    lambda trials, law=law, bound=bound, n=n: failures(law, bound, trials, n)
                )
        for name, sequence in sequences(DELTA).items():
            found[f"clusters, {law}: {name}, every look up to {LONGEST}"] = (
                lambda trials, law=law, sequence=sequence: ever(law, sequence, trials, LONGEST)
            )
    return found


def ignoring(law: str, bound: Upper, trials: int, n: int) -> float:
    """Share of failures if the sequences of n clusters are taken as independent."""
    drawn = (Evidence.draw(law, seed, n) for seed in range(trials))
    return float(np.mean([bound(x.values) < LAWS[law].mean for x in drawn]))


def as_completed(law: str, sequence: Sequential, trials: int, n: int) -> float:
    """Share of failures at any look if clusters are taken in the order in which they are complete."""
    drawn = (Evidence.draw(law, seed, n).means_as_completed() for seed in range(trials))
    return float(np.mean([(sequence(x, looks(n)) < LAWS[law].mean).any() for x in drawn]))


def moving_average(bound: Upper, trials: int, n: int, width: int = 8) -> float:
    """Share of failures for n sequences each of which shares coins with its neighbours: no cluster ends."""
    rng = np.random.default_rng(20_261_122)
    coins = (rng.random((trials, n + width - 1)) < 0.2).astype(float)
    windows = np.lib.stride_tricks.sliding_window_view(coins, width, axis=1).mean(axis=2)
    return float(np.mean([bound(HIGH * row) < 0.2 * HIGH for row in windows]))


def demonstrations() -> dict[str, Callable[[int], float]]:
    """Ways to fail far more often than DELTA, by name: share of failing trials. No claim covers them."""
    betting = upper_bounds(DELTA)["betting_upper"]
    peeked = sequences(DELTA)["betting_sequence"]
    rare, long = "blocks with a common rare spike", "windows of long, hard documents"
    return {
        f"{rare}, ignored: betting_upper": lambda trials: ignoring(rare, betting, trials, 40),
        f"{long}, as completed: betting_sequence": lambda trials: as_completed(
            long, peeked, trials, LONGEST
        ),
        "moving average along the hashes: betting_upper": lambda trials: moving_average(
            betting, trials, 200
        ),
    }

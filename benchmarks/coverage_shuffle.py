"""How often the shuffle test is wrong: p-values where there is nothing to find, limits that miss the effect.

A small world stands in for model and SAE: a sequence uses each feature some number of times, each use of a feature costs
what its decoder row misfits, and the gap of a sequence is what its uses cost. So the gap depends on the pairing of features
with rows, and the real pairing is drawn as the null hypothesis says (errors) or fits (power). `cases` gives every claim that
is tested as a function from a number of trials to the share of trials in which it fails; `findings` the shares of trials in which
something is found.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saelens_certify.bounds import loss_cap, loss_range
from saelens_certify.bounds.means import mean_distance_up
from saelens_certify.bounds.shuffle import permutation_p_value, shuffle_test

Array = NDArray[np.float64]

DELTA = 0.05
VOCAB = 50_257
WIDTH = float(loss_range(VOCAB))
LOW = float(loss_cap(VOCAB)) - WIDTH
COPIES = 19
SEQUENCES = 12  # in a trial of p-values
SIZE = 40  # sequences in a trial of limits

FREQUENCY: Array = np.repeat([0.1, 0.5, 2.0, 5.0], 4)
"""Mean number of uses per sequence of each feature: four groups of four features of like frequency."""
GROUPS: Array = np.repeat(np.arange(4.0), 4)
FEATURES = len(GROUPS)

Costs = Callable[[np.random.Generator], Array]

COSTS: dict[str, Costs] = {
    "smooth": lambda rng: rng.random((FEATURES, FEATURES)),
    "zero or one": lambda rng: rng.integers(0, 2, (FEATURES, FEATURES)).astype(float),
    "nearly always zero": lambda rng: (rng.random((FEATURES, FEATURES)) < 0.01).astype(float),
    "heavy tail": lambda rng: np.minimum(100.0, 0.1 / (1.0 - rng.random((FEATURES, FEATURES)))),
    "all equal": lambda rng: np.full((FEATURES, FEATURES), float(rng.integers(0, 3))),
}
"""What a use of each feature (row) costs when it is decoded with each row (column)."""


def pairings(rng: np.random.Generator, n: int, matched: bool) -> NDArray[np.int64]:
    """Draw n pairings [n, FEATURES], all being equally likely, or all that keep each group."""
    keys = rng.random((n, FEATURES))
    return np.argsort(keys + GROUPS if matched else keys, axis=1)


def p_value(base: Array, sae: Array, copies: Array) -> float:
    """The p-value that `shuffle_test` gives, without its limits."""
    gaps = [mean_distance_up(base, copy) for copy in copies]
    return permutation_p_value(mean_distance_up(base, sae), np.array(gaps))


def losses(rng: np.random.Generator, gaps: Array) -> tuple[Array, Array, Array]:
    """Losses of M, the real SAE (first row of the gaps) and its copies, within their interval.

    Args:
        rng: Source of the losses of M.
        gaps: Gaps [1 + R, n_sequences] of any size; halved until they leave M its place.
    """
    gaps = gaps * min(1.0, WIDTH / 4 / max(gaps.max(), 1e-300))
    base = LOW + WIDTH * rng.uniform(0.25, 0.75, gaps.shape[1])
    proxies = base + gaps * rng.choice([-1.0, 1.0], gaps.shape[1])
    return base, proxies[0], proxies[1:]


def world(
    rng: np.random.Generator, costs: Array, real: NDArray[np.int64], matched: bool, copied: bool
) -> tuple[Array, Array, Array]:
    """Losses of M, the real SAE and its copies.

    Args:
        rng: Source of randomness.
        costs: See COSTS.
        real: The real pairing [FEATURES].
        matched: Whether copies keep the groups.
        copied: Whether all sequences are copies of one: as dependent as can be.
    """
    uses = rng.poisson(FREQUENCY, (SEQUENCES, FEATURES))
    if copied:
        uses[:] = uses[0]
    all_pairings = np.vstack([real, pairings(rng, COPIES, matched)])
    per_use = costs[np.arange(FEATURES), all_pairings]
    return losses(rng, per_use @ uses.T)


def null_errors(name: str, trials: int, alpha: float, copied: bool = False) -> float:
    """Share of trials with a p-value of at most alpha, the real pairing being one drawn like its copies."""
    rng = np.random.default_rng([20_261_123, sorted(COSTS).index(name), int(copied)])
    found = 0
    for _ in range(trials):
        real = pairings(rng, 1, matched=False)[0]
        found += p_value(*world(rng, COSTS[name](rng), real, False, copied)) <= alpha
    return found / trials


def frequency_only(trials: int, alpha: float, matched: bool) -> float:
    """Share of trials with a p-value of at most alpha, rows fitting every feature of their own group alike.

    Args:
        trials: Number of trials.
        alpha: Level.
        matched: Whether the copies keep the groups: then there is nothing to find.
    """
    rng = np.random.default_rng([20_261_123, 100, int(matched)])
    found = 0
    for _ in range(trials):
        costs = 0.2 * rng.random((FEATURES, FEATURES)) + (GROUPS[:, None] != GROUPS)
        real = pairings(rng, 1, matched=True)[0]
        found += p_value(*world(rng, costs, real, matched, False)) <= alpha
    return found / trials


def aligned(trials: int, alpha: float, matched: bool) -> float:
    """Share of trials with a p-value of at most alpha, each feature's own row fitting it better than others."""
    rng = np.random.default_rng([20_261_123, 101, int(matched)])
    found = 0
    for _ in range(trials):
        costs = rng.uniform(0.5, 1.5, (FEATURES, FEATURES)) * (1.0 - np.eye(FEATURES))
        real = np.arange(FEATURES)
        found += p_value(*world(rng, costs, real, matched, False)) <= alpha
    return found / trials


def decoders(trials: int, alpha: float, fitting: float = 0.0) -> float:
    """Share of trials with a p-value of at most alpha against random directions of the same norms.

    Args:
        trials: Number of trials.
        alpha: Level.
        fitting: What the real directions have of those that would reconstruct without error; 0: nothing.
    """
    rng = np.random.default_rng([20_261_123, 102, int(100 * fitting)])
    found = 0
    for _ in range(trials):
        rows = rng.normal(size=(1 + COPIES, FEATURES, 6))
        right = rng.normal(size=(FEATURES, 6))
        rows[0] = (1.0 - fitting) * rows[0] + fitting * right
        rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
        right /= np.linalg.norm(right, axis=-1, keepdims=True)
        uses = rng.poisson(FREQUENCY, (SEQUENCES, FEATURES)) * rng.uniform(0.2, 3.0, FEATURES)
        gaps = np.linalg.norm(uses @ (rows - right), axis=-1)
        found += p_value(*losses(rng, gaps)) <= alpha
    return found / trials


@dataclass(frozen=True)
class Law:
    """A distribution of the gaps of the real SAE and of three copies, in [0, WIDTH].

    Attributes:
        effect: Expected mean gap of the copies minus expected gap of the real SAE.
        draw: Draws gaps [4, n], the real SAE's first.
    """

    effect: float
    draw: Callable[[np.random.Generator, int], Array]


def _coins(p: float, q: float) -> Law:
    """The largest gap or none: for the real SAE with probability p, for all copies at once with q."""

    def draw(rng: np.random.Generator, n: int) -> Array:
        hit = np.vstack([rng.random(n) < p, np.tile(rng.random(n) < q, (3, 1))])
        return np.where(hit, WIDTH, 0.0)

    return Law((q - p) * WIDTH, draw)


def _heavy(scale: float) -> Law:
    """Copies share a gap with density scale / x^2 up to the largest, in units of the range."""

    def draw(rng: np.random.Generator, n: int) -> Array:
        shared = WIDTH * np.minimum(1.0, scale / (1.0 - rng.random(n)))
        return np.vstack([rng.uniform(0.0, 0.4, n), np.tile(shared, (3, 1))])

    return Law(WIDTH * scale * (1.0 - np.log(scale)) - 0.2, draw)


def _measured() -> Law:
    """As on a small model: gaps of about a fifth of a bit, of copies about five bits, of unlike copies."""

    def draw(rng: np.random.Generator, n: int) -> Array:
        hard = rng.uniform(0.5, 1.5, n)
        noise = rng.uniform(-1.0, 1.0, (3, n))
        return np.vstack([0.2 * hard, np.array([[4.0], [5.0], [6.0]]) * hard + noise])

    return Law(4.8, draw)


LAWS: dict[str, Law] = {
    "coins, no effect": _coins(0.5, 0.5),
    "coins, rare gaps of the SAE": _coins(0.02, 0.5),
    "heavy tail": _heavy(0.02),
    "as measured": _measured(),
}


def limit_errors(name: str, trials: int, delta: float, scale: float = 1.0) -> float:
    """Share of trials in which the limits miss the effect.

    Args:
        name: Law.
        trials: Number of trials.
        delta: What `shuffle_test` is asked for.
        scale: Multiplies the margins between effect and limits: below 1, the limits are wrong.
    """
    law, missed = LAWS[name], 0
    rng = np.random.default_rng([20_261_123, 103, sorted(LAWS).index(name)])
    base = np.full(SIZE, LOW)
    for _ in range(trials):
        gaps = law.draw(rng, SIZE)
        test = shuffle_test(base, LOW + gaps[0], LOW + gaps[1:], vocab_size=VOCAB, delta=delta)
        lower = test.effect + scale * (test.lower - test.effect)
        upper = test.effect + scale * (test.upper - test.effect)
        missed += not lower <= law.effect <= upper
    return missed / trials


def cases(delta: float = DELTA) -> dict[str, Callable[[int], float]]:
    """Claims that fail with probability at most delta, by name: share of failing trials.

    Args:
        delta: Level of the tests and failure probability of the limits.
    """
    found: dict[str, Callable[[int], float]] = {
        f"p-value, costs {name}": functools.partial(_null, name, delta, False) for name in COSTS
    }
    found["p-value, all sequences alike"] = functools.partial(_null, "zero or one", delta, True)
    found["p-value, frequency only, matched copies"] = lambda trials: frequency_only(
        trials, delta, matched=True
    )
    found["p-value, random directions"] = lambda trials: decoders(trials, delta)
    for name in LAWS:
        found[f"limits, {name}"] = functools.partial(_limits, name, delta)
    return found


def findings(alpha: float = DELTA) -> dict[str, Callable[[int], float]]:
    """Share of trials in which the test finds what is there, by name: near 1."""
    return {
        "alignment, permuted copies": lambda trials: aligned(trials, alpha, matched=False),
        "alignment, matched copies": lambda trials: aligned(trials, alpha, matched=True),
        "frequency only, permuted copies": lambda t: frequency_only(t, alpha, matched=False),
        "directions, random decoders": lambda trials: decoders(trials, alpha, fitting=0.8),
    }


def _null(name: str, alpha: float, copied: bool, trials: int) -> float:
    return null_errors(name, trials, alpha, copied)


def _limits(name: str, delta: float, trials: int) -> float:
    return limit_errors(name, trials, delta)

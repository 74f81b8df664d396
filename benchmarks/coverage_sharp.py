"""How often the sharp certificates fail, on evidence chosen against them.

Laws of a whole row of evidence: losses of M, S∘M and h_G and the violation, with known expectations. `cases` gives every
claim that is tested as a function from a number of trials to the share of trials in which it fails.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from saelens_certify import bounds

Array = NDArray[np.float64]
Rows = tuple[Array, Array, Array, Array]

VOCAB = 50_257
CAP = float(bounds.loss_cap(VOCAB))
WIDTH = float(bounds.loss_range(VOCAB))
LOW = CAP - WIDTH
BASELINE = float(bounds.uniform_baseline(VOCAB))
DELTA = 0.05
SIZE = 40  # sequences of a trial with a number fixed in advance
LONGEST = 120  # and of one that may stop


@dataclass(frozen=True)
class Law:
    """A distribution of one row of evidence.

    Attributes:
        base: Expected loss of M.
        sae: Expected loss of S∘M.
        pool: Expected loss of h_G.
        draw: Draws losses of M, S∘M, h_G and violations, arrays of the given size each.
    """

    base: float
    sae: float
    pool: float
    draw: Callable[[np.random.Generator, int], Rows]


def coin(p: float) -> Law:
    """A perfect SAE on a loss that is either as small or as large as it can be."""

    def draw(rng: np.random.Generator, n: int) -> Rows:
        loss = np.where(rng.random(n) < p, CAP, LOW)
        return loss, loss, loss, np.zeros(n)

    risk = LOW + p * WIDTH
    return Law(risk, risk, risk, draw)


def hidden_by_violations(q: float) -> Law:
    """Every bit of M's loss sits on violating sequences, where h_G looks perfect: no slack in the proof."""

    def draw(rng: np.random.Generator, n: int) -> Rows:
        violation = (rng.random(n) < q).astype(float)
        loss = np.where(violation > 0, CAP, LOW)
        return loss, loss, np.full(n, LOW), violation

    return Law(LOW + q * WIDTH, LOW + q * WIDTH, LOW, draw)


def hidden_by_the_gap(q: float) -> Law:
    """Rare spikes of M's loss that the SAE removes, without a violation: only the gap sees them."""

    def draw(rng: np.random.Generator, n: int) -> Rows:
        low = np.full(n, LOW)
        return np.where(rng.random(n) < q, CAP, LOW), low, low, np.zeros(n)

    return Law(LOW + q * WIDTH, LOW, LOW, draw)


def like_gpt2() -> Law:
    """Risk 7, gap 0.2, 2 % violations that move the loss either way."""

    def draw(rng: np.random.Generator, n: int) -> Rows:
        base = rng.uniform(6.0, 8.0, n)
        sae = base + rng.uniform(0.0, 0.4, n)
        violation = (rng.random(n) < 0.02).astype(float)
        pool = np.where(violation > 0, sae + rng.uniform(-3.0, 3.0, n), sae)
        return base, sae, pool, violation

    return Law(7.0, 7.2, 7.2, draw)


LAWS = {
    "coin, even": coin(0.5),
    "coin, rarely high": coin(0.02),
    "violations hide the loss, even": hidden_by_violations(0.5),
    "violations hide the loss, rare": hidden_by_violations(0.02),
    "gap hides the loss, rare": hidden_by_the_gap(0.02),
    "like GPT-2": like_gpt2(),
}

_TRUTH: dict[str, Callable[[Law], float]] = {
    "sharp_betting": lambda law: law.base,
    "sharp_bernstein": lambda law: law.base,
    "sharp_measured": lambda law: law.base,
    "sharp_direct_sae": lambda law: law.sae,
    "sharp_direct_pool": lambda law: law.pool,
    "excess_pool": lambda law: law.pool - law.base,
    "excess_sae_two_sided": lambda law: law.sae - law.base,
}


def losses(law: Law, rng: np.random.Generator, n: int) -> bounds.Losses:
    """Draw the evidence of one run."""
    base, sae, pool, violation = law.draw(rng, n)
    return bounds.Losses.check(
        loss_base=base,
        loss_sae=sae,
        loss_pool=pool,
        violation=violation,
        vocab_size=VOCAB,
        alpha=0.5,
    )


def one_bound(law: Law, name: str, time_uniform: bool, trials: int, scale: float = 1.0) -> float:
    """Share of trials in which a bound, or the lower end of a two-sided one, is on the wrong side.

    Args:
        law: The evidence.
        name: The bound.
        time_uniform: Which form of it.
        trials: Number of trials.
        scale: Multiplies the margin: below 1, the bound is wrong.
    """
    rng, truth, wrong = _rng("one", name, time_uniform), _TRUTH[name](law), 0
    for _ in range(trials):
        evidence = losses(law, rng, SIZE)
        found = bounds.sharp_value(name, evidence, DELTA, time_uniform=time_uniform)
        mean = found.value - found.terms["t_sharp"]
        wrong += mean + scale * (found.value - mean) < truth - 1e-9
        if found.lower is not None:
            wrong += mean + scale * (found.lower - mean) > truth + 1e-9
    return wrong / trials


def stopped(law: Law, until: str | float, trials: int) -> float:
    """Share of trials in which a run that stops when it pleases ends with a bound below the risk of M."""
    rng, wrong = _rng("stopped", until), 0
    for _ in range(trials):
        evidence = losses(law, rng, LONGEST)
        stop = bounds.first_stop(evidence, until, DELTA)
        if stop is not None and stop.reason != "futile":
            wrong += stop.value < law.base
    return wrong / trials


def wrong_verdicts(reason: str, trials: int) -> float:
    """Share of trials with a verdict that is wrong by a hair: the mean of Z is log2 V, or just beside it."""
    nudge = 1e-6 if reason == "nonvacuous" else -1e-6
    law, rng, wrong = coin((BASELINE + nudge - LOW) / WIDTH), _rng("verdict", reason), 0
    for _ in range(trials):
        stop = bounds.first_stop(losses(law, rng, LONGEST), "decided", DELTA)
        wrong += stop is not None and stop.reason == reason
    return wrong / trials


def best_of_several(number: int, shared: bool, trials: int) -> float:
    """Share of trials in which the smallest of several bounds is below its risk.

    Args:
        number: SAEs that are compared on the same sequences, each losing something on others of them.
        shared: Whether they share delta.
        trials: Number of trials.
    """
    rng, wrong = _rng("best", number, shared), 0
    p = 0.5
    for _ in range(trials):
        found = []
        for _ in range(number):
            evidence = losses(coin(p), rng, SIZE)
            level = DELTA / number if shared else DELTA
            found.append(bounds.sharp_value("sharp_betting", evidence, level).value)
        wrong += min(found) < LOW + p * WIDTH
    return wrong / trials


def holm_rejects(number: int, false_nulls: int, trials: int) -> float:
    """Share of trials in which Holm's procedure calls any SAE non-vacuous that is not.

    Args:
        number: SAEs.
        false_nulls: How many of them are far below the baseline, and should be rejected.
        trials: Number of trials.
    """
    rng, wrong = _rng("holm", number, false_nulls), 0
    risks = [LOW + 0.2 * WIDTH] * false_nulls + [BASELINE + 1e-6] * (number - false_nulls)
    for _ in range(trials):
        p_values = {}
        for index, risk in enumerate(risks):
            x = losses(coin((risk - LOW) / WIDTH), rng, SIZE).joint()
            p_values[str(index)] = bounds.betting_p_value(
                x.samples, x.low, x.high, BASELINE, DELTA / number
            )
        rejected = bounds.holm(p_values, DELTA)
        wrong += any(rejected[str(index)] for index in range(false_nulls, number))
    return wrong / trials


def best_threshold_fails(trials: int) -> float:
    """Share of trials in which the Occam bound at the best of several thresholds is below the risk of M.

    A dictionary of 12 features; a violation of any pool hides the loss, as in the tightest law.
    """
    rng, wrong, sizes = _rng("threshold"), 0, {1: 11, 2: 9, 4: 6, 8: 3}
    p = 0.4
    for _ in range(trials):
        # The rarest feature has a count of 0, 1, 3, 5 or 20: which pools are violated.
        rarest = rng.choice([0, 1, 3, 5, 20], size=SIZE, p=[p / 4, p / 4, p / 4, p / 4, 1 - p])
        violation = (rarest < 1).astype(float)
        base = np.where(rarest < 20, CAP, LOW)
        evidence = bounds.Losses.check(
            loss_base=base, loss_sae=base, loss_pool=np.where(violation > 0, LOW, base),
            violation=violation, vocab_size=VOCAB, alpha=0.5,
        )  # fmt: skip
        best = bounds.best_threshold(evidence, rarest, sizes, dict_size=12, delta=DELTA)
        wrong += best.bound.value < LOW + p * WIDTH
    return wrong / trials


def all_pools(occam: bool, trials: int) -> float:
    """Share of trials in which the bound of any of C(6, 3) = 20 pools is below the risk of M.

    Args:
        occam: Whether each pool has delta / 20.
        trials: Number of trials.
    """
    rng, wrong, p = _rng("pools", occam), 0, 0.5
    nats = float(bounds.log_binom(6, 3)) if occam else 0.0
    for _ in range(trials):
        # Given the pool, Z is a coin: independent ones are the worst for a union of events.
        smallest = min(
            bounds.sharp_value(
                "sharp_occam", losses(coin(p), rng, SIZE), DELTA, complexity=nats
            ).value
            for _ in range(20)
        )
        wrong += smallest < LOW + p * WIDTH
    return wrong / trials


def cases() -> dict[str, Callable[[int], float]]:
    """Every claim by name."""
    found: dict[str, Callable[[int], float]] = {}
    for title, law in LAWS.items():
        for name in _TRUTH:
            found[f"{title}: {name}"] = functools.partial(one_bound, law, name, False)
        for name in ("sharp_betting", "sharp_measured"):
            found[f"{title}: {name} at any time"] = functools.partial(one_bound, law, name, True)
    for title in ("coin, even", "violations hide the loss, rare"):
        for until in ("nonvacuous", 14.0):
            found[f"{title}: until {until}"] = functools.partial(stopped, LAWS[title], until)
    found["verdict: wrongly non-vacuous"] = functools.partial(wrong_verdicts, "nonvacuous")
    found["verdict: wrongly futile"] = functools.partial(wrong_verdicts, "futile")
    found["best of 5 SAEs, delta shared"] = functools.partial(best_of_several, 5, True)
    found["Holm: 4 vacuous SAEs"] = functools.partial(holm_rejects, 4, 0)
    found["Holm: 4 SAEs, 2 of them vacuous"] = functools.partial(holm_rejects, 4, 2)
    found["best of 4 thresholds"] = best_threshold_fails
    found["all of 20 pools"] = functools.partial(all_pools, True)
    return found


def _rng(*what: object) -> np.random.Generator:
    return np.random.default_rng([20_261_122, *"/".join(map(str, what)).encode()])


def allowed(trials: int, delta: float = DELTA) -> float:
    """Largest share of failures that a probability of at most delta explains: four standard deviations."""
    return delta + 4.0 * math.sqrt(delta * (1.0 - delta) / trials)

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
from saelens_certify.bounds.times import looks

Array = NDArray[np.float64]
Rows = tuple[Array, Array, Array, Array]

VOCAB = 50_257
CAP = float(bounds.loss_cap(VOCAB))
WIDTH = float(bounds.loss_range(VOCAB))
LOW = CAP - WIDTH
BASELINE = float(bounds.uniform_baseline(VOCAB))
DELTA = 0.05
SIZE = 40  # sequences of a trial with a number fixed in advance
LONGEST = 200  # and of one that may stop


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

UNIGRAM = LOW + WIDTH / 2
"""Expected loss of the unigram model, a fair coin in every law."""

_TRUTH: dict[str, Callable[[Law], float]] = {
    "sharp_betting": lambda law: law.base,
    "sharp_bernstein": lambda law: law.base,
    "sharp_measured": lambda law: law.base,
    "sharp_direct_base": lambda law: law.base,
    "sharp_direct_sae": lambda law: law.sae,
    "sharp_direct_pool": lambda law: law.pool,
    "sharp_unigram": lambda law: law.base - UNIGRAM,
    "excess_sae": lambda law: law.sae - law.base,
    "excess_pool": lambda law: law.pool - law.base,
    "excess_sae_two_sided": lambda law: law.sae - law.base,
    "excess_pool_two_sided": lambda law: law.pool - law.base,
}
_ANY_TIME = ("sharp_betting", "sharp_bernstein", "sharp_measured", "sharp_unigram", "excess_pool")
_LOOKED_AT = ("coin, even", "violations hide the loss, rare", "like GPT-2")
_PUBLISHED = ("u_sae", "u_sae_occam", "direct_base", "direct_pool", "preprint")


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
        loss_unigram=np.where(rng.random(n) < 0.5, CAP, LOW),
    )


def published(law: Law, name: str, trials: int) -> float:
    """Share of trials in which a published bound is below what it bounds."""
    columns = law.draw(_rng("published", name), trials * SIZE)
    base, sae, pool, violation = (column.reshape(trials, SIZE) for column in columns)
    measured = {
        "risk_pool": pool.mean(axis=1),
        "gap": np.abs(base - sae).mean(axis=1),
        "eta": violation.mean(axis=1),
    }
    constants = {"n": SIZE, "vocab_size": VOCAB, "dict_size": 10, "pool_size": 9, "delta": DELTA}
    if name == "preprint":
        values = bounds.preprint(**measured, **constants)
    else:
        values = bounds.published(**measured, risk_base=base.mean(axis=1), **constants)[name]
    truth = law.pool if name == "direct_pool" else law.base
    return float(np.mean(values < truth - 1e-9))


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


def stopped(law: Law, trials: int, fixed: bool = False, longest: int = LONGEST) -> float:
    """Share of trials in which a run that stops as soon as it is below the risk of M ever stops.

    The hardest rule there is: whenever it stops, the bound is wrong.

    Args:
        law: The evidence.
        trials: Number of trials.
        fixed: Whether to look with the bound for one number of sequences, which does not survive it.
        longest: Most sequences.
    """
    rng, wrong, target = _rng("stopped"), 0, law.base - 1e-6
    for _ in range(trials):
        evidence = losses(law, rng, longest)
        if not fixed:
            wrong += bounds.first_stop(evidence, target, DELTA) is not None
            continue
        x = evidence.joint()
        wrong += any(
            bounds.betting_upper(x.samples[:n], x.low, x.high, DELTA) <= target
            for n in looks(longest).tolist()
        )
    return wrong / trials


def wrong_verdicts(reason: str, trials: int, name: str = "sharp_betting") -> float:
    """Share of trials with a verdict that is wrong by a hair: the mean of Z is log2 V, or just beside it."""
    nudge = 1e-6 if reason == "nonvacuous" else -1e-6
    law, rng, wrong = coin((BASELINE + nudge - LOW) / WIDTH), _rng("verdict", reason), 0
    for _ in range(trials):
        stop = bounds.first_stop(losses(law, rng, LONGEST), "decided", DELTA, name=name)
        wrong += stop is not None and stop.reason == reason
    return wrong / trials


def best_of_several(number: int, shared: bool, trials: int) -> float:
    """Share of trials in which the smallest of several bounds is below its risk.

    Args:
        number: SAEs that are compared, each on sequences of its own: the worst case of a union.
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


def holm_rejects(number: int, false_nulls: int, trials: int, corrected: bool = True) -> float:
    """Share of trials in which Holm's procedure rejects any claim that is true.

    Args:
        number: Claims about means; fair coins whose mean is what is claimed, or
        false_nulls: (so many) far below it, which should be rejected.
        trials: Number of trials.
        corrected: Whether p-values are compared with Holm's levels; else each with delta.
    """
    rng, wrong, claim = _rng("holm", number, false_nulls), 0, LOW + WIDTH / 2
    for _ in range(trials):
        p_values = {}
        for index in range(number):
            p = 0.05 if index < false_nulls else 0.5
            x = losses(coin(p), rng, SIZE).joint()
            level = DELTA / number if corrected else DELTA
            p_values[str(index)] = bounds.betting_p_value(x.samples, x.low, x.high, claim, level)
        rejected = bounds.holm(p_values, DELTA)
        if not corrected:
            rejected = {name: p <= DELTA for name, p in p_values.items()}
        wrong += any(rejected[str(index)] for index in range(false_nulls, number))
    return wrong / trials


def best_threshold_fails(trials: int) -> float:
    """Share of trials in which the Occam bound at the best of several thresholds is below the risk of M.

    A dictionary of 12 features; a violation of any pool hides the loss, as in the tightest law. (Z of no
    threshold can then be below the loss, so the bounds differ only by what they pay for.)
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
        for name in _PUBLISHED:
            found[f"{title}: {name}"] = functools.partial(published, law, name)
        for name in _TRUTH:
            found[f"{title}: {name}"] = functools.partial(one_bound, law, name, False)
        for name in _ANY_TIME if title in _LOOKED_AT else ():
            found[f"{title}: {name} at any time"] = functools.partial(one_bound, law, name, True)
    for title in _LOOKED_AT:
        found[f"{title}: stopped below the truth"] = functools.partial(stopped, LAWS[title])
    for name in ("sharp_betting", "sharp_measured"):
        for reason in ("nonvacuous", "futile"):
            found[f"verdict of {name}: wrongly {reason}"] = functools.partial(
                wrong_verdicts, reason, name=name
            )
    found["best of 5 SAEs, delta shared"] = functools.partial(best_of_several, 5, True)
    found["Holm: 20 true claims"] = functools.partial(holm_rejects, 20, 0)
    found["Holm: 10 true claims of 20"] = functools.partial(holm_rejects, 20, 10)
    found["best of 4 thresholds"] = best_threshold_fails
    found["all of 20 pools"] = functools.partial(all_pools, True)
    return found


def _rng(*what: object) -> np.random.Generator:
    return np.random.default_rng([20_261_122, *"/".join(map(str, what)).encode()])


def allowed(trials: int, delta: float = DELTA) -> float:
    """Largest share of failures that a probability of at most delta explains: four standard deviations."""
    return delta + 4.0 * math.sqrt(delta * (1.0 - delta) / trials)

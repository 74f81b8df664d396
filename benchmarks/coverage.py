"""How often every bound and every test fails, on distributions chosen against them.

Run as ``python -m benchmarks.coverage [--json FILE] [--trials 10000]``. Here are the bounds of a bounded mean: every trial draws a sample of a
variable whose mean is known. A bound fails if it is below that mean; a sequence fails if any of its bounds is,
whenever one looks, so its failures include those of every rule for stopping early. Times are printed as well.
What is built on them has a module of its own each (`CLAIMS`): the sharp certificates, baselines, clusters, shuffle tests.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import coverage_clusters, coverage_plan, coverage_sharp, coverage_shuffle
from benchmarks.environment import environment
from benchmarks.results import write_json
from saelens_certify import bounds

Array = NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, int]], Array]

HIGH = 17.6  # bits: about the range of GPT-2's smoothed loss
DELTA = 0.05
SIZES = (10, 40, 200)
LOOKS_AT_EVERY = 40
LONGEST = 400

CLAIMS = {
    "sharp certificates": coverage_sharp.cases,
    "baselines and information kept": coverage_plan.cases,
    "clusters": coverage_clusters.cases,
    "shuffle test": coverage_shuffle.cases,
}
"""Claims by topic: functions from a number of trials to the share of trials in which the claim fails."""


@dataclass(frozen=True)
class Law:
    """A distribution on [0, HIGH].

    Attributes:
        mean: Its mean.
        draw: Draws an array of the given shape.
    """

    mean: float
    draw: Draw


def two_points(p: float) -> Law:
    """The largest value with probability p, else the smallest."""
    return Law(p * HIGH, lambda rng, shape: np.where(rng.random(shape) < p, HIGH, 0.0))


def spikes(p: float) -> Law:
    """Quiet losses, and a mismatch term that adds its whole range with probability p."""
    half = HIGH / 2

    def draw(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
        quiet = rng.uniform(0.3, 0.5, shape) * half
        return quiet + half * (rng.random(shape) < p)

    return Law((0.4 + p) * half, draw)


def heavy_tail(scale: float) -> Law:
    """The smaller of 1 and scale / U, in units of the range: a density of scale / x^2 below its end."""

    def draw(rng: np.random.Generator, shape: tuple[int, int]) -> Array:
        return HIGH * np.minimum(1.0, scale / (1.0 - rng.random(shape)))

    return Law(HIGH * scale * (1.0 - math.log(scale)), draw)


def losses() -> Law:
    """Moments like GPT-2's losses: mean 7 bits, standard deviation 1 bit."""
    return Law(7.0, lambda rng, shape: 7.0 + rng.uniform(-1.0, 1.0, (3, *shape)).sum(axis=0))


LAWS: dict[str, Law] = {
    "two points, even": two_points(0.5),
    "two points, rarely high": two_points(0.02),
    "two points, rarely low": two_points(0.97),
    "rare spike": spikes(0.02),
    "heavy upper tail": heavy_tail(0.02),
    "losses": losses(),
}

Upper = Callable[[Array], float]
Sequential = Callable[[Array, Any], Array]


def upper_bounds(delta: float) -> dict[str, Upper]:
    """The bounds for one number of samples, by name."""
    return {
        "hoeffding_upper": lambda x: bounds.hoeffding_upper(x, 0.0, HIGH, delta),
        "bernstein_upper": lambda x: bounds.bernstein_upper(x, 0.0, HIGH, delta),
        "betting_upper": lambda x: bounds.betting_upper(x, 0.0, HIGH, delta),
        "betting_upper constant": lambda x: bounds.betting_upper(
            x, 0.0, HIGH, delta, bets="constant"
        ),
    }


def sequences(delta: float) -> dict[str, Sequential]:
    """The confidence sequences, by name."""
    return {
        "hoeffding_sequence": lambda x, t: bounds.hoeffding_sequence(x, 0.0, HIGH, delta, t),
        "bernstein_sequence": lambda x, t: bounds.bernstein_sequence(x, 0.0, HIGH, delta, t),
        "betting_sequence": lambda x, t: bounds.betting_sequence(x, 0.0, HIGH, delta, t),
    }


def sample(name: str, trials: int, n: int) -> Array:
    """Samples of a law [trials, n]; the same for the same arguments."""
    seed = [20_261_122, sorted(LAWS).index(name), n]
    return LAWS[name].draw(np.random.default_rng(seed), (trials, n))


def failures(name: str, bound: Upper, trials: int, n: int, scale: float = 1.0) -> float:
    """Share of trials in which a bound is below the mean.

    Args:
        name: Law.
        bound: Bound for one number of samples.
        trials: Number of trials.
        n: Number of samples in each.
        scale: Multiplies the margin between sample mean and bound: below 1, the bound is wrong.
    """
    x = sample(name, trials, n)
    found = np.array([bound(row) for row in x])
    means = x.mean(axis=1)
    return float(np.mean(means + scale * (found - means) < LAWS[name].mean))


def looks(n: int) -> NDArray[np.int64]:
    """When a sequence is looked at: after each of the first samples, then ever more rarely."""
    return np.union1d(np.arange(1, min(n, LOOKS_AT_EVERY) + 1), bounds.log_times(n))


@dataclass(frozen=True)
class Peeked:
    """What came of looking all the time.

    Attributes:
        ever: Share of trials in which the bound was below the mean at any look.
        stopped: Share of trials in which it was below the mean at the look at which it first was below
            the target, or at the last look.
        stopped_at: Median number of samples at that look.
    """

    ever: float
    stopped: float
    stopped_at: float


def peek(name: str, sequence: Sequential, trials: int, n: int) -> Peeked:
    """Look all the time, and stop when the bound is below the mean plus a tenth of the range.

    Args:
        name: Law.
        sequence: Confidence sequence.
        trials: Number of trials.
        n: Most samples.
    """
    mean, when = LAWS[name].mean, looks(n)
    ever, stopped, at = 0, 0, []
    for row in sample(name, trials, n):
        found = sequence(row, when)
        below = np.flatnonzero(found < mean + HIGH / 10)
        stop = int(below[0]) if len(below) else len(when) - 1
        ever += bool((found < mean).any())
        stopped += bool(found[stop] < mean)
        at.append(int(when[stop]))
    return Peeked(ever / trials, stopped / trials, float(np.median(at)))


def allowed(trials: int, delta: float = DELTA) -> float:
    """Largest share of failures that is compatible with a probability of at most delta.

    Four standard deviations above delta: a bound that fails with probability delta exceeds it once in some
    30,000 experiments.
    """
    return delta + 4.0 * math.sqrt(delta * (1.0 - delta) / trials)


def timings(n: int) -> dict[str, float]:
    """Seconds for each bound and each whole sequence on n samples."""
    x = sample("losses", 1, n)[0]
    calls: dict[str, Callable[[], object]] = {
        name: lambda bound=bound: bound(x) for name, bound in upper_bounds(DELTA).items()
    }
    calls |= {
        name: lambda sequence=sequence: sequence(x, None)
        for name, sequence in sequences(DELTA).items()
    }
    found = {}
    for name, call in calls.items():
        begin = time.perf_counter()
        call()
        found[name] = time.perf_counter() - begin
    return found


def claim_fails(topic: str, name: str, trials: int) -> float:
    """Share of trials in which one claim of `CLAIMS` fails."""
    return CLAIMS[topic]()[name](trials)


def claims(trials: int, jobs: int) -> list[dict[str, Any]]:
    """Simulate every claim of `CLAIMS`.

    Args:
        trials: Trials of each.
        jobs: Processes to use.
    """
    tasks = [(topic, name) for topic, cases in CLAIMS.items() for name in cases()]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        found = pool.map(claim_fails, *zip(*tasks, strict=True), [trials] * len(tasks))
        rows = []
        for (topic, name), rate in zip(tasks, found, strict=True):
            rows.append({"topic": topic, "claim": name, "failure": rate})
            print(f"{topic:30s} {name:50s} {rate:.4f}", flush=True)
    return rows


def run(
    trials: int, timed: int, jobs: int = 1, what: Sequence[str] = ("means", "claims")
) -> dict[str, Any]:
    """Simulate.

    Args:
        trials: Trials of each case.
        timed: Number of samples on which to measure times.
        jobs: Processes to use for the claims.
        what: "means": the bounds of a mean. "claims": what is built on them.
    """
    about = environment()
    begin = time.perf_counter()
    claimed = claims(trials, jobs) if "claims" in what else []
    laws = LAWS if "means" in what else {}
    rows: list[dict[str, Any]] = []
    for law in laws:
        for name, bound in upper_bounds(DELTA).items():
            rates = {str(n): failures(law, bound, trials, n) for n in SIZES}
            rows.append({"law": law, "bound": name, "failures": rates})
            print(f"{law:26s} {name:24s} {rates}", flush=True)
        for name, sequence in sequences(DELTA).items():
            found = dataclasses.asdict(peek(law, sequence, trials, LONGEST))
            rows.append({"law": law, "bound": name, **found})
            print(f"{law:26s} {name:24s} {found}", flush=True)
    rates = [rate for row in rows for rate in row.get("failures", {}).values()]
    rates += [row[key] for row in rows for key in ("ever", "stopped") if key in row]
    rates += [row["failure"] for row in claimed]
    return {
        "environment": about,
        "trials": trials,
        "delta": DELTA,
        "range": HIGH,
        "longest_sequence": LONGEST,
        "largest_failure_rate": max(rates),
        "allowed_failure_rate": allowed(trials),
        "covered": max(rates) <= allowed(trials),
        "rows": rows,
        "claims": claimed,
        "timed_samples": timed,
        "seconds_for_timed_samples": timings(timed),
        "seconds": time.perf_counter() - begin,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line.

    Returns:
        0 if every bound holds as often as it says, else 1.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.coverage",
        description=__doc__.splitlines()[0] if __doc__ else None,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write results here")
    parser.add_argument("--trials", type=int, default=10_000, help="trials of each case")
    parser.add_argument(
        "--timed", type=int, default=10**6, help="samples on which to measure times"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument(
        "--only", choices=("means", "claims"), help="bounds of a mean, or what is built on them"
    )
    options = parser.parse_args(argv)
    what = ("means", "claims") if options.only is None else (options.only,)
    found = run(options.trials, options.timed, options.jobs, what)
    if options.json is not None:
        write_json(options.json, found)
    for name, seconds in found["seconds_for_timed_samples"].items():
        print(f"{name:24s} {options.timed} samples in {seconds:.3f} s")
    verdict = "hold as often as they say" if found["covered"] else "FAIL more often than they say"
    print(
        f"all of them {verdict}: largest failure rate {found['largest_failure_rate']:.4f} "
        f"at delta = {DELTA}, {found['seconds']:.0f} s"
    )
    return 0 if found["covered"] else 1


if __name__ == "__main__":
    sys.exit(main())

"""Limits of baselines and of the information kept fail as rarely as they say, and the simulation can fail.

A small share of what `benchmarks.coverage_plan` runs: the same laws, fewer trials, fixed seeds.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks import coverage_plan as plan
from benchmarks.coverage import allowed
from saelens_certify.bounds.kept import information_kept

TRIALS = 120


@pytest.mark.parametrize("name", plan.cases())
def test_coverage(name: str):
    assert plan.cases()[name](TRIALS) <= allowed(TRIALS, plan.DELTA)


def test_limits_are_found_and_part_of_their_width_is_not_enough():
    limits = plan.kept_limits("coins", TRIALS)
    assert np.isfinite(limits).all(axis=1).mean() > 0.9
    truth = plan.LAWS["coins"].kept()
    assert plan.outside(limits, truth, 0.3) > allowed(TRIALS, plan.DELTA)
    assert plan.outside(limits, truth + 0.5) > 0.5


def test_no_ratio_without_a_denominator():
    """M exactly as good as the baseline: any limits are wrong, so there are at most delta / 2 of them."""
    rng = np.random.default_rng(3)
    wrong = 0
    for _ in range(TRIALS):
        b, m, p = plan.HIGH * (rng.random((3, plan.KEPT_SIZE)) < 0.5)
        wrong += information_kept(b, m, p, 0.0, plan.HIGH, 0.4).lower is not None
    assert wrong / TRIALS <= allowed(TRIALS, 0.2)


def test_the_laws_have_the_means_that_they_name():
    for name, law in plan.LAWS.items():
        drawn = plan.sample(name, 1000, plan.KEPT_SIZE)
        for x, mean in zip(drawn, (law.baseline, law.base, law.proxy), strict=True):
            assert x.min() >= 0.0
            assert x.max() <= plan.HIGH
            assert abs(x.mean() - mean) < 4.5 * x.std() / math.sqrt(x.size), name

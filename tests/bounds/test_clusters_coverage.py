"""Bounds on cluster means fail as rarely as they say; what the claim leaves out fails often.

A small share of ``benchmarks/coverage_clusters.py``: the same laws, fewer trials, fixed seeds.
"""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import coverage_clusters as simulation
from benchmarks.coverage import allowed
from saelens_certify.bounds.clusters import cluster_means

TRIALS = 300


@pytest.mark.parametrize("name", simulation.cases())
def test_coverage(name: str):
    assert simulation.cases()[name](TRIALS) <= allowed(TRIALS)


@pytest.mark.parametrize("name", simulation.demonstrations())
def test_what_is_not_claimed_fails(name: str):
    assert simulation.demonstrations()[name](TRIALS) > 2.0 * allowed(TRIALS)


@pytest.mark.parametrize("name", simulation.upper_bounds(simulation.DELTA))
def test_part_of_the_margin_is_not_enough(name: str):
    bound = simulation.upper_bounds(simulation.DELTA)[name]
    law = "windows of long, hard documents"
    assert simulation.failures(law, bound, TRIALS, 41, 0.15) > allowed(TRIALS)


@pytest.mark.parametrize("law", simulation.LAWS)
def test_the_laws_have_the_means_that_they_name(law: str):
    drawn = [simulation.Evidence.draw(law, seed, 40) for seed in range(TRIALS)]
    means = np.array([evidence.means() for evidence in drawn])
    assert means.shape == (TRIALS, 40)
    assert min(evidence.values.min() for evidence in drawn) >= 0.0
    assert max(evidence.values.max() for evidence in drawn) <= simulation.HIGH
    error = means.std() / np.sqrt(means.size)
    assert abs(means.mean() - simulation.LAWS[law].mean) < 4.5 * error


def test_clusters_as_completed_are_the_same_clusters():
    drawn = simulation.Evidence.draw("windows of long, hard documents", 1, 40)
    assert sorted(drawn.means()) == sorted(drawn.means_as_completed())
    assert len(cluster_means(drawn.values, drawn.hashes)) == len(drawn.values)

"""The sharp certificates fail as rarely as they say, and the simulation can fail.

A small share of ``python -m benchmarks.coverage``: the same laws, fewer trials, fixed seeds.
"""

from __future__ import annotations

import pytest

from benchmarks import coverage_sharp as sim

TRIALS = 200
SLOW = 30


def _trials(name: str) -> int:
    slow = any(
        word in name for word in ("any time", "until", "verdict", "best of", "Holm", "pools")
    )
    return SLOW if slow else TRIALS


@pytest.mark.parametrize("name", sim.cases())
def test_coverage(name: str):
    trials = _trials(name)
    assert sim.cases()[name](trials) <= sim.allowed(trials)


@pytest.mark.parametrize("name", ["sharp_betting", "sharp_bernstein", "sharp_measured"])
def test_part_of_the_margin_is_not_enough(name: str):
    scale = 0.15 if name == "sharp_bernstein" else 0.3
    rate = sim.one_bound(sim.LAWS["violations hide the loss, even"], name, False, TRIALS, scale)
    assert rate > sim.allowed(TRIALS)


def test_both_ends_of_a_two_sided_bound_matter():
    law = sim.LAWS["gap hides the loss, rare"]
    assert sim.one_bound(law, "excess_sae_two_sided", False, TRIALS, 0.05) > sim.allowed(TRIALS)


def test_the_best_of_several_needs_its_share_of_delta():
    """Without the Bonferroni share, choosing the smallest of many bounds fails more often than delta."""
    trials = 120
    assert sim.best_of_several(40, shared=False, trials=trials) > sim.allowed(trials)


def test_all_pools_need_the_occam_term():
    trials = 700
    assert sim.all_pools(occam=False, trials=trials) > sim.allowed(trials)


def test_a_bound_for_one_number_does_not_survive_looking_all_the_time():
    trials = 250
    rate = sim.stopped(sim.LAWS["coin, even"], trials, fixed=True, longest=1500)
    assert rate > sim.allowed(trials)


def test_many_true_claims_need_the_correction():
    trials = 200
    assert sim.holm_rejects(60, 0, trials, corrected=False) > sim.allowed(trials)

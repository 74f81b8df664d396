"""The shuffle test is wrong as rarely as it says and finds what is there; the simulation can fail.

A small share of what ``benchmarks.coverage_shuffle`` gives to the benchmark of coverage.
"""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import coverage_shuffle as simulation
from benchmarks.coverage import allowed
from saelens_certify.bounds.shuffle import shuffle_test

TRIALS = 300
P_VALUES = [name for name in simulation.cases() if name.startswith("p-value")]
LIMITS = [name for name in simulation.cases() if name.startswith("limits")]


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("name", P_VALUES)
def test_false_alarms(name: str, alpha: float) -> None:
    rate = simulation.cases(alpha)[name](TRIALS)
    assert rate <= allowed(TRIALS, alpha)
    if name in ("p-value, costs smooth", "p-value, random directions"):
        assert rate >= 2 * alpha - allowed(TRIALS, alpha), "exact, not conservative, without ties"


@pytest.mark.parametrize("delta", [0.05, 0.3])
@pytest.mark.parametrize("name", LIMITS)
def test_limits(name: str, delta: float) -> None:
    assert simulation.cases(delta)[name](150) <= allowed(150, delta)


@pytest.mark.parametrize("name", simulation.findings())
def test_what_is_there_is_found(name: str) -> None:
    assert simulation.findings()[name](40) >= 0.95


def test_frequency_alone_is_no_alignment_beyond_frequency() -> None:
    """The same SAEs: significant against uniform permutations, not against frequency-matched ones."""
    assert simulation.frequency_only(TRIALS, 0.05, matched=False) >= 0.99
    assert simulation.frequency_only(TRIALS, 0.05, matched=True) <= allowed(TRIALS, 0.05)
    assert simulation.aligned(TRIALS, 0.05, matched=True) >= 0.95


def test_nothing_is_found_below_the_smallest_p_value() -> None:
    assert simulation.aligned(20, 1 / 21, matched=False) == 0.0


def test_the_simulation_finds_wrong_p_values(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_itself(own: float, others: np.ndarray) -> float:
        return float(np.mean(others <= own))

    def without_ties(own: float, others: np.ndarray) -> float:
        return float((1 + np.sum(others < own)) / (1 + len(others)))

    monkeypatch.setattr(simulation, "permutation_p_value", without_itself)
    rate = simulation.null_errors("smooth", 2 * TRIALS, 0.01)
    assert rate > allowed(2 * TRIALS, 0.01)
    monkeypatch.setattr(simulation, "permutation_p_value", without_ties)
    assert simulation.null_errors("all equal", TRIALS, 0.05) > allowed(TRIALS, 0.05)


def test_the_simulation_finds_limits_that_are_too_tight() -> None:
    rate = simulation.limit_errors("coins, no effect", 300, 0.05, scale=0.4)
    assert rate > allowed(300, 0.05)


@pytest.mark.parametrize("name", simulation.LAWS)
def test_the_laws_have_the_effects_that_they_name(name: str) -> None:
    law = simulation.LAWS[name]
    gaps = law.draw(np.random.default_rng(3), 200_000)
    assert gaps.min() >= 0.0
    assert gaps.max() <= simulation.WIDTH
    difference = gaps[1:].mean(axis=0) - gaps[0]
    assert abs(difference.mean() - law.effect) < 4.5 * difference.std() / 200_000**0.5


def test_the_p_values_simulated_are_those_of_the_test() -> None:
    rng = np.random.default_rng(4)
    for name, costs in simulation.COSTS.items():
        real = simulation.pairings(rng, 1, matched=False)[0]
        base, sae, copies = simulation.world(rng, costs(rng), real, True, False)
        found = shuffle_test(base, sae, copies, vocab_size=simulation.VOCAB)
        assert found.p_value == simulation.p_value(base, sae, copies), name


def test_pairings_are_permutations_that_keep_groups_if_asked_to() -> None:
    rng = np.random.default_rng(5)
    for matched in (False, True):
        found = simulation.pairings(rng, 4000, matched)
        assert (np.sort(found, axis=1) == np.arange(simulation.FEATURES)).all()
        kept = simulation.GROUPS[found] == simulation.GROUPS
        assert kept.all() if matched else abs(kept.mean() - 0.25) < 0.02
        # Every place that is allowed is equally likely.
        share = (found[:, 0] == 0).mean()
        expected = 1 / 4 if matched else 1 / simulation.FEATURES
        assert abs(share - expected) < 0.04

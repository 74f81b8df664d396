"""Simulations: false alarms over unlimited monitoring, power after a shift, restarts, state."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from saelens_certify.errors import CertifyError
from saelens_certify.monitor.sequential import SequentialTest


def sequences(n, generator, violation=0.02, error=0.1):
    """Values of n sequences: violations, few outside features where violated, an error."""
    violated = (generator.random(n) < violation).astype(float)
    outside = violated * generator.beta(2, 60, n)
    errors = np.clip(generator.normal(error, 0.02, n), 0, 1)
    return np.stack([violated, outside, errors], axis=-1)


@pytest.mark.parametrize("violation", [0.0, 0.01, 0.5, 0.97])
def test_false_alarms_over_all_time_are_as_rare_as_stated(violation) -> None:
    """60 streams of 4,000 sequences, each watched after every sequence, at a level of 20 %."""
    false = 0
    for seed in range(60):
        generator = np.random.default_rng(seed)
        test = SequentialTest.start(sequences(150, generator, violation), false_alarm=0.2)
        test = test.after(sequences(4000, generator, violation))
        false += bool(test.alarms)
    # 12 are allowed on average; the bounds are not exact, so that far fewer occur.
    assert false <= 12


def test_false_alarms_at_the_worst_case_of_the_null() -> None:
    """Means equal to the reference's bounds: half of false_alarm is what Ville allows."""
    generator = np.random.default_rng(0)
    start = SequentialTest.start(sequences(100, generator, 0.1), false_alarm=0.4)
    bounds = np.array(start.reference.bounds)
    false = sum(
        bool(start.after((generator.random((1500, 3)) < bounds).astype(float)).alarms)
        for _ in range(200)
    )
    assert 0 < false <= 200 * 0.2


@pytest.mark.parametrize(
    ("before", "after", "within"),
    [
        ({"violation": 0.0}, {"violation": 0.05}, 150),
        ({"violation": 0.01}, {"violation": 0.10}, 150),
        ({"violation": 0.5}, {"violation": 0.8}, 100),
        ({"violation": 0.0}, {"error": 0.13}, 50),
        ({"violation": 0.97}, {"violation": 0.97, "error": 0.3}, 10),
    ],
)
@pytest.mark.parametrize("quiet", [0, 20_000])
def test_a_shift_is_found_in_few_sequences(before, after, within, quiet) -> None:
    delays = []
    for seed in range(5):
        generator = np.random.default_rng(seed)
        test = SequentialTest.start(sequences(2000, generator, **before), false_alarm=0.01)
        test = test.after(sequences(quiet, generator, **before))
        assert not test.alarms
        test = test.after(sequences(2000, generator, **{**before, **after}))
        assert test.alarms, "the shift was not found"
        delays.append(test.alarms[0].tested - quiet)
    # A long quiet past costs a factor, not a multiple of its length.
    assert np.median(delays) <= within * (3 if quiet else 1)


def test_features_outside_have_power_where_every_sequence_violates() -> None:
    generator = np.random.default_rng(0)
    values = sequences(1000, generator, violation=1.0)
    test = SequentialTest.start(values, false_alarm=0.01)
    shifted = sequences(200, generator, violation=1.0)
    shifted[:, 1] = np.clip(3 * shifted[:, 1], 0, 1)
    test = test.after(shifted)
    assert test.alarms[0].statistic == "outside"
    assert test.alarms[0].tested < 60


def test_easier_streams_raise_no_alarm() -> None:
    generator = np.random.default_rng(0)
    test = SequentialTest.start(sequences(1000, generator, 0.3, 0.2), false_alarm=0.5)
    test = test.after(sequences(5000, generator, 0.0, 0.01))
    assert not test.alarms
    assert test.log_e_max < math.log(1.2)


def test_alarm_is_at_the_crossing_and_stays() -> None:
    generator = np.random.default_rng(0)
    test = SequentialTest.start(sequences(500, generator, 0.0), false_alarm=0.01)
    stream = sequences(300, generator, 0.3)
    at_once = test.after(stream, request=7, time=1.5)
    for row in stream:
        test = test.after(row[None])
        if test.alarms:
            break
    assert test.alarms[0].tested == at_once.alarms[0].tested
    assert (at_once.alarms[0].request, at_once.alarms[0].time) == (7, 1.5)
    assert at_once.alarms[0].log_e >= at_once.log_threshold
    quiet = at_once.after(sequences(2000, generator, 0.0))
    assert quiet.alarms == at_once.alarms


def test_run_length_is_as_long_as_stated() -> None:
    """Average time to the detector's alarm, at the bounds: not below the run length."""
    generator = np.random.default_rng(1)
    start = SequentialTest.start(sequences(400, generator, 0.1), 0.01, run_length=100)
    bounds = np.array(start.reference.bounds)
    times = []
    for _ in range(60):
        values = (generator.random((4000, 3)) < bounds).astype(float)
        recent = [a for a in start.after(values).alarms if a.kind == "recent"]
        times.append(recent[0].tested if recent else 4000)
    assert np.mean(times) >= 100


def test_detector_begins_anew_and_repeats_while_the_shift_lasts() -> None:
    generator = np.random.default_rng(0)
    test = SequentialTest.start(sequences(1000, generator, 0.0), 0.01, run_length=10_000)
    test = test.after(sequences(1000, generator, 0.2))
    recent = [alarm.tested for alarm in test.alarms if alarm.kind == "recent"]
    assert len(recent) > 5
    assert recent == sorted(set(recent))
    more = test.after(sequences(3000, generator, 0.0))
    assert more.alarms[-1].tested <= 1010  # it stops with the shift


def test_detector_is_the_same_row_by_row() -> None:
    generator = np.random.default_rng(0)
    test = SequentialTest.start(sequences(1000, generator, 0.0), 0.01, run_length=10_000)
    stream = sequences(300, generator, 0.2)
    at_once = [alarm.tested for alarm in test.after(stream).alarms]
    for row in stream:
        test = test.after(row[None])
    assert [alarm.tested for alarm in test.alarms] == at_once
    assert len(at_once) > 4


def test_alarms_kept_are_limited_and_the_first_kind_stays() -> None:
    generator = np.random.default_rng(0)
    test = SequentialTest.start(sequences(300, generator, 0.0), 0.01, run_length=10)
    test = test.after(sequences(3000, generator, 1.0))
    assert len(test.alarms) == 100
    assert sum(alarm.kind == "left" for alarm in test.alarms) == 1


def test_state_survives_json() -> None:
    generator = np.random.default_rng(0)
    fresh = SequentialTest.start(sequences(300, generator), 0.01, run_length=1000)
    for n in (0, 40, 400):
        test = fresh.after(sequences(n, generator, 0.2))
        back = fresh.restored(json.loads(json.dumps(test.to_dict(), allow_nan=False)))
        stream = sequences(50, generator)
        assert back.after(stream).to_dict() == test.after(stream).to_dict()


def test_restarted_is_as_it_began() -> None:
    generator = np.random.default_rng(0)
    fresh = SequentialTest.start(sequences(300, generator), 0.01)
    assert fresh.after(sequences(400, generator, 0.5)).restarted().to_dict() == fresh.to_dict()


def test_values_out_of_range_leave_the_test_as_it_was() -> None:
    test = SequentialTest.start(np.zeros((10, 3)), 0.01)
    with pytest.raises(CertifyError):
        test.after(np.full((1, 3), np.nan))

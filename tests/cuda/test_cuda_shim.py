"""The emulation notices what a GPU would get wrong, and gets right what is right."""

from __future__ import annotations

import os
import subprocess
from fractions import Fraction

import cuda_emulation
import numpy as np
import pytest

SEEDS = range(6)


def run(case: str, seed: int = 0, *, ucontext: bool = False) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "SAELENS_CERTIFY_SHIM_SEED": str(seed)}
    command = [str(cuda_emulation.shim_cases(ucontext=ucontext)), case]
    return subprocess.run(command, capture_output=True, text=True, env=env)


def outputs(case: str) -> set[str]:
    done = [run(case, seed) for seed in SEEDS]
    assert all(one.returncode == 0 for one in done), done[0].stderr
    return {one.stdout for one in done}


@pytest.mark.parametrize("case", ["reverse", "shift", "collectives"])
def test_right_kernels_do_not_depend_on_the_order(case):
    assert len(outputs(case)) == 1


@pytest.mark.parametrize("case", ["shift", "collectives", "shift_unsynchronised", "arrivals"])
def test_portable_fibers_do_the_same(case):
    for seed in SEEDS:
        assert run(case, seed, ucontext=True).stdout == run(case, seed).stdout != ""


@pytest.mark.parametrize("case", ["reverse", "shift"])
def test_a_missing_barrier_shows(case):
    (right,) = outputs(case)
    wrong = outputs(f"{case}_unsynchronised")
    assert wrong != {right}
    assert len(wrong) > 1


def test_the_order_of_atomics_varies():
    orders = outputs("arrivals")
    assert len(orders) > 1
    for order in orders:
        assert sorted(map(int, order.split())) == list(range(64))


def test_an_update_that_is_not_atomic_gets_lost():
    (right,) = {one.split()[1] for one in outputs("lost_update")}
    assert right == "64"
    assert any(one.split()[0] != "64" for one in outputs("lost_update"))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missed_barrier", "returned without the barrier"),
        ("different_barriers", "wait at different barriers"),
        ("divergent", "meet at different collectives"),
        ("missing_lane", "a lane of the mask has returned"),
        ("foreign_mask", "the mask lacks the calling lane"),
        ("shuffle_from_outside", "reads from a lane outside the mask"),
        ("barrier_in_half_a_warp", "a lane of the mask"),
    ],
)
def test_errors_abort_and_say_where(case, message):
    for seed in SEEDS:
        done = run(case, seed)
        assert done.returncode != 0
        assert message in done.stderr
        assert "shim_cases.cpp" in done.stderr
        assert "lane" in done.stderr


def test_shared_memory_starts_undefined():
    (line,) = outputs("uninitialised")
    assert set(line.split()) <= {"nan", "-nan"}


def test_collectives():
    (line,) = outputs("collectives")
    got = np.array(line.split(), dtype=np.int64).reshape(96, 16)
    lane = np.arange(96) % 32
    low = lane < 16
    sevens = np.where(lane < 7, 0b0101010, -1)
    wanted = [
        np.full(96, np.array(sum(1 << i for i in range(0, 32, 3)), np.uint32).astype(np.int32)),
        (lane // 2) ** 2,
        lane ^ 5,
        np.where(lane + 3 < 32, lane + 3, lane),
        np.where(lane >= 2, lane - 2, lane),
        lane ^ 6,
        lane // 8 * 8 + 3,
        np.where(low, 120, 376),
        np.where(low, 15, 31),
        ~low,
        ~low,
        (lane ^ 1) * 500,
        np.full(96, 20),
        np.full(96, 1),
        np.full(96, 0),
        sevens,
    ]
    for column, numbers in enumerate(wanted):
        assert got[:, column].tolist() == np.asarray(numbers).astype(int).tolist(), column


def test_directed_roundings():
    (text,) = outputs("roundings")
    a, b, out = (np.array(line.split(), dtype=np.float32) for line in text.splitlines())
    for x, y, results in zip(a, b, out.reshape(-1, 6), strict=True):
        x, y = Fraction(float(x)), Fraction(float(y))
        quotient = Fraction(float(x) / float(y))
        exact = [x + y, x + y, x * y, x * y, quotient, quotient]
        for i, (number, result) in enumerate(zip(exact, results, strict=True)):
            towards = np.float32(-np.inf if i % 2 == 0 else np.inf)
            next_one = Fraction(float(np.nextafter(result, towards)))
            got = Fraction(float(result))
            assert (next_one < number <= got) if i % 2 == 0 else (got <= number < next_one)


@pytest.mark.parametrize("case", ["beyond_shared", "beyond_dynamic"])
def test_the_sanitizer_sees_the_ends_of_shared_memory(case, monkeypatch):
    monkeypatch.setenv("SAELENS_CERTIFY_EMULATE_SANITIZED", "1")
    cuda_emulation.shim_cases.cache_clear()
    program = cuda_emulation.shim_cases()
    cuda_emulation.shim_cases.cache_clear()
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run([str(program), case], capture_output=True, text=True, env=env)
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr or "runtime error" in done.stderr

"""What tests/cuda/conftest.py does around every test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# The conftest of this folder beside a device whose second test launches what it should not.
CONFTEST = f"""\
import importlib.util, sys
import torch

sys.path.insert(0, {str(Path(__file__).parent)!r})
spec = importlib.util.spec_from_file_location("real", {str(Path(__file__).with_name("conftest.py"))!r})
real = importlib.util.module_from_spec(spec)
sys.modules["real"] = real
spec.loader.exec_module(real)
pytest_addoption, poisoned, sound_device = real.pytest_addoption, real.poisoned, real.sound_device
lost = []

def synchronize():
    if lost:
        raise RuntimeError("an illegal memory access was encountered")

torch.cuda.synchronize = synchronize
"""
TESTS = """\
from conftest import lost

def test_first():
    pass

def test_second():
    lost.append(1)

def test_third():
    pass
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32])
def test_new_tensors_hold_no_right_answer(backend, dtype):
    (right,) = backend.to(torch.arange(1024).to(dtype))
    del right
    new = torch.empty(1024, dtype=dtype, device=backend.device)
    wrong = new.isnan() if dtype.is_floating_point else new == torch.iinfo(dtype).max
    assert bool(wrong.all())


@pytest.mark.parametrize("worker", ["", "gw0"])
def test_a_lost_device_is_blamed_on_the_test_that_lost_it(tmp_path, monkeypatch, worker):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_device.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    if worker:
        monkeypatch.setenv("PYTEST_XDIST_WORKER", worker)
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [*command, "--device", "cuda", "test_device.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    printed = done.stdout + done.stderr
    assert "test_device.py::test_first PASSED" in printed
    assert "an illegal memory access was encountered" in printed
    assert "test_third" not in printed
    if worker:
        assert done.returncode == 3
        assert "test_device.py::test_second: an illegal" in done.stderr
    else:
        assert "the device was lost in test_device.py::test_second" in printed

"""Where the CUDA operators run: emulated on the CPU (default), or on a GPU.

``pytest tests/cuda`` needs a C++ compiler and no GPU; see cuda_emulation.py for sanitizers and seeds.
``pytest tests/cuda --device cuda`` runs the same tests with the real library on a real device.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cuda_emulation
import pytest
import torch

from saelens_certify.ops import _library, fakes


@dataclass(frozen=True)
class Backend:
    """The operators under test.

    Attributes:
        name: "emulated" or "cuda".
        ops: Their namespace in ``torch.ops``.
        device: Where their inputs go.
    """

    name: str
    ops: Any
    device: torch.device

    def to(self, *tensors: torch.Tensor | None) -> list[Any]:
        """The tensors on the device."""
        return [None if tensor is None else tensor.to(self.device) for tensor in tensors]


def pytest_addoption(parser):
    parser.addoption("--device", choices=["emulated", "cuda"], default="emulated")


@pytest.fixture(scope="session")
def backend(request) -> Backend:
    # The compiled CPU operators are what results are compared with.
    cpu = _library.library()
    assert cpu.path is not None, cpu.reason
    if request.config.getoption("device", "emulated") == "cuda":
        cuda = _library.cuda_library()
        assert cuda.path is not None, cuda.reason
        return Backend("cuda", torch.ops.saelens_certify, torch.device("cuda", 0))
    if cuda_emulation.sanitized() and "asan" not in os.environ.get("LD_PRELOAD", ""):
        pytest.fail(f"the sanitizers need LD_PRELOAD: {cuda_emulation.__doc__}")
    torch.ops.load_library(str(cuda_emulation.library()))
    for name, fake in fakes._FAKES.items():
        torch.library.register_fake(f"saelens_certify_emulated::{name}", fake)
    return Backend("emulated", torch.ops.saelens_certify_emulated, torch.device("cpu"))


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """New tensors hold NaN (or the largest integer) until something is written into them.

    Memory that was freed a moment ago still holds the last test's right answer: a kernel that leaves rows
    unwritten would pass.
    """
    before = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=only_warns)


@pytest.fixture(autouse=True)
def sound_device(request) -> Iterator[None]:
    """A kernel's bad access is reported in the test that launched it, and spoils no other test.

    The device tells of it at the next call that waits, perhaps tests later, and the process can then use the
    device no more.
    """
    yield
    if request.config.getoption("device", "emulated") != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" not in os.environ:
            request.session.shouldstop = f"the device was lost in {request.node.nodeid}"
            raise
        # pytest-xdist names the test that its process died in, and starts another process.
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            sys.stderr.write(f"{request.node.nodeid}: {error}\n")
            sys.stderr.flush()
        os._exit(3)

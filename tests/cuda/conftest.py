"""Where the CUDA operators run: emulated on the CPU (default), or on a GPU.

``pytest tests/cuda`` needs a C++ compiler and no GPU; see cuda_emulation.py for sanitizers and seeds.
``pytest tests/cuda --device cuda`` runs the same tests with the real library on a real device.
"""

from __future__ import annotations

import os
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

"""Which compiled operators a device gets, and what is said when it gets none."""

from __future__ import annotations

import pytest
import torch

from saelens_certify.errors import CertifyError
from saelens_certify.ops import _library
from saelens_certify.ops._library import architecture_problem, cuda_library, use_native

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def forget():
    """Forget what was found before, and again afterwards."""
    cached = [cuda_library, architecture_problem, _library._device_problem]
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.parametrize(
    ("compiled", "capability", "served"),
    [
        (["sm_80"], (8, 0), True),
        (["sm_80"], (8, 9), True),
        (["sm_86"], (8, 0), False),
        (["sm_80"], (9, 0), False),
        (["sm_80", "sm_90", "compute_90"], (7, 5), False),
        (["sm_80", "sm_90", "compute_90"], (12, 0), True),
        (["sm_90a"], (9, 0), True),
        (["sm_100"], (10, 3), True),
        ([], (7, 5), True),
    ],
)
def test_devices_served(monkeypatch, compiled, capability, served):
    monkeypatch.setattr(_library, "build_report", lambda: {"cuda_architectures": compiled})
    problem = architecture_problem(capability)
    assert (problem == "") == served
    if not served:
        number = f"{capability[0]}.{capability[1]}"
        assert f"TORCH_CUDA_ARCH_LIST={number}" in problem
        assert compiled[0] in problem


def test_a_torch_without_cuda_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert cuda_library().reason == f"torch {torch.__version__} was built without CUDA"
    assert not use_native("auto", CUDA)
    with pytest.raises(CertifyError, match="'native' is not possible: torch .* without CUDA"):
        use_native("native", CUDA)


def test_an_installation_without_the_cuda_part_repeats_the_builds_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    told = "not built: no nvcc for torch's CUDA 13.0"
    monkeypatch.setattr(_library, "build_report", lambda: {"cuda": told})
    _library.library()
    monkeypatch.setattr(_library, "PACKAGE", tmp_path)
    assert cuda_library().reason == f"this installation has no compiled operators for CUDA: {told}"
    assert not use_native("auto", CUDA)


def test_no_device_is_said(monkeypatch):
    monkeypatch.setattr(_library, "cuda_library", lambda: _library.Library(_library.PACKAGE, ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CertifyError, match="torch sees no CUDA device"):
        use_native("native", CUDA)

"""When the CUDA operators are built, and what setup.py does when they cannot be."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cuda_toolkit
import pytest
from cuda_toolkit import Impossible, Toolkit, architectures, decide, find_toolkit

ROOT = Path(__file__).resolve().parents[2]
CUDA_13 = Toolkit(Path("/toolkit"), Path("/toolkit/bin/nvcc"), (13, 0))

NVCC = """#!/bin/sh
if [ "$1" = --version ]; then echo "Cuda compilation tools, release {release}, V{release}.88"
else echo "#$ TOP={top}" >&2; fi
"""


def fake_nvcc(folder: Path, release: str, top: str = "") -> Path:
    """A program that answers like nvcc."""
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(NVCC.format(release=release, top=top or folder / "bin" / ".."))
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("wanted", "torch_cuda", "toolkit", "reason"),
    [
        (None, "13.0", CUDA_13, None),
        (None, "13.2", CUDA_13, None),
        ("1", None, CUDA_13, None),
        (None, None, CUDA_13, "torch was built without CUDA"),
        ("0", "13.0", CUDA_13, "SAELENS_CERTIFY_CUDA=0"),
        (None, "12.8", CUDA_13, "nvcc 13.0 (/toolkit/bin/nvcc) does not fit torch's CUDA 12.8"),
        (None, "13.0", None, 'pip install "nvidia-cuda-nvcc==13.0.*"'),
    ],
)
def test_decision(wanted, torch_cuda, toolkit, reason):
    decision = decide(wanted, torch_cuda, toolkit)
    assert decision.build == (reason is None)
    assert (reason or "") in decision.reason


@pytest.mark.parametrize(
    ("wanted", "torch_cuda", "toolkit", "message"),
    [
        ("1", "13.0", None, "SAELENS_CERTIFY_CUDA=1: no nvcc"),
        ("1", None, None, "SAELENS_CERTIFY_CUDA=1: no nvcc"),
        ("1", "12.8", CUDA_13, "SAELENS_CERTIFY_CUDA=1: nvcc 13.0"),
        ("yes", None, None, "SAELENS_CERTIFY_CUDA = 'yes'"),
    ],
)
def test_what_is_demanded_and_impossible_is_an_error(wanted, torch_cuda, toolkit, message):
    with pytest.raises(Impossible, match=message):
        decide(wanted, torch_cuda, toolkit)


def test_toolkit_search_order(tmp_path):
    named = fake_nvcc(tmp_path / "named", "13.1")
    fake_nvcc(tmp_path / "usual", "12.8")
    usual = [tmp_path / "absent", tmp_path / "usual"]
    found = find_toolkit({"CUDA_HOME": str(tmp_path / "named"), "PATH": ""}, usual)
    assert found == Toolkit(tmp_path / "named", named, (13, 1))
    found = find_toolkit({"CUDA_HOME": str(tmp_path / "gone"), "PATH": ""}, usual)
    assert found is not None
    assert found.release == "12.8"
    assert find_toolkit({"PATH": ""}, []) is None


def test_a_wrapper_on_path_is_not_taken_for_the_toolkit(tmp_path):
    real = tmp_path / "real"
    (real / "bin").mkdir(parents=True)
    wrapper = fake_nvcc(tmp_path / "local", "13.0", top=f"{real}/bin/..")
    found = find_toolkit({"PATH": str(wrapper.parent) + os.pathsep + os.environ["PATH"]}, [])
    assert found is not None
    assert found.nvcc == wrapper
    assert found.home == real


def test_toolkit_from_packages_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_toolkit.sysconfig, "get_path", lambda _name: str(tmp_path))
    fake_nvcc(tmp_path / "nvidia" / "cu13", "13.0")
    assert cuda_toolkit._usual_folders()[1:] == [tmp_path / "nvidia" / "cu13"]


def test_architectures():
    assert architectures() == ["sm_80", "sm_90", "compute_90"]
    assert architectures("9.0a 10.0+PTX") == ["sm_90a", "sm_100", "compute_100"]
    # A container's list often starts with what is too old for these operators.
    assert architectures("7.0;7.5;8.0;8.0") == ["sm_80"]
    with pytest.raises(Impossible, match="'Hopper' is not understood"):
        architectures("Hopper")
    with pytest.raises(Impossible, match="8.0 or newer"):
        architectures("7.5+PTX")


_BUILD = """
import sys, torch
torch.version.cuda = {cuda!r}
sys.argv = ["setup.py", "build_ext", "--inplace"]
exec(compile(open("setup.py").read(), "setup.py", "exec"), {{"__name__": "__main__", "__file__": "setup.py"}})
"""


@pytest.fixture
def small_checkout(tmp_path):
    """setup.py with next to nothing to compile for the CPU, and a CUDA source."""
    for name in ("setup.py", "build_support", "pyproject.toml", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "README.md").write_text("readme\n")
    (tmp_path / "saelens_certify").mkdir()
    (tmp_path / "saelens_certify" / "version.py").write_text('__version__ = "0"\n')
    for name in ("ops/cuda/x.cu", "ops/common.cpp", "common/isa.cpp"):
        (tmp_path / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "csrc" / name).write_text("static int nothing = 0;\n")
    return tmp_path


def install(folder: Path, cuda: str | None, **environment: str) -> subprocess.CompletedProcess:
    """Run setup.py with a torch that claims this CUDA version."""
    return subprocess.run(
        [sys.executable, "-c", _BUILD.format(cuda=cuda)],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_failing_cuda_part_leaves_the_rest(small_checkout, tmp_path):
    # This nvcc answers, but compiles nothing.
    fake_nvcc(tmp_path / "toolkit", "13.0")
    toolkit = {"CUDA_HOME": str(tmp_path / "toolkit")}
    assert install(small_checkout, "13.0", **toolkit).returncode == 0
    package = small_checkout / "saelens_certify"
    report = json.loads((package / "_build_report.json").read_text())
    assert report["operators"] == "built"
    assert report["cuda"].startswith("not built: ")
    assert "cuda_architectures" not in report
    assert [path.name for path in package.glob("_C*")] == ["_C.abi3.so"]
    assert list(package.glob("_cuda*")) == []
    # Demanded, the same is an error.
    assert install(small_checkout, "13.0", SAELENS_CERTIFY_CUDA="1", **toolkit).returncode != 0


def test_setup_reports_why_there_is_no_cuda_part(small_checkout, tmp_path):
    fake_nvcc(tmp_path / "toolkit", "12.8")
    toolkit = {"CUDA_HOME": str(tmp_path / "toolkit")}
    assert install(small_checkout, "13.0", **toolkit).returncode == 0
    report_file = small_checkout / "saelens_certify" / "_build_report.json"
    report = json.loads(report_file.read_text())
    assert report["operators"] == "built"
    assert "does not fit torch's CUDA 13.0" in report["cuda"]
    refused = install(small_checkout, "13.0", SAELENS_CERTIFY_CUDA="1", **toolkit)
    assert refused.returncode != 0
    assert "SAELENS_CERTIFY_CUDA=1: nvcc 12.8" in refused.stderr

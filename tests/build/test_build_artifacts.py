from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from symbols import undefined_symbols, unstable_symbols

from saelens_certify import build_info
from saelens_certify.ops._library import PACKAGE, library

BUILT = build_info()["build"]
ROOT = Path(__file__).resolve().parents[2]
PARTS = ["csrc", "build_support", "saelens_certify", "setup.py", "pyproject.toml", "CMakeLists.txt"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources, so that nothing is built inside the working tree."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in [*PARTS, "MANIFEST.in", "LICENSE", "tests/cpp"]:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("*.so", "_build_report.json", "__pycache__")
            shutil.copytree(source, target, ignore=ignored)
        else:
            shutil.copy(source, target)
    (folder / "README.md").write_text("readme\n")
    return folder


def build(checkout: Path, hook: str, target: Path, **environment: str) -> Path:
    """Call a PEP 517 hook of the project's backend the way a front end does."""
    script = (
        "import sys; sys.path.insert(0, 'build_support'); import backend; "
        f"print('NAME=' + backend.{hook}({str(target)!r}))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode != 0:
        raise RuntimeError(run.stdout + run.stderr)
    return target / run.stdout.rsplit("NAME=", 1)[1].strip()


def report(wheel: Path) -> dict:
    with zipfile.ZipFile(wheel) as archive:
        return json.loads(archive.read("saelens_certify/_build_report.json"))


@pytest.mark.parametrize("part", ["_C", *(["_cuda"] if BUILT["cuda"] == "built" else [])])
def test_operators_use_only_the_stable_interface(part):
    """So one file serves every torch from 2.11 on: it does not matter which it was built against."""
    path = PACKAGE / f"{part}.abi3.so"
    assert path.exists(), build_info()["reason"]
    symbols = undefined_symbols(path)
    assert "torch_call_dispatcher" in symbols
    # Nothing else of torch, nothing of CPython, and the CUDA runtime is inside.
    assert unstable_symbols(symbols) == set()


def test_symbols_that_tie_to_one_version_are_noticed():
    stable = {"torch_call_dispatcher", "aoti_torch_get_size", "memcpy", "_ZdlPv", "currency"}
    unstable = {
        "_ZN3c106detail14torchCheckFailEPKcS2_jS2_",
        "_ZN2at4_ops2mm4callERKNS_6TensorES4_",
        "PyErr_SetString",
        "cudaLaunchKernel",
        "__cudaRegisterFatBinary",
        "cuCtxGetCurrent",
    }
    assert unstable_symbols(stable | unstable) == unstable


def test_build_info_says_what_is_active():
    info = build_info()
    assert info["native"] == (library().path is not None)
    assert info["implementation"] == ("native" if info["native"] else "torch")
    assert bool(info["reason"]) != info["native"]
    assert bool(info["cuda_reason"]) != bool(info["cuda_operators"])
    if info["cuda"] is None:
        assert info["cuda_reason"] == f"torch {info['torch']} was built without CUDA"
    assert info["build"]["operators"] == "built"
    assert info["compiled"]["isa_active"] in ("scalar", "avx2", "avx512")
    json.dumps(info)


def test_source_distribution_holds_the_sources(checkout, tmp_path):
    with tarfile.open(build(checkout, "build_sdist", tmp_path)) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for needed in (
        "csrc/ops/encode.cpp",
        "csrc/ops/encode.h",
        "csrc/ops/cpu/row_kernels.inl",
        "csrc/ops/cuda/device.h",
        "build_support/backend.py",
        "build_support/cuda_toolkit.py",
        "CMakeLists.txt",
        "setup.py",
        "tests/cpp/check.h",
    ):
        assert needed in names
    assert not any(name.endswith((".so", "_build_report.json")) for name in names)


def test_without_a_compiler_the_wheel_is_built_and_says_why(checkout, tmp_path):
    missing = {"CC": "no-such-compiler", "CXX": "no-such-compiler"}
    wheel = build(checkout, "build_wheel", tmp_path, **missing)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    assert not any(name.startswith(("csrc", "tests", "build_support")) for name in names)
    assert not any(name.endswith((".so", ".cpp", ".h")) for name in names)
    for part in ("operators", "native"):
        assert report(wheel)[part].startswith("not built: ")
        assert "no-such-compiler" in report(wheel)[part]
    script = (
        "import torch; from saelens_certify import build_info, ops; info = build_info(); "
        "assert info['implementation'] == 'torch' and info['compiled'] is None, info; "
        "codes, _ = ops.topk_encode(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(4), k=2); "
        "assert codes.indices.tolist() == [[0, 1]] * 2; print(info['reason'])"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path / "installed",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "no compiled operators: not built:" in run.stdout
    assert "no-such-compiler" in run.stdout


def test_a_required_extension_must_build(checkout, tmp_path):
    environment = {
        "CC": "no-such-compiler",
        "CXX": "no-such-compiler",
        "SAELENS_CERTIFY_REQUIRE_EXTENSION": "1",
    }
    with pytest.raises(RuntimeError, match="no-such-compiler"):
        build(checkout, "build_wheel", tmp_path, **environment)


def test_extension_can_be_declined(checkout, tmp_path):
    wheel = build(checkout, "build_wheel", tmp_path, SAELENS_CERTIFY_NO_EXTENSION="1")
    for part in ("operators", "native", "cuda"):
        assert report(wheel)[part] == "not built: SAELENS_CERTIFY_NO_EXTENSION=1"


def test_backend_asks_for_torch_only_where_there_is_none(checkout, tmp_path):
    script = (
        "import sys, sysconfig; sys.path.insert(0, 'build_support'); import backend; "
        "print(backend._torch()); sysconfig.get_path = lambda name: sys.argv[1]; "
        "print(backend._torch())"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split("\n")[:2] == ["[]", "['torch==2.13.0']"]

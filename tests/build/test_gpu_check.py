"""benchmarks/gpu_check.sh with stand-ins for the compiler, the GPU, its tools and the tests."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Logs a call and fails where it is asked to. What is Python's own is run, without site-packages: the
# modules below then take the place of torch and setuptools.
PYTHON = f"""\
#!/usr/bin/env bash
case "$1" in
  -c | -) exec {sys.executable} -S "$@" ;;
esac
echo "arch=${{TORCH_CUDA_ARCH_LIST-unset}} tf32=${{NVIDIA_TF32_OVERRIDE-unset}} python $*" >>"$CALLED"
printf '%b\\n' "$SAYS"
[[ -n "$FAILS" && "$*" == *"$FAILS"* ]] && exit 1
exit 0
"""
SANITIZER = """\
#!/usr/bin/env bash
echo "compute-sanitizer $*" >>"$CALLED"
# A program may read what it is given.
cat >/dev/null
case "$BLIND $*" in
  no*racecheck*.planted\\ race | no*memcheck*.planted\\ overrun) exit 99 ;;
  all*) exit 99 ;;
esac
"""
NVCC = """\
#!/usr/bin/env bash
echo "nvcc $*" >>"$CALLED"
"""
MODULES = {
    "torch.py": """\
import os, types
__version__ = "2.11.0"
version = types.SimpleNamespace(cuda="13.0")
cuda = types.SimpleNamespace(
    is_available=lambda: os.environ["GPU"] == "1",
    get_device_name=lambda _: "a GPU",
    get_device_capability=lambda *_: (9, 0),
    get_device_properties=lambda _: types.SimpleNamespace(
        name="a GPU", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30),
)
""",
    "setuptools.py": "import os\n__version__ = os.environ['SETUPTOOLS']\n",
    "xdist.py": "",
    "saelens_certify/__init__.py": """\
ops = None
def build_info():
    return {"cuda_operators": ["decode"], "cuda_reason": "", "build": {}}
""",
    "build_support/cuda_toolkit.py": "def find_toolkit():\n    return 'a toolkit'\n",
    "tests/ops/test_plain.py": "import torch\n",
    "tests/ops/test_oracle.py": "from sae_lens import SAE\n",
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A tree that holds the script and stand-ins for all that it calls."""
    folder = tmp_path / "a checkout"
    for name, text in MODULES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "benchmarks").mkdir()
    shutil.copy(ROOT / "benchmarks" / "gpu_check.sh", folder / "benchmarks")
    tools = {"python": PYTHON, "compute-sanitizer": SANITIZER, "nvcc": NVCC, "nvidia-smi": NVCC}
    (folder / "bin").mkdir()
    for name, text in tools.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    return folder


def run(
    checkout: Path, *arguments: str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run the script; what it printed, and the calls that it made."""
    calls = checkout / "calls"
    calls.write_text("")
    defaults = {
        "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}",
        "PYTHON": str(checkout / "bin" / "python"),
        "OUT": str(checkout / "out"),
        "CALLED": str(calls),
        "GPU": "1",
        "SETUPTOOLS": "81.0.0",
        "SAYS": "3 passed in 1 s",
        "FAILS": "",
        "BLIND": "no",
        "NVIDIA_TF32_OVERRIDE": "1",
        "TORCH_CUDA_ARCH_LIST": "Hopper",
        "PYTHONPATH": "",
    }
    done = subprocess.run(
        ["bash", "benchmarks/gpu_check.sh", *arguments],
        cwd=checkout,
        env={**os.environ, **defaults, **environment},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    return done, calls.read_text().splitlines()


def summary(checkout: Path) -> dict[str, Any]:
    return json.loads((checkout / "out" / "summary.json").read_text(encoding="utf-8"))


def outcomes(checkout: Path) -> dict[str, str]:
    return {step["step"]: step["outcome"] for step in summary(checkout)["steps"]}


def called(calls: list[str], *words: str) -> list[int]:
    """Positions of the calls that hold all of some words."""
    return [i for i, call in enumerate(calls) if all(word in call for word in words)]


def test_the_script_is_bash():
    subprocess.run(["bash", "-n", ROOT / "benchmarks" / "gpu_check.sh"], check=True)


def test_every_step_in_order_of_worth(checkout):
    done, calls = run(checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(outcomes(checkout)) == [
        "environment",
        "build",
        "opcheck on the GPU",
        "tests/cuda on the GPU",
        "benchmarks",
        "sanitizers see planted faults",
        "racecheck",
        "memcheck",
        "tests/ops on the CPU",
    ]
    assert summary(checkout)["passed"]
    assert summary(checkout)["device"] == "a GPU"
    # What the image sets would change what is built and how float32 is multiplied.
    (build,) = called(calls, "setup.py build_ext --inplace")
    assert calls[build].startswith("arch=9.0 tf32=unset")
    (tests,) = called(calls, "--device cuda tests/cuda --ignore=tests/cuda/test_cuda_shim.py")
    (benchmarks,) = called(calls, "-m benchmarks cuda")
    assert benchmarks == tests + 1
    (on_cpu,) = called(calls, "tests/ops")
    assert "--ignore=tests/ops/test_oracle.py" in calls[on_cpu]
    assert "test_plain" not in calls[on_cpu]
    # The tools watch this package's kernels only, on small shapes and on larger ones.
    sanitized = called(calls, "compute-sanitizer")
    assert len(sanitized) == 5
    for i in sanitized:
        assert "--kernel-name kns=saelens_certify --report-api-errors no" in calls[i]
    for tool in ("racecheck", "memcheck"):
        assert called(calls, f"--tool {tool}", "-k every_operator or larger")
    left_over = sorted(path.name for path in (checkout / "out").iterdir())
    assert left_over == ["gpu-check.log", "summary.json"]


def test_steps_before_the_benchmarks_leave_them_their_time(checkout):
    done, _ = run(checkout, SECONDS_IN_ALL="260")
    budgets = dict(re.findall(r"##### (.+) \((\d+) s at most\)", done.stdout))
    assert int(budgets["build"]) <= 140
    assert int(budgets["tests/cuda on the GPU"]) <= 140
    assert int(budgets["benchmarks"]) == 120


def test_without_a_build_torch_is_not_tested_against_itself(checkout):
    done, calls = run(checkout, FAILS="setup.py")
    assert done.returncode == 1
    assert outcomes(checkout)["build"] == "failed"
    assert outcomes(checkout)["benchmarks"] == "left out"
    assert outcomes(checkout)["tests/ops on the CPU"] == "passed"
    assert not called(calls, "--device cuda")
    assert not called(calls, "-m benchmarks")


@pytest.mark.parametrize("blind", ["yes", "all"])
def test_sanitizers_that_see_nothing_or_everything_are_noticed(checkout, blind):
    done, _ = run(checkout, BLIND=blind)
    assert done.returncode == 1
    assert outcomes(checkout)["sanitizers see planted faults"] == "failed"


def test_a_step_that_fails_does_not_stop_the_others(checkout):
    done, calls = run(checkout, FAILS="test_cuda_shim")
    assert done.returncode == 1
    failed = [name for name, outcome in outcomes(checkout).items() if outcome == "failed"]
    assert failed == ["tests/cuda on the GPU"]
    assert called(calls, "-m benchmarks cuda")


def test_old_setuptools_are_named_before_anything_is_built(checkout):
    done, _ = run(checkout, SETUPTOOLS="65.5.0")
    assert outcomes(checkout)["environment"] == "failed"
    assert "setuptools 65.5.0 cannot read pyproject.toml" in done.stdout
    # A wheel that is carried comes before what the image has.
    (checkout / "wheels").mkdir()
    (checkout / "wheels" / "setuptools-81.0.0-py3-none-any.whl").write_text("")
    _, calls = run(checkout, "wheels")
    (install,) = called(calls, "-m pip install")
    assert calls[install].endswith(" wheels/setuptools-81.0.0-py3-none-any.whl")


def test_half_a_character_in_the_last_line_spoils_no_summary(checkout):
    # Quotes of three bytes each, of which byte 160 is not the last one.
    done, _ = run(checkout, SAYS="xx" + 60 * "\N{RIGHT SINGLE QUOTATION MARK}", LC_ALL="C")
    assert done.returncode == 0, done.stderr
    last = summary(checkout)["steps"][-1]["last_line"]
    assert last.startswith("xx\N{RIGHT SINGLE QUOTATION MARK}")
    assert last.endswith("\N{REPLACEMENT CHARACTER}")


def test_without_a_gpu_only_a_dry_run_does_something(checkout):
    done, calls = run(checkout, GPU="0")
    assert done.returncode == 2
    assert "no GPU" in done.stdout
    assert calls == []
    done, calls = run(checkout, "--dry-run", GPU="0")
    assert done.returncode == 1
    assert calls[called(calls, "setup.py")[0]].startswith("arch=unset")
    assert called(calls, "-m pytest", "tests/cuda")
    assert not called(calls, "--device cuda")
    assert outcomes(checkout)["tests/cuda emulated"] == "passed"
    assert outcomes(checkout)["memcheck"] == "left out"
    assert run(checkout, "--dryrun")[0].returncode == 2

"""The CPU sources compile for 64-bit ARM: ``make arm-check``.

A cross compiler is taken from ARM_CXX, else ``aarch64-linux-gnu-g++``, else the package ``ziglang``
of this Python. torch's headers are the same for every architecture, so nothing of torch for ARM is
needed; nothing is linked against it either. With the GNU compiler and ``qemu-aarch64``, the C++ tests,
which know nothing of torch, are linked and run as well.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "build" / "arm-check"
EMULATOR = "qemu-aarch64"
FLAGS = [
    "-O2",
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-unused-parameter",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    f"-I{ROOT / 'csrc'}",
]


def compiler() -> list[str]:
    """The command of a C++ compiler for 64-bit ARM, empty if there is none."""
    if named := os.environ.get("ARM_CXX"):
        return shlex.split(named)
    if gnu := shutil.which("aarch64-linux-gnu-g++"):
        return [gnu]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-gnu"]
    return []


def run(command: list[str]) -> str:
    """Run a command; returns its output if it fails."""
    environment = {"ZIG_GLOBAL_CACHE_DIR": str(OUTPUT / "zig"), **os.environ}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, errors="replace", check=False
    )
    return done.stdout + done.stderr + shlex.join(command) if done.returncode else ""


def main() -> int:
    """Compile everything, then link and run the C++ tests if they can run."""
    import torch

    found = compiler()
    if not found:
        sys.exit("no C++ compiler for ARM: install g++-aarch64-linux-gnu, or pip install ziglang")
    OUTPUT.mkdir(parents=True, exist_ok=True)
    headers = Path(torch.__file__).parent / "include"
    include = [f"-isystem{headers}", f"-isystem{headers / 'torch' / 'csrc' / 'api' / 'include'}"]
    csrc = ROOT / "csrc"
    patterns = ("ops/*.cpp", "ops/cpu/*.cpp", "common/*.cpp", "stats/*.cpp")
    sources = sorted(path for pattern in patterns for path in csrc.glob(pattern))
    sources += [csrc / "build_info" / "build_info.cpp", *sorted(ROOT.glob("tests/cpp/test_*.cpp"))]

    def compile_one(source: Path) -> str:
        target = OUTPUT / f"{source.stem}.o"
        return run([*found, *FLAGS, *include, "-c", str(source), "-o", str(target)])

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
        problems = [problem for problem in pool.map(compile_one, sources) if problem]
    print(f"{shlex.join(found)}: {len(sources) - len(problems)} of {len(sources)} files compile")

    # Static linking, so that the tests need no C library for ARM; zig cannot link glibc that way.
    if not problems and shutil.which(EMULATOR) and "ziglang" not in found:
        shared = [*csrc.glob("ops/cpu/row_kernels*.cpp"), *csrc.glob("common/*.cpp")]
        shared += csrc.glob("stats/*.cpp")
        objects = [str(OUTPUT / f"{path.stem}.o") for path in shared]
        for test in sorted(ROOT.glob("tests/cpp/test_*.cpp")):
            program = OUTPUT / test.stem
            link = [*found, "-static", str(OUTPUT / f"{test.stem}.o"), *objects, "-o", str(program)]
            problem = run(link) or run([EMULATOR, str(program)])
            problems += [problem] if problem else []
            print(f"{test.stem} under {EMULATOR}: {'failed' if problem else 'passed'}")
    for problem in problems:
        print(f"FAILED: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

"""Everything about the CUDA operators that can be checked without a GPU: ``make cuda-check``.

1. nvcc compiles every csrc/ops/cuda/*.cu as setup.py does, and ptxas says what each kernel needs.
   Spilled registers, a kernel over its budget of registers, host functions called from device code,
   serialised matrix instructions (C7510) and an object over its size budget are failures.
2. The objects link, with the CUDA runtime inside, and ask for nothing but torch's stable interface.
3. tests/cuda, where the same sources run on the CPU, passes under AddressSanitizer and the undefined
   behaviour sanitizer, and with other orders of threads.

Run by an interpreter that has torch, pytest and the package's compiled CPU operators.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cuda_toolkit import (
    NVCC_FLAGS,
    PYPI_LINE,
    WHERE,
    Toolkit,
    architectures,
    find_toolkit,
    target_flags,
)
from symbols import demangled, undefined_symbols, unstable_symbols

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "build" / "cuda-check"
SHIM_SEEDS = (1, 2, 3)
OBJECT_MIB = 4.0

# What a kernel may use, as the occupancy it is written for: (threads per block, blocks per
# multiprocessor that must fit). A multiprocessor has 65536 registers. The first pattern found in a
# kernel's name counts.
DEFAULT_BUDGET = (256, 4)
BUDGETS: tuple[tuple[str, tuple[int, int]], ...] = (
    ("^filter_kernel<", (128, 4)),
    # Two rows of logits at a time hold two states.
    (r"^segment_kernel<\w+, true,", (128, 5)),
    ("^segment_kernel<", (128, 8)),
)

COMPILING = re.compile(r"Compiling entry function '(\S+)' for '(sm_\w+)'")
PROPERTIES = re.compile(
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
)
REGISTERS = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
SUSPECT = re.compile(r"C7510|#20011|#20014")


@dataclass
class Kernel:
    """What ptxas says about one kernel on one architecture."""

    source: str
    symbol: str
    target: str
    registers: int = 0
    spilled: int = 0
    stack: int = 0
    shared: int = 0
    name: str = ""

    @property
    def budget(self) -> int:
        """Registers per thread that leave the promised number of blocks on a multiprocessor."""
        bounds = (bound for pattern, bound in BUDGETS if re.search(pattern, self.name))
        threads, blocks = next(bounds, DEFAULT_BUDGET)
        return min(255, 65536 // (threads * blocks) // 8 * 8)


def parse(source: str, output: str) -> list[Kernel]:
    """The kernels in the output of ``ptxas -v``, with readable names."""
    kernels: list[Kernel] = []
    for line in output.splitlines():
        if found := COMPILING.search(line):
            kernels.append(Kernel(source, found[1], found[2]))
        if not kernels:
            continue
        kernel = kernels[-1]
        if found := PROPERTIES.search(line):
            kernel.stack = max(kernel.stack, int(found[1]))
            kernel.spilled = max(kernel.spilled, int(found[2]) + int(found[3]))
        if found := REGISTERS.search(line):
            kernel.registers = int(found[1])
            shared = SHARED.search(line)
            kernel.shared = int(shared[1]) if shared else 0
    for kernel, name in zip(kernels, demangled(k.symbol for k in kernels), strict=True):
        kernel.name = readable(name)
    return kernels


def readable(name: str) -> str:
    """A demangled kernel without return type, namespaces and parameters."""
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N_\w*::|saelens_certify\w*::", "", name)
    name = re.sub(r"^void ", "", name)
    depth = 0
    for at, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            return name[:at]
    return name


def judge(kernel: Kernel) -> list[str]:
    """What is wrong with a kernel."""
    where = f"{kernel.source}: {kernel.name} on {kernel.target}"
    problems = []
    if kernel.spilled:
        problems.append(f"{where} spills {kernel.spilled} bytes of registers to memory")
    if kernel.registers > kernel.budget:
        problems.append(f"{where} uses {kernel.registers} registers, budget {kernel.budget}")
    return problems


def compile_source(toolkit: Toolkit, include: list[str], source: Path) -> tuple[Path, str, str]:
    """Compile one file; returns the object, what nvcc printed and, if it failed, the problem."""
    target = OUTPUT / f"{source.stem}.o"
    command = [
        str(toolkit.nvcc),
        *NVCC_FLAGS,
        *target_flags(architectures()),
        "-Xptxas=-v,-warn-spills",
        "-Xcompiler=-fPIC",
        "--expt-relaxed-constexpr",
        "-DUSE_CUDA",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        *include,
        "-c",
        str(source),
        "-o",
        str(target),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    printed = done.stdout + done.stderr
    return target, printed, "" if done.returncode == 0 else f"{source.name} does not compile"


def check_kernels(toolkit: Toolkit, jobs: int) -> list[str]:
    """Compile, read what ptxas says, link; returns the problems."""
    import torch

    base = Path(torch.__file__).parent
    headers = [base / "include", base / "include" / "torch" / "csrc" / "api" / "include"]
    include = [f"-I{ROOT / 'csrc'}", *(f"-isystem={path}" for path in headers)]
    sources = sorted((ROOT / "csrc" / "ops" / "cuda").glob("*.cu"))
    if not sources:
        return ["there is no csrc/ops/cuda/*.cu"]
    OUTPUT.mkdir(parents=True, exist_ok=True)
    problems: list[str] = []
    kernels: list[Kernel] = []
    objects: list[Path] = []
    with ThreadPoolExecutor(jobs) as pool:
        compiled = pool.map(lambda source: compile_source(toolkit, include, source), sources)
        for source, (target, printed, problem) in zip(sources, compiled, strict=True):
            (OUTPUT / f"{source.stem}.log").write_text(printed, encoding="utf-8")
            if problem:
                problems.append(problem)
                print(printed)
                continue
            found = parse(source.name, printed)
            kernels += found
            objects.append(target)
            suspect = [line.strip() for line in printed.splitlines() if SUSPECT.search(line)]
            problems += [f"{source.name}: {line}" for line in suspect]
            mib = target.stat().st_size / 2**20
            if mib > OBJECT_MIB:
                problems.append(f"{source.name}: object of {mib:.1f} MiB, budget {OBJECT_MIB}")
    print_table(kernels)
    for kernel in kernels:
        problems += judge(kernel)
    return problems or check_link(toolkit, include, base / "lib", objects)


def check_link(
    toolkit: Toolkit, include: list[str], torch_lib: Path, objects: list[Path]
) -> list[str]:
    """Link the library as setup.py does and look at what it leaves open."""
    library = OUTPUT / "_cuda.abi3.so"
    flags = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-shared"]
    command = [
        *os.environ.get("CXX", "g++").split(),
        *flags,
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        *(flag.replace("-isystem=", "-isystem") for flag in include),
        *(str(ROOT / "csrc" / "ops" / name) for name in ("common.cpp", "checks.cpp")),
        *(str(path) for path in objects),
        *(f"-L{toolkit.home / name}" for name in ("lib64", "lib")),
        f"-L{torch_lib}",
        *("-lc10", "-ltorch_cpu", "-lcudart_static", "-lrt", "-ldl", "-lpthread"),
        "-Wl,--exclude-libs,ALL",
        "-o",
        str(library),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout + done.stderr)
        return ["the objects do not link"]
    unstable = sorted(unstable_symbols(undefined_symbols(library)))
    print(
        f"linked: {library.stat().st_size / 2**20:.1f} MiB, stable symbols only: {not unstable}\n"
    )
    return [f"the library needs {name}, which is not torch's stable interface" for name in unstable]


def print_table(kernels: list[Kernel]) -> None:
    """One line per kernel and architecture."""
    rows = [["source", "kernel", "target", "registers", "budget", "spilled", "stack", "shared"]]
    for k in sorted(kernels, key=lambda k: (k.source, k.name, k.target)):
        numbers = (k.registers, k.budget, k.spilled, k.stack, k.shared)
        rows.append([k.source, k.name, k.target, *map(str, numbers)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        left = "  ".join(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=False))
        right = "  ".join(
            cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True)
        )
        print(f"{left}  {right}")
    print()


def run_emulated(sanitized: bool, seed: int) -> str:
    """tests/cuda on the CPU with one order of threads; returns the problem, if any."""
    environment = {
        **os.environ,
        "SAELENS_CERTIFY_SHIM_SEED": str(seed),
        "OMP_NUM_THREADS": "1",
        "MAX_JOBS": "1",
    }
    what = f"tests/cuda emulated, seed {seed}"
    if sanitized:
        what += ", address and undefined behaviour sanitizers"
        libraries = [
            subprocess.run(
                ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
            ).stdout.strip()
            for name in ("libasan.so", "libubsan.so")
        ]
        environment |= {
            "LD_PRELOAD": " ".join(libraries),
            # Leaks are those of torch and CPython, which free little at exit.
            "ASAN_OPTIONS": "detect_leaks=0",
            "SAELENS_CERTIFY_EMULATE_SANITIZED": "1",
        }
    start = time.monotonic()
    options = ["-q", "-p", "no:cacheprovider", "--maxfail=3", "--tb=short"]
    command = [sys.executable, "-m", "pytest", "tests/cuda", *options]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    output = done.stdout + done.stderr
    if done.returncode:
        print(output)
    told = next((line for line in reversed(output.splitlines()) if " in " in line), "no tests")
    print(f"{what}: {told.strip('= ')} ({time.monotonic() - start:.0f} s)", flush=True)
    return f"{what}: failed" if done.returncode else ""


def check_emulated(jobs: int) -> list[str]:
    """All variants of the emulated tests; returns the problems."""
    variants: list[Callable[[], str]] = [lambda: run_emulated(True, SHIM_SEEDS[0])]
    variants += [lambda seed=seed: run_emulated(False, seed) for seed in SHIM_SEEDS[1:]]
    with ThreadPoolExecutor(jobs) as pool:
        return [problem for problem in pool.map(lambda variant: variant(), variants) if problem]


def main() -> int:
    """Run the checks that were asked for."""
    parser = argparse.ArgumentParser(description="Check the CUDA operators without a GPU.")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 4))
    parser.add_argument("--only", choices=["kernels", "emulated"], help="half of the checks")
    arguments = parser.parse_args()
    start = time.monotonic()
    problems = []
    if arguments.only != "emulated":
        toolkit = find_toolkit()
        if toolkit is None:
            sys.exit(f"no nvcc in {WHERE}. To install one here:\n  {PYPI_LINE}")
        print(f"nvcc {toolkit.release}, {', '.join(architectures())}")
        problems += check_kernels(toolkit, arguments.jobs)
        print(f"kernels: {time.monotonic() - start:.0f} s", flush=True)
    if arguments.only != "kernels":
        problems += check_emulated(arguments.jobs)
    for problem in problems:
        print(f"FAILED: {problem}")
    print(f"{'failed' if problems else 'passed'} after {time.monotonic() - start:.0f} s")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

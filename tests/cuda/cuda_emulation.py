"""Build the CUDA operators as plain C++ (csrc/ops/cuda/host) and load them.

Objects are kept in build/emulated/ and compiled again when their source, any header or the flags
change. ``SAELENS_CERTIFY_EMULATE_SANITIZED=1`` adds AddressSanitizer and the undefined behaviour
sanitizer, whose runtime must be in the process from the start::

    export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
    export ASAN_OPTIONS=detect_leaks=0 SAELENS_CERTIFY_EMULATE_SANITIZED=1
    python -m pytest tests/cuda

(libstdc++ because AddressSanitizer looks for its exceptions when the process starts; the leaks are
those of Python.)
``SAELENS_CERTIFY_SHIM_SEED`` varies the order in which threads run; results must not change.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "emulated"

FLAGS = [
    "-std=c++20",
    "-O1",
    "-g1",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-unused-parameter",
    "-DSAELENS_CERTIFY_HOST_SHIM",
    f"-I{CSRC}",
    # A 16-byte load from an unaligned address works here, but not on a GPU.
    "-fsanitize=alignment",
    "-fno-sanitize-recover=all",
]
SANITIZE = [
    "-fsanitize=address,undefined",
    "-fno-omit-frame-pointer",
    # Shared arrays get their own section (shim.h), which is left out unless named.
    "-fsanitize-sections=saelens_certify_shared",
]


def sanitized() -> bool:
    """Whether the sanitizers are asked for."""
    return os.environ.get("SAELENS_CERTIFY_EMULATE_SANITIZED", "0") == "1"


def flags() -> list[str]:
    """Compiler flags of this process's variant."""
    return FLAGS + (SANITIZE if sanitized() else [])


def compiler() -> list[str]:
    """The C++ compiler: CXX, or g++."""
    return shlex.split(os.environ.get("CXX", "g++"))


def run(command: Sequence[str]) -> str:
    """Run a command; its output if it fails is the error."""
    # The compiler is no place for the sanitizers' runtime.
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def build(name: str, sources: Sequence[Path], compile_with: Sequence[str], link: Sequence[str]):
    """Compile and link what has changed since the last time.

    Args:
        name: File name of the result.
        sources: What to compile.
        compile_with: More compiler flags.
        link: Linker flags.

    Returns:
        Path of the result.
    """
    folder = BUILD / ("sanitized" if sanitized() else "plain")
    parts = folder / Path(name).stem
    parts.mkdir(parents=True, exist_ok=True)
    every = [*compiler(), *flags(), *compile_with]
    common = hashlib.sha256("\0".join(every).encode())
    for header in sorted(CSRC.rglob("*.h")) + sorted(CSRC.rglob("*.cuh")):
        common.update(header.read_bytes())

    with open(folder / "lock", "w") as lock:
        # Two test runs at a time must not write the same files.
        fcntl.flock(lock, fcntl.LOCK_EX)

        def compiled(source: Path) -> Path:
            key = common.copy()
            key.update(source.read_bytes())
            target = parts / f"{source.stem}-{key.hexdigest()[:16]}.o"
            if not target.exists():
                for old in parts.glob(f"{source.stem}-" + "?" * 16 + ".o"):
                    old.unlink()
                partial = target.with_suffix(".partial")
                run([*every, "-x", "c++", "-c", str(source), "-o", str(partial)])
                partial.rename(target)
            return target

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            objects = list(pool.map(compiled, sources))
        names = "\0".join([*map(str, objects), *link])
        linked = folder / f"{hashlib.sha256(names.encode()).hexdigest()[:16]}-{name}"
        if not linked.exists():
            for old in folder.glob(f"*-{name}"):
                old.unlink()
            partial = linked.with_suffix(".partial")
            run([*compiler(), *flags(), *map(str, objects), *link, "-o", str(partial)])
            partial.rename(linked)
    return linked


@cache
def library() -> Path:
    """The emulated operators."""
    import torch

    base = Path(torch.__file__).parent
    sources = [CSRC / "ops" / name for name in ("common.cpp", "checks.cpp")]
    sources += sorted((CSRC / "ops" / "cuda").glob("*.cu"))
    sources += sorted((CSRC / "ops" / "cuda" / "host").glob("*.cpp"))
    return build(
        "emulated.so",
        sources,
        [
            "-DTORCH_TARGET_VERSION=0x020b000000000000",
            f"-isystem{base / 'include'}",
            f"-isystem{base / 'include' / 'torch' / 'csrc' / 'api' / 'include'}",
        ],
        ["-shared", f"-L{base / 'lib'}", "-ltorch_cpu"],
    )


@cache
def shim_cases(*, ucontext: bool = False) -> Path:
    """The program with the tests of the shim itself.

    Args:
        ucontext: Switch fibers the portable way.
    """
    host = CSRC / "ops" / "cuda" / "host"
    return build(
        "shim_cases_ucontext" if ucontext else "shim_cases",
        [Path(__file__).with_name("shim_cases.cpp"), host / "engine.cpp", host / "switch.cpp"],
        ["-DSAELENS_CERTIFY_SHIM_UCONTEXT"] if ucontext else [],
        [],
    )

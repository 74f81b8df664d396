"""Find nvcc, decide whether to build the CUDA operators, and with which flags.

Shared by setup.py and cuda_check.py; standard library only. As a program it says which toolkit is
found, or with ``--packages`` which packages from PyPI make up one. torch's own search is not enough: it
finds no toolkit at all where torch is a CPU build, takes the folder of a wrapper script on PATH for
the toolkit, and does not look at the toolkit's packages from PyPI.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# The oldest architecture that the sources serve; what is compiled unless TORCH_CUDA_ARCH_LIST says
# otherwise.
OLDEST = (8, 0)
ARCHITECTURES = "8.0;9.0+PTX"

# The numeric contract: products and sums are fused where the sources say so and nowhere else, and
# nothing is approximated. 20011 and 20014 are calls of host functions from device code, which nvcc
# compiles into garbage unless told to refuse them.
NVCC_FLAGS = [
    "-O3",
    "-std=c++20",
    "-fmad=false",
    "--diag-error=20011,20014",
    "-Xcompiler=-fvisibility=hidden,-ffp-contract=off,-fno-math-errno,-fno-trapping-math",
]

# One release for all parts: mixed ones disagree on the version of PTX.
PYPI_PACKAGES = (
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-nvvm==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
)
PYPI_LINE = "pip install " + " ".join(f'"{package}"' for package in PYPI_PACKAGES)
WHERE = "CUDA_HOME, PATH, /usr/local/cuda and the nvidia packages of this Python"


@dataclass(frozen=True)
class Toolkit:
    """An nvcc and the toolkit folder it belongs to."""

    home: Path
    nvcc: Path
    version: tuple[int, int]

    @property
    def release(self) -> str:
        """The version as a text."""
        return f"{self.version[0]}.{self.version[1]}"


@dataclass(frozen=True)
class Decision:
    """Whether to build the CUDA operators; if not, why not."""

    build: bool
    reason: str = ""


class Impossible(Exception):
    """CUDA operators were demanded and cannot be built."""


def find_toolkit(
    environment: Mapping[str, str] = os.environ, folders: Iterable[Path] | None = None
) -> Toolkit | None:
    """Find the first nvcc that answers.

    Args:
        environment: CUDA_HOME, CUDA_PATH and PATH are read from it.
        folders: Where to look after those (default: /usr/local/cuda and site-packages).
    """
    for nvcc in _candidates(environment, _usual_folders() if folders is None else folders):
        version = _version(nvcc)
        if version is not None:
            return Toolkit(_home(nvcc), nvcc, version)
    return None


def decide(wanted: str | None, torch_cuda: str | None, toolkit: Toolkit | None) -> Decision:
    """Whether to build the CUDA operators.

    Args:
        wanted: SAELENS_CERTIFY_CUDA: "1" demands them, "0" declines them, None leaves it open.
        torch_cuda: The CUDA version of torch (None: a CPU build).
        toolkit: The nvcc found, if any.

    Raises:
        Impossible: They are demanded and cannot be built, or the demand is not understood.
    """
    if wanted not in (None, "", "0", "1"):
        raise Impossible(f"SAELENS_CERTIFY_CUDA = {wanted!r}: set it to 1 or 0, or leave it unset")
    if wanted == "0":
        return Decision(False, "SAELENS_CERTIFY_CUDA=0")
    if torch_cuda is None and wanted != "1":
        return Decision(False, "torch was built without CUDA")
    wish = "the CUDA operators" if torch_cuda is None else f"torch's CUDA {torch_cuda}"
    problem = ""
    if toolkit is None:
        problem = (
            f"no nvcc for {wish} in {WHERE}: install the CUDA toolkit and set CUDA_HOME, or "
            f"{PYPI_LINE}"
        )
    elif torch_cuda is not None and toolkit.version[0] != int(torch_cuda.split(".")[0]):
        problem = (
            f"nvcc {toolkit.release} ({toolkit.nvcc}) does not fit {wish}: install a toolkit "
            f"of CUDA {torch_cuda.split('.')[0]} and set CUDA_HOME"
        )
    if problem and wanted == "1":
        raise Impossible(f"SAELENS_CERTIFY_CUDA=1: {problem}")
    return Decision(not problem, problem)


def architectures(wanted: str | None = None) -> list[str]:
    """Targets for a list such as "8.0;9.0+PTX", as nvcc names them: sm_80, sm_90, compute_90.

    Architectures too old for the sources are left out: such lists often come with a container.

    Raises:
        Impossible: The list is not one of numbers, or nothing in it is new enough.
    """
    targets = []
    for entry in re.split(r"[;,\s]+", (wanted or ARCHITECTURES).strip("; ,")):
        parsed = re.fullmatch(r"(\d+)\.(\d)([a-z]?)(\+PTX)?", entry)
        if parsed is None:
            raise Impossible(
                f"TORCH_CUDA_ARCH_LIST = {wanted!r}: {entry!r} is not understood; give numbers, "
                f"for example {ARCHITECTURES!r}"
            )
        if (int(parsed[1]), int(parsed[2])) < OLDEST:
            continue
        number = f"{parsed[1]}{parsed[2]}{parsed[3]}"
        targets.append(f"sm_{number}")
        if parsed[4]:
            targets.append(f"compute_{number}")
    if not targets:
        raise Impossible(
            f"TORCH_CUDA_ARCH_LIST = {wanted!r}: the CUDA operators need an architecture of 8.0 or "
            "newer"
        )
    return list(dict.fromkeys(targets))


def target_flags(targets: Iterable[str]) -> list[str]:
    """The flags of nvcc for such targets."""
    return [f"-gencode=arch=compute_{target.split('_')[1]},code={target}" for target in targets]


def _candidates(environment: Mapping[str, str], folders: Iterable[Path]) -> Iterator[Path]:
    named = environment.get("CUDA_HOME") or environment.get("CUDA_PATH")
    if named:
        yield Path(named) / "bin" / "nvcc"
    on_path = shutil.which("nvcc", path=environment.get("PATH", ""))
    if on_path:
        yield Path(on_path)
    for folder in folders:
        yield folder / "bin" / "nvcc"


def _usual_folders() -> list[Path]:
    packages = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    found = [home for path in packages for home in sorted(Path(path, "nvidia").glob("cu[0-9]*"))]
    return [Path("/usr/local/cuda"), *found]


def _version(nvcc: Path) -> tuple[int, int] | None:
    try:
        told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    release = re.search(r"release (\d+)\.(\d+)", told.stdout)
    return None if release is None else (int(release[1]), int(release[2]))


def _home(nvcc: Path) -> Path:
    """The toolkit's folder, also where nvcc on PATH is a script that calls the real one."""
    guess = nvcc.parent.parent
    if (guess / "include" / "cuda_runtime.h").exists():
        return guess
    steps = subprocess.run(
        [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull],
        capture_output=True,
        text=True,
        check=False,
    )
    top = re.search(r"^#\$ TOP=(.+)$", steps.stderr + steps.stdout, re.MULTILINE)
    return guess if top is None else Path(os.path.normpath(top[1].strip()))


def main() -> int:
    """Say what was found; the exit status tells whether anything was."""
    if sys.argv[1:] == ["--packages"]:
        print(*PYPI_PACKAGES)
        return 0
    toolkit = find_toolkit()
    print(f"no nvcc in {WHERE}" if toolkit is None else f"nvcc {toolkit.release}: {toolkit.nvcc}")
    return 1 if toolkit is None else 0


if __name__ == "__main__":
    sys.exit(main())

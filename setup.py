"""Build of the compiled operators; everything else is in pyproject.toml.

Three binaries come from csrc/:

* ``_C``: the operators, on torch's stable C++ interface for torch 2.11. It uses neither Python's
  nor torch's unstable symbols, so one file serves every CPython >= 3.10 and every torch >= 2.11.
* ``_cuda``: the same operators for CUDA tensors, on the same interface, with the CUDA runtime linked
  in. It is built where torch has CUDA and there is an nvcc of the same major version; without it,
  CUDA tensors use plain torch. build_support/cuda_toolkit.py decides.
* ``_native``: the torch-free part, bound with pybind11. pybind11 needs the full CPython interface,
  so this file, and with it the wheel, belongs to one CPython version.

A build that fails does not fail the installation, nor the other parts: the package then runs on its
plain torch operators, and the reason is kept in ``_build_report.json`` for ``build_info()``.

Environment variables:
    SAELENS_CERTIFY_NO_EXTENSION=1: compile nothing.
    SAELENS_CERTIFY_REQUIRE_EXTENSION=1: fail the installation if compiling fails.
    SAELENS_CERTIFY_CUDA=1: fail if the CUDA operators cannot be built; with a CPU-only torch they are
        compiled and linked all the same. 0: leave them out. Unset: build them where it is possible.
    TORCH_CUDA_ARCH_LIST: their architectures (default "8.0;9.0+PTX").
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_support"))
from cuda_toolkit import (  # noqa: E402
    NVCC_FLAGS,
    Impossible,
    architectures,
    decide,
    find_toolkit,
    target_flags,
)

REPORT = "_build_report.json"
PARTS = {
    "operators": "saelens_certify._C",
    "native": "saelens_certify._native",
    "cuda": "saelens_certify._cuda",
}

# torch 2.11, in the encoding of torch/headeronly/version.h.
TORCH_TARGET_VERSION = "0x020b000000000000"
FLAGS = [
    "-O3",
    "-g0",
    "-std=c++20",
    "-fvisibility=hidden",
    # The numeric contract: no silent fusing of products and sums.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-unused-parameter",
]


def sources(*patterns: str) -> list[str]:
    """Files of csrc/ that match a pattern, found the way CMakeLists.txt finds them."""
    found = {path for pattern in patterns for path in (ROOT / "csrc").glob(pattern)}
    return sorted(str(path.relative_to(ROOT)) for path in found)


def wanted(name: str) -> bool:
    """Whether an environment variable is set to 1."""
    return os.environ.get(name, "0") == "1"


def torch_tools():
    """Find torch and its extension builder, from the build environment or the one installed into."""
    # Build isolation hides the target environment; its torch serves as well as any other.
    for path in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        if path not in sys.path:
            sys.path.append(path)
    import torch
    from torch.utils import cpp_extension

    return torch, cpp_extension


report: dict = {
    "operators": "not built",
    "native": "not built",
    "cuda": "not built",
    "torch": None,
    "torch_target": "2.11",
    "flags": FLAGS,
}


def cuda_extension(torch, cpp_extension) -> Extension | None:
    """The CUDA operators, or nothing if they cannot or shall not be built; the report says why.

    Args:
        torch: The module.
        cpp_extension: Its extension builder.
    """
    toolkit = find_toolkit()
    decision = decide(os.environ.get("SAELENS_CERTIFY_CUDA"), torch.version.cuda, toolkit)
    if not decision.build or toolkit is None:
        report["cuda"] = f"not built: {decision.reason}"
        return None
    targets = architectures(os.environ.get("TORCH_CUDA_ARCH_LIST"))
    # torch looks for a toolkit only if it has CUDA itself, and takes any nvcc's folder for one.
    cpp_extension.CUDA_HOME = str(toolkit.home)
    nvcc_flags = [*NVCC_FLAGS, *target_flags(targets)]
    defines = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", "-DUSE_CUDA"]
    extension = cpp_extension.CUDAExtension(
        "saelens_certify._cuda",
        sources("ops/common.cpp", "ops/checks.cpp", "ops/cuda/*.cu"),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": [*FLAGS, *defines], "nvcc": [*nvcc_flags, *defines]},
        # The runtime linked in stays inside: it must not answer for the one that torch loads.
        extra_link_args=["-Wl,--exclude-libs,ALL"],
        py_limited_api=True,
    )
    # A CPU build of torch has no torch_cuda: what is linked there shows that it links, no more.
    parts = ["c10", "torch_cpu", *(["torch_cuda"] if torch.version.cuda else [])]
    extension.libraries = [*parts, "cudart_static", "rt", "dl", "pthread"]
    report["cuda_toolkit"] = toolkit.release
    report["cuda_flags"] = nvcc_flags
    return extension


extensions = []
command: type[build_ext] = build_ext

if wanted("SAELENS_CERTIFY_NO_EXTENSION"):
    if wanted("SAELENS_CERTIFY_CUDA"):
        sys.exit("SAELENS_CERTIFY_CUDA=1 and SAELENS_CERTIFY_NO_EXTENSION=1: unset one of them")
    for part in ("operators", "native", "cuda"):
        report[part] = "not built: SAELENS_CERTIFY_NO_EXTENSION=1"
else:
    try:
        import pybind11

        extensions.append(
            Extension(
                "saelens_certify._native",
                sources("stats/*.cpp", "build_info/*.cpp", "common/*.cpp"),
                include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
                extra_compile_args=FLAGS,
                language="c++",
            )
        )
    except ImportError as error:
        report["native"] = f"not built: {error}"
    try:
        torch, cpp_extension = torch_tools()
        report["torch"] = torch.__version__
        command = cpp_extension.BuildExtension
        extensions.append(
            cpp_extension.CppExtension(
                "saelens_certify._C",
                sources("ops/*.cpp", "ops/cpu/*.cpp", "common/*.cpp"),
                include_dirs=[str(ROOT / "csrc")],
                extra_compile_args=[*FLAGS, f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"],
                py_limited_api=True,
            )
        )
        cuda = cuda_extension(torch, cpp_extension)
        extensions += [] if cuda is None else [cuda]
    except ImportError as error:
        for part in ("operators", "cuda"):
            report[part] = f"not built: torch could not be imported while building: {error}"
        if wanted("SAELENS_CERTIFY_CUDA"):
            sys.exit(f"SAELENS_CERTIFY_CUDA=1: {report['cuda']}")
    except Impossible as error:
        if os.environ.get("SAELENS_CERTIFY_CUDA", "") not in ("", "0"):
            sys.exit(str(error))
        report["cuda"] = f"not built: {error}"


@contextlib.contextmanager
def compiler_output() -> Iterator[list[str]]:
    """Collect what the compiler prints, then pass it on; ninja keeps it out of its exception."""
    lines: list[str] = []
    sys.stdout.flush()
    saved = os.dup(1)
    with tempfile.TemporaryFile(mode="w+", errors="replace") as file:
        os.dup2(file.fileno(), 1)
        try:
            yield lines
        finally:
            sys.stdout.flush()
            os.dup2(saved, 1)
            os.close(saved)
            file.seek(0)
            text = file.read()
            lines += text.splitlines()
            sys.stdout.write(text)


def reason(error: BaseException, output: list[str]) -> str:
    """Why a build failed: the compiler's first errors, or else the exception."""
    # A word of its own: the command lines printed hold flags like --diag-error.
    telling = re.compile(r"(^|[\s:(])(error|fatal)\b|not found|cannot find", re.IGNORECASE)
    complaints = [line.strip() for line in output if telling.search(line)]
    return "not built: " + ("; ".join(complaints[:5]) or str(error) or type(error).__name__)


class BuildCore(command):
    """Build what can be built, and write down what could not and why."""

    def run(self) -> None:
        """Build everything and leave the report in the package."""
        output: list[str] = []
        try:
            with compiler_output() as output:
                super().run()
        except (Exception, SystemExit) as error:
            for name in PARTS:
                self._failed(name, error, output)
        inplace = self.inplace or self.editable_mode
        folder = ROOT / "saelens_certify" if inplace else Path(self.build_lib) / "saelens_certify"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    def build_extensions(self) -> None:
        """Build all binaries, without the CUDA one if torch refuses its compiler beforehand."""
        try:
            super().build_extensions()
        except (RuntimeError, OSError, ValueError) as error:
            rest = [ext for ext in self.extensions if PARTS["cuda"] != ext.name]
            if len(rest) == len(self.extensions):
                raise
            self._failed("cuda", error, [])
            self.extensions = rest
            super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        """Build one binary, noting a failure instead of raising it."""
        if not ext.sources:
            return
        part = next(part for part, name in PARTS.items() if name == ext.name)
        output: list[str] = []
        try:
            with compiler_output() as output:
                super().build_extension(ext)
            report[part] = "built"
            if part == "cuda":
                code = re.findall(r",code=(\w+)", " ".join(report["cuda_flags"]))
                report["cuda_architectures"] = code
        except (Exception, SystemExit) as error:
            self._failed(part, error, output)

    def copy_extensions_to_source(self) -> None:
        """Copy what was built next to the sources, for an editable installation."""
        built = Path(self.build_lib)
        self.extensions = [
            ext
            for ext in self.extensions
            if (built / self.get_ext_filename(self.get_ext_fullname(ext.name))).exists()
        ]
        super().copy_extensions_to_source()

    def _failed(self, part: str, error: BaseException, output: list[str]) -> None:
        demanded = part == "cuda" and wanted("SAELENS_CERTIFY_CUDA")
        if demanded or wanted("SAELENS_CERTIFY_REQUIRE_EXTENSION"):
            raise error
        if report[part] == "not built":
            report[part] = reason(error, output)


if not extensions:
    # Nothing to compile, but the report must still be written.
    extensions = [Extension("saelens_certify._none", [])]

setup(ext_modules=extensions, cmdclass={"build_ext": BuildCore})

"""Find and load the compiled operators; never fail at import."""

from __future__ import annotations

import json
import os
import re
import warnings
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, Literal

import torch

from saelens_certify.errors import CertifyError

Impl = Literal["auto", "native", "torch"]

PACKAGE = Path(__file__).resolve().parents[1]
BUILD_REPORT = PACKAGE / "_build_report.json"

# What SAELENS_CERTIFY_ISA may ask for (csrc/common/isa.h).
ISAS = ("scalar", "avx2", "avx512")


@dataclass(frozen=True)
class Library:
    """A library of compiled operators, or why there is none.

    Attributes:
        path: The shared library that was loaded, if any.
        reason: Why none is loaded, empty when one is.
    """

    path: Path | None
    reason: str


@cache
def build_report() -> dict[str, Any]:
    """What the build left about itself, empty if it left nothing (CMake leaves nothing)."""
    if not BUILD_REPORT.exists():
        return {}
    return json.loads(BUILD_REPORT.read_text(encoding="utf-8"))


@cache
def library() -> Library:
    """Load the compiled operators for CPU tensors once; later calls return the same answer."""
    loaded = _load("_C", "this installation has no compiled operators", "operators")
    if loaded.path is not None:
        from saelens_certify.ops import fakes

        fakes.register()
    return loaded


@cache
def cuda_library() -> Library:
    """Load the compiled operators for CUDA tensors once, on top of those for CPU tensors."""
    if torch.version.cuda is None:
        return Library(None, f"torch {torch.__version__} was built without CUDA")
    if library().path is None:
        return Library(None, library().reason)
    return _load("_cuda", "this installation has no compiled operators for CUDA", "cuda")


@cache
def architecture_problem(capability: tuple[int, int]) -> str:
    """Why the CUDA library has no code for a device of this compute capability, empty if it has."""
    compiled = build_report().get("cuda_architectures", [])
    if not compiled or any(_serves(target, capability) for target in compiled):
        return ""
    return (
        f"the CUDA operators were compiled for {', '.join(compiled)} and the device has compute "
        f"capability {capability[0]}.{capability[1]}: build again with "
        f"TORCH_CUDA_ARCH_LIST={capability[0]}.{capability[1]} (8.0 is the oldest possible)"
    )


@cache
def isa_problem() -> str:
    """Why the compiled operators for CPU tensors refuse to run, empty if they do not.

    They read SAELENS_CERTIFY_ISA once, when they are first used, as this does.
    """
    wanted = os.environ.get("SAELENS_CERTIFY_ISA", "")
    if library().path is None or wanted in ("", *ISAS):
        return ""
    return (
        f"SAELENS_CERTIFY_ISA={wanted} is unknown: choose {', '.join(ISAS[:-1])} or {ISAS[-1]}, or "
        "leave it unset"
    )


def use_native(impl: Impl, device: torch.device) -> bool:
    """Whether to run the compiled operator.

    Args:
        impl: "auto" takes the compiled operator when there is one for the device; "native" insists
            on it; "torch" takes plain torch.
        device: Device of the inputs.

    Raises:
        CertifyError: The name is unknown, "native" is asked for and not available, or
            SAELENS_CERTIFY_ISA names no instruction set.
    """
    if impl not in ("auto", "native", "torch"):
        raise CertifyError(f"impl = {impl!r} is unknown: choose 'auto', 'native' or 'torch'")
    if impl == "torch":
        return False
    if device.type == "cpu" and isa_problem():
        raise CertifyError(isa_problem())
    missing = _missing(device)
    if missing and impl == "native":
        raise CertifyError(f"impl = 'native' is not possible: {missing}; use impl = 'auto'")
    if device.type == "cuda" and impl == "auto" and not missing:
        _say_untried()
    return not missing


# What is known of the CUDA operators; empty once they have passed benchmarks/gpu_check.sh.
CUDA_STATUS = (
    "the CUDA operators have been compiled and emulated on a CPU, but never run on a GPU: "
    "benchmarks/gpu_check.sh tests them, impl = 'torch' avoids them, impl = 'native' silences this"
)


@cache
def _say_untried() -> None:
    if CUDA_STATUS:
        warnings.warn(CUDA_STATUS, stacklevel=4)


def _missing(device: torch.device) -> str:
    if device.type == "cpu":
        return library().reason
    if device.type == "cuda":
        return cuda_library().reason or _device_problem(device.index)
    return f"there are no compiled operators for {device.type}"


@cache
def _device_problem(index: int | None) -> str:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return architecture_problem(torch.cuda.get_device_capability(index))


def _load(stem: str, absent: str, part: str) -> Library:
    names = [f"{stem}{suffix}" for suffix in EXTENSION_SUFFIXES]
    path = next((PACKAGE / name for name in names if (PACKAGE / name).exists()), None)
    if path is None:
        told = build_report().get(part, "")
        return Library(None, f"{absent}: {told}" if told.startswith("not built") else absent)
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return Library(None, f"{path.name} does not load with torch {torch.__version__}: {error}")
    return Library(path, "")


def _serves(target: str, capability: tuple[int, int]) -> bool:
    """Whether machine code (sm_80) or PTX (compute_90) runs on a device of this capability."""
    parsed = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", target)
    if parsed is None:
        return False
    major, minor = int(parsed[2]), int(parsed[3])
    if parsed[4]:
        return (major, minor) == capability
    if parsed[1] == "sm":
        return major == capability[0] and minor <= capability[1]
    return (major, minor) <= capability

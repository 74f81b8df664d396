"""What was built, what is active, and why something is absent."""

from __future__ import annotations

import os
from typing import Any

import torch

from saelens_certify.ops._library import build_report, cuda_library, isa_problem, library


def build_info() -> dict[str, Any]:
    """Describe the compiled parts of this installation.

    Returns:
        ``native``: whether compiled operators are active, and ``implementation``: "native" or
        "torch", what ``impl="auto"`` takes for CPU tensors; ``reason``: why not native (empty if
        so; where SAELENS_CERTIFY_ISA is misspelt, "auto" is an error); ``torch``: the version running; ``cuda``: its CUDA version (None: CPU build);
        ``cuda_operators``: the operators compiled for CUDA tensors that are loaded, ``cuda_reason``:
        why there are none (empty if there are), ``cuda_architectures``: what they were compiled for;
        ``build``: what the build reported (torch built against, flags, outcome of each part);
        ``compiled``: compiler, C++ standard, pybind11 and instruction sets, as told by the
        torch-free module, if it is there.
    """
    cuda, report = cuda_library(), build_report()
    reason = library().reason or isa_problem()
    return {
        "native": not reason,
        "implementation": "torch" if reason else "native",
        "reason": reason,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cuda_operators": [] if cuda.path is None else _cuda_operators(),
        "cuda_reason": cuda.reason,
        "cuda_architectures": report.get("cuda_architectures", []),
        "isa_requested": os.environ.get("SAELENS_CERTIFY_ISA"),
        "build": report,
        "compiled": _compiled(),
    }


def _cuda_operators() -> list[str]:
    """Operators of this package that the dispatcher has a CUDA kernel for."""
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    prefix = "saelens_certify::"
    return sorted(name[len(prefix) :] for name in registered if name.startswith(prefix))


def _compiled() -> dict[str, str] | None:
    try:
        from saelens_certify import _native
    except ImportError:
        return None
    return dict(_native.build_info())

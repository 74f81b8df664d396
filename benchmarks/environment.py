"""What a measurement was made on."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import saelens_certify

_ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("torch", "sae-lens", "transformer-lens", "transformers")
_INSTRUCTION_SETS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")


def environment(device: str = "cpu") -> dict[str, Any]:
    """Return processor, threads, versions, active operators, commit, date and load.

    Args:
        device: "cpu", or "cuda" to describe the GPU as well.
    """
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "instruction_sets": _instruction_sets(),
        "torch_threads": torch.get_num_threads(),
        "load_average": load_average(),
        "python": platform.python_version(),
        "saelens_certify": saelens_certify.__version__,
        "commit": commit(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "build": saelens_certify.build_info(),
    }
    if device == "cuda":
        found["gpu"] = _gpu()
    return found


def load_average() -> list[float] | None:
    """Load of the machine over 1, 5 and 15 minutes, where the system tells."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def commit() -> str | None:
    """Commit of the working tree, with ``+changes`` if files under version control differ from it.

    Where git cannot tell (a copy without its history): what ``SAELENS_CERTIFY_COMMIT`` says.
    """
    try:
        found = _git("rev-parse", "HEAD")
        return found + ("+changes" if _git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("SAELENS_CERTIFY_COMMIT") or None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(_ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "capability": list(torch.cuda.get_device_capability(0)),
        "cuda": torch.version.cuda,
    }


def _processor() -> str:
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _instruction_sets() -> list[str]:
    for line in _cpuinfo():
        if line.lower().startswith(("flags", "features")):
            flags = set(line.partition(":")[2].split())
            return [name for name in _INSTRUCTION_SETS if name in flags]
    return []


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []

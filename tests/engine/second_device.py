"""A second device for machines that have none: second_device.cpp, compiled and loaded.

Its tensors are of torch's spare device type, in the host's memory, and an operator whose tensors
are on several devices raises as it does with a GPU. Compiled once into build/second_device/.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import subprocess
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

SOURCE = Path(__file__).with_suffix(".cpp")
BUILD = Path(__file__).resolve().parents[2] / "build" / "second_device"
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-shared", "-Wall", "-Wextra"]

SECOND, THIRD = "privateuseone:0", "privateuseone:1"


@cache
def load() -> None:
    """Compile the device if that has not been done, and make it known to torch."""
    torch.ops.load_library(str(_library()))
    module: Any = types.ModuleType("torch.privateuseone")
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None  # noqa: ARG005 - it has no generator
    torch._register_device_module("privateuseone", module)


def operators() -> set[str]:
    """The operators that have run on the device so far, as ``"aten::add.out"``."""
    load()
    return set(torch.ops.second_device.operators())


@cache
def operators_of_cuda() -> frozenset[str]:
    """The operators that torch's own list gives a kernel for CUDA."""
    import torchgen

    path = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    entries = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    names = {entry["func"].partition("(")[0]: entry for entry in entries}

    def has_kernel(entry: dict[str, Any]) -> bool:
        entry = names.get(entry.get("structured_delegate"), entry)
        keys = ",".join(entry.get("dispatch", {}))
        # One source for CPU and CUDA needs no naming of either.
        return "ufunc_inner_loop" in entry or "CUDA" in [key.strip() for key in keys.split(",")]

    return frozenset(f"aten::{name}" for name, entry in names.items() if has_kernel(entry))


def tensors_of(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers of a module, by name."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def _library() -> Path:
    base = Path(torch.__file__).parent
    command = [
        *shlex.split(os.environ.get("CXX", "g++")),
        *FLAGS,
        f"-isystem{base / 'include'}",
        f"-isystem{base / 'include' / 'torch' / 'csrc' / 'api' / 'include'}",
        str(SOURCE),
        f"-L{base / 'lib'}",
        "-lc10",
        "-ltorch_cpu",
    ]
    key = hashlib.sha256("\0".join([*command, torch.__version__]).encode() + SOURCE.read_bytes())
    target = BUILD / f"{key.hexdigest()[:16]}.so"
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / "lock", "w") as lock:
        # Two test runs at a time must not write the same file.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            partial = target.with_suffix(".partial")
            done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
            partial.rename(target)
    return target

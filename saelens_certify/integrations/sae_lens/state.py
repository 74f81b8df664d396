"""Leaving a process as it was found: random generators and attributes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

_MISSING = object()


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Restore the global random states of torch (CPU and every CUDA device in use), NumPy and Python."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    of_numpy = np.random.get_state()  # noqa: NPY002 (the user's own generator, not ours)
    of_python = random.getstate()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        np.random.set_state(of_numpy)  # noqa: NPY002
        random.setstate(of_python)


@contextmanager
def replaced(target: Any, name: str, value: Any) -> Iterator[None]:
    """Give one object an attribute for a while; its class is left alone.

    Args:
        target: The object.
        name: The attribute, perhaps one that the object has from its class.
        value: What it is meanwhile.
    """
    before = vars(target).get(name, _MISSING)
    setattr(target, name, value)
    try:
        yield
    finally:
        if before is _MISSING:
            delattr(target, name)
        else:
            setattr(target, name, before)

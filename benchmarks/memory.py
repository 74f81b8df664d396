"""Memory that a call takes beyond what was there before and what it returns."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Allocations:
    """Tensor memory taken during a call, in bytes.

    Attributes:
        peak: Most that was alive at once, beyond what was alive before.
        largest: Largest single allocation.
    """

    peak: int
    largest: int


def cpu_allocations(call: Callable[[], object]) -> tuple[Allocations, object]:
    """Run a call and return what torch's CPU allocator handed out meanwhile, and the result.

    Allocations inside compiled operators count, if they are tensors. Their C++ buffers do not: some MiB of
    candidates in the encoders.
    """
    gc.collect()
    with (
        _without_native_messages(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        result = call()
    alive = peak = largest = 0
    for event in _memory_events(profiler):
        alive += event
        peak = max(peak, alive)
        largest = max(largest, event)
    return Allocations(peak, largest), result


@dataclass(frozen=True)
class Footprint:
    """Memory of one call, in bytes.

    Attributes:
        extra: Most that was alive at once beyond what was there before, without the outputs.
        outputs: What the call returns.
    """

    extra: int
    outputs: int

    def against(self, limit: int) -> float:
        """Return all memory of the call / (limit + outputs): at most 1 if the limit is kept."""
        return (self.extra + self.outputs) / (limit + self.outputs)


def footprint(call: Callable[[], object], device: str) -> Footprint:
    """Measure the memory of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        allocations, result = cpu_allocations(call)
        peak = allocations.peak
    outputs = _output_bytes(result)
    return Footprint(max(0, peak - outputs), outputs)


@contextmanager
def _without_native_messages() -> Iterator[None]:
    """Keep the profiler's own lines, written past Python, off the terminal."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _memory_events(profiler: Any) -> list[int]:
    """Sizes of allocations (positive) and releases (negative) in order of time."""
    events = [
        event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def _output_bytes(result: object) -> int:
    leaves = tree_leaves(_plain(result))
    storages = {
        leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes()
        for leaf in leaves
        if isinstance(leaf, Tensor)
    }
    return sum(storages.values())


def _plain(result: object) -> object:
    """Turn results that are dataclasses of tensors into their fields."""
    if isinstance(result, (tuple, list)):
        return [_plain(part) for part in result]
    fields = getattr(result, "__dataclass_fields__", None)
    return result if fields is None else [_plain(getattr(result, name)) for name in fields]

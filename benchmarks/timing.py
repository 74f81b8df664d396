"""Interleaved timing: contenders take turns, so that what disturbs one disturbs all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

# Called with the number of the call, so that it can take its inputs in turn.
Contender = Callable[[int], object]

# One sample lasts at least this long: shorter calls are repeated inside it.
_SAMPLE_S = 2e-3
_MAX_REPEATS = 200
# A call that takes longer than this is not repeated only to be warm.
_LONG_S = 0.3


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one contender.

    Attributes:
        samples: One value per round, in the order taken.
    """

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.samples)

    @property
    def range(self) -> tuple[float, float]:
        """Fastest and slowest round."""
        return min(self.samples), max(self.samples)


class _Turn:
    """One contender with the number of its next call and the repeats that make up a sample."""

    def __init__(self, call: Contender, device: str) -> None:
        self._call = call
        self._device = device
        self._next = 0
        self._repeats = 1

    def warm_up(self) -> None:
        """Call once, and if it was short once more, to see how often a sample must repeat it."""
        if self.sample() > _LONG_S:
            return
        once = self.sample()
        self._repeats = max(1, min(_MAX_REPEATS, round(_SAMPLE_S / max(once, 1e-9))))

    def sample(self) -> float:
        """Return seconds per call."""
        numbers = range(self._next, self._next + self._repeats)
        self._next = numbers.stop
        if self._device == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for number in numbers:
                self._call(number)
            stop.record()
            stop.synchronize()
            return start.elapsed_time(stop) / 1e3 / self._repeats
        begin = time.perf_counter()
        for number in numbers:
            self._call(number)
        return (time.perf_counter() - begin) / self._repeats


def interleaved(
    contenders: Mapping[str, Contender],
    device: str = "cpu",
    *,
    budget_s: float = 4.0,
    min_rounds: int = 3,
    max_rounds: int = 15,
    warm_up: bool = True,
) -> dict[str, Timing]:
    """Time contenders in turn: a, b, a, b, ..., the order reversed every other round.

    Args:
        contenders: What to time.
        device: "cpu" (wall clock) or "cuda" (events).
        budget_s: Stop after this long, once there are enough rounds.
        min_rounds: Rounds to take in any case.
        max_rounds: Rounds to take at most.
        warm_up: Call each contender once or twice, uncounted, before the first round.

    Returns:
        Timings by name.

    Raises:
        ValueError: There is nothing to time.
    """
    if not contenders or min_rounds < 1:
        raise ValueError(f"{len(contenders)} contenders, {min_rounds} rounds: nothing to time")
    begin = time.perf_counter()
    turns = {name: _Turn(call, device) for name, call in contenders.items()}
    if warm_up:
        for turn in turns.values():
            turn.warm_up()
    samples: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(max_rounds):
        for name in list(turns) if number % 2 == 0 else reversed(list(turns)):
            samples[name].append(turns[name].sample())
        if number + 1 >= min_rounds and time.perf_counter() - begin > budget_s:
            break
    return {name: Timing(tuple(values)) for name, values in samples.items()}

"""Rows, what a row measures, and what rows of one run share."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from benchmarks.memory import footprint
from benchmarks.rooflines import Ceilings, Work, has_native_16bit, measure_ceilings
from benchmarks.timing import Contender, Timing, interleaved

Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class Measured:
    """What a row found.

    Attributes:
        ratio: The number that the target is about.
        ours_s: Median seconds of a call of ours, if the row is about time.
        baseline_s: Median seconds of the baseline, likewise.
        floor_s: Seconds at the measured limits of the machine, if there is such a floor.
        extra: Further entries of the row's record.
    """

    ratio: float
    ours_s: float | None = None
    baseline_s: float | None = None
    floor_s: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of the benchmark.

    Attributes:
        name: Unique name, ``group.what.shape``.
        what: What is divided by what, in words.
        measure: Takes the measurement.
        target: Bound on the ratio; None where the row only informs.
        better: Which direction of the ratio is good.
        unavailable: Why the row cannot be measured in this version, empty if it can.
        on_request: Whether the row runs only when it is named.
    """

    name: str
    what: str
    measure: Callable[[Session], Measured]
    target: float | None = None
    better: Better = "lower"
    unavailable: str = ""
    on_request: bool = False

    def met(self, ratio: float) -> bool | None:
        """Whether a ratio meets the target; None without one."""
        if self.target is None:
            return None
        return ratio <= self.target if self.better == "lower" else ratio >= self.target


class Session:
    """What the rows of one run share.

    Attributes:
        device: "cpu" or "cuda".
        quick: Whether every row runs at toy size.
        budget_s: Time that one comparison may take once it has three rounds.
    """

    def __init__(self, device: str, quick: bool = False) -> None:
        self.device = device
        self.quick = quick
        self.budget_s = 0.0 if quick else (0.5 if device == "cuda" else 2.5)
        self._scope = ""
        self._kept: dict[str, Any] = {}

    @cached_property
    def ceilings(self) -> Ceilings:
        """The machine's limits, measured when first needed."""
        return measure_ceilings(self.device, self.quick)

    @cached_property
    def native_16bit(self) -> bool:
        """Whether 16-bit matrix products run in hardware."""
        return has_native_16bit(self.device)

    def keep(self, scope: str, slot: str, make: Callable[[], Any]) -> Any:
        """Return what was made for a slot; a new scope first drops all that the last one kept."""
        if scope != self._scope:
            self._kept.clear()
            gc.collect()
            self._scope = scope
        if slot not in self._kept:
            self._kept[slot] = make()
        return self._kept[slot]

    def copies(self, n_bytes: int) -> int:
        """How many inputs of this size must take turns so that none is found in the L2 cache."""
        if self.quick:
            return 2
        wanted = 2 * (64 << 20)
        return max(1, min(8, -(-wanted // max(1, n_bytes))))

    def time(self, contenders: Mapping[str, Contender], **options: Any) -> dict[str, Timing]:
        """Time contenders in turn within this session's budget."""
        if self.quick:
            options |= {"min_rounds": 1, "max_rounds": 2}
        options.setdefault("budget_s", self.budget_s)
        return interleaved(contenders, self.device, **options)

    def compare(
        self,
        ours: Contender,
        baseline: Contender,
        *,
        work: Iterable[Work] = (),
        information: Mapping[str, Contender] | None = None,
        memory: bool = False,
        better: Better = "lower",
        extra: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Measured:
        """Time ours and the baseline in turn.

        Args:
            ours: What is measured.
            baseline: What it is measured against.
            work: Stages whose floor is reported.
            information: Further contenders, timed three times after the comparison; reported as
                ``<name>_s``.
            memory: Whether to report the peak extra memory of one call of ours.
            better: "lower": ratio ours / baseline; "higher": baseline / ours.
            extra: Further entries.
            **options: Passed to `interleaved`.

        Returns:
            The ratio of medians, with spread.
        """
        stages = list(work)
        timings = self.time({"ours": ours, "baseline": baseline}, **options)
        mine, theirs = timings["ours"], timings["baseline"]
        found: dict[str, Any] = {
            "ours_range_s": list(mine.range),
            "baseline_range_s": list(theirs.range),
            "rounds": len(mine.samples),
        }
        for name, call in (information or {}).items():
            times = self.time({name: call}, min_rounds=3, max_rounds=3)
            found[f"{name}_s"] = times[name].median
        if memory:
            found["peak_extra_bytes"] = footprint(lambda: ours(0), self.device).extra
        if stages:
            found["flops"] = sum(w.flops for w in stages)
            found["bytes"] = sum(w.n_bytes for w in stages)
        ratio = mine.median / theirs.median
        return Measured(
            ratio=ratio if better == "lower" else 1 / ratio,
            ours_s=mine.median,
            baseline_s=theirs.median,
            floor_s=self.ceilings.floor(stages) if stages else None,
            extra=found | dict(extra or {}),
        )

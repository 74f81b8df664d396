"""Slow, plain versions of what baselines, the information kept and plans rest on: one value and one stake at a time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

CAPS = ((0.5, 0.25), (0.75, 0.25), (0.98, 0.5))


def betting_upper(x: Sequence[float], low: float, high: float, threshold: float) -> float:
    """The adaptive betting bound, by halving the claims: from its definition, in double precision."""
    y = [(high - value) / (high - low) for value in x]
    n, total, squares, stakes = len(y), 0.5, 0.25, []
    for i, value in enumerate(y, start=1):
        stakes.append(math.sqrt(2.0 * threshold * i / (n * squares)))
        total += value
        squares += (value - total / (i + 1)) ** 2

    def refuted(m: float) -> bool:
        wealth = 0.0
        for cap, weight in CAPS:
            logs = (math.log1p(min(s, cap / m) * (v - m)) for s, v in zip(stakes, y, strict=True))
            wealth += weight * math.exp(min(math.fsum(logs), 700.0))
        return math.log(wealth) >= threshold if wealth > 0.0 else False

    refuted_up_to, kept_from = 0.0, math.fsum(y) / n
    if kept_from > 0.0 and refuted(kept_from):
        return high - (high - low) * kept_from
    for _ in range(60):
        m = (refuted_up_to + kept_from) / 2.0
        if m > 0.0 and refuted(m):
            refuted_up_to = m
        else:
            kept_from = m
    return high - (high - low) * refuted_up_to


class KeptOracle:
    """Wealth against any ratio of the information kept, with scales from all corners of the losses' ranges.

    Args:
        b: Losses of the baseline.
        m: Losses of M.
        p: Losses of the proxy.
        low: Smallest loss.
        high: Largest loss.
        threshold: Logarithm of the wealth that refutes.
        sign: 1: against ratios that are too small; -1: against ratios that are too large.
        constant: Whether the baseline's loss is the same for all sequences by construction.
        any_time: Whether stakes do not depend on the number of sequences.
    """

    def __init__(self, b, m, p, low, high, threshold, sign, constant=False, any_time=False):
        self.threshold, self.sign, self.any_time = threshold, sign, any_time
        self.rows = list(zip(b, m, p, strict=True))
        ends = (b[0],) if constant else (low, high)
        self.corners = list(itertools.product(ends, (low, high), (low, high)))
        self.stakes = self._stakes()

    def value(self, row, u, v):
        b, m, p = row
        return self.sign * (u * (b - p) - v * (b - m))

    def worst(self, u, v):
        return max(-self.value(corner, u, v) for corner in self.corners)

    def direction(self, f):
        """(u, v), scaled, for a ratio: the scale is linear between those at -infinity, 0, 1 and infinity."""
        if f < 0.0:
            scale = self.worst(1.0, 0.0) - f * self.worst(0.0, -1.0)
        elif f <= 1.0:
            scale = (1.0 - f) * self.worst(1.0, 0.0) + f * self.worst(1.0, 1.0)
        else:
            scale = self.worst(1.0, 1.0) + (f - 1.0) * self.worst(0.0, 1.0)
        return 1.0 / scale, f / scale

    def _stakes(self):
        n, stakes = len(self.rows), []
        for i in range(n):
            before = self.rows[:i]
            above = math.fsum(b - m for b, m, _ in before)
            f = math.fsum(b - p for b, _, p in before) / above if above > 0.0 else 1.0
            f = min(max(f, 0.0), 1.0)
            values = [self.value(row, 1.0, f) / self.worst(1.0, f) for row in before]
            mean = math.fsum(values) / max(i, 1)
            spread = (1.0 + math.fsum((w - mean) ** 2 for w in values)) / (i + 1)
            horizon = (i + 1) * math.log(i + 2) if self.any_time else n
            stakes.append(math.sqrt(2.0 * self.threshold / (horizon * spread)))
        return stakes

    def log_wealth(self, f):
        """Of all bets together."""
        u, v = self.direction(f)
        values = [self.value(row, u, v) for row in self.rows]
        assert min(values) >= -1.0 - 1e-12
        total = 0.0
        for cap, weight in CAPS:
            logs = (math.log1p(min(s, cap) * w) for s, w in zip(self.stakes, values, strict=True))
            total += weight * math.exp(min(math.fsum(logs), 700.0))
        return math.log(total) if total > 0.0 else -math.inf

    def refuted(self, f):
        return self.log_wealth(f) >= self.threshold

"""Sums over sequences and requests, and a history whose length stays bounded."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from saelens_certify.monitor.observe import Columns
from saelens_certify.monitor.reference import STATISTICS

_LONGEST_HISTORY = 512


@dataclass(frozen=True)
class Sums:
    """Sums over measured sequences; they add up, in any order.

    Attributes:
        sequences: Sequences.
        broken: Sequences with an activation that was not finite.
        tokens: Coded tokens (of sequences that were not broken, as all that follows but ``values``).
        outside_tokens: Tokens with an active feature outside the pool.
        active: Active features.
        error: Squared error per token, without the first position.
        power: Squared distance from the calibration mean per token, without the first position.
        values: The tested statistics, in the order of `STATISTICS`.
    """

    sequences: int = 0
    broken: int = 0
    tokens: int = 0
    outside_tokens: int = 0
    active: int = 0
    error: float = 0.0
    power: float = 0.0
    values: tuple[float, ...] = (0.0,) * len(STATISTICS)

    @classmethod
    def of(cls, columns: Columns, rows: NDArray[np.bool_]) -> Sums:
        """Add up some of the measured sequences."""
        return cls(
            sequences=int(rows.sum()),
            broken=int(columns.broken[rows].sum()),
            tokens=int(columns.tokens[rows].sum()),
            outside_tokens=int(columns.outside_tokens[rows].sum()),
            active=int(columns.active[rows].sum()),
            error=float(columns.error[rows].sum()),
            power=float(columns.power[rows].sum()),
            values=tuple(columns.values[rows].sum(axis=0).tolist()),
        )

    def __add__(self, other: Sums) -> Sums:
        mine, theirs = vars(self), vars(other)
        added = {k: mine[k] + theirs[k] for k in mine if k != "values"}
        values = tuple(a + b for a, b in zip(self.values, other.values, strict=True))
        return Sums(**added, values=values)

    def mean(self, statistic: str) -> float:
        """Mean of a tested statistic; 0 where nothing was measured."""
        return self.values[STATISTICS.index(statistic)] / max(1, self.sequences)

    @property
    def violating(self) -> int:
        """Sequences that violate the pool; broken ones count."""
        return round(self.values[0])

    @property
    def relative_error(self) -> float:
        """Squared error over the activation's power, 1 - explained variance; 0 without tokens."""
        return self.error / self.power if self.power > 0 else 0.0

    @property
    def outside_share(self) -> float:
        """Share of tokens with an active feature outside the pool."""
        return self.outside_tokens / max(1, self.tokens)

    @property
    def l0(self) -> float:
        """Active features per token."""
        return self.active / max(1, self.tokens)


@dataclass(frozen=True)
class Request:
    """One forward.

    Attributes:
        number: Counted from 0 over the monitor's life.
        sequences: Sequences in it.
        tokens: Real tokens in it.
        late_tokens: Those after the first L of their sequence: counted, not measured.
        tested: Sums over the measured sequences of at least L tokens.
        short: Sums over the measured sequences of fewer: not tested.
        without_bos: Sequences that do not begin as the certified ones; None where tokens are unknown.
        unread: Tested sequences whose special tokens inside were not left out, as certified, because
            the request came without its tokens.
        log_e: Logarithm of the combined e-value after it.
    """

    number: int
    sequences: int
    tokens: int
    late_tokens: int
    tested: Sums = field(default_factory=Sums)
    short: Sums = field(default_factory=Sums)
    without_bos: int | None = None
    unread: int = 0
    log_e: float = 0.0


@dataclass(frozen=True)
class Totals:
    """Counts over all requests.

    Attributes:
        requests: First forwards of requests.
        sequences: Their sequences.
        tokens: Their real tokens.
        late_tokens: Those after the first L of their sequence.
        continuations: Forwards that continue a request, as in generation with a cache.
        continued_tokens: Their tokens.
        without_bos: Sequences known not to begin as the certified ones.
        unread: Tested sequences in which special tokens may have been coded, unlike in certification.
        errors: Observations that failed.
        tested: Sums over tested sequences.
        short: Sums over measured sequences of fewer than L tokens.
    """

    requests: int = 0
    sequences: int = 0
    tokens: int = 0
    late_tokens: int = 0
    continuations: int = 0
    continued_tokens: int = 0
    without_bos: int = 0
    unread: int = 0
    errors: int = 0
    tested: Sums = field(default_factory=Sums)
    short: Sums = field(default_factory=Sums)

    def plus(self, request: Request) -> Totals:
        """Count a request."""
        return dataclasses.replace(
            self,
            requests=self.requests + 1,
            sequences=self.sequences + request.sequences,
            tokens=self.tokens + request.tokens,
            late_tokens=self.late_tokens + request.late_tokens,
            without_bos=self.without_bos + (request.without_bos or 0),
            unread=self.unread + request.unread,
            tested=self.tested + request.tested,
            short=self.short + request.short,
        )


@dataclass(frozen=True)
class Span:
    """Some consecutive requests in the history.

    Attributes:
        end: Sequences tested up to its end.
        tested: Sums over its tested sequences.
        log_e: Largest logarithm of the combined e-value in it.
    """

    end: int
    tested: Sums
    log_e: float


@dataclass(frozen=True)
class History:
    """The whole past in at most 512 spans: when there are more, neighbours are joined.

    Attributes:
        spans: Oldest first.
        width: Tested sequences after which a span is full.
    """

    spans: tuple[Span, ...] = ()
    width: int = 1

    def plus(self, tested: Sums, end: int, log_e: float) -> History:
        """Append a request."""
        if not tested.sequences:
            return self
        new = Span(end, tested, log_e)
        spans = self.spans
        if spans and spans[-1].tested.sequences < self.width:
            return History((*spans[:-1], _joined(spans[-1], new)), self.width)
        if len(spans) < _LONGEST_HISTORY:
            return History((*spans, new), self.width)
        pairs = tuple(_joined(a, b) for a, b in zip(spans[::2], spans[1::2], strict=True))
        return History((*pairs, new), 2 * self.width)


def _joined(a: Span, b: Span) -> Span:
    return Span(b.end, a.tested + b.tested, max(a.log_e, b.log_e))

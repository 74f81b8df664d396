"""All that a monitor remembers, as one immutable value: readers need no lock, writers swap it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from saelens_certify.monitor.reference import FloatArray
from saelens_certify.monitor.sequential import SequentialTest
from saelens_certify.monitor.tally import History, Request, Span, Sums, Totals

_KEPT_ERRORS = 10


@dataclass(frozen=True)
class State:
    """What has been seen so far.

    Attributes:
        test: The sequential test.
        totals: Counts over all requests.
        history: The whole past, coarsely.
        recent: The latest requests, oldest first.
        errors: The latest messages of observations that failed, oldest first.
    """

    test: SequentialTest
    totals: Totals = field(default_factory=Totals)
    history: History = field(default_factory=History)
    recent: tuple[Request, ...] = ()
    errors: tuple[str, ...] = ()

    def after(self, request: Request, values: FloatArray, time: float, window: int) -> State:
        """Count and test a request.

        Args:
            request: What was measured.
            values: The statistics of its tested sequences.
            time: Seconds since the epoch, for alarms.
            window: How many recent requests to keep.
        """
        test = self.test.after(values, request.number, time)
        request = dataclasses.replace(request, log_e=test.combined)
        return dataclasses.replace(
            self,
            test=test,
            totals=self.totals.plus(request),
            history=self.history.plus(request.tested, test.n, test.combined),
            recent=(*self.recent, request)[-window:],
        )

    def continued(self, tokens: int) -> State:
        """Count a forward that continues a request."""
        totals = dataclasses.replace(
            self.totals,
            continuations=self.totals.continuations + 1,
            continued_tokens=self.totals.continued_tokens + tokens,
        )
        return dataclasses.replace(self, totals=totals)

    def failed(self, message: str) -> State:
        """Count an observation that failed."""
        totals = dataclasses.replace(self.totals, errors=self.totals.errors + 1)
        return dataclasses.replace(
            self, totals=totals, errors=(*self.errors, message)[-_KEPT_ERRORS:]
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "test": self.test.to_dict(),
            "totals": dataclasses.asdict(self.totals),
            "history": dataclasses.asdict(self.history),
            "recent": [dataclasses.asdict(request) for request in self.recent],
            "errors": list(self.errors),
        }

    def restored(self, state: dict[str, Any]) -> State:
        """Return the state that `to_dict` wrote, with this state's reference."""
        totals, history = state["totals"], state["history"]
        spans = (Span(**{**span, "tested": _sums(span["tested"])}) for span in history["spans"])
        return State(
            test=self.test.restored(state["test"]),
            totals=Totals(**_with_sums(totals)),
            history=History(tuple(spans), history["width"]),
            recent=tuple(Request(**_with_sums(request)) for request in state["recent"]),
            errors=tuple(state["errors"]),
        )


def _with_sums(values: dict[str, Any]) -> dict[str, Any]:
    return {**values, "tested": _sums(values["tested"]), "short": _sums(values["short"])}


def _sums(values: dict[str, Any]) -> Sums:
    return Sums(**{**values, "values": tuple(values["values"])})

"""The sequential test: has the stream left what was certified?

*Null hypothesis.* The tested sequences are independent draws from the distribution of the certificate's
evaluation sequences, and which sequences are tested, and when, does not depend on what they contain. It
may be weakened: enough that, given all earlier ones, each statistic of the next tested sequence has a
mean of at most its certified expectation. Streams that are easier than certified, and streams whose
sequences depend on each other without being harder, are therefore no cause for alarm.

*Guarantee.* The reference bounds hold with probability at least 1 - false_alarm / 2 over the evaluation
sequences (`reference`). Where they hold, the average of the e-processes of all statistics is an
e-process (`wealth`), and reaches 2 / false_alarm with probability at most false_alarm / 2 (Ville). So under the null
the alarm is raised, at any time however long the stream, with probability at most false_alarm.

A test of exchangeability between evidence and stream (ranks, conformal p-values) would need no reference
bounds and would spend all of false_alarm on the stream. It is not used, because it rejects whatever is not
exchangeable: a burst of similar requests, or text that is easier than certified. Its advantage is small: with
N sequences of evidence, both see a violation rate of some multiple of 1/N after few violations where none
was seen in the evidence, and a shift of some multiple of 1/sqrt(N) otherwise.

*e-detector.* With a run length r, a second alarm watches the latest past only, and begins anew after each
alarm. Where the reference bounds hold, r tested sequences or more pass on average before it
is false. Over an unlimited time it will be false at some time.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from saelens_certify.monitor.reference import STATISTICS, Reference
from saelens_certify.monitor.wealth import FloatArray, Wealth, check_values, log_mean_exp

AlarmKind = Literal["left", "recent"]


@dataclass(frozen=True)
class Alarm:
    """The stream has left what was certified.

    Attributes:
        kind: ``"left"``: the test with the false-alarm probability. ``"recent"``: the e-detector.
        tested: Sequences tested until then, this one included.
        statistic: The statistic with the strongest evidence.
        log_e: Logarithm of the e-value (of the e-detector's sum).
        request: Number of the request.
        time: Seconds since the epoch.
    """

    kind: AlarmKind
    tested: int
    statistic: str
    log_e: float
    request: int
    time: float


@dataclass(frozen=True)
class SequentialTest:
    """The state of the test; `after` returns the next one.

    Attributes:
        reference: Bounds from the certificate's evidence.
        log_threshold: The e-process raises the alarm here.
        log_run_length: The e-detector raises its alarm here; None: there is none.
        process: The e-process.
        detector: The e-detector.
        log_e: Logarithm of each statistic's e-value.
        log_e_max: Largest logarithm of the combined e-value so far.
        alarms: All alarms: at most one ``"left"``, and the latest of the others.
    """

    reference: Reference
    log_threshold: float
    log_run_length: float | None
    process: Wealth
    detector: Wealth
    log_e: tuple[float, ...] = (0.0,) * len(STATISTICS)
    log_e_max: float = 0.0
    alarms: tuple[Alarm, ...] = ()

    @classmethod
    def start(
        cls, values: FloatArray, false_alarm: float, run_length: float | None = None
    ) -> SequentialTest:
        """Begin a test against evidence.

        Args:
            values: `sequence_values` of the evidence.
            false_alarm: Largest probability of a false alarm; half of it is for the reference.
            run_length: Average number of tested sequences until a false alarm of the e-detector.
        """
        return cls(
            reference=Reference.from_values(values, false_alarm / 2),
            log_threshold=math.log(2 / false_alarm),
            log_run_length=None if run_length is None else math.log(run_length),
            process=Wealth.start(len(STATISTICS)),
            detector=Wealth.start(len(STATISTICS), renewed=True),
        )

    @property
    def combined(self) -> float:
        """Logarithm of the average e-value."""
        return float(log_mean_exp(np.array(self.log_e), (0,)))

    @property
    def n(self) -> int:
        """Sequences tested."""
        return self.process.n

    def after(self, values: FloatArray, request: int = 0, time: float = 0.0) -> SequentialTest:
        """Test further sequences.

        Args:
            values: `sequence_values` of the sequences, in their order.
            request: Number of the request that they belong to, for the record.
            time: Seconds since the epoch, for the record.
        """
        if not len(values):
            return self
        check_values(values)
        bounds = np.array(self.reference.bounds)
        process, log_e = self.process.after(values, bounds)
        combined = log_mean_exp(log_e, (1,))
        alarms = self.alarms
        over = np.flatnonzero(combined >= self.log_threshold)
        if len(over) and not any(alarm.kind == "left" for alarm in alarms):
            first = int(over[0])
            alarms += (_alarm("left", self.n + first + 1, log_e[first], request, time),)
        detector, alarms = self._detect(values, bounds, alarms, request, time)
        return dataclasses.replace(
            self,
            process=process,
            detector=detector,
            log_e=tuple(log_e[-1].tolist()),
            log_e_max=max(self.log_e_max, float(combined.max())),
            alarms=alarms,
        )

    def _detect(
        self,
        values: FloatArray,
        bounds: FloatArray,
        alarms: tuple[Alarm, ...],
        request: int,
        time: float,
    ) -> tuple[Wealth, tuple[Alarm, ...]]:
        detector, done = self.detector, 0
        while self.log_run_length is not None and done < len(values):
            # A few at a time: what follows an alarm is computed again.
            part = values[done : done + _DETECTED_TOGETHER]
            moved, log_sums = detector.after(part, bounds)
            over = np.flatnonzero(log_mean_exp(log_sums, (1,)) >= self.log_run_length)
            if not len(over):
                detector, done = moved, done + len(part)
                continue
            first = int(over[0])
            done += first + 1
            alarm = _alarm("recent", self.n + done, log_sums[first], request, time)
            alarms = _keep_latest((*alarms, alarm))
            detector = Wealth.start(len(STATISTICS), renewed=True)
        return detector, alarms

    def restarted(self) -> SequentialTest:
        """Return the test as it began, with the same reference."""
        return dataclasses.replace(
            self,
            process=Wealth.start(len(STATISTICS)),
            detector=Wealth.start(len(STATISTICS), renewed=True),
            log_e=(0.0,) * len(STATISTICS),
            log_e_max=0.0,
            alarms=(),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the state as plain JSON values."""
        return {
            "reference": dataclasses.asdict(self.reference),
            "log_threshold": self.log_threshold,
            "log_run_length": self.log_run_length,
            "process": _wealth_to_dict(self.process),
            "detector": _wealth_to_dict(self.detector),
            "log_e": list(self.log_e),
            "log_e_max": self.log_e_max,
            "alarms": [dataclasses.asdict(alarm) for alarm in self.alarms],
        }

    def restored(self, state: dict[str, Any]) -> SequentialTest:
        """Return this test with the wealth and alarms of a stored state."""
        return dataclasses.replace(
            self,
            process=_wealth_from_dict(state["process"], renewed=False),
            detector=_wealth_from_dict(state["detector"], renewed=True),
            log_e=tuple(float(value) for value in state["log_e"]),
            log_e_max=float(state["log_e_max"]),
            alarms=tuple(Alarm(**alarm) for alarm in state["alarms"]),
        )


_KEPT_ALARMS = 100
_DETECTED_TOGETHER = 128


def _keep_latest(alarms: tuple[Alarm, ...]) -> tuple[Alarm, ...]:
    """Drop the oldest alarm of the e-detector when there are many; ``"left"`` stays."""
    if len(alarms) <= _KEPT_ALARMS:
        return alarms
    oldest = next(alarm for alarm in alarms if alarm.kind == "recent")
    return tuple(alarm for alarm in alarms if alarm is not oldest)


def _alarm(kind: AlarmKind, tested: int, log_e: FloatArray, request: int, time: float) -> Alarm:
    return Alarm(
        kind=kind,
        tested=tested,
        statistic=STATISTICS[int(np.argmax(log_e))],
        log_e=float(log_mean_exp(log_e, (0,))),
        request=request,
        time=time,
    )


def _wealth_to_dict(wealth: Wealth) -> dict[str, Any]:
    """JSON has no infinity: a bet that has not begun is null."""
    rows = [[v if math.isfinite(v) else None for v in row] for row in wealth.log_bet.tolist()]
    return {"log_bet": rows, "n": wealth.n}


def _wealth_from_dict(state: dict[str, Any], renewed: bool) -> Wealth:
    rows = [[-math.inf if v is None else float(v) for v in row] for row in state["log_bet"]]
    return Wealth(np.array(rows), int(state["n"]), renewed)

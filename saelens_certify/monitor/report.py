"""What a monitor has seen, for people and for dashboards."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from saelens_certify.certificate import Certificate
from saelens_certify.monitor.reference import STATISTICS
from saelens_certify.monitor.sequential import Alarm
from saelens_certify.monitor.state import State
from saelens_certify.monitor.tally import Sums, Totals

if TYPE_CHECKING:
    import plotly.graph_objects as go

LABELS = {
    "violation": "sequences violating the pool",
    "outside": "active features outside the pool",
    "error": "relative reconstruction error",
}


@dataclass(frozen=True)
class Report:
    """A monitor at one moment.

    Attributes:
        certificate: What is monitored.
        state: All that was seen.
        settings: ``false_alarm`` and ``run_length``.
        share: Share of the sequences that are measured.
        notes: What the monitor noticed about the model.
    """

    certificate: Certificate
    state: State
    settings: dict[str, Any]
    share: float
    notes: tuple[str, ...] = ()

    @property
    def alarm(self) -> Alarm | None:
        """The alarm with the false-alarm probability, once it has been raised."""
        return next((a for a in self.state.test.alarms if a.kind == "left"), None)

    @property
    def totals(self) -> Totals:
        """Counts and sums over all requests."""
        return self.state.totals

    @property
    def recent(self) -> Sums:
        """Sums over the tested sequences of the recent requests."""
        return sum((request.tested for request in self.state.recent), Sums())

    @property
    def log10_e(self) -> float:
        """Decimal logarithm of the combined e-value."""
        return self.state.test.combined / math.log(10)

    @property
    def log10_threshold(self) -> float:
        """Decimal logarithm of the e-value that raises the alarm."""
        return self.state.test.log_threshold / math.log(10)

    def to_dict(self) -> dict[str, float]:
        """Return flat numbers for a dashboard; no measurement is NaN: what has no value is left out."""
        totals, test = self.totals, self.state.test
        flat: dict[str, float] = {
            "alarm": float(self.alarm is not None),
            "alarms_recent": float(sum(a.kind == "recent" for a in test.alarms)),
            "log10_e": self.log10_e,
            "log10_e_max": test.log_e_max / math.log(10),
            "log10_threshold": self.log10_threshold,
            "requests": totals.requests,
            "sequences": totals.sequences,
            "tokens": totals.tokens,
            "late_tokens": totals.late_tokens,
            "continuations": totals.continuations,
            "continued_tokens": totals.continued_tokens,
            "without_bos": totals.without_bos,
            "unread": totals.unread,
            "errors": totals.errors,
        }
        for name, sums in (("", totals.tested), ("recent_", self.recent), ("short_", totals.short)):
            flat |= {
                f"{name}tested" if name != "short_" else "short_measured": sums.sequences,
                f"{name}broken": sums.broken,
            }
            if sums.sequences:
                flat |= {f"{name}{statistic}": sums.mean(statistic) for statistic in STATISTICS}
            if sums.tokens:
                flat |= {
                    f"{name}outside_tokens": sums.outside_share,
                    f"{name}explained_variance": 1 - sums.relative_error,
                    f"{name}l0": sums.l0,
                }
        for i, statistic in enumerate(STATISTICS):
            flat[f"certified_{statistic}"] = test.reference.means[i]
            flat[f"bound_{statistic}"] = test.reference.bounds[i]
            flat[f"log10_e_{statistic}"] = test.log_e[i] / math.log(10)
        return flat

    def __str__(self) -> str:
        test, totals = self.state.test, self.totals
        rows: list[tuple[str, ...]] = [
            ("", "certified", "bound", "all", f"last {len(self.state.recent)}", "log10 e")
        ]
        for i, name in enumerate(STATISTICS):
            seen = (
                _percent(s.mean(name)) if s.sequences else "–" for s in (totals.tested, self.recent)
            )
            reference = (test.reference.means[i], test.reference.bounds[i])
            e = f"{test.log_e[i] / math.log(10):.1f}"
            rows.append((LABELS[name], *(_percent(v) for v in reference), *seen, e))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        table = [
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([self.verdict(), "", *table, "", *self._counts(), *self._remarks()])

    def verdict(self) -> str:
        """Return the state of the test in one sentence."""
        n, false_alarm = self.state.test.n, self.settings["false_alarm"]
        alarm = self.alarm
        if alarm is not None:
            return (
                f"ALARM after {alarm.tested:,} tested sequences: the stream has left what was certified "
                f"({LABELS[alarm.statistic]}). A stream that had not would ever raise an alarm with "
                f"probability {false_alarm:g} at most."
            )
        return (
            f"No alarm in {n:,} tested sequences: e-value 10^{self.log10_e:.1f}, an alarm is raised at "
            f"10^{self.log10_threshold:.1f} (false with probability {false_alarm:g} at most, however "
            "long the stream)."
        )

    def figure(self) -> go.Figure:
        """Draw violations, error and e-value over time; see `monitor_figure`."""
        from saelens_certify.monitor.figure import monitor_figure

        return monitor_figure(self)

    def _counts(self) -> list[str]:
        totals, tested, length = self.totals, self.totals.tested, self.certificate.config.seq_len
        lines = [
            f"{totals.requests:,} requests, {totals.sequences:,} sequences, {totals.tokens:,} tokens; "
            f"{tested.sequences:,} sequences tested (their first {length} tokens"
            + ("" if self.share == 1 else f"; a random share of {self.share:.3g} is measured")
            + ")"
        ]
        if tested.tokens:
            lines.append(
                f"tokens with a feature outside the pool: {_percent(tested.outside_share)}; "
                f"explained variance {1 - tested.relative_error:.4f} (certified "
                f"{self.certificate.explained_variance(first=False):.4f}); active features per token "
                f"{tested.l0:.1f} (certified {self.certificate.column('l0').mean():.1f})"
            )
        recent = [alarm for alarm in self.state.test.alarms if alarm.kind == "recent"]
        if recent:
            lines.append(
                f"alarms of the recent past: {len(recent)}, the last after {recent[-1].tested:,} tested "
                f"sequences ({LABELS[recent[-1].statistic]})"
            )
        return lines

    def _remarks(self) -> list[str]:
        totals, length = self.totals, self.certificate.config.seq_len
        short = totals.short
        remarks = {
            f"not tested: {short.sequences:,} measured sequences of fewer than {length} tokens, "
            f"{_percent(short.mean('violation'))} violate the pool, explained variance "
            f"{1 - short.relative_error:.4f}": short.sequences,
            f"not measured: {totals.late_tokens:,} tokens after the first {length} of their sequence, "
            f"{totals.continued_tokens:,} of {totals.continuations:,} continuations": (
                totals.late_tokens + totals.continued_tokens
            ),
            f"{totals.tested.broken + short.broken:,} sequences with NaN or infinite activations": (
                totals.tested.broken + short.broken
            ),
            f"{totals.without_bos:,} sequences do not begin as the certified ones": totals.without_bos,
            f"{totals.unread:,} tested sequences came without their tokens: special ones inside them were "
            "coded, unlike in certification, and the false-alarm probability is about streams "
            "without such; give monitor.request(tokens)": totals.unread,
            f"{totals.errors:,} observations failed, the last with "
            f"{self.state.errors[-1] if self.state.errors else ''}": totals.errors,
        }
        return [text for text, count in remarks.items() if count] + list(self.notes)


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"

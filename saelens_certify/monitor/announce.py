"""Who is told of an alarm: nobody's failure keeps it from the log."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import numpy as np

from saelens_certify.monitor.sequential import Alarm

_LOGGER = logging.getLogger("saelens_certify.monitor")


def log_alarm(alarm: Alarm) -> None:
    """Write an alarm to the log ``saelens_certify.monitor`` as a warning."""
    _LOGGER.warning(
        "the stream has left what was certified (%s): %s, after %d tested sequences, e-value %.3g",
        alarm.kind,
        alarm.statistic,
        alarm.tested,
        np.exp(min(alarm.log_e, 700.0)),
    )


def announce(alarms: Iterable[Alarm], callback: Callable[[Alarm], None] | None) -> None:
    """Tell of alarms.

    Args:
        alarms: New alarms.
        callback: Who is told; None: the log.

    Raises:
        Exception: What the callback raised first, after every alarm has been told or logged.
    """
    failed: Exception | None = None
    for alarm in alarms:
        try:
            (callback or log_alarm)(alarm)
        except Exception as error:
            log_alarm(alarm)
            failed = failed or error
    if failed is not None:
        raise failed

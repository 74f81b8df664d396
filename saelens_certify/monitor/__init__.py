"""Following a certified SAE in use: has the stream left what was certified?

- ``wealth``, ``reference``, ``sequential``: the statistics, with statements and proofs (NumPy only).
- ``sampling``, ``observe``: what is measured of a forward.
- ``tally``, ``state``, ``storage``: what is remembered.
- ``monitor``, ``checks``, ``announce``: the face. ``report``, ``figure``: what comes out.
"""

from saelens_certify.monitor.announce import log_alarm
from saelens_certify.monitor.monitor import Monitor
from saelens_certify.monitor.report import Report
from saelens_certify.monitor.sequential import Alarm
from saelens_certify.monitor.tally import Request, Sums, Totals

__all__ = ["Alarm", "Monitor", "Report", "Request", "Sums", "Totals", "log_alarm"]

"""What an experiment leaves behind: a table, what it says, a picture, and the certificates behind them."""

from __future__ import annotations

import csv
import io
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go

from saelens_certify.certificate import Certificate
from saelens_certify.errors import CertifyError
from saelens_certify.report import write_picture
from saelens_certify.storage import dump_json, write_atomically

Row = dict[str, str | int | float | bool | None]
"""One row of a table of results; None: not available."""


@dataclass(frozen=True, eq=False, repr=False)
class Experiment:
    """The result of an experiment.

    Attributes:
        kind: Which experiment, e.g. ``"layer_sweep"``; names the files.
        title: The same for people.
        certificates: By setting; each is a run of its own that `verify` takes. Empty where there are none.
        rows: The table of results, the same keys in all rows.
        findings: What the rows say, in sentences made from them.
        figure: The picture.
    """

    kind: str
    title: str
    certificates: Mapping[str, Certificate]
    rows: tuple[Row, ...]
    findings: tuple[str, ...]
    figure: go.Figure

    def __repr__(self) -> str:
        return f"<Experiment {self.kind}: {' '.join(self.findings)}>"

    def save(self, folder: str | Path) -> None:
        """Write ``<kind>.csv``, ``<kind>.json``, ``<kind>.html`` and, where images can be exported, ``<kind>.png``.

        Args:
            folder: The folder; made if missing.

        Raises:
            CertifyError: If the folder cannot be made.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CertifyError(f"output folder {str(folder)!r} cannot be made: {error}") from None
        plain = [{key: _plain(value) for key, value in row.items()} for row in self.rows]
        result = {"kind": self.kind, "title": self.title, "findings": list(self.findings)}
        write_atomically(folder / f"{self.kind}.json", dump_json({**result, "rows": plain}))
        write_atomically(folder / f"{self.kind}.csv", _csv(plain))
        page = self.figure.to_html(full_html=True, include_plotlyjs=True)
        write_atomically(folder / f"{self.kind}.html", page.encode())
        try:
            write_picture(self.figure, folder / f"{self.kind}.png")
        except CertifyError as error:
            warnings.warn(f"{self.kind}.png was not written: {error}", stacklevel=2)


def _plain(value: str | int | float | bool | None) -> str | int | float | bool | None:
    """JSON has neither infinities nor NaN: both are null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv(rows: list[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()

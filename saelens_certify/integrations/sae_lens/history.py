"""Certificates over the steps of a training run: in memory, as JSON lines, as a picture."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from saelens_certify.errors import CertifyError


@dataclass(frozen=True)
class Record:
    """One certificate of a run.

    Attributes:
        step: Optimizer steps done; None where SAELens did not say (its own evaluations).
        samples: Activations trained on; None likewise.
        name: The SAE's name in a run of several, else its hook.
        metrics: The flat numbers of `Certificate.to_metrics`; empty if there is no certificate.
        refused: Why there is no certificate.
        seconds: What it took.
        run: The evaluator it is from; tells runs in one file apart.
    """

    step: int | None
    samples: int | None
    name: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    refused: str | None = None
    seconds: float = 0.0
    run: str | None = None


class History:
    """The records of a run, in order.

    Args:
        path: A file to append each record to as one line of JSON, at once; None keeps them in memory only.

    Attributes:
        run: Name for the records made from now on: the time in UTC and some digits of chance.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.records: list[Record] = []
        # From the system, not from the random generators of the training run.
        self.run = f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}-{os.urandom(3).hex()}"
        if self.path is not None:
            if self.path.is_dir():
                raise CertifyError(f"log={str(path)!r} is a folder; give a file, e.g. 'run.jsonl'")
            self.path.parent.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]

    def add(self, record: Record) -> None:
        """Keep a record and write its line; what is not finite is written as null.

        Raises:
            OSError: If the line cannot be written. The record is kept nevertheless.
        """
        self.records.append(record)
        if self.path is None:
            return
        written = asdict(record)
        written["metrics"] = {
            key: value if math.isfinite(value) else None for key, value in record.metrics.items()
        }
        line = json.dumps(written, allow_nan=False) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def series(
        self, key: str, name: str | None = None, run: str | None = None
    ) -> list[tuple[int | None, float]]:
        """One number over the steps, e.g. ``series("sharp_betting")``, of one SAE or of all, one run or all."""
        return [
            (record.step, record.metrics[key])
            for record in self.records
            if key in record.metrics and name in (None, record.name) and run in (None, record.run)
        ]

    def figure(self, name: str | None = None, run: str | None = None) -> Any:
        """Bound, gap and baselines over the steps as a plotly figure.

        Args:
            name: The SAE to show, in a run of several; the first by default.
            run: The run to show, of a file with several; the newest by default.
        """
        import plotly.graph_objects as go

        run = run or next((record.run for record in reversed(self.records)), None)
        name = name or next((r.name for r in self.records if run in (None, r.run)), None)
        shown = {
            "sharp_betting": ("sharp bound", "#1f5fa8", None),
            "u_sae": ("U_SAE", "#8fb3d9", None),
            "risk_pool": ("proxy risk", "#d1742b", None),
            "risk_base": ("risk of the model", "#3d3d3d", None),
            "gap": ("reconstruction gap", "#7a4ea3", None),
            "baseline_unigram": ("unigram", "#8a8a8a", "dot"),
            "baseline_uniform": ("uniform", "#8a8a8a", "dash"),
        }
        figure = go.Figure()
        for key, (label, colour, dash) in shown.items():
            points = self.series(key, name, run)
            steps = [step if step is not None else i for i, (step, _) in enumerate(points)]
            figure.add_scatter(
                x=steps,
                y=[value for _, value in points],
                name=label,
                mode="lines+markers" if dash is None else "lines",
                line={"color": colour, "dash": dash},
            )
        figure.update_layout(
            title=f"Certificate while training: {name}",
            template="plotly_white",
            xaxis_title="training step",
            yaxis_title="bits per token",
            yaxis_rangemode="tozero",
        )
        return figure

    @classmethod
    def load(cls, path: str | Path) -> History:
        """Read a file of records; the result keeps them in memory and appends nothing.

        Raises:
            CertifyError: If a line is no record.
        """
        history = cls()
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
            try:
                record = Record(**json.loads(line))
                # The opposite of `add`: a number that was not finite is not a number.
                metrics = {k: math.nan if v is None else v for k, v in record.metrics.items()}
                history.records.append(replace(record, metrics=metrics))
            except (AttributeError, TypeError, ValueError) as error:
                raise CertifyError(
                    f"{path}, line {number} is no record of a run: {error}"
                ) from None
        return history

"""A monitor's past as one picture: violations, error and e-value over the tested sequences."""

from __future__ import annotations

import math

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from saelens_certify.monitor.reference import STATISTICS
from saelens_certify.monitor.report import LABELS, Report

_COLOURS = {"violation": "#ccbb44", "outside": "#aa3377", "error": "#ee6677", "e": "#4477aa"}


def monitor_figure(report: Report) -> go.Figure:
    """Draw what a monitor has seen.

    Args:
        report: The report.

    Returns:
        From the top: share of violating sequences and share of active features outside the pool;
        relative reconstruction error; e-value. Dashed: certified bounds and the alarm's threshold.
        Vertical: alarms.
    """
    spans = report.state.history.spans
    figure = make_subplots(
        rows=3, shared_xaxes=True, vertical_spacing=0.07, row_heights=[0.3, 0.3, 0.4]
    )
    x = [span.end for span in spans]
    for i, statistic in enumerate(STATISTICS):
        row = 2 if statistic == "error" else 1
        figure.add_trace(
            go.Scatter(
                x=x,
                y=[span.tested.mean(statistic) for span in spans],
                name=LABELS[statistic],
                mode="lines",
                line={"color": _COLOURS[statistic], "width": 1.5},
            ),
            row=row,
            col=1,
        )
        figure.add_hline(
            y=report.state.test.reference.bounds[i],
            line={"dash": "dash", "width": 1, "color": _COLOURS[statistic]},
            opacity=1,
            row=row,  # pyright: ignore[reportArgumentType]
            col=1,  # pyright: ignore[reportArgumentType]
        )
    figure.add_trace(
        go.Scatter(
            x=x,
            y=[span.log_e / math.log(10) for span in spans],
            name="e-value",
            mode="lines",
            line={"color": _COLOURS["e"], "width": 2},
        ),
        row=3,
        col=1,
    )
    figure.add_hline(
        y=report.log10_threshold,
        line={"dash": "dash", "width": 1, "color": "black"},
        opacity=1,
        annotation_text="alarm",
        row=3,  # pyright: ignore[reportArgumentType]
        col=1,  # pyright: ignore[reportArgumentType]
    )
    for alarm in report.state.test.alarms:
        figure.add_vline(
            x=alarm.tested,
            line={"width": 1.5 if alarm.kind == "left" else 0.5, "color": "black"},
            opacity=1,
        )
    figure.update_yaxes(title="share", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title="relative error", rangemode="tozero", row=2, col=1)
    figure.update_yaxes(title="log10 e-value", row=3, col=1)
    figure.update_xaxes(title="tested sequences", row=3, col=1)
    identity = report.certificate.manifest["identity"]
    figure.update_layout(
        title=f"SAE at {identity['hook_out']} in use: {report.state.test.n:,} tested sequences",
        template="simple_white",
        width=900,
        height=640,
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        margin={"t": 90, "b": 60, "l": 80},
    )
    return figure

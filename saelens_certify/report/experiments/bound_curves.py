"""Bounds against the number of sequences as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from saelens_certify.report.terms import bound_label

_LINES: dict[str, tuple[str, dict[str, Any]]] = {
    "u_sae_occam": (bound_label("u_sae_occam"), {"color": "#5c5c5c", "width": 2.5}),
    "u_sae": (bound_label("u_sae"), {"color": "#8c8c8c", "width": 2.5}),
    "sharp_betting_any_time": (
        f"{bound_label('sharp_betting')}, all N at once",
        {"color": "#228833", "width": 2.5},
    ),
    "direct_base": (bound_label("direct_base"), {"color": "#4477aa", "width": 1.5, "dash": "dot"}),
}


def bound_curves_figure(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Draw bounds against the number of sequences.

    Args:
        rows: Of `saelens_certify.experiments.bound_curves.bound_curve_rows`.

    Returns:
        One panel for each certificate, with log2 V as a dashed line. A ring marks where a published bound is first below
        it, which is descriptive; a disc where the time-uniform one is, which is valid.
    """
    names = list(dict.fromkeys(str(row["name"]) for row in rows))
    figure = make_subplots(
        cols=len(names), subplot_titles=names, horizontal_spacing=min(0.07, 0.3 / len(names))
    )
    for column, name in enumerate(names, start=1):
        _add_panel(figure, [row for row in rows if row["name"] == name], column)
    ticks = _round_numbers(min(row["n"] for row in rows), max(row["n"] for row in rows))
    figure.update_xaxes(
        title="sequences N", type="log", tickvals=ticks, ticktext=[f"{n:,}" for n in ticks]
    )
    figure.update_yaxes(rangemode="tozero")
    figure.update_yaxes(title="bits per token", col=1)
    figure.update_layout(
        title="Bounds on the model's expected loss against the number of sequences",
        template="simple_white",
        width=max(620, 420 * len(names)),
        height=470,
        legend={"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"},
        margin={"t": 90, "b": 110, "l": 70, "r": 30},
    )
    return figure


def _add_panel(figure: go.Figure, rows: Sequence[Mapping[str, Any]], column: int) -> None:
    uniform = rows[0]["uniform"]
    for key, (label, line) in _LINES.items():
        figure.add_trace(
            go.Scatter(
                x=[row["n"] for row in rows],
                y=[row[key] for row in rows],
                name=label,
                legendgroup=key,
                showlegend=column == 1,
                mode="lines+markers",
                marker={"size": 5},
                line=line,
                hovertemplate="N = %{x}: %{y:.3f} bits<extra>" + label + "</extra>",
            ),
            row=1,
            col=column,
        )
        below = [row for row in rows if row[key] < uniform]
        if below and key != "direct_base":
            symbol = "circle" if key.endswith("_any_time") else "circle-open"
            figure.add_trace(
                go.Scatter(
                    x=[below[0]["n"]],
                    y=[below[0][key]],
                    mode="markers",
                    marker={"size": 14, "symbol": symbol, "color": line["color"], "opacity": 1, "line": {"width": 2.5}},
                    showlegend=False,
                    hoverinfo="skip",
                ),
                row=1,
                col=column,
            )  # fmt: skip
    figure.add_trace(
        go.Scatter(
            x=[rows[0]["n"], rows[-1]["n"]],
            y=[uniform, uniform],
            name="uniform guess (log₂ V)",
            legendgroup="uniform",
            showlegend=column == 1,
            mode="lines",
            line={"dash": "dash", "width": 1.5, "color": "black"},
        ),
        row=1,
        col=column,
    )


def _round_numbers(low: float, high: float) -> list[int]:
    """1, 2 and 5 times powers of ten within an interval, and its ends if there are fewer than two."""
    found = [
        digit * 10**power
        for power in range(int(math.log10(high)) + 1)
        for digit in (1, 2, 5)
        if low <= digit * 10**power <= high
    ]
    return found if len(found) > 1 else sorted({int(low), int(high)})

"""Accuracy on downstream tasks as a picture: of M, S∘M and h_G, and what is lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from saelens_certify.rounding import percent

_NAMES = {"base": "M", "sae": "S∘M", "pool": "h_G"}
_COLOURS = {"base": "#4477aa", "sae": "#ee6677", "pool": "#ccbb44"}
_BAR = 0.26


def tasks_figure(rows: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Draw the rows of `downstream_tasks`.

    Args:
        rows: What `task_rows` returned.

    Returns:
        Left: accuracy of M, S∘M and h_G by task, with that of guessing as a dashed line. Right: drops against M
        with their intervals.
    """
    figure = make_subplots(cols=2, column_widths=[0.55, 0.45], horizontal_spacing=0.11)
    places = list(range(len(rows)))
    for offset, (proxy, name) in zip((-_BAR, 0.0, _BAR), _NAMES.items(), strict=True):
        accuracies = [100 * row[f"acc_{proxy}"] for row in rows]
        figure.add_trace(
            go.Bar(
                x=[place + offset for place in places], y=accuracies, width=_BAR, name=name,
                marker_color=_COLOURS[proxy], text=[f"{value:.1f}" for value in accuracies],
                textposition="outside", textfont_size=11, cliponaxis=False, legendgroup=proxy,
                hovertemplate="%{y:.2f} %<extra>" + name + "</extra>",
            ),
            row=1, col=1,
        )  # fmt: skip
    _add_chance(figure, rows)
    for offset, proxy in ((-_BAR / 2, "sae"), (_BAR / 2, "pool")):
        drops = [100 * row[f"drop_{proxy}"] for row in rows]
        figure.add_trace(
            go.Scatter(
                x=[place + offset for place in places], y=drops, mode="markers", name=_NAMES[proxy],
                marker={"color": _COLOURS[proxy], "size": 9}, legendgroup=proxy, showlegend=False,
                error_y={
                    "array": [100 * row[f"drop_{proxy}_upper"] - drop for row, drop in zip(rows, drops, strict=True)],
                    "arrayminus": [drop - 100 * row[f"drop_{proxy}_lower"] for row, drop in zip(rows, drops, strict=True)],
                    "thickness": 1.8, "width": 5,
                },
                hovertemplate="%{y:.2f} points<extra>" + _NAMES[proxy] + "</extra>",
            ),
            row=1, col=2,
        )  # fmt: skip
    figure.add_hline(y=0, line={"color": "black", "width": 1}, row=1, col=2)  # pyright: ignore[reportArgumentType]
    ticks = {
        "tickvals": places,
        "ticktext": [f"{row['task']}<br>n = {row['n']:,}" for row in rows],
        "range": [-0.6, len(rows) - 0.4],
    }
    figure.update_xaxes(**ticks)
    metric = " / ".join(dict.fromkeys(row["metric"] for row in rows))
    highest = max(100 * row[f"acc_{proxy}"] for row in rows for proxy in _NAMES)
    figure.update_yaxes(
        title=f"accuracy ({metric}), %", range=[0, min(112.0, 1.15 * highest + 1)], row=1, col=1
    )
    confidence = percent(rows[0]["confidence"])
    figure.update_yaxes(title=f"drop against M, points ({confidence} interval each)", row=1, col=2)
    figure.update_layout(
        title="Accuracy of M, S∘M and h_G on downstream tasks",
        template="simple_white",
        barmode="overlay",
        width=max(1100, 300 + 170 * len(rows)),
        height=450,
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        margin={"t": 90, "b": 70},
    )
    return figure


def _add_chance(figure: go.Figure, rows: Sequence[Mapping[str, Any]]) -> None:
    x: list[float | None] = []
    y: list[float | None] = []
    for place, row in enumerate(rows):
        if row["chance"] is not None:
            x += [place - 1.7 * _BAR, place + 1.7 * _BAR, None]
            y += [100 * row["chance"], 100 * row["chance"], None]
    if x:
        figure.add_trace(
            go.Scatter(
                x=x, y=y, mode="lines", name="guessing",
                line={"color": "black", "dash": "dash", "width": 1.5},
                hovertemplate="%{y:.1f} %<extra>guessing</extra>",
            ),
            row=1, col=1,
        )  # fmt: skip

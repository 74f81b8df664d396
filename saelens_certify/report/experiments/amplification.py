"""Error amplification as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from saelens_certify.report.terms import sae_labels

_GROWTH, _UNDONE = "#ee6677", "#228833"


def amplification_figure(rows: Sequence[Mapping[str, Any]], title: str) -> go.Figure:
    """Draw how the divergence of each SAE grows.

    Args:
        rows: Of `saelens_certify.experiments.amplification.amplification_rows`.
        title: Of the figure.

    Returns:
        Left: KL(M || S∘M) against the number of blocks after the hook, one line for each SAE, its end
        marked. Middle: what of it is there at the hook, in the line's colour. Right: how often the blocks
        after it double it.
    """
    labels = sae_labels({str(row["name"]): str(row["hook"]) for row in rows})
    rows = [{**row, "name": labels[str(row["name"])]} for row in rows]
    names = list(labels.values())
    at = [0.9 * i / max(1, len(names) - 1) for i in range(len(names))]
    colours = dict(zip(names, map(str, sample_colorscale("Viridis", at)), strict=True))
    # Names of the SAEs stand between the first two panels.
    room = min(0.2, 0.03 + 0.006 * max(map(len, names)))
    figure = make_subplots(cols=3, column_widths=[0.42, 0.29, 0.29], horizontal_spacing=room)
    for name, colour in colours.items():
        _add_line(figure, [row for row in rows if row["name"] == name], colour)
    ends = [row for row in rows if row["horizon"] == "full"]
    local, growth = [row["local"] for row in ends], [row["growth"] for row in ends]
    _add_bars(figure, 2, names, local, list(colours.values()), "%{x:.3g}")
    _add_bars(
        figure, 3, names, growth, [_UNDONE if g < 0 else _GROWTH for g in growth], "%{x:+.2f}"
    )
    figure.update_xaxes(title="local: KL at the hook, bits per token", row=1, col=2)
    figure.update_xaxes(title="growth: log₂(KL at the end / KL at the hook)", row=1, col=3)
    figure.update_layout(
        title=title,
        template="simple_white",
        width=1150,
        height=max(430, 150 + 32 * len(names)),
        showlegend=False,
        margin={"t": 60, "b": 60, "l": 80, "r": 30},
    )
    return figure


def _add_line(figure: go.Figure, rows: Sequence[Mapping[str, Any]], colour: str) -> None:
    full = [row["horizon"] == "full" for row in rows]
    marker = {
        "size": [12 if last else 7 for last in full],
        "symbol": ["diamond" if last else "circle" for last in full],
        "opacity": 1,
    }
    figure.add_trace(
        go.Scatter(
            x=[row["blocks_after"] if last else row["horizon"] for row, last in zip(rows, full, strict=True)],
            y=[row["kl"] for row in rows],
            name=str(rows[0]["name"]),
            mode="lines+markers",
            line_color=colour,
            marker=marker,
            cliponaxis=False,
            customdata=[row["horizon"] for row in rows],
            hovertemplate="horizon %{customdata}: %{y:.4f} bits<extra>" + str(rows[0]["name"]) + "</extra>",
        ),
        row=1,
        col=1,
    )  # fmt: skip
    figure.update_xaxes(title="blocks after the hook (◆ after all of them)", row=1, col=1)
    figure.update_yaxes(
        title="KL(M ‖ S∘M), bits per token", type="log", exponentformat="none", row=1, col=1
    )


def _add_bars(
    figure: go.Figure,
    column: int,
    names: Sequence[str],
    values: Sequence[float],
    colours: Sequence[str],
    text: str,
) -> None:
    figure.add_trace(
        go.Bar(
            x=values,
            y=names,
            orientation="h",
            marker_color=colours,
            texttemplate=text,
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{y}: %{x:.4f}<extra></extra>",
        ),
        row=1,
        col=column,
    )
    low, high = min(0.0, *values), max(0.0, *values)
    room = 0.2 * ((high - low) or 1.0)
    edges = [low - room if low < 0 else 0.0, high + room if high > 0 or low == 0 else room / 4]
    figure.update_xaxes(range=edges, row=1, col=column)
    figure.update_yaxes(autorange="reversed", type="category", showticklabels=column == 2, row=1, col=column)  # fmt: skip
    figure.add_vline(x=0, line={"width": 1, "color": "black"}, row=1, col=column)  # pyright: ignore[reportArgumentType]

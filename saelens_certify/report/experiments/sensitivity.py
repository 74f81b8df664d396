"""Sensitivities as a picture: for every factor that was varied, the bounds and the terms of the published one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from saelens_certify.report.terms import bound_label, term_label

if TYPE_CHECKING:
    from saelens_certify.experiments.result import Row

_FACTORS = {
    "K": "K, features per token",
    "budget": "calibration sequences",
    "tau": "τ, calibration tokens",
    "alpha": "α, smoothing",
    "L": "L, tokens per sequence",
}
_LINES: dict[str, dict[str, Any]] = {
    "u_sae_occam": {"color": "#5c5c5c", "dash": "dash"},
    "u_sae": {"color": "#8c8c8c", "dash": "dash"},
    "sharp_occam": {"color": "#997700"},
    "sharp_betting": {"color": "#228833"},
    "sharp_measured": {"color": "#4477aa", "dash": "dot"},
    "uniform": {"color": "black", "dash": "dot", "width": 1.5},
    "unigram": {"color": "black", "dash": "dashdot", "width": 1.5},
}
_BASELINES = {"uniform": "uniform guess (log2 V)", "unigram": "unigram model, measured"}
_TERMS = {
    "risk_pool": "#4477aa",
    "gap": "#ee6677",
    "mismatch": "#ccbb44",
    "t_occ": "#5c5c5c",
    "t_eta": "#b0b0b0",
    "t_eps": "#d0d0d0",
}
_BASE = "base"


def sensitivity_figure(rows: Sequence[Row]) -> go.Figure:
    """Draw sensitivities.

    Args:
        rows: Of `sensitivity_rows`.

    Returns:
        A column for every factor that was varied, its values at equal distances, that of the base in bold. Top: bounds and
        baselines. Bottom, unless a run has no published bounds: U_SAE+Occam as the sum of its terms.
    """
    factors = [name for name in _FACTORS if any(row["factor"] == name for row in rows)]
    stacked = all(row["u_sae_occam"] is not None for row in rows)
    columns = max(1, len(factors))
    figure = make_subplots(
        rows=2 if stacked else 1,
        cols=columns,
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=0.14,
    )
    for column, factor in enumerate(factors, start=1):
        _add_factor(figure, rows, factor, column, stacked)
    for row, title in enumerate(("bounds, bits per token", "terms of U_SAE+Occam, bits"), start=1):
        if row == 1 or stacked:
            figure.update_yaxes(title=title, row=row, col=1)
    base = next(row for row in rows if row["factor"] == _BASE)
    k = "native" if base["K"] is None else f"K = {base['K']}"
    figure.update_layout(
        title={
            "text": (
                f"Sensitivities around {k}, {base['budget']:,} calibration sequences, τ = {base['tau']}, "
                f"α = {base['alpha']:g}, L = {base['L']}"
            ),
            "y": 0.985, "yanchor": "top",
        },
        template="simple_white",
        barmode="stack",
        width=max(860, 130 + 330 * columns),
        height=860 if stacked else 520,
        margin={"t": 130 if columns > 2 else 150, "b": 110, "l": 70, "r": 30},
        legend={
            "orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal", "entrywidth": 190,
        },
        legend2={
            "orientation": "h", "x": 0, "y": -0.1, "yanchor": "top", "traceorder": "normal", "entrywidth": 190,
        },
    )  # fmt: skip
    return figure


def _add_factor(
    figure: go.Figure, rows: Sequence[Row], factor: str, column: int, stacked: bool
) -> None:
    series = [row for row in rows if row["factor"] in (factor, _BASE) and row[factor] is not None]
    series.sort(key=lambda row: _number(row, factor))
    labels = [_tick(row, factor) for row in series]
    for name, style in _LINES.items():
        if any(row[name] is None for row in rows):
            continue
        label = _BASELINES.get(name) or bound_label(name)
        figure.add_trace(
            go.Scatter(
                x=labels,
                y=[row[name] for row in series],
                name=label,
                legendgroup=name,
                showlegend=column == 1,
                mode="lines" if name in _BASELINES and len(series) > 1 else "lines+markers",
                line=style,
                legend="legend",
                hovertemplate=f"%{{y:.4f}} bits<extra>{label}</extra>",
            ),
            row=1,
            col=column,
        )
    for term, colour in _TERMS.items() if stacked else ():
        label = term_label(term)
        figure.add_trace(
            go.Bar(
                x=labels,
                y=[row[term] for row in series],
                name=label,
                legendgroup=f"term {term}",
                showlegend=column == 1,
                marker_color=colour,
                legend="legend2",
                hovertemplate=f"%{{y:.4f}} bits<extra>{label}</extra>",
            ),
            row=2,
            col=column,
        )
    for row in (1, 2) if stacked else (1,):
        figure.update_xaxes(
            title=_FACTORS[factor], type="category", categoryorder="array", categoryarray=labels,
            row=row, col=column,
        )  # fmt: skip
        figure.update_yaxes(rangemode="tozero", row=row, col=column)


def _tick(row: Row, factor: str) -> str:
    text = f"{_number(row, factor):,.10g}"
    return f"<b>{text}</b>" if row["factor"] == _BASE else text


def _number(row: Row, name: str) -> float:
    value = row[name]
    assert isinstance(value, (int, float))
    return float(value)

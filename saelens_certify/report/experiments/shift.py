"""A distribution shift as a picture: what the bound is made of in each condition, and bounds by corruption rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from saelens_certify.report.terms import bound_label, term_label
from saelens_certify.rounding import rounded_up

if TYPE_CHECKING:
    from saelens_certify.experiments.result import Row

# As in the picture of a certificate: measured terms in colour, what more data shrinks in greys.
_STACKS: dict[str, dict[str, str]] = {
    "u_sae": {
        "risk_pool": "#4477aa",
        "gap": "#ee6677",
        "mismatch": "#ccbb44",
        "t_proxy": "#8c8c8c",
        "t_eta": "#b0b0b0",
        "t_eps": "#d0d0d0",
    },
    "sharp_betting": {
        "risk_pool": "#4477aa",
        "gap": "#ee6677",
        "mismatch": "#ccbb44",
        "t_sharp": "#8c8c8c",
    },
}
_LINES: dict[str, dict[str, Any]] = {
    "u_sae_occam": {"color": "#5c5c5c", "dash": "dash"},
    "u_sae": {"color": "#8c8c8c", "dash": "dash"},
    "sharp_betting": {"color": "#228833"},
    "sharp_measured": {"color": "#4477aa", "dash": "dot"},
}
_BASELINES = {"uniform": "uniform guess (log2 V)", "unigram": "unigram model, measured"}
_DASHES = {"uniform": "dot", "unigram": "dashdot"}


def shift_figure(rows: Sequence[Row]) -> go.Figure:
    """Draw a distribution shift.

    Args:
        rows: Of `shift_rows`.

    Returns:
        Left: U_SAE (or, where a run has none, the sharp bound) in each condition as the sum of its terms, with the
        baselines as dashed lines. Right, if documents were corrupted: bounds and the model's own risk by rate.
    """
    rated = [row for row in rows if row["rate"] is not None]
    curves = len(rated) > 1
    figure = make_subplots(
        cols=2 if curves else 1,
        column_widths=[0.54, 0.46] if curves else None,
        horizontal_spacing=0.09,
        subplot_titles=_titles(rows, curves),
    )
    _add_stacks(figure, rows)
    if curves:
        _add_curves(figure, rated)
    figure.update_layout(
        title=f"Distribution shift: one pool of {rows[0]['pool_size']:,} features, other evaluation documents",
        template="simple_white",
        barmode="stack",
        width=1420 if curves else 800,
        height=560,
        margin={"t": 90, "b": 110, "l": 65, "r": 200 if curves else 30},
        legend={
            "orientation": "h",
            "x": 0,
            "y": -0.17,
            "yanchor": "top",
            "traceorder": "normal",
            "entrywidth": 210,
        },
        legend2={
            "x": 1.01,
            "xanchor": "left",
            "y": 1,
            "yanchor": "top",
            "traceorder": "normal",
        },
    )
    return figure


def _titles(rows: Sequence[Row], curves: bool) -> list[str]:
    left = f"{bound_label(_stacked(rows))} and its terms"
    return [left, "bounds by corruption rate"] if curves else [left]


def _stacked(rows: Sequence[Row]) -> str:
    """The bound that is taken apart."""
    return "u_sae" if all(row["u_sae"] is not None for row in rows) else "sharp_betting"


def _add_stacks(figure: go.Figure, rows: Sequence[Row]) -> None:
    name = _stacked(rows)
    labels = [_label(row) for row in rows]
    for term, colour in _STACKS[name].items():
        label = term_label(term)
        figure.add_trace(
            go.Bar(
                x=labels,
                y=[row[f"{name}_{term}"] for row in rows],
                name=label,
                marker_color=colour,
                hovertemplate=f"%{{y:.4f}} bits<extra>{label}</extra>",
            ),
            row=1,
            col=1,
        )
    for key, label in _BASELINES.items():
        figure.add_trace(
            go.Scatter(
                x=labels,
                y=[row[key] for row in rows],
                name=label,
                mode="lines+markers",
                marker={"color": "black", "size": 5},
                line={"color": "black", "dash": _DASHES[key], "width": 1.5},
                hovertemplate=f"%{{y:.4f}} bits<extra>{label}</extra>",
            ),
            row=1,
            col=1,
        )
    for row, label in zip(rows, labels, strict=True):
        total = _number(row, name)
        figure.add_annotation(
            x=label, y=total, text=f"{rounded_up(total, 2):.2f}", showarrow=False, yanchor="bottom",
            bgcolor="white", borderpad=1, yshift=2, row=1, col=1,
        )  # fmt: skip
    figure.update_xaxes(title="evaluation documents", type="category", row=1, col=1)
    figure.update_yaxes(title="bits per token", rangemode="tozero", row=1, col=1)


def _add_curves(figure: go.Figure, rated: Sequence[Row]) -> None:
    rates = [_number(row, "rate") for row in rated]
    lines: dict[str, tuple[str, dict[str, Any]]] = {
        name: (bound_label(name), style)
        for name, style in _LINES.items()
        if all(row[name] is not None for row in rated)
    }
    lines["risk_base"] = term_label("risk_base"), {"color": "#aa3377", "width": 1.5}
    for key, label in _BASELINES.items():
        lines[key] = label, {"color": "black", "dash": _DASHES[key], "width": 1.5}
    for key, (label, style) in lines.items():
        figure.add_trace(
            go.Scatter(
                x=rates,
                y=[row[key] for row in rated],
                name=label,
                mode="lines" if key in _BASELINES else "lines+markers",
                line=style,
                legend="legend2",
                hovertemplate=f"%{{y:.4f}} bits at rate %{{x}}<extra>{label}</extra>",
            ),
            row=1,
            col=2,
        )
    figure.update_xaxes(
        title="corruption rate (share of tokens replaced)", range=[-0.02, 1.02 * max(rates)],
        row=1, col=2,
    )  # fmt: skip
    figure.update_yaxes(title="bits per token", rangemode="tozero", row=1, col=2)


def _label(row: Row) -> str:
    rate = row["rate"]
    if rate is None:
        return str(row["name"])
    return {0.0: "as they are", 1.0: "random tokens"}.get(_number(row, "rate"), f"rate {rate:g}")


def _number(row: Row, name: str) -> float:
    value = row[name]
    assert isinstance(value, (int, float))
    return float(value)

"""A layer sweep as a picture: bounds by layer, what they are made of, and bounds as they grow with N."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from saelens_certify.certificate import Certificate
from saelens_certify.curves import Curve, any_time_curves, fixed_curves
from saelens_certify.report.terms import bound_label, shortened, term_label

if TYPE_CHECKING:
    from saelens_certify.experiments.result import Row

# Published bounds dashed and grey, sharp ones in colour.
_LINES: dict[str, dict[str, Any]] = {
    "u_sae_occam": {"color": "#5c5c5c", "dash": "dash"},
    "u_sae": {"color": "#8c8c8c", "dash": "dash"},
    # Wide below narrow: where bounds coincide, all are seen.
    "sharp_occam_tau": {"color": "#aa3377", "width": 7},
    "sharp_occam": {"color": "#ccbb44", "width": 5},
    "sharp_betting": {"color": "#228833", "width": 3},
    "sharp_measured": {"color": "#66ccee", "width": 1.5},
}
_TERMS = {"risk_base": "#bbbbbb", "lost": "#4477aa", "gap": "#ee6677", "mismatch": "#ccbb44"}
_UPPER = ((0.0, 0.325), (0.58, 0.845))
_PANELS = ("u_sae_occam", "u_sae", "sharp_betting", "sharp_measured")

_MARKS = "Marks: first N below log2 V; open: found by looking, descriptive; filled: valid there"


def layers_figure(
    certificates: Mapping[str, Certificate],
    rows: Sequence[Row],
    grid: Sequence[int] | None = None,
) -> go.Figure:
    """Draw a sweep.

    Args:
        certificates: By name.
        rows: Of `layer_rows`, in the order in which SAEs are drawn.
        grid: Numbers of sequences at which fixed bounds are drawn.

    Returns:
        Top left: every bound by layer. Top right: the measured terms of U_SAE by layer, stacked: what is left of
        the bound with ever more sequences. Bottom: four bounds as functions of N, a line an SAE, with a mark where
        each is first below log2 V: filled where the bound is time-uniform and the mark valid, open where descriptive.
    """
    figure = make_subplots(
        rows=2,
        cols=4,
        specs=[[{"colspan": 2}, None, {"colspan": 2}, None], [{}, {}, {}, {}]],
        row_heights=[0.52, 0.48],
        horizontal_spacing=0.055,
        vertical_spacing=0.19,
        subplot_titles=(
            "bounds",
            "what U_SAE tends to with ever larger N",
            *(_panel_title(name) for name in _PANELS),
        ),
    )
    # Each picture of the upper row has its legend to the right of it.
    titles: Any = figure["layout"]["annotations"]
    for number, (left, right) in enumerate(_UPPER):
        figure.update_xaxes(domain=[left, right], row=1, col=2 * number + 1)
        titles[number].x = (left + right) / 2
    _add_bounds(figure, rows)
    _add_floors(figure, rows)
    _add_curves(figure, certificates, rows, grid)
    one = next(iter(certificates.values()))
    figure.update_layout(
        title=(
            f"Layer sweep: {one.manifest['model']['name']}, {len(rows)} SAEs, "
            f"N = {one.measured.n_sequences:,} {one.unit}, delta = {one.config.share:.3g} each"
        ),
        template="simple_white",
        barmode="stack",
        width=1250,
        height=900,
        margin={"t": 90, "b": 90, "l": 65, "r": 30},
        legend={"x": _UPPER[0][1] + 0.01, "y": 1.0, "yanchor": "top"},
        legend2={"x": _UPPER[1][1] + 0.01, "y": 1.0, "yanchor": "top", "traceorder": "reversed"},
        legend3={
            "orientation": "h",
            "x": 0,
            "y": -0.1,
            "yanchor": "top",
            "title": {"text": _MARKS, "side": "top", "font": {"size": 13}},
        },
    )
    return figure


def _add_bounds(figure: go.Figure, rows: Sequence[Row]) -> None:
    x, axis = _positions(rows)
    for name, line in _LINES.items():
        values = [row[name] for row in rows]
        if all(value is None for value in values):
            continue
        figure.add_trace(
            go.Scatter(
                x=x,
                y=values,
                name=bound_label(name),
                mode="lines+markers",
                line=line,
                legend="legend",
                hovertemplate=f"{bound_label(name)}: %{{y:.3f}} bits<extra>%{{x}}</extra>",
            ),
            row=1,
            col=1,
        )
    for name, dash in (("uniform", "dot"), ("unigram", "dashdot")):
        figure.add_trace(
            go.Scatter(
                x=x,
                y=[row[name] for row in rows],
                name="uniform guess (log2 V)" if name == "uniform" else "unigram model, measured",
                mode="lines" if len(rows) > 1 else "lines+markers",
                line={"color": "black", "dash": dash, "width": 1.5},
                legend="legend",
            ),
            row=1,
            col=1,
        )
    figure.update_xaxes(**axis, row=1, col=1)
    figure.update_yaxes(title="bits per token", range=[0, _top(rows, *_LINES)], row=1, col=1)


def _add_floors(figure: go.Figure, rows: Sequence[Row]) -> None:
    """The floor of the published bounds: risk of M, what the proxy loses, gap and mismatch."""
    x, axis = _positions(rows)
    base = np.array([row["risk_base"] for row in rows], dtype=float)
    pool = np.array([row["risk_pool"] for row in rows], dtype=float)
    gap = np.array([row["gap"] for row in rows], dtype=float)
    floor = np.array([np.nan if x is None else x for x in (row["floor_u_sae"] for row in rows)])
    parts = {
        "risk_base": (np.minimum(base, pool), "measured risk of M"),
        "lost": (np.maximum(pool - base, 0.0), "risk of h_G beyond that"),
        "gap": (gap, term_label("gap")),
        "mismatch": (floor - pool - gap, term_label("mismatch")),
    }
    for key, (values, label) in parts.items():
        figure.add_trace(
            go.Bar(
                x=x,
                y=values,
                name=label,
                marker_color=_TERMS[key],
                legend="legend2",
                hovertemplate=f"{label}: %{{y:.3f}} bits<extra>%{{x}}</extra>",
            ),
            row=1,
            col=3,
        )
    uniform = _largest(rows, "uniform")
    figure.add_shape(
        type="line", x0=0, x1=1, xref="x domain", y0=uniform, y1=uniform, opacity=1,
        line={"color": "black", "dash": "dot", "width": 1.5}, row=1, col=3,
    )  # fmt: skip
    figure.update_xaxes(**axis, row=1, col=3)
    figure.update_yaxes(title="bits per token", range=[0, _top(rows, "floor_u_sae")], row=1, col=3)


def _add_curves(
    figure: go.Figure,
    certificates: Mapping[str, Certificate],
    rows: Sequence[Row],
    grid: Sequence[int] | None,
) -> None:
    uniform = _largest(rows, "uniform")
    unit, lowest = next(iter(certificates.values())).unit, uniform
    for row, colour in zip(rows, _shades(len(rows)), strict=True):
        certificate = certificates[str(row["name"])]
        curves = fixed_curves(certificate, _PANELS[:2], grid)
        curves |= any_time_curves(certificate, _PANELS[2:], grid)
        for column, name in enumerate(_PANELS, start=1):
            if name in curves:
                lowest = min(lowest, float(curves[name].values.min()))
                _add_curve(figure, curves[name], row, colour, column)
    for column in range(1, len(_PANELS) + 1):
        figure.add_shape(
            type="line", x0=0, x1=1, xref="x domain", y0=uniform, y1=uniform, opacity=1,
            line={"color": "black", "dash": "dot", "width": 1.5}, row=2, col=column,
        )  # fmt: skip
        figure.update_xaxes(
            title=f"N, {unit}", type="log", dtick=1, exponentformat="none", row=2, col=column
        )
        figure.update_yaxes(
            title="bits per token" if column == 1 else None,
            range=[0.9 * lowest, uniform + 0.35 * (uniform - 0.9 * lowest)],
            row=2,
            col=column,
        )


def _add_curve(figure: go.Figure, curve: Curve, row: Row, colour: str, column: int) -> None:
    label = str(row["label"])
    figure.add_trace(
        go.Scatter(
            x=curve.n,
            y=curve.values,
            name=label,
            legendgroup=label,
            showlegend=column == len(_PANELS),
            legend="legend3",
            mode="lines",
            line={"color": colour, "width": 2},
            hovertemplate=f"{label}, N = %{{x}}: %{{y:.3f}} bits<extra></extra>",
        ),
        row=2,
        col=column,
    )
    at = curve.crossing
    if at is not None:
        figure.add_trace(
            go.Scatter(
                x=[at.n],
                y=[at.value],
                legendgroup=label,
                showlegend=False,
                mode="markers",
                marker={
                    "color": colour,
                    "size": 9,
                    "symbol": "circle" if at.valid else "circle-open",
                    "line": {"width": 2, "color": colour},
                },
                hovertemplate=f"{label}: first below log2 V at N = %{{x}}<extra></extra>",
            ),
            row=2,
            col=column,
        )


def _positions(rows: Sequence[Row]) -> tuple[list[Any], dict[str, Any]]:
    """Where SAEs stand on an axis: at their layers, or by name where these do not tell them apart."""
    layers = [row["layer"] for row in rows]
    if None in layers or len(set(layers)) < len(layers):
        places = list(range(len(rows)))
        names = [shortened(str(row["label"])) for row in rows]
        return places, {"title": "SAE", "tickvals": places, "ticktext": names}
    return layers, {"title": "layer", "tickvals": layers}


def _top(rows: Sequence[Row], *names: str) -> float:
    """Where an axis ends: above log2 V, and not far above it, where bounds say nothing."""
    uniform = _largest(rows, "uniform")
    return max(
        1.1 * uniform, min(1.05 * max(_largest(rows, name) for name in names), 1.7 * uniform)
    )


def _largest(rows: Sequence[Row], name: str) -> float:
    return max((float(value) for row in rows if (value := row[name]) is not None), default=0.0)


def _panel_title(name: str) -> str:
    kind = "looked at all the time" if name.startswith("sharp") else "N fixed in advance"
    return f"{bound_label(name)}<br><sub>{kind}</sub>"


def _shades(number: int) -> list[str]:
    """Colours from the first layer to the last."""
    places = [0.9 * i / max(number - 1, 1) for i in range(number)]
    return [str(colour) for colour in sample_colorscale("Viridis", places)]

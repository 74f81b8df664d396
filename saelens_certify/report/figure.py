"""A certificate as one picture: what the bound is made of, and the controls beside it."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from saelens_certify.certificate import Certificate
from saelens_certify.controls import first_of_each_kind
from saelens_certify.report.terms import bound_label, control_label, term_label
from saelens_certify.rounding import rounded_up

# Measured terms in saturated colours, concentration terms in greys: what more data shrinks is grey.
_COLOURS = {
    "risk_base": "#4477aa",
    "risk_pool": "#4477aa",
    "gap": "#ee6677",
    "mismatch": "#ccbb44",
    "t_proxy": "#8c8c8c",
    "t_occ": "#5c5c5c",
    "t_eta": "#b0b0b0",
    "t_eps": "#d0d0d0",
    "hoeffding_margin": "#8c8c8c",
    "mismatch_measured": "#ccbb44",
    "t_sharp": "#8c8c8c",
}
_SHOWN = ("sharp_direct_base", "u_sae_occam", "u_sae")
_LINES = ("#228833", "#aa3377", "#66ccee", "#997700", "#000000")


def certificate_figure(certificate: Certificate) -> go.Figure:
    """Draw a certificate.

    Args:
        certificate: The certificate.

    Returns:
        Left: each bound as the sum of its terms, with the baselines as vertical lines. Right: share of
        evaluation sequences whose loss moves by at most so many bits, for the SAE and each control.
    """
    figure = make_subplots(cols=2, column_widths=[0.58, 0.42], horizontal_spacing=0.1)
    _add_bounds(figure, certificate)
    _add_gaps(figure, certificate)
    identity = certificate.manifest["identity"]
    figure.update_layout(
        title=(
            f"{certificate.manifest['model']['name']}, {certificate.manifest['sae']['architecture']} SAE "
            f"at {identity['hook_out']}, N = {certificate.measured.n_sequences:,} {certificate.unit}"
        ),
        barmode="stack",
        template="simple_white",
        width=1150,
        height=430,
        legend={"orientation": "h", "y": -0.22, "x": 0, "traceorder": "normal", "entrywidth": 185},
        legend2={"orientation": "h", "x": 0.62, "y": 1.02, "yanchor": "bottom"},
        margin={"t": 60, "b": 120, "l": 130},
    )
    return figure


def _add_bounds(figure: go.Figure, certificate: Certificate) -> None:
    bounds = [certificate.bounds[name] for name in _SHOWN if name in certificate.bounds]
    bounds.append(certificate.headline)
    labels = [bound_label(bound.name) for bound in bounds]
    terms = dict.fromkeys(term for bound in reversed(bounds) for term in bound.terms)
    # What was measured comes first in every bar, what data are lacking last.
    for term in sorted(terms, key=lambda term: term.startswith("t_")):
        figure.add_trace(
            go.Bar(
                y=labels,
                x=[bound.terms.get(term, 0.0) for bound in bounds],
                name=term_label(term),
                orientation="h",
                marker_color=_COLOURS.get(term, "#999999"),
                showlegend=term != "risk_base",
                hovertemplate="%{x:.4f} bits<extra>" + term_label(term) + "</extra>",
            ),
            row=1,
            col=1,
        )
    for bound, label in zip(bounds, labels, strict=True):
        figure.add_annotation(
            x=bound.value, y=label, text=f" {rounded_up(bound.value, 2):.2f}", showarrow=False, xanchor="left",
            row=1, col=1,
        )  # fmt: skip
    lines = certificate.baselines
    for name, x in lines.items():
        # The left plot spans the figure's height: its lines are placed in paper coordinates.
        figure.add_shape(
            type="line", xref="x", yref="paper", x0=x, x1=x, y0=0, y1=1, opacity=1,
            line={"dash": "dash", "width": 1.5, "color": "black"},
        )  # fmt: skip
        figure.add_annotation(
            xref="x", yref="paper", x=x, y=0.02, text=f"{name} {x:.2f}", showarrow=False, textangle=-90,
            xanchor="left" if x == max(lines.values()) else "right", yanchor="bottom", font_size=12,
        )  # fmt: skip
    largest = max([bound.value for bound in bounds] + list(lines.values()))
    figure.update_xaxes(title="bits per token", range=[0, 1.12 * largest], row=1, col=1)


def _add_gaps(figure: go.Figure, certificate: Certificate) -> None:
    base = certificate.column("loss_base")
    proxies = {"this SAE": "loss_sae"}
    controls = first_of_each_kind(certificate.controls, few=1)
    proxies |= {control_label(name): f"loss_{name}" for name in controls}
    for (label, column), colour in zip(proxies.items(), _LINES * len(proxies), strict=False):
        gaps = np.sort(np.abs(base - certificate.column(column)))
        gaps, share = np.append(0.0, gaps), np.arange(len(gaps) + 1) / len(gaps)
        figure.add_trace(
            go.Scatter(
                x=gaps, y=share, name=label, mode="lines", line_color=colour, legend="legend2"
            ),
            row=1,
            col=2,
        )
    figure.update_xaxes(
        title="|loss of M − loss of proxy|, bits per token", rangemode="tozero", row=1, col=2
    )
    figure.update_yaxes(title="share of sequences", range=[0, 1], row=1, col=2)

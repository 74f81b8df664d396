"""Feature shuffling as a picture."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from saelens_certify.certificate import Certificate
from saelens_certify.controls import BEYOND, control_names
from saelens_certify.report.terms import CONTROLS

_COLOURS = {
    "sae": "#228833",
    "permuted": "#aa3377",
    "matched": "#4477aa",
    "random_decoder": "#66ccee",
    "random_unit_decoder": "#997700",
}
# Gaps below this are drawn at it: the axis is logarithmic.
_SMALLEST = 1e-4


def shuffling_figure(certificate: Certificate) -> go.Figure:
    """Draw the SAE against its copies.

    Args:
        certificate: A certificate with controls, error-only permutations or both.

    Returns:
        Left: distribution over sequences of |loss of M - loss of the proxy|, every copy a line. Right,
        where measured: mean squared errors of the error-only permutations, the SAE's as a line, with
        and without position 0.
    """
    columns = [
        ("mse", "all positions"),
        ("mse_no_first", "without position 0"),
    ]
    shown = [
        c for c in columns if f"{c[0]}_error_permutations" in certificate.evidence.column_names
    ]
    figure = make_subplots(
        rows=2,
        cols=2,
        column_widths=[0.6, 0.4],
        horizontal_spacing=0.12,
        vertical_spacing=0.24,
        specs=[[{"rowspan": 2}, {}], [None, {}]] if shown else [[{"rowspan": 2, "colspan": 2}, None], [None, None]],
        subplot_titles=["", *(f"squared error, {label}" for _, label in shown)],
    )  # fmt: skip
    _add_gaps(figure, certificate)
    for row, (name, _) in enumerate(shown, start=1):
        _add_errors(figure, certificate, name, row)
    identity = certificate.manifest["identity"]
    figure.update_layout(
        title=(
            f"Feature shuffling: {certificate.manifest['model']['name']}, "
            f"{certificate.manifest['sae']['architecture']} SAE at {identity['hook_out']}, "
            f"N = {certificate.measured.n_sequences:,} {certificate.unit}"
        ),
        template="simple_white",
        width=1150,
        height=500,
        legend={"orientation": "h", "x": 0, "y": -0.18, "yanchor": "top"},
        margin={"t": 90, "b": 110, "l": 70, "r": 30},
        bargap=0.02,
    )
    return figure


def _add_gaps(figure: go.Figure, certificate: Certificate) -> None:
    base = certificate.column("loss_base")
    names = ["sae", *control_names(certificate)]
    seen: set[str] = set()
    largest = 0.0
    # The SAE is drawn last, on top of the others.
    for name in sorted(names, key=lambda name: name == "sae"):
        kind = "sae" if name == "sae" else name.rpartition("_")[0]
        gaps = np.sort(np.abs(base - certificate.column(f"loss_{name}")))
        figure.add_trace(
            go.Scatter(
                x=np.maximum(gaps, _SMALLEST),
                y=np.arange(1, len(gaps) + 1) / len(gaps),
                name="this SAE" if kind == "sae" else f"{CONTROLS[kind]} ({_count(names, kind)})",
                legendgroup=kind,
                legendrank=["sae", *BEYOND].index(kind),
                showlegend=kind not in seen,
                mode="lines",
                line={
                    "color": _COLOURS[kind],
                    "width": 3 if kind == "sae" else 1.4,
                    "shape": "hv",
                    # Where the SAE's rows have norm 1 it lies on the other kind of random decoder.
                    "dash": "dash" if kind == "random_unit_decoder" else "solid",
                },
                hovertemplate=f"{name}: %{{y:.1%}} of sequences within %{{x:.3g}} bits<extra></extra>",
            ),
            row=1,
            col=1,
        )
        seen.add(kind)
        largest = max(largest, float(gaps[-1]))
    smallest = float(np.quantile(np.abs(base - certificate.column("loss_sae")), 0.01))
    figure.update_xaxes(
        title="|loss of M − loss of proxy|, bits per token",
        type="log",
        range=[np.log10(max(smallest, _SMALLEST)), np.log10(max(largest, 10 * _SMALLEST)) + 0.02],
        exponentformat="none",
        dtick="D2",
        row=1,
        col=1,
    )
    figure.update_yaxes(title="share of sequences", range=[0, 1.01], row=1, col=1)


def _add_errors(figure: go.Figure, certificate: Certificate, name: str, row: int) -> None:
    errors = np.stack(list(certificate.column(f"{name}_error_permutations"))).mean(axis=0)
    own = float(certificate.column(name).mean())
    largest = 1.06 * max(float(errors.max()), own)
    figure.add_trace(
        go.Histogram(
            x=errors,
            xbins={"start": 0, "end": largest, "size": largest / 70},
            marker_color=_COLOURS["permuted"],
            name=f"{len(errors)} permutations, errors only",
            legendgroup="errors",
            showlegend=row == 1,
            hovertemplate="%{y} permutations at %{x}<extra></extra>",
        ),
        row=row,
        col=2,
    )
    figure.add_shape(
        type="line", x0=own, x1=own, y0=0, y1=1, yref="y domain", opacity=1,
        line={"color": _COLOURS["sae"], "width": 3}, row=row, col=2,
    )  # fmt: skip
    figure.add_annotation(
        x=own, y=1, yref="y domain", text=f" this SAE: {own:.3g}", showarrow=False,
        xanchor="left", yanchor="top", font_color=_COLOURS["sae"], row=row, col=2,
    )  # fmt: skip
    figure.update_xaxes(
        title="mean squared error, per token" if row == 2 else None,
        range=[0, largest],
        row=row,
        col=2,
    )
    figure.update_yaxes(title="permutations", row=row, col=2)


def _count(names: list[str], kind: str) -> int:
    return sum(name.rpartition("_")[0] == kind for name in names)

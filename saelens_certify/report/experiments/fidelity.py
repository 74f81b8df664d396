"""Output fidelity as a picture: distributions over sequences, an SAE beside the other."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from saelens_certify.certificate import Certificate
from saelens_certify.report.terms import shortened

_COLOURS = {"M": "#8c8c8c", "S∘M": "#4477aa", "h_G": "#ee6677"}
# Title of the axis, and for each model the column of the evidence.
_PANELS: tuple[tuple[str, dict[str, str]], ...] = (
    ("KL from M, bits per token", {"S∘M": "kl", "h_G": "kl_pool"}),
    (
        "|Δ log p(true token)|, bits per token",
        {"S∘M": "gold_logprob_gap", "h_G": "gold_logprob_gap_pool"},
    ),
    (
        "same most likely token, share of positions",
        {"S∘M": "top1_agreement", "h_G": "top1_agreement_pool"},
    ),
    (
        "smoothed loss, bits per token",
        {"M": "loss_base", "S∘M": "loss_sae", "h_G": "loss_pool"},
    ),
)

_WIDTH = 0.26  # of a box, SAEs being 1 apart


def fidelity_figure(certificates: Mapping[str, Certificate]) -> go.Figure:
    """Draw how far the proxies' predictions are from the model's.

    Args:
        certificates: By name, in the order in which SAEs are drawn.

    Returns:
        Four pictures with a box for every SAE and proxy: whiskers from the 10 % to the 90 % quantile over sequences,
        the box from 25 % to 75 %, a line at the median, a dashed one at the mean.
    """
    figure = make_subplots(rows=2, cols=2, horizontal_spacing=0.09, vertical_spacing=0.17)
    labels = list(certificates)
    for index, (title, columns) in enumerate(_PANELS):
        row, col = index // 2 + 1, index % 2 + 1
        for place, (proxy, column) in enumerate(columns.items()):
            boxes = _boxes(
                proxy,
                labels,
                [certificate.column(column) for certificate in certificates.values()],
                shift=(place - (len(columns) - 1) / 2) * _WIDTH,
                legend=title == _PANELS[-1][0],
            )
            figure.add_trace(boxes, row=row, col=col)
        figure.update_yaxes(title=title, rangemode="tozero", row=row, col=col)
        if "share" in title:
            figure.update_yaxes(range=[0, 1.02], tickformat=".0%", row=row, col=col)
    one = next(iter(certificates.values()))
    figure.update_xaxes(
        tickvals=list(range(len(labels))),
        ticktext=[shortened(label) for label in labels],
        range=[-0.6, len(labels) - 0.4],
        automargin=True,
    )
    figure.update_layout(
        title=(
            f"Output fidelity: {one.manifest['model']['name']}, N = {one.evidence.num_rows:,} sequences"
            "<br><sub>distribution over sequences: whiskers 10 % to 90 %, box 25 % to 75 %, line median, dashed mean</sub>"
        ),
        template="simple_white",
        boxmode="overlay",
        width=1150,
        height=820,
        margin={"t": 100, "b": 60, "l": 70, "r": 30},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
    )
    return figure


def _boxes(
    proxy: str, labels: list[str], values: list[np.ndarray], shift: float, legend: bool
) -> go.Box:
    """One box an SAE, from quantiles: the picture does not grow with the number of sequences."""
    quantiles = np.array([np.quantile(each, (0.1, 0.25, 0.5, 0.75, 0.9)) for each in values])
    low, lower, middle, upper, high = quantiles.T
    return go.Box(
        x=np.arange(len(labels)) + shift,
        width=0.9 * _WIDTH,
        lowerfence=low,
        q1=lower,
        median=middle,
        q3=upper,
        upperfence=high,
        mean=[float(each.mean()) for each in values],
        name=proxy,
        legendgroup=proxy,
        showlegend=legend,
        marker_color=_COLOURS[proxy],
        line_width=1.5,
    )

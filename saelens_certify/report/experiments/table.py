"""The result of an experiment in the terminal: its main columns, and what they say; all columns are in the CSV."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from saelens_certify.report.table import plain_table
from saelens_certify.rounding import rounded_up

if TYPE_CHECKING:
    from saelens_certify.experiments.result import Experiment, Row

_SHOWN: dict[str, dict[str, str]] = {
    "layer_sweep": {
        "label": "SAE", "pool_size": "pool", "risk_pool": "risk (h_G)", "gap": "gap", "eta": "η", "u_sae": "U_SAE",
        "u_sae_occam": "+Occam", "sharp_betting": "sharp",
    },
    "bound_curves": {
        "name": "SAE", "n": "N", "u_sae": "U_SAE", "u_sae_occam": "+Occam", "sharp_betting": "sharp", "uniform": "log2 V",
    },
    "output_fidelity": {
        "label": "SAE", "KL_M_vs_SoM": "KL (S∘M)", "KL_M_vs_hG": "KL (h_G)", "Top1Agree_M_vs_SoM": "top-1",
        "AbsGoldLogProbDiff_M_vs_SoM": "|Δ log p|", "Loss_M": "loss M", "Loss_SoM": "S∘M", "Loss_hG": "h_G",
    },
    "error_amplification": {
        "name": "SAE", "horizon": "blocks", "kl": "KL", "sd": "sd", "growth": "doublings", "growth_per_block": "per block",
    },
    "feature_shuffling": {
        "label": "proxy", "risk": "risk", "gap": "gap", "kl": "KL", "mse": "error", "effect": "effect", "p_value": "p",
        "mse_p_value": "p (error)",
    },
    "sensitivity": {
        "factor": "factor", "value": "value", "pool_size": "pool", "complexity": "ln C", "eta": "η", "gap": "gap", "risk_pool": "risk (h_G)",
        "u_sae": "U_SAE", "u_sae_occam": "+Occam", "sharp_betting": "sharp",
    },
    "distribution_shift": {
        "name": "documents", "n_sequences": "N", "risk_base": "risk (M)", "risk_pool": "(h_G)", "gap": "gap", "eta": "η",
        "u_sae": "U_SAE", "sharp_betting": "sharp", "uniform": "log2 V",
    },
    "downstream_tasks": {
        "task": "task", "n": "n", "acc_base": "M", "acc_sae": "S∘M", "acc_pool": "h_G", "drop_sae": "drop",
        "drop_sae_lower": "≥", "drop_sae_upper": "≤", "chance": "chance",
    },
}  # fmt: skip

_BOUNDS = ("u_sae", "u_sae_occam", "sharp_betting")
"""Upper bounds: rounded upwards."""


def print_experiment(experiment: Experiment, console: Console | None = None) -> None:
    """Print the main columns of an experiment, and its findings.

    Args:
        experiment: What to print.
        console: Where; the terminal by default.
    """
    console = console or Console()
    labels, cells = main_columns(experiment.kind, experiment.rows)
    table = plain_table(experiment.title, *labels)
    table.columns[0].overflow = "fold"
    for row in cells:
        table.add_row(*map(escape, row))
    console.print(table)
    for finding in experiment.findings:
        console.print(f"- {finding}", markup=False, highlight=False, soft_wrap=True)


def main_columns(kind: str, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return the labels of the main columns of a table of results, and their cells as text.

    Args:
        kind: `Experiment.kind`.
        rows: `Experiment.rows`.
    """
    found = list(rows[0]) if rows else []
    shown = _SHOWN.get(kind, {key: key for key in found})
    keys = [key for key in shown if key in found and any(row[key] is not None for row in rows)]
    return [shown[key] for key in keys], [[_cell(row, key) for key in keys] for row in rows]


def _cell(row: Row, key: str) -> str:
    value = row[key]
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, str):
        return value
    return f"{rounded_up(value, 2):.2f}" if key in _BOUNDS else f"{value:.4g}"

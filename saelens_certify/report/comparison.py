"""Several certificates as one table in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from saelens_certify.comparison import Comparison
from saelens_certify.report.table import plain_table
from saelens_certify.rounding import percent, rounded_down, rounded_up


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print bounds that hold together, the best first, and what may be concluded.

    Args:
        comparison: What to print.
        console: Where; the terminal by default.
    """
    console = console or Console()
    confidence = percent(1 - comparison.delta)
    members = sorted(comparison.members.items(), key=lambda item: item[1].bound.value)
    name = members[0][1].bound.name
    table = plain_table(
        f"{len(members)} certificates at {confidence} confidence together: {name} [bits/token]",
        "certificate", "N", "bound", "below uniform", "p-value", "non-vacuous (Holm)",
    )  # fmt: skip
    table.columns[0].overflow = "fold"
    for title, member in members:
        table.add_row(
            escape(title),
            f"{member.n_sequences:,}",
            f"{rounded_up(member.bound.value):.4f}",
            f"{rounded_down(member.uniform - member.bound.value):+.4f}",
            f"{member.p_value:.2g}",
            "yes" if member.nonvacuous else "no",
        )
    console.print(table)
    console.print(
        f"Each bound spends delta / {comparison.family} (Bonferroni), so all hold at once with {confidence} confidence "
        f"and the smallest may be chosen after looking: {comparison.best}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )

"""A plan in words."""

from __future__ import annotations

import math

from rich.console import Console

from saelens_certify.bounds import Plan
from saelens_certify.rounding import percent


def print_plan(plan: Plan, unit: str = "sequences", console: Console | None = None) -> None:
    """Print how many sequences a bound needs, and what the pilot cannot tell.

    Args:
        plan: What to print.
        unit: What the pilot's values stand for: sequences, or clusters of them.
        console: Where; the terminal by default.
    """
    goal = (
        f"at most {plan.margin:g} above its mean"
        if plan.margin is not None
        else f"at most {round(plan.target or 0.0, 4) + 0.0:.4f} bits per token"
    )
    lines = [
        f"For {plan.bound} to be {goal} at {percent(1 - plan.delta)} confidence: N = {_count(plan.n)} {unit} (80% "
        f"interval {_count(plan.n_low)} to {_count(plan.n_high)}, from a pilot of {plan.pilot_size:,}).",
        f"An event that the pilot never showed may have probability {plan.unseen:.2%} and add "
        f"{plan.unseen_cost:.3f} bits per token.",
        "This is a forecast: fix N, or use --until, and certify on other sequences.",
    ]
    if math.isinf(plan.n):
        lines.insert(
            1,
            "The mean of the pilot is not below that, so more of them do not help: a better SAE may, or more "
            "calibration documents where the mismatch is large.",
        )
    if plan.reachable < 1:
        lines.insert(1, f"{plan.reachable:.0%} of the resampled pilots reach it at some N.")
    if plan.extrapolated:
        lines.insert(1, "N is extrapolated beyond what was simulated.")
    for line in lines:
        (console or Console()).print(line, markup=False, highlight=False, soft_wrap=True)


def _count(n: float) -> str:
    return "∞" if math.isinf(n) else f"{n:,.0f}"

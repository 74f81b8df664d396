"""What the rows of sensitivities say, in sentences made from them."""

from __future__ import annotations

from collections.abc import Sequence

from saelens_certify.experiments.result import Row
from saelens_certify.report.terms import bound_label
from saelens_certify.rounding import percent, rounded_up

_BASE = "base"
_COMPARED = ("u_sae", "u_sae_occam", "sharp_betting", "sharp_measured")
_NAMES = {
    "K": "features per token K",
    "budget": "calibration sequences",
    "tau": "frequency threshold tau",
    "alpha": "smoothing alpha",
    "L": "tokens per sequence L",
}


def sensitivity_findings(rows: Sequence[Row]) -> tuple[str, ...]:
    """Say for every factor what it moves, and where each bound is smallest and says something.

    Args:
        rows: Of `sensitivity_rows`.
    """
    family = _number(rows[0], "simultaneous")
    alone = "each by itself" if family == 1 else f"all of {family:.0f} at once"
    said = [
        f"Every bound holds with {percent(_number(rows[0], 'confidence'))} confidence, {alone}."
    ]
    for factor in _NAMES:
        series = series_of(rows, factor)
        if series:
            said += _factor(factor, series)
    if family < len(rows) > 1:
        said.append(
            f"Smallest values were found by looking at {len(rows)} settings: as a claim, the best of them needs all at "
            f"once (simultaneous = {len(rows)})."
        )
    return tuple(said)


def series_of(rows: Sequence[Row], factor: str) -> list[Row]:
    """Return the rows of a factor by rising value, the base among them; empty if the factor is not varied.

    Args:
        rows: Of `sensitivity_rows`.
        factor: One of the factors. The native coding rule has no K: such a base is left out.
    """
    varied = [row for row in rows if row["factor"] == factor]
    base = [row for row in rows if row["factor"] == _BASE and row[factor] is not None]
    return sorted([*base, *varied], key=lambda row: _number(row, factor)) if varied else []


def _factor(factor: str, series: Sequence[Row]) -> list[str]:
    shown = [name for name in _COMPARED if all(row[name] is not None for row in series)]
    values = f"{_at(series[0], factor)} to {_at(series[-1], factor)}"
    title = f"{_NAMES[factor]}, {values}"
    said = [f"{title[0].upper()}{title[1:]}: {_moves(factor, series)}."]
    if factor == "alpha":
        said.append(
            "Losses smoothed with different alpha are different losses: what compares is each bound with log2 V, not "
            "one bound with another."
        )
    if factor == "budget" and len(series) > 1:
        said.append(_against_paper(series))
    for name in shown:
        best = min(series, key=lambda row: _number(row, name))
        below = [_at(row, factor) for row in series if row[f"nonvacuous_{name}"]]
        where = (
            "everywhere"
            if len(below) == len(series)
            else f"at {', '.join(below)} of {', '.join(_at(row, factor) for row in series)}"
            if below
            else "nowhere"
        )
        said.append(
            f"{bound_label(name)} by {_NAMES[factor]}: smallest at {_at(best, factor)} "
            f"({rounded_up(_number(best, name), 2):.2f} bits per token), non-vacuous {where}."
        )
    return said


def _moves(factor: str, series: Sequence[Row]) -> str:
    """What the factor moves, from its smallest to its largest value."""
    parts = {
        "K": ("gap", "pool", "eta", "complexity"),
        "budget": ("pool", "eta", "complexity"),
        "tau": ("pool", "eta", "complexity"),
        "alpha": ("risk_base", "gap", "loss_range"),
        "L": ("risk_base", "gap", "eta", "n"),
    }[factor]
    first, last = series[0], series[-1]
    said = [_move(part, first, last) for part in parts]
    if "complexity" in parts:
        top = max(series, key=lambda row: _number(row, "complexity"))
        if top not in (first, last):
            said.append(
                f"the complexity is largest at {_at(top, factor)} ({_number(top, 'complexity'):,.1f} nats, "
                f"{100 * _number(top, 'pool_share'):.1f} % of the features in the pool)"
            )
    return "; ".join(said)


def _move(part: str, first: Row, last: Row) -> str:
    def both(name: str, form: str, scale: float = 1.0) -> str:
        one, other = scale * _number(first, name), scale * _number(last, name)
        return f"{one:{form}} to {other:{form}}"

    return {
        "gap": lambda: f"reconstruction gap {both('gap', '.3f')} bits",
        "pool": lambda: f"pool {both('pool_size', ',.0f')} features",
        "eta": lambda: f"violations {both('eta', '.2f', 100)} % of sequences",
        "complexity": lambda: f"ln C(m, P) {both('complexity', ',.1f')} nats",
        "risk_base": lambda: f"measured risk of M {both('risk_base', '.2f')} bits",
        "loss_range": lambda: f"range of the loss {both('loss_range', '.2f')} bits",
        "n": lambda: f"independent sequences {both('n_sequences', ',.0f')}",
    }[part]()


def _against_paper(series: Sequence[Row]) -> str:
    """The paper's Table 2: with more calibration tokens, mismatch, complexity and the bound fall."""
    names = {"eta": "violations", "complexity": "complexity", "u_sae_occam": "U_SAE+Occam"}
    known = {key: label for key, label in names.items() if series[0][key] is not None}
    rises = [
        label
        for key, label in known.items()
        if any(_number(b, key) > _number(a, key) for a, b in zip(series, series[1:], strict=False))
    ]
    every = ", ".join(known.values())
    if not rises:
        return f"With a larger budget none of these rises: {every}, as in the paper's Table 2."
    return (
        f"With a larger budget {', '.join(rises)} rise{'s' if len(rises) == 1 else ''} somewhere, other than in the "
        f"paper's Table 2, where {every} fall."
    )


def _at(row: Row, factor: str) -> str:
    return f"{_number(row, factor):,.10g}"


def _number(row: Row, name: str) -> float:
    value = row[name]
    assert isinstance(value, (int, float))
    return float(value)

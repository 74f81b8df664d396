"""What the rows of a distribution shift say, in sentences made from them."""

from __future__ import annotations

from collections.abc import Sequence

from saelens_certify.experiments.result import Row
from saelens_certify.report.terms import bound_label, term_label
from saelens_certify.rounding import percent, rounded_up

_COMPARED = ("u_sae", "u_sae_occam", "sharp_betting", "sharp_measured")
_TERMS = ("risk_pool", "gap", "mismatch")
_PUBLISHED_PREFIX = "u_sae_"


def shift_findings(rows: Sequence[Row]) -> tuple[str, ...]:
    """Say which conditions can be certified, from which rate on none can, and which term grows.

    Args:
        rows: Of `shift_rows`.
    """
    plain = next(row for row in rows if row["rate"] == 0.0)
    rated = [row for row in rows if row["rate"] is not None]
    other = [row for row in rows if row["rate"] is None]
    said = [_confidence(plain), _unchanged(plain)]
    if len(rated) > 1:
        said += [_first_vacuous(name, rated) for name in _shown(rated)]
        said += _far(plain, rated[-1])
    for row in other:
        said += [_condition(row), _growth(plain, row)]
    return tuple(said)


def _confidence(row: Row) -> str:
    family = _number(row, "simultaneous")
    alone = "each by itself" if family == 1 else f"all of {family:.0f} at once"
    return f"Every bound holds with {percent(_number(row, 'confidence'))} confidence, {alone}, for its own condition."


def _unchanged(row: Row) -> str:
    return (
        f"Documents as they are: {_values(row)}; a uniform guess has {_number(row, 'uniform'):.2f} bits per token, a "
        f"unigram model {_number(row, 'unigram'):.2f}."
    )


def _first_vacuous(name: str, rated: Sequence[Row]) -> str:
    label = bound_label(name)
    vacuous = [_number(row, "rate") for row in rated if not row[f"nonvacuous_{name}"]]
    if not vacuous:
        return f"{label} stays non-vacuous at every corruption rate up to {_number(rated[-1], 'rate'):g}."
    if vacuous[0] == 0.0:
        return f"{label} is vacuous already on the documents as they are."
    last = max(_number(row, "rate") for row in rated if _number(row, "rate") < vacuous[0])
    later = [_number(row, "rate") for row in rated if _number(row, "rate") > vacuous[0]]
    back = len(vacuous) < 1 + len(later)
    return (
        f"{label} is first vacuous at corruption rate {vacuous[0]:g}; the rate looked at before, {last:g}, is "
        f"certified.{' It is non-vacuous again at a higher rate.' if back else ''}"
    )


def _far(plain: Row, far: Row) -> list[str]:
    """The strongest corruption: the paper's claim is that a far shift is vacuous."""
    rate = _number(far, "rate")
    what = "random tokens" if rate == 1.0 else f"corruption rate {rate:g}"
    vacuous = [name for name in _shown([far]) if not far[f"nonvacuous_{name}"]]
    said = [f"Far shift ({what}): {_values(far)}; log2 V is {_number(far, 'uniform'):.2f}."]
    if rate == 1.0:
        if len(vacuous) == len(_shown([far])):
            said.append("Every bound is vacuous under the far shift, as the paper found.")
        elif vacuous:
            said.append(
                f"Under the far shift {_labels(vacuous)} is vacuous, as the paper found; "
                f"{_labels([n for n in _shown([far]) if n not in vacuous])} is not."
            )
        else:
            said.append("No bound is vacuous under the far shift, against the paper's finding.")
    if _number(far, "risk_base") >= _number(far, "uniform"):
        said.append(
            f"There the model itself has a measured risk of {_number(far, 'risk_base'):.2f} bits, no better than a "
            "uniform guess, so a vacuous bound says nothing against the SAE."
        )
    return [*said, _growth(plain, far)]


def _growth(plain: Row, row: Row) -> str:
    """Which measured term of the bound moves most from the documents as they are."""
    prefix = _PUBLISHED_PREFIX if row.get("u_sae") is not None else "sharp_betting_"
    bound = prefix.removesuffix("_")
    moves = {term: _number(row, prefix + term) - _number(plain, prefix + term) for term in _TERMS}
    first = max(moves, key=lambda term: moves[term])
    change = _number(row, bound) - _number(plain, bound)
    labelled = {term_label(term): move for term, move in moves.items()}
    labelled["concentration"] = change - sum(moves.values())
    parts = ", ".join(f"{label} {move:+.2f}" for label, move in labelled.items())
    grows = (
        f"the measured term that grows most is: {term_label(first)}"
        if moves[first] > 0.0
        else "no measured term grows"
    )
    return (
        f"{_called(row)}: {bound_label(bound)} changes by {change:+.2f} bits ({parts}); {grows}. "
        f"{100 * _number(plain, 'eta'):.1f} % of sequences violate the pool on the documents as they are, "
        f"{100 * _number(row, 'eta'):.1f} % here."
    )


def _condition(row: Row) -> str:
    vacuous = [name for name in _shown([row]) if not row[f"nonvacuous_{name}"]]
    verdict = f"vacuous: {_labels(vacuous)}" if vacuous else "none vacuous"
    return f"{_called(row)}: {_values(row)}; log2 V is {_number(row, 'uniform'):.2f}; {verdict}."


def _called(row: Row) -> str:
    rate = row["rate"]
    if rate is None:
        return f"Data {row['name']!r}"
    return "Random tokens" if rate == 1.0 else f"Corruption rate {rate:g}"


def _values(row: Row) -> str:
    bounds = (
        f"{bound_label(name)} {rounded_up(_number(row, name), 2):.2f}" for name in _shown([row])
    )
    return f"{', '.join(bounds)} bits per token"


def _labels(names: Sequence[str]) -> str:
    return ", ".join(bound_label(name) for name in names)


def _shown(rows: Sequence[Row]) -> list[str]:
    return [name for name in _COMPARED if all(row[name] is not None for row in rows)]


def _number(row: Row, name: str) -> float:
    value = row[name]
    assert isinstance(value, (int, float))
    return float(value)

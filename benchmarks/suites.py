"""Which rows make up `python -m benchmarks cpu` and `cuda`, and choosing among them."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.session import Row, Session

SUITES = ("cpu", "cuda")


class UnknownRowError(ValueError):
    """A name given to ``--only`` matches no row."""


def rows_of(suite: str, session: Session) -> list[Row]:
    """Return the rows of a suite, those that share inputs next to each other."""
    from benchmarks.rows_codes import code_rows
    from benchmarks.rows_device import device_rows
    from benchmarks.rows_encode import encode_rows
    from benchmarks.rows_predictions import prediction_rows
    from benchmarks.shapes import SHAPES

    operators = encode_rows(suite, session.native_16bit) + code_rows(suite)
    if suite == "cuda":
        operators += device_rows()
    predictions = prediction_rows(suite)
    shapes = tuple(f".{shape.name}" for shape in SHAPES)
    ordered = [row for row in operators if not row.name.endswith(shapes)]
    # By shape, so that one shape's weights are in memory at a time and a run that is cut
    # short has every operator of the shapes that it reached.
    for shape in shapes:
        ordered += [row for row in operators + predictions if row.name.endswith(shape)]
    if suite == "cpu":
        # Imported here: only these rows need SAELens and TransformerLens.
        from benchmarks.rows_end_to_end import end_to_end_rows

        ordered = end_to_end_rows() + ordered
    names = [row.name for row in ordered]
    if len(set(names)) != len(names):
        raise ValueError("two rows have one name")
    return ordered


def chosen(rows: Sequence[Row], only: Sequence[str]) -> list[Row]:
    """Return the rows whose names are given or begin with what is given.

    With nothing given: all but those that run on request.

    Raises:
        UnknownRowError: Something given matches no row.
    """
    if not only:
        return [row for row in rows if not row.on_request]
    for wanted in only:
        if not wanted or not any(row.name.startswith(wanted) for row in rows):
            groups = sorted({row.name.partition(".")[0] for row in rows})
            raise UnknownRowError(
                f"--only {wanted}: no row has this name or begins so; names begin with "
                f"{', '.join(groups)} (--list shows them all)"
            )
    return [row for row in rows if any(row.name.startswith(wanted) for wanted in only)]

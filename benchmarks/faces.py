"""Timing of public functions, and the check that ours and the baseline compute the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import Ring
from benchmarks.session import Measured, Session
from benchmarks.timing import Contender


def compare_face(
    session: Session,
    inputs: Ring,
    face: Callable[[Any], object],
    baseline: Contender,
    information: Mapping[str, Contender] | None = None,
    **options: Any,
) -> Measured:
    """Compare a public function with a baseline.

    On a CPU the function itself is timed. On a GPU its checks wait for the device, so the compiled
    operators are timed alone and the function is reported as ``face_s``.
    """
    information = dict(information or {})
    ours = inputs.call(face)
    if session.device == "cuda":
        operator = inputs.replayed(face)
        if operator is not None:
            information = {"face": ours, **information}
            ours = operator
    return session.compare(ours, baseline, information=information, **options)


def few(n_tokens: int) -> int:
    """Tokens on which the plain torch form is timed: it is written to be right, not fast."""
    return max(1, n_tokens // 16)


def check(what: str, ours: Tensor, baseline: Tensor, tolerance: float) -> None:
    """Raise unless two results agree: a fast wrong answer is no result.

    Args:
        what: What is compared, for the message.
        ours: Our result.
        baseline: The baseline's, same shape.
        tolerance: Largest difference, relative to the largest magnitude of the baseline.

    Raises:
        ValueError: They differ by more.
    """
    wide = baseline.double()
    scale = float(wide.abs().max()) or 1.0
    difference = float((ours.double() - wide).abs().max()) / scale
    if not difference <= tolerance or not torch.isfinite(wide).all():
        raise ValueError(f"ours and the baseline disagree on {what}: relative {difference:.3g}")

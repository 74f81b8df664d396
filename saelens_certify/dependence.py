"""Evaluation sequences that repeat each other, and what a run does about them."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

from saelens_certify.bounds import cluster_order
from saelens_certify.config import CertifyConfig
from saelens_certify.data import Sequences
from saelens_certify.data.near_duplicates import find_clusters
from saelens_certify.data.repeats import near_duplicates_across


@dataclass(frozen=True)
class Draws:
    """Evaluation sequences in the order in which they are measured.

    Attributes:
        sequences: The sequences; members of a cluster stand next to each other.
        clusters: The cluster of each, None for one by itself; None in all if they were not looked for.
        found: What was found, for the manifest.
    """

    sequences: Sequences
    clusters: tuple[str | None, ...] | None
    found: dict[str, Any]


def independent_draws(
    calibration: Sequences, evaluation: Sequences, config: CertifyConfig
) -> Draws:
    """Find the evaluation sequences that count as one, as ``config.dependence`` says.

    Args:
        calibration: Calibration sequences: what evaluation repeats of them is counted and recorded.
        evaluation: Evaluation sequences.
        config: Settings.

    Raises:
        CertifyError: If sequences repeat each other and ``config.dependence`` is ``"refuse"``.
    """
    if config.dependence == "ignore":
        return Draws(evaluation.canonical(), None, {"looked_for": False})
    found = find_clusters(evaluation)
    if config.dependence == "refuse":
        found.refuse()
    across = near_duplicates_across(calibration, evaluation)
    if found.links:
        warnings.warn(str(found), stacklevel=3)
    order = cluster_order(found.names, evaluation.hashes).tolist()
    alone = {name for name, size in Counter(found.names).items() if size == 1}
    names = tuple(None if found.names[i] in alone else found.names[i] for i in order)
    record = {
        "looked_for": True,
        "within_evaluation": found.to_dict(),
        "of_calibration": across.to_dict(),
    }
    return Draws(evaluation.select(order), names, record)

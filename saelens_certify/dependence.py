"""Evaluation sequences that repeat each other, and what a run does about them."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from saelens_certify.bounds import cluster_order
from saelens_certify.config import CertifyConfig
from saelens_certify.data import Sequences
from saelens_certify.data.near_duplicates import Clusters, find_clusters
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

    @cached_property
    def sizes(self) -> tuple[int, ...] | None:
        """Number of sequences in the cluster of each."""
        if self.clusters is None:
            return None
        sizes = Counter(self.clusters)
        return tuple(1 if name is None else sizes[name] for name in self.clusters)


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
        return Draws(evaluation.canonical, None, {"looked_for": False})
    found = find_clusters(evaluation)
    if config.dependence == "refuse":
        found.refuse()
    if found.links:
        warnings.warn(str(found), stacklevel=3)
    across = near_duplicates_across(calibration, evaluation)
    if across.links:
        warnings.warn(
            f"{across} The certificate is about documents that repeat the calibration documents that often",
            stacklevel=3,
        )
    record = {
        "looked_for": True,
        "within_evaluation": found.to_dict(),
        "of_calibration": across.to_dict(),
    }
    return Draws(*in_order(evaluation, found), record)


def in_order(evaluation: Sequences, found: Clusters) -> tuple[Sequences, tuple[str | None, ...]]:
    """Put sequences into the order in which they are measured; name the cluster of those in one.

    Args:
        evaluation: Evaluation sequences.
        found: Their clusters.
    """
    order = cluster_order(found.names, evaluation.hashes).tolist()
    sizes = Counter(found.names)
    names = tuple(found.names[i] if sizes[found.names[i]] > 1 else None for i in order)
    return evaluation.select(order), names

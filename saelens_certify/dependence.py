"""Evaluation sequences that repeat each other, and what a run does about them."""

from __future__ import annotations

from collections.abc import Sequence

from saelens_certify.config import CertifyConfig
from saelens_certify.data import Sequences


def independent_draws(
    sequences: Sequences, config: CertifyConfig
) -> tuple[Sequences, Sequence[str | None] | None]:
    """Find the sequences that count as one, and put the members of each cluster next to each other."""
    return sequences, None

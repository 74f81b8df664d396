"""How the evaluation is divided into parts: what a killed run may lose, and when a run may stop."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from saelens_certify.config import CertifyConfig
from saelens_certify.evidence import CLUSTER

_FIRST = 16  # sequences: few verdicts are valid earlier
_LOOK_GROWTH = 8
_GROWTH = 4  # a part is at most this fraction of what was measured before it


def part_slices(config: CertifyConfig, clusters: Sequence[str | None]) -> list[slice]:
    """Return the sequences of each evidence part, in order.

    A run that measures everything has parts of one size. One that may stop has small parts at first, so that
    it measures about a quarter more than it needs at most: it is looked at after each. No part ends within
    a cluster of sequences that count as one.

    Args:
        config: Settings (``part_sequences``, ``until``).
        clusters: The cluster of each evaluation sequence, members next to each other; None for a sequence
            by itself.
    """
    slices, start, n = [], 0, len(clusters)
    while start < n:
        size = config.part_sequences
        if config.until is not None:
            size = min(size, max(_FIRST, start // _GROWTH))
        stop = min(start + size, n)
        while stop < n and clusters[stop] is not None and clusters[stop] == clusters[stop - 1]:
            stop += 1
        slices.append(slice(start, stop))
        start = stop
    return slices


def looked_at(slices: Sequence[slice]) -> list[bool]:
    """Say after which parts a run that may stop is looked at.

    After every part at first; later when an eighth has been added, so that looking stays cheap; and at the end.

    Args:
        slices: The parts.
    """
    looks, last = [], 0
    for number, part in enumerate(slices, 1):
        look = _LOOK_GROWTH * (part.stop - last) >= last or number == len(slices)
        last = part.stop if look else last
        looks.append(look)
    return looks


def part_clusters(evidence: pa.Table) -> list[str | None]:
    """Return what `part_slices` needs of the evidence."""
    if CLUSTER not in evidence.column_names:
        return [None] * evidence.num_rows
    return evidence.column(CLUSTER).to_pylist()

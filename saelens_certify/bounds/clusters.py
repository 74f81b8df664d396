"""Sequences that are not independent of each other, counted as one: means of clusters.

Several windows of one document, or copies of one text, repeat each other. Bounds that count each of them say
more than was seen. If whole *clusters* are independent draws from one distribution of clusters, then so are their means,
which lie in the interval that the values lie in: every bound of a bounded mean holds for them, with the
number of clusters in place of the number of sequences. Nothing is assumed of the sequences within a cluster.

**What is then bounded** is the expectation of the cluster mean: draw a cluster, then one of its sequences, all equally
likely. It is the expectation over sequences, R, if no cluster has a second sequence, if all clusters have
equally many, or if size and mean are uncorrelated; else long documents count for less than in R.

**Order.** Adaptive bets and confidence sequences read the means one after another, and each has to be a fresh draw
given those before. The order must therefore not depend on the sizes. In the order of the sequences' hashes
a large cluster ends late and begins early, so the clusters that are complete first are the small ones. `cluster_order`
puts the members of a cluster next to each other, at a place that a hash of the cluster's name decides.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saelens_certify.bounds.exact import divide_up, exact_sum_up, per_sequence
from saelens_certify.bounds.rounding import FloatArray
from saelens_certify.errors import CertifyError

Labels = Iterable[Hashable]
"""A name for the cluster of each sequence [n_sequences]; those with equal names form a cluster."""


def cluster_means(
    values: ArrayLike, clusters: Labels, *, complete: int | None = None
) -> FloatArray:
    """The mean of each cluster, rounded up: never below the exact mean, never above its largest value.

    Clusters come in the order of their last members. Because members stand next to each other, a prefix of the sequences
    holds a prefix of the clusters, whole, and at most one that is cut: with ``complete=n``
    the result is ``cluster_means(values, clusters)[:k]`` for the k clusters that end within n sequences.

    For a lower bound, give the negated values: they are rounded towards the safe side in turn.

    Args:
        values: One value per sequence, finite, in the order of `cluster_order`. With ``complete`` only the first
            ``complete`` need be there.
        clusters: The cluster of each sequence, the members of a cluster next to each other.
        complete: Number of leading sequences to go by; clusters that end later are left out. None: all.

    Returns:
        Means [n_clusters], in the unit of the values. Empty only if ``complete`` ends within the first cluster.

    Raises:
        CertifyError: For values or clusters that are empty, of different lengths or not finite, for clusters
            whose members are apart, or ``complete`` outside what was given.
    """
    codes = cluster_codes(clusters)
    found = per_sequence("values", values)
    seen = _seen(found.size, codes.size, complete)
    check_together(codes)
    ends = np.cumsum(np.bincount(codes))
    ends = ends[ends <= seen]
    starts = np.concatenate([[0], ends[:-1]]) if ends.size else ends
    means = found[starts]
    for index in np.flatnonzero(ends - starts > 1):
        members = found[starts[index] : ends[index]].tolist()
        mean = divide_up(exact_sum_up(members), len(members))
        means[index] = min(mean, max(members))
    return means


def cluster_order(clusters: Labels, sequences: Sequence[str]) -> NDArray[np.int64]:
    """The order in which clusters of sequences are independent draws from one distribution.

    Members of a cluster are neighbours. A sequence that is a cluster of its own keeps the place that its hash
    gives it, so without larger clusters this is the order of the hashes; a larger cluster is placed by a hash of
    its name, which is as uniform as a sequence's and says nothing about its size. It does not depend on the
    order in which the sequences are given.

    Args:
        clusters: The cluster of each sequence: its name, made from content (the smallest hash of its members).
        sequences: Content hashes, one per sequence, in the same order.

    Returns:
        Indices [n_sequences]; ``values[order]`` is what `cluster_means` takes.

    Raises:
        CertifyError: If lengths differ or there are none.
    """
    labels = list(clusters)
    codes = cluster_codes(labels)
    if len(sequences) != codes.size:
        raise CertifyError(
            f"Lengths differ: clusters has {codes.size}, sequences has {len(sequences)}. Give one each per sequence."
        )
    alone = np.bincount(codes)[codes] == 1
    keys = [
        (name if single else _key(label), name)
        for label, name, single in zip(labels, sequences, alone.tolist(), strict=True)
    ]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)


def check_together(codes: NDArray[np.int64]) -> None:
    """Check that the members of each cluster stand next to each other.

    Args:
        codes: From :func:`cluster_codes`.

    Raises:
        CertifyError: If another cluster stands between them.
    """
    apart = np.flatnonzero(np.diff(codes) < 0)
    if apart.size:
        row = int(apart[0]) + 1
        raise CertifyError(
            f"the cluster of sequence {row} has another cluster between its members. Sort values and clusters "
            "by cluster_order(clusters, sequences): in the order of the hashes, large clusters end "
            "late, and the means are not draws from one distribution."
        )


def cluster_codes(clusters: Labels) -> NDArray[np.int64]:
    """Number the clusters by first appearance.

    Args:
        clusters: The cluster of each sequence.

    Returns:
        A number for each sequence [n_sequences], from 0 without gaps.

    Raises:
        CertifyError: If there are none, or what was given is one text or has an entry that is no name.
    """
    if isinstance(clusters, (str, bytes)) or not isinstance(clusters, Iterable):
        raise CertifyError(
            f"clusters={clusters!r:.80} is one value: give the cluster of each sequence, [n_sequences]."
        )
    numbers: dict[Hashable, int] = {}
    try:
        codes = [
            numbers.setdefault(_name(label, row), len(numbers))
            for row, label in enumerate(clusters)
        ]
    except TypeError as error:
        raise CertifyError(
            f"clusters holds what cannot name a cluster ({error}): give one text or number per sequence."
        ) from error
    if not codes:
        raise CertifyError("clusters is empty: give the cluster of each sequence, at least one.")
    return np.array(codes, dtype=np.int64)


def _name(label: Hashable, row: int) -> Hashable:
    if label is None or label != label:
        raise CertifyError(
            f"clusters[{row}]={label!r} names no cluster: give each sequence one, its own hash if it is alone."
        )
    return label


def _seen(n_values: int, n_clusters: int, complete: int | None) -> int:
    """How many leading sequences count."""
    if complete is None:
        if n_values != n_clusters:
            raise CertifyError(
                f"Lengths differ: values has {n_values}, clusters has {n_clusters}. Give one each per "
                "sequence, or complete= if the others have not been measured yet."
            )
        return n_values
    try:
        seen = operator.index(complete)
    except TypeError:
        seen = -1
    if isinstance(complete, bool) or not 1 <= seen <= min(n_values, n_clusters):
        raise CertifyError(
            f"complete={complete!r} is not a whole number from 1 to the {min(n_values, n_clusters)} "
            f"sequences given ({n_values} values, {n_clusters} clusters)."
        )
    return seen


def _key(label: Hashable) -> str:
    return hashlib.sha256(f"saelens_certify.cluster:{label}".encode()).hexdigest()

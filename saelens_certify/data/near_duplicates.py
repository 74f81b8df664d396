"""Sequences that repeat each other: several of one document, and near duplicates.

Bounds need independent draws. Exact copies are dropped when documents are read; what is left are windows of
one document and texts that differ in a few words: a reprinted notice, a verse and its parallel, a page and its
next version. Such sequences are put into one cluster (single linkage), which then counts as one draw
(`bounds.clusters`).

**What counts as near.** Two sequences whose sets of token 3-grams, BOS left out, have a Jaccard similarity of 0.5
or more: they share two thirds of their 3-grams. With 31 tokens that allows three single words changed, or a
stretch of nine tokens at one end. Shorter n-grams are shared by unrelated texts, through grammar alone ("of the");
longer ones miss texts in which every fifth word was changed. Among the 7,954 bundled documents 18 pairs
of 31.6 million are that near, all of them parallel verses or formulas. With 7 tokens after BOS (L = 8) four of five 3-grams
have to be shared: 289 pairs, all with six tokens in a row in common ("And it came to pass, when"). Sequences of
fewer than three tokens are compared whole.

**What is not found.** Paraphrases and translations, texts on one subject or by one author, and windows of one
document that overlap little and were given under different names: only the name says that they belong
together. Of pairs of similarity exactly 0.5 about 3 in 10,000 are missed, at 0.6 two in 100 million.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import minimum_spanning_tree

from saelens_certify.data.minhash import NgramSets, band_keys, buckets
from saelens_certify.data.sequences import Sequences
from saelens_certify.errors import CertifyError

NGRAM = 3
THRESHOLD = 0.5

Reason = Literal["document", "near duplicate"]

SEED = 20_261_122
_SMALL = 16
_BLOCK = 1 << 18
_DENSE = 20
_SHOWN = 3
_KEPT = 20

Rows = Int[np.ndarray, " n_rows"]


@dataclass(frozen=True)
class Link:
    """Two sequences that were put together.

    Attributes:
        documents: Their documents' ids, in the order of the hashes.
        sequences: Their content hashes, ascending.
        similarity: Exact Jaccard similarity of their n-gram sets, in [0, 1].
        reason: ``"document"``: of one document. ``"near duplicate"``: alike.
    """

    documents: tuple[str, str]
    sequences: tuple[str, str]
    similarity: float
    reason: Reason

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "documents": list(self.documents),
            "sequences": list(self.sequences),
            "similarity": self.similarity,
            "reason": self.reason,
        }

    def __str__(self) -> str:
        a, b = (f"{name:.40}" for name in self.documents)
        return (
            f"two of {a}" if self.reason == "document" else f"{a} and {b} ({self.similarity:.2f})"
        )


@dataclass(frozen=True)
class Clusters:
    """Which sequences are one draw.

    Attributes:
        names: For each sequence, in their order, its cluster: the smallest content hash in it.
        n_clusters: Number of clusters.
        links: Pairs that hold the clusters together, k - 1 for a cluster of k: documents first, then the most
            alike.
        threshold: Least similarity of near duplicates.
        ngram: Length of the n-grams compared, in tokens.
    """

    names: tuple[str, ...]
    n_clusters: int
    links: tuple[Link, ...]
    threshold: float
    ngram: int

    def __len__(self) -> int:
        return len(self.names)

    @property
    def n_repeated(self) -> int:
        """Sequences in clusters of two or more."""
        return sum(size for size in Counter(self.names).values() if size > 1)

    def __str__(self) -> str:
        """One sentence for people."""
        if not self.links:
            return f"No two of {len(self)} sequences are of one document or near duplicates."
        return (
            f"{self.n_repeated} of {len(self)} sequences repeat each other and count as "
            f"{self.n_clusters - len(self) + self.n_repeated}, which leaves {self.n_clusters} clusters: "
            f"{self._reasons()}."
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: counts, settings and the first links."""
        return {
            "n_sequences": len(self),
            "n_clusters": self.n_clusters,
            "n_repeated": self.n_repeated,
            "n_document_links": self._count("document"),
            "n_near_duplicate_links": self._count("near duplicate"),
            "threshold": self.threshold,
            "ngram": self.ngram,
            "links": [link.to_dict() for link in self.links[:_KEPT]],
        }

    def refuse(self, role: str = "evaluation") -> None:
        """Refuse sequences that repeat each other.

        Args:
            role: Name of the data, for the message.

        Raises:
            CertifyError: If there are any, naming some documents, the reason and the remedy.
        """
        if self.links:
            raise CertifyError(
                f"{role}: {self.n_repeated} of {len(self)} sequences are not independent draws: {self._reasons()}. "
                'Give one sequence a document and drop repeated texts, or set dependence="cluster", which '
                f"counts each group as one draw ({self.n_clusters} in all)."
            )

    def _count(self, reason: Reason) -> int:
        return sum(link.reason == reason for link in self.links)

    def _reasons(self) -> str:
        texts = []
        for reason, what in (
            ("document", "further sequences of a document"),
            (
                "near duplicate",
                f"near duplicates (>= {self.threshold:g} of {self.ngram}-grams shared)",
            ),
        ):
            found = [str(link) for link in self.links if link.reason == reason]
            if found:
                dots = ", ..." if len(found) > _SHOWN else ""
                texts.append(f"{len(found)} {what}, e.g. {', '.join(found[:_SHOWN])}{dots}")
        return "; ".join(texts)


def find_clusters(
    sequences: Sequences, *, threshold: float = THRESHOLD, ngram: int = NGRAM
) -> Clusters:
    """Put sequences of one document and near duplicates together.

    The result does not depend on the order of the sequences. Work grows with their number plus that of the
    pairs which look alike: it is quadratic only where thousands of texts share nearly half of their n-grams
    without being near duplicates. Memory: about 3 KB a sequence.

    Args:
        sequences: The sequences, BOS included.
        threshold: Least Jaccard similarity of near duplicates, in (0, 1]. Below 0.4 the search misses pairs
            (one in 25 at 0.4).
        ngram: Length of n-grams, in tokens; as long as the sequence where that is shorter.

    Raises:
        CertifyError: If threshold or ngram are out of range.
    """
    check_search(threshold, ngram)
    order = sorted(
        range(len(sequences)), key=lambda i: (sequences.hashes[i], sequences.document_ids[i])
    )
    forest = _Forest(len(order))
    if len(order) > 1:
        tokens = sequences.tokens.numpy()[order]
        tokens = tokens[:, 1:] if sequences.source.prepends_bos else tokens
        length = min(ngram, tokens.shape[1])
        sets = NgramSets(tokens, length, threshold)
        _link_documents(forest, sets, [sequences.document_ids[i] for i in order])
        _link_near(forest, sets, band_keys(tokens, length, SEED), threshold)
    names = [""] * len(order)
    for row, place in enumerate(order):
        names[place] = sequences.hashes[order[forest.find(row)]]
    links = tuple(
        Link(
            (sequences.document_ids[order[a]], sequences.document_ids[order[b]]),
            (sequences.hashes[order[a]], sequences.hashes[order[b]]),
            similarity,
            reason,
        )
        for a, b, similarity, reason in forest.links
    )
    return Clusters(tuple(names), len(order) - len(links), links, threshold, ngram)


class _Forest:
    """Union-find: a component is known by its smallest row."""

    def __init__(self, n: int) -> None:
        self.parent = list(range(n))
        self.links: list[tuple[int, int, float, Reason]] = []

    def find(self, row: int) -> int:
        parent = self.parent
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    def roots(self, rows: Rows) -> Rows:
        return np.array([self.find(row) for row in rows.tolist()], dtype=np.int64)

    def join(self, a: int, b: int, similarity: float, reason: Reason) -> None:
        """Record the pair, unless its ends are together already."""
        one, other = self.find(a), self.find(b)
        if one != other:
            self.parent[max(one, other)] = min(one, other)
            self.links.append((min(a, b), max(a, b), similarity, reason))


def _link_documents(forest: _Forest, sets: NgramSets, documents: Sequence[str]) -> None:
    first: dict[str, int] = {}
    pairs = [
        (first[name], row)
        for row, name in enumerate(documents)
        if first.setdefault(name, row) != row
    ]
    if not pairs:
        return
    a, b = np.array(pairs, dtype=np.int64).T
    for one, other, similarity in zip(*_lists(a, b, sets.pair_similarity(a, b)), strict=True):
        forest.join(one, other, similarity, "document")


def _link_near(forest: _Forest, sets: NgramSets, keys: np.ndarray, threshold: float) -> None:
    """Small buckets: all their pairs at once, the most alike first. Large ones: one after another."""
    a, b, large = small_pairs(buckets(keys), len(sets.sizes))
    similarity = sets.pair_similarity(a, b)
    order = np.lexsort((b, a, -similarity))
    order = order[similarity[order] >= threshold]
    for one, other, value in zip(*_lists(a[order], b[order], similarity[order]), strict=True):
        forest.join(one, other, value, "near duplicate")
    for rows in large:
        _link_bucket(forest, sets, rows, threshold)


def small_pairs(found: Iterable[Rows], n_sequences: int) -> tuple[Rows, Rows, list[Rows]]:
    """The different pairs of rows that share a small bucket, smaller row first, and the large buckets."""
    small, large = [np.empty((0, 2), np.int64)], []
    for rows in found:
        if len(rows) > _SMALL:
            large.append(rows)
        else:
            one, other = np.triu_indices(len(rows), 1)
            small.append(np.stack([rows[one], rows[other]], axis=1))
    pairs = np.concatenate(small)
    codes = np.unique(pairs[:, 0] * n_sequences + pairs[:, 1])
    return codes // n_sequences, codes % n_sequences, large


def _link_bucket(forest: _Forest, sets: NgramSets, rows: Rows, threshold: float) -> None:
    """Compare every two rows that are not yet together, many at a time."""
    labels = forest.roots(rows)
    if (labels == labels[0]).all():
        return
    part = sets.within(rows)
    todo = np.arange(len(rows))
    while len(todo) and (labels[todo] != labels[todo[0]]).any():
        # Rows of the largest component come last: once the others are done, nothing is left to do.
        todo = todo[np.lexsort((labels[todo], np.bincount(labels[todo])[labels[todo]]))]
        size = max(1, _BLOCK // len(todo))
        block, others, todo = todo[:size], todo, todo[size:]
        one, other, similarity = similar_pairs(part, block, others, threshold)
        apart = labels[one] != labels[other]
        if apart.any():
            # Among many pairs of few rows, a spanning forest is enough; 2 - s because an entry of 0 is no edge.
            entries = (2.0 - similarity[apart], (one[apart], other[apart]))
            tree = minimum_spanning_tree(coo_array(entries, shape=(len(rows),) * 2)).tocoo()
            kept = part.pair_similarity(tree.row, tree.col)
            found = _lists(rows[tree.row], rows[tree.col], kept)
            for a, b, value in zip(*found, strict=True):
                forest.join(a, b, value, "near duplicate")
            labels = forest.roots(rows)


def similar_pairs(
    sets: NgramSets, block: Rows, others: Rows, threshold: float
) -> tuple[Rows, Rows, np.ndarray]:
    """Similar pairs of one row of the block and one of the others, and their similarities."""
    one, other = sets.candidates(block, others)
    if len(one) * _DENSE > len(block) * len(others):
        table = sets.similarity(block, others)
        one, other = np.nonzero(table >= threshold)
        return block[one], others[other], table[one, other]
    one, other = block[one], others[other]
    similarity = sets.pair_similarity(one, other)
    near = similarity >= threshold
    return one[near], other[near], similarity[near]


def _lists(*arrays: np.ndarray) -> list[list[Any]]:
    return [array.tolist() for array in arrays]


def check_search(threshold: float, ngram: int) -> None:
    """Refuse settings of the search that are out of range.

    Raises:
        CertifyError: If threshold is not in (0, 1] or ngram is no positive whole number.
    """
    if not 0.0 < threshold <= 1.0:
        raise CertifyError(
            f"threshold={threshold!r} must lie in (0, 1]; {THRESHOLD} is the default."
        )
    if isinstance(ngram, bool) or not isinstance(ngram, int) or ngram < 1:
        raise CertifyError(
            f"ngram={ngram!r} must be a whole number from 1; {NGRAM} is the default."
        )

"""Evaluation sequences that nearly repeat calibration sequences: counted, not refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from saelens_certify.data.minhash import NgramSets, band_keys, buckets
from saelens_certify.data.near_duplicates import (
    NGRAM,
    SEED,
    THRESHOLD,
    Link,
    check_search,
    similar_pairs,
    small_pairs,
)
from saelens_certify.data.sequences import Sequences

_KEPT = 20
_SHOWN = 3
_BLOCK = 1 << 18


@dataclass(frozen=True)
class Repeats:
    """What evaluation repeats of calibration.

    Attributes:
        links: For each evaluation sequence that is a near duplicate of a calibration sequence, one such pair:
            calibration first, evaluation second; the most alike first.
        n_evaluation: Number of evaluation sequences.
        threshold: Least similarity of near duplicates.
        ngram: Length of the n-grams compared, in tokens.
    """

    links: tuple[Link, ...]
    n_evaluation: int
    threshold: float
    ngram: int

    def __str__(self) -> str:
        """One sentence for people."""
        start = f"{len(self.links)} of {self.n_evaluation} evaluation sequences are near duplicates of calibration sequences"
        if not self.links:
            return f"{start}."
        dots = ", ..." if len(self.links) > _SHOWN else ""
        return f"{start}, e.g. {', '.join(map(str, self.links[:_SHOWN]))}{dots}."

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: counts, settings and the first links."""
        return {
            "n_repeated": len(self.links),
            "n_evaluation": self.n_evaluation,
            "threshold": self.threshold,
            "ngram": self.ngram,
            "links": [link.to_dict() for link in self.links[:_KEPT]],
        }


def near_duplicates_across(
    calibration: Sequences,
    evaluation: Sequences,
    *,
    threshold: float = THRESHOLD,
    ngram: int = NGRAM,
) -> Repeats:
    """Count the evaluation sequences that nearly repeat a calibration sequence.

    They are reported, not refused. The pool is made from calibration documents alone; given these, it is a
    constant, and the evaluation sequences are still independent draws from their distribution, so the bounds
    hold. But if many are near duplicates, that distribution repeats the texts the pool was made from, and
    the certificate is about such a distribution: on new texts the pool may be violated more often.
    (Exact copies are refused: there the two sets are not disjoint.)

    Names of documents are not compared: two sources may both have a document "tokens:0".

    Args:
        calibration: Sequences the pool is chosen on.
        evaluation: Sequences the certificate is measured on; unequal lengths are compared on the shorter one.
        threshold: Least Jaccard similarity of near duplicates, in (0, 1].
        ngram: Length of n-grams, in tokens; as long as the sequence where that is shorter.

    Returns:
        The same for any order of either side.

    Raises:
        CertifyError: If threshold or ngram are out of range, or sequences have no token besides BOS.
    """
    check_search(threshold, ngram)
    calibration, evaluation = calibration.canonical, evaluation.canonical
    n = len(calibration)
    if not n or not len(evaluation):
        return Repeats((), len(evaluation), threshold, ngram)
    length = min(calibration.seq_len, evaluation.seq_len)
    begin = int(calibration.source.prepends_bos and evaluation.source.prepends_bos)
    sides = [data.tokens[:, begin:length].numpy() for data in (calibration, evaluation)]
    tokens = np.concatenate(sides)
    width = min(ngram, tokens.shape[1])
    pairs = _pairs(tokens, n, width, threshold)
    links = tuple(
        Link(
            (calibration.document_ids[a], evaluation.document_ids[b - n]),
            (calibration.hashes[a], evaluation.hashes[b - n]),
            similarity,
            "near duplicate",
        )
        for a, b, similarity in pairs
    )
    return Repeats(links, len(evaluation), threshold, ngram)


def _pairs(
    tokens: Int[np.ndarray, "n_sequences pos"], n: int, ngram: int, threshold: float
) -> list[tuple[int, int, float]]:
    """A calibration row (below n) for each evaluation row that is similar to one, and the similarity."""
    sets = NgramSets(tokens, ngram, threshold)
    found: dict[int, tuple[int, float]] = {}
    rows = [r for r in buckets(band_keys(tokens, ngram, SEED)) if r[0] < n <= r[-1]]
    a, b, large = small_pairs(rows, len(tokens))
    across = (a < n) & (b >= n)
    a, b = a[across], b[across]
    similarity = sets.pair_similarity(a, b)
    for row in np.lexsort((a, -similarity)).tolist():
        if similarity[row] >= threshold:
            found.setdefault(int(b[row]), (int(a[row]), float(similarity[row])))
    for bucket in large:
        part = sets.within(bucket)
        ours, theirs = np.flatnonzero(bucket < n), np.flatnonzero(bucket >= n)
        size = max(1, _BLOCK // len(theirs))
        for start in range(0, len(ours), size):
            theirs = theirs[[row not in found for row in bucket[theirs].tolist()]]
            if not len(theirs):
                break
            one, other, values = similar_pairs(part, ours[start : start + size], theirs, threshold)
            for place in np.lexsort((one, -values)).tolist():
                pair = int(bucket[one[place]]), float(values[place])
                found.setdefault(int(bucket[other[place]]), pair)
    pairs = [(a, b, similarity) for b, (a, similarity) in found.items()]
    return sorted(pairs, key=lambda pair: (-pair[2], pair[1]))

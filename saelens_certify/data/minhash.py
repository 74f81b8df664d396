"""Sets of token n-grams: which are worth comparing (MinHash), and how alike they are (exactly).

The Jaccard similarity of two sets is the share of their union that both have. The smallest hashed elements of
two sets agree with that probability (Broder, 1997); a band of several such minima agrees for similar sets
often, for dissimilar ones almost never (locality-sensitive hashing). Minima come from `datasketch`. A pair that
agrees in a band is only a candidate: what counts is the exact similarity.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
from datasketch import MinHash
from jaxtyping import Float, Int, Shaped
from scipy.sparse import csr_array

from saelens_certify.errors import CertifyError

BANDS = 128
ROWS = 4
"""A band is four minima. Two sets of similarity s agree in one of 128 bands with probability 1 - (1 - s^4)^128:
0.9997 for s = 0.5, 0.99999998 for s = 0.6, and 1e-5 for s = 0.0175, one common n-gram of 29."""

_MIXER = np.uint64(0x9E3779B97F4A7C15)
_CHUNK = 4096
_PAIRS = 1 << 18

Tokens = Int[np.ndarray, "n_sequences pos"]


class NgramSets:
    """The set of n-grams of each sequence.

    Attributes:
        sizes: Number of different n-grams of each sequence [n_sequences].
    """

    def __init__(self, tokens: Tokens, ngram: int, threshold: float) -> None:
        """Number the n-grams that occur.

        Args:
            tokens: Token ids below 2^31, at least ``ngram`` a sequence.
            ngram: Length of an n-gram, in tokens.
            threshold: Least similarity that is looked for.

        Raises:
            CertifyError: If there is no token to compare.
        """
        n, length = tokens.shape
        if ngram < 1:
            raise CertifyError(
                f"sequences have {length} tokens besides BOS: nothing to compare. Use longer sequences."
            )
        width = length - ngram + 1
        codes = np.zeros((n, width), dtype=np.int64)
        for offset in range(ngram):
            # Numbers stay below 2^31 * 2^31: no two different n-grams share one.
            codes = (codes << 31) | tokens[:, offset : offset + width]
            codes = np.unique(codes, return_inverse=True)[1].reshape(n, width)
        # The rarest n-grams get the smallest numbers.
        counts = np.bincount(codes.ravel())
        rank = np.empty_like(counts)
        rank[np.argsort(counts, kind="stable")] = np.arange(len(counts))
        codes = np.sort(rank[codes], axis=1)
        new = np.diff(codes, axis=1, prepend=-1) > 0
        self.sizes = new.sum(axis=1)
        self._all = _incidence(codes, new, len(counts))
        # Similar sets share ceil(threshold * size) n-grams, so one of these is among the rarest of either.
        rare = self.sizes - np.ceil(threshold * self.sizes - 1e-9).astype(np.int64) + 1
        self._rare = _incidence(codes, new & (new.cumsum(axis=1) <= rare[:, None]), len(counts))

    def within(self, rows: Int[np.ndarray, " n_rows"]) -> NgramSets:
        """The sets of some sequences alone, n-grams that one of them has left out: faster to compare often."""
        part = copy.copy(self)
        part.sizes = self.sizes[rows]
        part._all, part._rare = _shared(self._all[rows]), _shared(self._rare[rows])
        return part

    def candidates(
        self, rows: Int[np.ndarray, " n_rows"], others: Int[np.ndarray, " n_others"]
    ) -> tuple[Int[np.ndarray, " n_pairs"], Int[np.ndarray, " n_pairs"]]:
        """Places in ``rows`` and in ``others`` of the pairs that can be similar: they share a rare n-gram."""
        shared = (self._rare[rows] @ self._rare[others].T).tocoo()
        return shared.row.astype(np.int64), shared.col.astype(np.int64)

    def similarity(
        self, rows: Int[np.ndarray, " n_rows"], others: Int[np.ndarray, " n_others"]
    ) -> Float[np.ndarray, "n_rows n_others"]:
        """Exact Jaccard similarities of some sequences with others, each rounded to double once."""
        common = (self._all[rows] @ self._all[others].T).toarray()
        return common / (self.sizes[rows][:, None] + self.sizes[others] - common)

    def pair_similarity(
        self, rows: Int[np.ndarray, " n_pairs"], others: Int[np.ndarray, " n_pairs"]
    ) -> Float[np.ndarray, " n_pairs"]:
        """Exact Jaccard similarity of each pair (rows[i], others[i]), rounded to double once."""
        found = np.empty(len(rows))
        for start in range(0, len(rows), _PAIRS):
            a, b = rows[start : start + _PAIRS], others[start : start + _PAIRS]
            common = self._all[a].multiply(self._all[b]).sum(axis=1)
            found[start : start + _PAIRS] = common / (self.sizes[a] + self.sizes[b] - common)
        return found


def band_keys(tokens: Tokens, ngram: int, seed: int) -> Shaped[np.ndarray, "bands n_sequences"]:
    """A number for each band of each sequence's MinHash signature.

    It depends on the sequence's own tokens and the seed alone. Four minima are scrambled into 64 bits; an
    agreement by accident costs a comparison.

    Args:
        tokens: Token ids, at least ``ngram`` a sequence.
        ngram: Length of an n-gram, in tokens.
        seed: Chooses the permutations.
    """
    n = len(tokens)
    keys = np.empty((BANDS, n), dtype=np.uint64)
    hashes = _ngram_hashes(tokens, ngram)
    for start in range(0, n, _CHUNK):
        part = hashes[start : start + _CHUNK].tolist()
        sketches = MinHash.generator(
            part, num_perm=BANDS * ROWS, seed=seed, hashfunc=_hashed_already, scheme="affine32"
        )
        minima = np.stack([sketch.hashvalues for sketch in sketches]).astype(np.uint64)
        minima = minima.reshape(len(part), BANDS, ROWS)
        key = np.zeros((len(part), BANDS), dtype=np.uint64)
        for row in range(ROWS):
            key = _mix(key ^ minima[:, :, row])
        keys[:, start : start + _CHUNK] = key.T
    return keys


def buckets(keys: Shaped[np.ndarray, "bands n_sequences"]) -> Iterator[Int[np.ndarray, " n_rows"]]:
    """The sequences that agree in a band, two or more at a time, in ascending order."""
    for key in keys:
        order = np.argsort(key, kind="stable")
        sorted_keys = key[order]
        starts = np.flatnonzero(np.r_[True, sorted_keys[1:] != sorted_keys[:-1]])
        ends = np.r_[starts[1:], len(key)]
        for index in np.flatnonzero(ends - starts > 1):
            yield order[starts[index] : ends[index]]


def _ngram_hashes(tokens: Tokens, ngram: int) -> Shaped[np.ndarray, "n_sequences width"]:
    """32 bits of each n-gram's content: the same in whatever company it is found."""
    width = tokens.shape[1] - ngram + 1
    key = np.zeros((len(tokens), width), dtype=np.uint64)
    for offset in range(ngram):
        key = _mix(key ^ tokens[:, offset : offset + width].astype(np.uint64))
    return (key >> np.uint64(32)).astype(np.uint32)


def _mix(key: Shaped[np.ndarray, "*shape"]) -> Shaped[np.ndarray, "*shape"]:
    """Scramble 64 bits, one to one: odd multipliers and shifts, wrapping around."""
    key = (key + _MIXER) * np.uint64(0xD6E8FEB86659FD93)
    key = (key ^ (key >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return key ^ (key >> np.uint64(32))


def _incidence(
    codes: Int[np.ndarray, "n_sequences width"],
    chosen: Shaped[np.ndarray, "n_sequences width"],
    n_ngrams: int,
) -> csr_array:
    """A one for each chosen n-gram of each sequence [n_sequences, n_ngrams]."""
    starts = np.r_[0, chosen.sum(axis=1).cumsum()]
    ones = np.ones(starts[-1], np.int32)
    return csr_array((ones, codes[chosen], starts), shape=(len(codes), n_ngrams))


def _shared(ones: csr_array) -> csr_array:
    """The columns that have more than one entry, numbered anew."""
    _, place, counts = np.unique(ones.indices, return_inverse=True, return_counts=True)
    kept = counts > 1
    chosen = kept[place]
    starts = np.r_[0, chosen.cumsum()][ones.indptr]
    places = (kept.cumsum() - 1)[place[chosen]]
    shape = (len(starts) - 1, max(1, int(kept.sum())))
    return csr_array((ones.data[chosen], places, starts), shape=shape)


def _hashed_already(value: int) -> int:
    return value

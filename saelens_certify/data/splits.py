"""Calibration and evaluation documents that cannot meet."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import overload

from saelens_certify.data.hashing import text_hash
from saelens_certify.data.sequences import Sequences
from saelens_certify.errors import CertifyError

_SHOWN = 3


@overload
def split(
    data: Sequences,
    fractions: Sequence[float] | None = None,
    *,
    counts: Sequence[int] | None = None,
    seed: int,
    names: Sequence[str] = ("calibration", "evaluation"),
) -> dict[str, Sequences]: ...


@overload
def split(
    data: Sequence[str],
    fractions: Sequence[float] | None = None,
    *,
    counts: Sequence[int] | None = None,
    seed: int,
    names: Sequence[str] = ("calibration", "evaluation"),
) -> dict[str, list[str]]: ...


def split(
    data: Sequences | Sequence[str],
    fractions: Sequence[float] | None = None,
    *,
    counts: Sequence[int] | None = None,
    seed: int,
    names: Sequence[str] = ("calibration", "evaluation"),
) -> dict[str, Sequences] | dict[str, list[str]]:
    """Divide sequences (or texts) by a keyed hash of their content.

    With ``fractions`` each document's side depends on the seed and its own content only: the same
    in any order, on any machine and in any shard; sizes are fractions in expectation. With
    ``counts`` the sizes are exact, and sides depend on the whole set but still not on its order.
    The last name is filled from the far end, so a larger calibration share leaves evaluation as it
    was, as long as both fit.

    Args:
        data: `Sequences`, or documents as text (compared by their UTF-8 bytes).
        fractions: One share a name, positive, sum at most 1 (the rest is used by none).
        counts: One number of sequences a name, in place of fractions.
        seed: Key of the hash.
        names: Names of the sides.

    Returns:
        name -> its part, in the order of ``data``; ``tuple(split(...).values())`` unpacks.

    Raises:
        CertifyError: Shares or counts that do not fit, or repeated documents with ``counts``.
    """
    sizes = _checked_sizes(fractions, counts, names, len(data))
    hashes = data.hashes if isinstance(data, Sequences) else [text_hash(text) for text in data]
    keys = [_key(seed, item) for item in hashes]
    if counts is not None:
        _refuse_repeats(hashes)
        ranks = {
            index: rank for rank, index in enumerate(sorted(range(len(keys)), key=keys.__getitem__))
        }
        places, end = [ranks[index] for index in range(len(keys))], len(keys)
    else:
        places, end = [key / 2**53 for key in keys], 1
    parts = {}
    for name, (low, high) in zip(names, _intervals(sizes, end), strict=True):
        rows = [row for row, place in enumerate(places) if low <= place < high]
        if isinstance(data, Sequences):
            rule = f"counts={tuple(sizes)}" if counts is not None else f"fractions={tuple(sizes)}"
            parts[name] = data.select(rows).with_note(f"split {name} {rule} seed={seed}")
        else:
            parts[name] = [data[row] for row in rows]
    return parts


def _key(seed: int, content_hash: str) -> int:
    """53 uniform bits (exact in a float) from SHA-256 of the seed and the content hash."""
    message = f"saelens_certify.split:{seed}:{content_hash}".encode()
    return int.from_bytes(hashlib.sha256(message).digest()[:8], "big") >> 11


def _intervals(sizes: Sequence[float], end: float) -> list[tuple[float, float]]:
    """Half-open intervals, from 0 up for all but the last, which ends at ``end``."""
    intervals, low = [], 0.0
    for size in sizes[:-1]:
        intervals.append((low, low + size))
        low += size
    # Shares that use everything up must leave neither a gap nor an overlap to rounding.
    last = end - sizes[-1]
    intervals.append((low if math.isclose(low, last, abs_tol=1e-9) else last, end))
    return intervals


def _checked_sizes(
    fractions: Sequence[float] | None,
    counts: Sequence[int] | None,
    names: Sequence[str],
    n: int,
) -> list[float]:
    if (fractions is None) == (counts is None):
        raise CertifyError("split takes either fractions or counts. Give exactly one of the two.")
    sizes = list(fractions if fractions is not None else counts or ())
    what = "fractions" if fractions is not None else "counts"
    if len(sizes) != len(names) or len(set(names)) != len(names) or not sizes:
        raise CertifyError(
            f"split got {what}={tuple(sizes)} for names={tuple(names)}. "
            "Give one value a name, and different names."
        )
    if counts is not None:
        if any(isinstance(size, bool) or not isinstance(size, int) or size < 0 for size in sizes):
            raise CertifyError(f"split counts must be whole numbers >= 0, are {tuple(sizes)}.")
        if sum(sizes) > n:
            raise CertifyError(
                f"split asks for {' + '.join(map(str, sizes))} = {sum(sizes)} documents, there are {n}. "
                "Ask for fewer or read more documents."
            )
        return sizes
    if any(not 0 < size <= 1 for size in sizes) or math.fsum(sizes) > 1 + 1e-9:
        raise CertifyError(
            f"split fractions must lie in (0, 1] and sum to at most 1, are {tuple(sizes)} "
            f"(sum {math.fsum(sizes):g}). Lower them."
        )
    return sizes


def _refuse_repeats(hashes: Sequence[str]) -> None:
    repeats = len(hashes) - len(set(hashes))
    if repeats:
        raise CertifyError(
            f"split by counts got {repeats} repeated documents, and copies could land on both sides. "
            'Build the sequences with on_duplicate="drop", or split by fractions.'
        )


def check_size(sequences: Sequences, minimum: int = 1, role: str = "data") -> None:
    """Refuse too few sequences.

    Args:
        sequences: The sequences of one side.
        minimum: The least number accepted.
        role: Their name in the message, e.g. "calibration".

    Raises:
        CertifyError: Naming how many documents were read, how many were too short, and L.
    """
    if len(sequences) >= minimum:
        return
    source, length = sequences.source, sequences.seq_len
    history = f" ({'; '.join(source.selection)})" if source.selection else ""
    raise CertifyError(
        f"{role}: {len(sequences)} sequences of L = {length} tokens, at least {minimum} needed. "
        f"{source.n_documents_read} documents were read, {source.n_too_short} were too short or padded "
        f"and {source.n_duplicates} repeated an earlier one{history}. "
        "Read more documents, or lower the sequence length."
    )


def check_disjoint(calibration: Sequences, evaluation: Sequences) -> None:
    """Refuse calibration and evaluation data that share a sequence.

    Sequences of unequal length are compared on the shorter length.

    Args:
        calibration: Sequences the pool is chosen on.
        evaluation: Sequences the certificate is measured on.

    Raises:
        CertifyError: If either side is empty, or any content hash is on both sides.
    """
    check_size(calibration, 1, "calibration")
    check_size(evaluation, 1, "evaluation")
    length = min(calibration.seq_len, evaluation.seq_len)
    calibration_keys = calibration.prefix_hashes(length)
    evaluation_keys = evaluation.prefix_hashes(length)
    shared = set(calibration_keys) & set(evaluation_keys)
    if not shared:
        return
    raise CertifyError(
        f"calibration and evaluation share {len(shared)} sequences (the first {length} tokens are equal): "
        f"calibration {_named(calibration, calibration_keys, shared)}, "
        f"evaluation {_named(evaluation, evaluation_keys, shared)}. The bounds need disjoint documents. "
        "Drop them from calibration, which is always valid: "
        "calibration = calibration.without(evaluation); on the command line, give the documents once "
        "as --data, which divides them by content."
    )


def _named(sequences: Sequences, keys: Sequence[str], shared: set[str]) -> str:
    ids = [name for name, key in zip(sequences.document_ids, keys, strict=True) if key in shared]
    return "[" + ", ".join(ids[:_SHOWN]) + (", ..." if len(ids) > _SHOWN else "") + "]"

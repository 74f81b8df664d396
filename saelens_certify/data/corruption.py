"""Documents with random tokens in them: a shift of the distribution whose strength is one number.

Each token is replaced with a given probability, independently of all others. The random numbers come from SHAKE-256
of the seed and the sequence's own content, so a document is corrupted in the same way in any order, on any machine and
beside any other documents, and what is replaced at one rate is replaced, by the same token, at every higher rate.

Corrupted documents are independent where the original ones are. Where these repeat each other, corruption hides it
from a search for near duplicates without undoing it: `one_document_per_cluster` keeps what was found on the original
documents.
"""

from __future__ import annotations

import hashlib
import numbers
import operator
from typing import Any

import numpy as np
import torch

from saelens_certify.data.near_duplicates import Clusters
from saelens_certify.data.sequences import Sequences
from saelens_certify.errors import CertifyError

# Random bytes for a position: 8 decide whether it is replaced, 8 by what.
_BYTES = 16


def corrupted(
    sequences: Sequences,
    rate: float,
    *,
    seed: int,
    d_vocab: int,
    keep: tuple[int, ...] = (),
) -> Sequences:
    """Replace tokens by random ones.

    Position 0 (BOS, and never predicted) and special tokens stay. Every other token is replaced with probability
    ``rate`` by one that is uniform over the vocabulary without the special ids; that may be the token itself, so a share
    of ``rate * (1 - 1 / choices)`` of the tokens changes.

    Args:
        sequences: Sequences of L tokens.
        rate: Probability of replacement, in [0, 1]; at 1 all tokens are random.
        seed: Key of the random numbers.
        d_vocab: The model's vocabulary size V, tokens.
        keep: Ids of special tokens: neither replaced nor put in.

    Returns:
        As many sequences in the same order, with the same document ids, hashes of the new tokens, and a note of what
        was done. Different documents may in principle become equal: read them again (`as_sequences`) to drop copies.

    Raises:
        CertifyError: For a rate outside [0, 1], or no token to put in.
    """
    rate, seed = check_rate(rate), _integer("seed", seed)
    d_vocab, special = _integer("d_vocab", d_vocab), {_integer("keep", token) for token in keep}
    choices = np.setdiff1d(np.arange(max(0, d_vocab)), sorted(special))
    if not choices.size:
        raise CertifyError(
            f"d_vocab={d_vocab} without the {len(special)} special ids leaves no token to put in. Pass the "
            "model's d_vocab."
        )
    tokens = sequences.tokens.numpy().copy()
    for row, item in zip(tokens, sequences.hashes, strict=True):
        replaced, drawn = _draws(seed, item, len(row))
        chosen = (replaced < rate) & ~np.isin(row, sorted(special))
        chosen[0] = False
        row[chosen] = choices[(drawn[chosen] * choices.size).astype(np.int64)]
    made = Sequences.from_tokens(torch.from_numpy(tokens), sequences.document_ids, sequences.source)
    return made.with_note(
        f"tokens but the first and {len(special)} special ids replaced by uniform ones, rate={rate!r} seed={seed} d_vocab={d_vocab}"
    )


def one_document_per_cluster(sequences: Sequences, clusters: Clusters) -> Sequences:
    """Name sequences that repeat each other as if they were of one document, which keeps them one draw.

    Sequences of one document are put together whatever their tokens are (`find_clusters`). The name is the document id
    of the cluster's member of smallest hash. No other cluster has it: sequences of one name are in one cluster.

    Args:
        sequences: The sequences.
        clusters: What `find_clusters` found among them.

    Returns:
        The same sequences, sequences by themselves under their own names.

    Raises:
        CertifyError: If the clusters are those of another number of sequences.
    """
    if len(clusters) != len(sequences):
        raise CertifyError(
            f"the clusters are those of {len(clusters)} sequences, there are {len(sequences)}: search again"
        )
    name_of: dict[str, str] = {}
    for item, document in zip(sequences.hashes, sequences.document_ids, strict=True):
        name_of[item] = min(document, name_of.get(item, document))
    renamed = Sequences(
        sequences.tokens,
        tuple(name_of[cluster] for cluster in clusters.names),
        sequences.hashes,
        sequences.source,
    )
    n_renamed = sum(
        a != b for a, b in zip(renamed.document_ids, sequences.document_ids, strict=True)
    )
    if not n_renamed:
        return sequences
    return renamed.with_note(f"{n_renamed} repeating sequences under the document id of another")


def check_rate(rate: Any) -> float:
    """Return a probability as float.

    Raises:
        CertifyError: If it is no number in [0, 1].
    """
    if (
        isinstance(rate, bool)
        or not isinstance(rate, numbers.Real)
        or not 0.0 <= float(rate) <= 1.0
    ):
        raise CertifyError(
            f"rate={rate!r} must be a number from 0 (as it is) to 1 (random tokens)."
        )
    return float(rate)


def _draws(seed: int, content_hash: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Two uniform numbers in [0, 1) for every position: multiples of 2^-53, so exact in a float."""
    message = f"saelens_certify.corruption:{seed}:{content_hash}".encode()
    raw = np.frombuffer(hashlib.shake_256(message).digest(_BYTES * length), dtype="<u8")
    uniform = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniform[0::2], uniform[1::2]


def _integer(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise CertifyError(f"{name} must be made of whole numbers, got {value!r}") from None

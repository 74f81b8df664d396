"""Documents as one setting of a study sees them: some of them, or their beginnings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from saelens_certify.data import Sequences
from saelens_certify.errors import CertifyError


@dataclass(frozen=True, eq=False)
class View:
    """Sequences, or a part of them that is measured along with the whole.

    Attributes:
        sequences: The sequences that are read. Views of the *same object* share a pass.
        first: Only the first so many in the order of their hashes; None: all. Smaller ones are contained
            in larger ones.
        length: Only the first so many tokens of each; None: all.
    """

    sequences: Sequences
    first: int | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.sequences, Sequences):
            raise CertifyError(
                f"a View is of Sequences, got {type(self.sequences).__name__}; as_sequences(...) makes them"
            )


@dataclass(frozen=True, eq=False)
class Seen:
    """What a single run would be given, and where that is in the pass.

    Attributes:
        sequences: Sequences of the setting, in the order of their own hashes.
        rows: For each of them its row among the sequences that are read, in the order of *their* hashes.
    """

    sequences: Sequences
    rows: Int[Tensor, " n_sequences"]

    @classmethod
    def of(cls, view: View, without: frozenset[str] = frozenset()) -> Seen:
        """Find the sequences of a view.

        Beginnings that are equal count once, as equal documents do.

        Args:
            view: The view.
            without: Hashes of sequences that are left out.

        Raises:
            CertifyError: If there are not that many sequences, or their tokens are fewer.
        """
        read = view.sequences.canonical
        n = len(read) if view.first is None else view.first
        if not 1 <= n <= len(read):
            raise CertifyError(
                f"a view of the first {view.first} sequences, of {len(read)}: give 1 to {len(read)}, or more documents"
            )
        rows = torch.arange(n, device="cpu")
        found = read if n == len(read) else read.take(n)
        if view.length is not None and view.length != read.seq_len:
            if not 2 <= view.length <= read.seq_len:
                raise CertifyError(
                    f"a view of the first {view.length} tokens, of {read.seq_len}: give 2 to {read.seq_len}"
                )
            found = _cut(found, view.length)
        first_of: dict[str, int] = {}
        for row, own in enumerate(found.hashes):
            if own not in without:
                first_of.setdefault(own, row)
        if view.length in (None, read.seq_len):
            return cls(found, rows)
        kept = sorted(first_of)
        rows = torch.tensor([first_of[own] for own in kept], dtype=torch.int64, device="cpu")
        copies = len(found) - len(set(found.hashes))
        source = dataclasses.replace(found.source, n_duplicates=found.source.n_duplicates + copies)
        selected = dataclasses.replace(found.select(rows), source=source)
        return cls(selected, rows)


def _cut(sequences: Sequences, length: int) -> Sequences:
    """The beginnings of sequences, each with its own hash."""
    return Sequences.from_tokens(
        sequences.tokens[:, :length], sequences.document_ids, sequences.source
    ).with_note(f"the first {length} tokens of sequences of {sequences.seq_len}")

"""The statistical unit: the first L tokens of one document, one sequence a document."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from saelens_certify.data.hashing import sequence_hashes, set_digest
from saelens_certify.errors import CertifyError


@dataclass(frozen=True)
class DataSource:
    """Where sequences came from and what was left out on the way; goes into the manifest.

    Attributes:
        kind: "tokens", "text", "dataset", "txt", "txt_folder", "jsonl", "json", "parquet",
            "npy", "safetensors", "dataset_folder", "hub" or "activations_store".
        location: Path or hub name as the caller gave it (with ":config"); None for in-memory data.
        split: Split of a dataset.
        revision: Revision of a hub dataset: the commit that was read where it could be resolved.
        column: Column, key or field that held the documents.
        fingerprint: SHA-256 of the file (or of a folder's names and files); ``datasets``' own
            fingerprint for a Dataset; the commit for a hub dataset; None where there is none or
            the files exceed 4 GiB (the sequences' digest remains).
        n_documents_read: Documents looked at.
        n_too_short: Of these, left out because they give no L tokens free of padding.
        n_padded: Of the too short, those with L tokens or more but a pad id or a masked position
            inside the first L.
        n_duplicates: Documents whose first L tokens repeat those of an earlier document.
        tokenizer: Name of the tokenizer that turned text into ids; None for token data.
        prepends_bos: Whether every sequence begins with BOS (for token data: with the known BOS id,
            or, where no BOS id is known, with one constant id).
        first_token: The id at position 0 if all sequences share it.
        selection: What was done to the sequences since, e.g. a split, in order.
    """

    kind: str = "tokens"
    location: str | None = None
    split: str | None = None
    revision: str | None = None
    column: str | None = None
    fingerprint: str | None = None
    n_documents_read: int = 0
    n_too_short: int = 0
    n_padded: int = 0
    n_duplicates: int = 0
    tokenizer: str | None = None
    prepends_bos: bool = False
    first_token: int | None = None
    selection: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = dataclasses.asdict(self)
        values["selection"] = list(self.selection)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DataSource:
        """Inverse of `to_dict`."""
        return cls(**{**values, "selection": tuple(values.get("selection", ()))})


@dataclass(frozen=True, eq=False)
class Sequences:
    """Sequences of L tokens, one a document, with their ids and content hashes.

    Attributes:
        tokens: int64 on the CPU; the first L tokens of one document each, BOS included.
        document_ids: The caller's names, or "source:row" (rows counted from 0).
        hashes: Hex SHA-256 of the L ids as little-endian int32: the sequence id everywhere.
        source: Where they came from.
    """

    tokens: Int[Tensor, "n_sequences pos"]
    document_ids: tuple[str, ...]
    hashes: tuple[str, ...]
    source: DataSource

    def __post_init__(self) -> None:
        if self.tokens.dtype != torch.int64 or self.tokens.ndim != 2:
            raise CertifyError(
                f"Sequences.tokens must be int64 [n_sequences, pos], is {self.tokens.dtype} "
                f"{list(self.tokens.shape)}. Use as_sequences(...) to build Sequences from data."
            )
        counts = (len(self.tokens), len(self.document_ids), len(self.hashes))
        if len(set(counts)) != 1:
            raise CertifyError(
                f"Sequences holds {counts[0]} rows of tokens, {counts[1]} document ids and "
                f"{counts[2]} hashes; they must agree. Use as_sequences(...) to build it."
            )

    @classmethod
    def from_tokens(
        cls,
        tokens: Int[Tensor, "n_sequences pos"],
        document_ids: Sequence[str] | None = None,
        source: DataSource | None = None,
    ) -> Sequences:
        """Hash rows that are already clean: no checks beyond shape and dtype; see `as_sequences`."""
        tokens = tokens.detach().to("cpu", torch.int64).contiguous()
        if document_ids is None:
            document_ids = [f"tokens:{row}" for row in range(len(tokens))]
        if source is None:
            source = DataSource(n_documents_read=len(tokens))
        return cls(tokens, tuple(document_ids), sequence_hashes(tokens), source)

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def seq_len(self) -> int:
        """L, in tokens."""
        return self.tokens.shape[1]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the sorted hashes: the same set of sequences in any order has the same digest."""
        return set_digest(self.hashes)

    @cached_property
    def canonical(self) -> Sequences:
        """The same sequences sorted by hash, so that nothing depends on the order of the input."""
        order = sorted(range(len(self)), key=lambda i: (self.hashes[i], self.document_ids[i]))
        return self.select(order)

    def take(self, n: int) -> Sequences:
        """The first ``n`` sequences in the present order.

        Raises:
            CertifyError: If there are fewer than ``n``, or ``n`` is negative.
        """
        if not 0 <= n <= len(self):
            raise CertifyError(
                f"take({n}) of {len(self)} sequences. Ask for 0 to {len(self)}, or read more documents."
            )
        return self.select(range(n))

    def select(self, indices: Sequence[int] | Int[Tensor, " n_selected"]) -> Sequences:
        """The sequences at ``indices``, in that order.

        Raises:
            CertifyError: If an index is outside ``[0, len(self))``.
        """
        rows = [int(i) for i in indices]
        for row in rows:
            if not 0 <= row < len(self):
                raise CertifyError(
                    f"sequence index {row} is outside 0..{len(self) - 1}. Select existing rows."
                )
        return Sequences(
            self.tokens[torch.tensor(rows, dtype=torch.int64, device="cpu")],
            tuple(self.document_ids[row] for row in rows),
            tuple(self.hashes[row] for row in rows),
            self.source,
        )

    def prefix_hashes(self, length: int) -> tuple[str, ...]:
        """Hashes of the first ``length`` tokens: what sequences of unequal L are compared by."""
        if length == self.seq_len:
            return self.hashes
        return sequence_hashes(self.tokens[:, :length].contiguous())

    def without(self, other: Sequences) -> Sequences:
        """The sequences that ``other`` does not contain (compared on the shorter of the two L).

        Dropping from calibration what evaluation has is always valid: the documents that remain
        are other draws, independent of the evaluation ones, and no evaluation document is lost.
        """
        length = min(self.seq_len, other.seq_len)
        taken = set(other.prefix_hashes(length))
        keys = self.prefix_hashes(length)
        kept = self.select([i for i, key in enumerate(keys) if key not in taken])
        note = f"without {len(self) - len(kept)} sequences shared with {other.digest[:16]}"
        return kept.with_note(note)

    def with_note(self, note: str) -> Sequences:
        """The same sequences with ``note`` added to ``source.selection``."""
        source = dataclasses.replace(self.source, selection=(*self.source.selection, note))
        return dataclasses.replace(self, source=source)
